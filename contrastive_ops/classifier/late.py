"""Tensors with rows that are elsewhere and are updated late: not every optimiser can do that."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


def updated_late(tensor: Tensor, by: str) -> None:
    """Mark a tensor, as `updated_late_by`: optimisers without an attribute `updates_late` refuse it from now
    on, and name the one it is for."""
    tensor.updated_late_by = by  # type: ignore[attr-defined]
    _watch_optimizers()


@functools.cache
def _watch_optimizers() -> None:
    """PyTorch tells of other packages' optimisers in this one way: by a hook before the steps of all."""
    register_optimizer_step_pre_hook(_refuse_marked)


def _refuse_marked(optimizer: Optimizer, *_: Any) -> None:
    """Runs before any optimiser's step. One that lets `optimizers` of its own take the step is not asked:
    they are."""
    if getattr(optimizer, "updates_late", False) or hasattr(optimizer, "optimizers"):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if by := getattr(parameter, "updated_late_by", ""):
                raise TypeError(
                    f"{type(optimizer).__name__} holds the weight of an InstanceClassifier: what it would do "
                    f"to the rows that are not active cannot be done late. Leave that parameter to {by}"
                )
