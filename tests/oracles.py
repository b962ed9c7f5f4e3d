"""What the losses must be: the pasted eager formula in float64, and how far from it they may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from contrastive_ops import co2_loss
from train_ref.eager import eager_co2, eager_conic, eager_nt_xent

Results = Sequence[Tensor]  # a loss and its gradients

# The oracle's own rounding, for losses and gradients that are zero or nearly so.
ORACLE_ERROR = 1e-12
# A loss near zero, or a gradient whose terms cancel, keeps the last digit of a float32 similarity.
LAST_DIGIT = 1e-7


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


def assert_near(actual: Results, oracle: Results, relative: Sequence[float], absolute: float = 0.0) -> None:
    """The error of each result is within that part of its norm, and an absolute rest."""
    for result, exact, part in zip(actual, oracle, relative, strict=True):
        assert distance(result, exact) <= part * exact.norm().item() + absolute


def assert_no_worse_than_eager(
    actual: Results,
    eager: Results,
    oracle: Results,
    *,
    times: float = 1.0,
    accurate: Sequence[float] | None = None,
    rounding: float | Sequence[float] = 0.0,
    cancelling: float | Sequence[float] = 0.0,
) -> None:
    """The error of each result is within some times that of eager PyTorch, and what no code can avoid.

    Args:
        actual, eager, oracle: a loss and its gradients, of the fused code, of eager PyTorch, and in float64.
        times: eager's error may be multiplied by this.
        accurate: an error of that part of a result's norm is small enough, whatever eager's is.
        rounding: the part of a result's norm that its own rounding may add.
        cancelling: what roundings of similarities may add where terms cancel, so that nothing of it shows in
            the norm. Eager may happen to hit such a value exactly.
    """
    parts = (each_of(value, len(oracle)) for value in (accurate or 0.0, rounding, cancelling))
    for result, peer, exact, small, rounded, cancelled in zip(actual, eager, oracle, *parts, strict=True):
        norm = exact.norm().item()
        allowed = max(small * norm, times * distance(peer, exact)) + rounded * norm + cancelled
        assert distance(result, exact) <= allowed


def each_of(value: float | Sequence[float], count: int) -> Sequence[float]:
    return (value,) * count if isinstance(value, float) else value


def last_digits(slope: float, rows: int = 1, times: float = 30) -> float:
    """What the last digits of float32 similarities do to results that change with them, a few times over.

    Args:
        slope: of a result in a similarity: the larger, the sharper the softmaxes.
        rows: results that have errors of their own, so that the norm of all errors grows with their root.
        times: how many such roundings add up.
    """
    return times * torch.finfo(torch.float32).eps / 2 * slope * rows**0.5
