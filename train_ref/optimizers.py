"""What moves an encoder's weights: SGD, LARS for large batches, AdamW for transformers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from .errors import UsageError

OptimizerName = Literal["sgd", "lars", "adamw"]


def optimizer_of(name: OptimizerName, net: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """An optimizer of a network's parameters.

    - "sgd" with momentum 0.9 decays all of them, as in MoCo's code and ConIC's.
    - "lars" (You et al., 2017), SimCLR's: SGD with momentum 0.9 whose gradient, decay included, is scaled for
      each tensor w by 0.001 ‖w‖ / (‖g‖ + weight decay · ‖w‖).
    - "adamw" has PyTorch's own moments, 0.9 and 0.999, as MoCo v3's.

    LARS and AdamW leave vectors, which are biases and what norms have, without decay. LARS does not scale
    their gradients either: they take plain steps of SGD.

    Raises:
        UsageError: LARS is timm's, which is missing.
    """
    if name == "sgd":
        return torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    trained = [p for p in net.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay}
    vectors = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    if name == "adamw":
        return torch.optim.AdamW([matrices, vectors], lr)
    try:
        from timm.optim import Lars
    except ModuleNotFoundError as error:
        raise UsageError("model.optimizer: lars is timm's, which is missing: pip install timm") from error
    # Without a decay, too, weights are scaled, where timm's own rule is to scale what it decays.
    groups: list[dict[str, Any]] = [{**matrices, "always_adapt": True}, {**vectors, "always_adapt": False}]
    return Lars(groups, lr, momentum=0.9, trust_coeff=0.001)
