"""What several adapters need: rows of unit length, the ranks, and InfoNCE with a gradient for its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..functional import info_nce_loss, under_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def unit(rows: Tensor) -> Tensor:
    """The rows, L2-normalised, in float32 or wider."""
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)


def multiplied(rows: Tensor) -> Tensor:
    """Normalised rows in the dtype in which autocast multiplies matrices, where it is enabled. PyTorch has
    normalised them in float32, and the losses multiply in the dtype of what they are given."""
    if under_autocast(rows) and rows.dtype == torch.float32:
        return rows.to(torch.get_autocast_dtype(rows.device.type))
    return rows


def world() -> ProcessGroup | None:
    """The group of all ranks, where there are several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def info_nce(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float, normalize: bool) -> Tensor:
    """The mean of `info_nce_loss`, which gives `key` a gradient too where it requires one.

    A row's key is in its loss L by the similarity s_+ alone, and the loss knows its derivative there: with
    the positive's probability p = e^{−L},

        ∂L/∂s_+ = (p − 1) / τ = expm1(−L) / τ.
    """
    if not (key.requires_grad and torch.is_grad_enabled()):
        return info_nce_loss(query, key, queue, temperature=temperature, normalize=normalize)
    losses = info_nce_loss(
        query, key.detach(), queue, temperature=temperature, normalize=normalize, reduction="none"
    )
    slope = torch.expm1(-losses.detach()) / temperature
    if normalize:
        query, key = unit(query), unit(key)
    positive = (query.detach().to(losses.dtype) * key.to(losses.dtype)).sum(dim=1)
    return (losses + with_slope(slope, positive)).mean()


def with_slope(slope: Tensor, x: Tensor) -> Tensor:
    """Zeros, whose derivative in `x` is `slope`."""
    return slope.detach() * (x - x.detach())
