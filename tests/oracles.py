"""What the losses must be: the pasted eager formula in float64, and the measure of distance from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contrastive_ops import co2_loss
from train_ref.eager import eager_co2, eager_conic, eager_nt_xent


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


def conic_loss_and_gradients(
    function: Callable[..., Any], views: Tensor, weight: Tensor, target: Tensor, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the instances (B,), and their gradients in views (V, B, D) and weight (A, D), in float64.
    Each instance's loss has an incoming gradient of its own."""
    views, weight = views.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(views, weight, target, reduction="none", **settings)
    incoming = torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype, device=loss.device)
    gradients = torch.autograd.grad(loss, (views, weight), incoming)
    return loss.detach().double(), gradients[0].double(), gradients[1].double()


def conic_oracle(
    views: Tensor, weight: Tensor, target: Tensor, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return conic_loss_and_gradients(eager_conic, views.double(), weight.double(), target, **settings)


def nt_xent_loss_and_gradients(
    function: Callable[..., Any], view1: Tensor, view2: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Losses of the rows (2 B,) and their gradients (2, B, D) in the views, in float64. Each row's loss has
    an incoming gradient of its own."""
    views = [view.detach().requires_grad_() for view in (view1, view2)]
    loss = function(*views, reduction="none", **settings)
    incoming = torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype, device=loss.device)
    gradients = torch.autograd.grad(loss, views, incoming)
    return loss.detach().double(), torch.stack(gradients).double()


def nt_xent_oracle(view1: Tensor, view2: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    return nt_xent_loss_and_gradients(eager_nt_xent, view1.double(), view2.double(), **settings)


def distance(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖₂; NaN and infinity are as far as can be."""
    if not torch.isfinite(actual).all():
        return float("inf")
    return (actual - expected).norm().item()
