"""Contrastive losses over very many keys, computed without the matrix of their similarities."""

from ._installation import installed_instead

__path__ = installed_instead(__path__)

from ._backends import BackendStatus, available_backends, serving_backend, use_backend
from .classifier import DelayedSGD, InstanceClassifier, MemoryBank
from .functional import (
    ConICMetrics,
    LossMetrics,
    co2_loss,
    conic_loss,
    consistency_loss,
    info_nce_loss,
    nt_xent_loss,
)
from .modules import CO2Loss, ConICLoss, ConsistencyLoss, InfoNCELoss, NTXentLoss
from .queue import KeyQueue

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "CO2Loss",
    "ConICLoss",
    "ConICMetrics",
    "ConsistencyLoss",
    "DelayedSGD",
    "InfoNCELoss",
    "InstanceClassifier",
    "KeyQueue",
    "LossMetrics",
    "MemoryBank",
    "NTXentLoss",
    "available_backends",
    "co2_loss",
    "conic_loss",
    "consistency_loss",
    "info_nce_loss",
    "nt_xent_loss",
    "serving_backend",
    "use_backend",
]
