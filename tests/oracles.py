"""What the losses must be: the pasted eager formula in float64, and the measure of distance from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.eager import eager_co2
from contrastive_ops import co2_loss


def loss_and_gradient(
    function: Callable[..., Any], query: Tensor, key: Tensor, queue: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Row losses (B,) and their gradient (B, D) in the query, in float64."""
    query = query.detach().requires_grad_()
    loss = function(query, key, queue, reduction="none", **settings)
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    return loss.detach().double(), gradient.double()


def oracle(query: Tensor, key: Tensor, queue: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    return loss_and_gradient(eager_co2, query.double(), key.double(), queue.double(), **settings)


def fused(query: Tensor, key: Tensor, queue: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    return loss_and_gradient(co2_loss, query, key, queue, **settings)


def distance(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖₂; NaN and infinity are as far as can be."""
    if not torch.isfinite(actual).all():
        return float("inf")
    return (actual - expected).norm().item()
