"""Triton kernels: the operators of contrastive_ops/_ops.py on NVIDIA GPUs from compute capability 8.0 on."""

import torch

from ._co2 import co2
from ._conic import conic, conic_backward, conic_backward_sgd_
from ._nt_xent import nt_xent, nt_xent_backward
from ._rows import exchange_rows_, sgd_

__all__ = [
    "DTYPES",
    "MAX_DIM",
    "co2",
    "conic",
    "conic_backward",
    "conic_backward_sgd_",
    "exchange_rows_",
    "nt_xent",
    "nt_xent_backward",
    "sgd_",
]

PREFERRED_ON = ("cuda",)


def unavailable() -> str | None:
    return "its functions do not have their new names yet"


DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of query and views; queue and weight may have any
MAX_DIM = 1024
