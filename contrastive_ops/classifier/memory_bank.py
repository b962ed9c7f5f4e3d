"""A classifier whose rows are averages of past features."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_floating, check_floating_dtype, check_integer, check_number
from .._eager import eager
from .indices import STATEFUL, checked_instances


class MemoryBank(nn.Module):
    """The classifier of InstDisc (Wu et al., CVPR 2018): each row the exponential average of past features.

        w_n ← normalise(μ w_n + (1 − μ) x̂)

    Rows get no gradient. Use it as `conic_loss`'s weight, with the instances' numbers as the target.

    Args:
        num_instances: N.
        dim: dimension D.
        momentum: μ in [0, 1].
        seed: of the rows, random unit vectors at first.
        dtype: of the rows, floating.
        device: of the rows.

    Attributes:
        rows: (N, D) buffer of unit vectors.

    Example:
        >>> import torch
        >>> from contrastive_ops import MemoryBank, conic_loss
        >>> bank, indices = MemoryBank(num_instances=1000, dim=16), torch.tensor([7, 999])
        >>> features = torch.randn(2, 16, requires_grad=True)
        >>> loss = conic_loss(features[None], bank.rows, indices, temperature=0.07)
        >>> loss.backward()
        >>> bank.update(indices, features)
    """

    rows: Tensor

    def __init__(
        self,
        num_instances: int,
        dim: int,
        momentum: float = 0.5,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        num_instances, dim = check_integer("num_instances", num_instances, 1), check_integer("dim", dim, 1)
        seed = check_integer("seed", seed, 0)
        check_floating_dtype(dtype)
        self.momentum = check_number("momentum", momentum, minimum=0)
        if momentum > 1:
            raise ValueError(f"momentum must be at most 1, got {momentum}")
        # The same rows on every device.
        generator = torch.Generator("cpu").manual_seed(seed)
        rows = F.normalize(torch.randn(num_instances, dim, generator=generator, device="cpu"), dim=1)
        self.register_buffer("rows", rows.to(torch.empty(0, device=device).device, dtype))

    @eager(STATEFUL)
    @torch.no_grad()
    def update(self, indices: Tensor, features: Tensor) -> None:
        """Average the features of instances into their rows; call it after backward.

        Computed in the wider of both dtypes, in float32 at least. A feature that is not finite makes its own
        instance's row NaN, and no other.

        Args:
            indices: (B,) int64. The features of an instance that repeats are averaged first. A batch of none
                changes nothing.
            features: (B, D), or (V, B, D) of V views, floating, on the rows' device; normalised here.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing has been changed.
        """
        numbers = checked_instances("indices", indices, len(self.rows))
        check_floating("features", features)
        wanted = (len(numbers), self.rows.shape[1])
        if (
            features.shape[-2:] != wanted
            or features.ndim not in (2, 3)
            or (features.ndim == 3 and not len(features))
        ):
            raise ValueError(
                f"features must be {wanted} or (V, {wanted[0]}, {wanted[1]}), got {tuple(features.shape)}"
            )
        if features.device != self.rows.device:
            raise ValueError(
                f"features must be on the device of the rows, {self.rows.device}, got {features.device}"
            )
        if not len(numbers):
            return
        dtype = torch.promote_types(torch.promote_types(features.dtype, self.rows.dtype), torch.float32)
        unit = F.normalize(features.to(dtype), dim=-1)
        if unit.ndim == 3:
            unit = unit.mean(0)
        # Sorted, so that an instance's features are added in a fixed order: equal input gives equal bits.
        arrays = (np.argsort(numbers, kind="stable"), *np.unique(numbers, return_counts=True))
        order, instances, lengths = (torch.from_numpy(array).to(unit.device) for array in arrays)
        mean = torch.segment_reduce(unit[order], "mean", lengths=lengths, unsafe=True)
        rows = self.momentum * self.rows[instances].to(dtype) + (1 - self.momentum) * mean
        self.rows[instances] = F.normalize(rows, dim=1).to(self.rows.dtype)

    def extra_repr(self) -> str:
        count, dim = self.rows.shape
        return f"num_instances={count}, dim={dim}, momentum={self.momentum}"
