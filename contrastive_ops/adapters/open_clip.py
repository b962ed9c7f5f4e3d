"""open_clip's `ClipLoss`, with its arguments.

from contrastive_ops.adapters.open_clip import ClipLoss
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._checks import check_device, check_filled, check_flag, check_integer, check_number, check_tensor
from ..functional import conic_loss, consistency_loss
from ._common import multiplied, unit, with_slope

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# How far from 1 the length of a row may be that half precision has rounded.
_NEARLY_UNIT = 0.02


class _Tower(NamedTuple):
    """What one of the two losses is of: rows that are classified among the rows of the other tower."""

    rows: Tensor
    others: Tensor


class ClipLoss(nn.Module):
    """open_clip's `ClipLoss`: each image among the texts of the batch, each text among its images.

    With s = `logit_scale`, and unit features x_i and t_i of pair i:

        L = −½ mean_i [log softmax_j(s x_i·t_j)_i + log softmax_j(s t_i·x_j)_i]

    Both halves are `conic_loss`, which never holds the matrix of logits. Values are open_clip's, and so are
    the gradients in `logit_scale` and, behind the normalisation with which open_clip's towers end, in their
    features. The derivative in s follows from a third pass over the similarities: ∂L/∂s is how far the
    similarity expected under the softmax exceeds the positive's.

    What differs:

    - Features must be L2-normalised, and rows that are not are refused. Their gradient is that behind their
      normalisation, without the part along the features, which a tower's own normalisation would drop.
    - The scale is read by the host, which waits for the GPU in each call.
    - `logit_bias` is added to all logits, which changes no softmax: its gradient is 0 without rounding.

    Args:
        local_loss: with several ranks, compute the loss of this rank's rows alone.
        gather_with_grad: with several ranks, let gradients through the features of the others. With the four
            combinations of both a rank gets the gradient that it gets from open_clip, before its average over
            the ranks.
        cache_labels: keep the places of rows among those of all between calls.
        rank: of this process in `torch.distributed`'s group of all.
        world_size: number of its ranks. All have as many rows.
        use_horovod: refused; ranks are those of `torch.distributed`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Shapes:
        image_features, text_features: (B, D) of unit rows; logit_scale: a number or a tensor of one; returns
        a scalar, or {"contrastive_loss": scalar} with ``output_dict=True``.

    Example:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from contrastive_ops.adapters.open_clip import ClipLoss
        >>> image, text = (torch.randn(8, 512, requires_grad=True) for _ in range(2))
        >>> log_scale = torch.tensor(2.6593, requires_grad=True)
        >>> criterion = ClipLoss()
        >>> criterion(normalize(image), normalize(text), log_scale.exp()).backward()
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "cache_labels": cache_labels}
        for name, value in flags.items():
            check_flag(name, value)
        if use_horovod:
            raise ValueError("use_horovod must be False: ranks are those of torch.distributed")
        check_integer("world_size", world_size, 1)
        if check_integer("rank", rank, 0) >= world_size:
            raise ValueError(f"rank must be below world_size, {world_size}, got {rank}")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = False
        self.labels: dict[tuple[torch.device, int], Tensor] = {}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch of pairs."""
        scale = _check_scale(logit_scale, image_features, text_features)
        group, across = self._group(), self.world_size > 1
        image, text = multiplied(image_features), multiplied(text_features)
        towers = [_Tower(image, text), _Tower(text, image)]
        if across and self.local_loss and not self.gather_with_grad:
            towers = [_Tower(rows, others.detach()) for rows, others in towers]
        own = self._own(image)
        to_text, to_image = (self._classify(tower, own, scale, group) for tower in towers)
        loss, slope = (to_text + to_image) / 2, torch.zeros_like(to_text)

        learned = None
        if isinstance(logit_scale, Tensor) and logit_scale.requires_grad and torch.is_grad_enabled():
            learned = logit_scale.reshape(()).to(loss.dtype)
            of_text, of_image = (_slope(tower, scale, group) for tower in towers)
            slope = (of_text + of_image) / 2
        if across and not self.local_loss:
            loss, slope = self._of_all(loss, slope)
        if learned is not None:
            loss = loss + with_slope(slope, learned)
        if logit_bias is not None:
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _group(self) -> ProcessGroup | None:
        """All ranks, which must be those that the arguments count; None where there is one."""
        if self.world_size == 1:
            return None
        there = 0, 1
        if dist.is_available() and dist.is_initialized():
            there = dist.get_rank(), dist.get_world_size()
        if there != (self.rank, self.world_size):
            raise ValueError(
                f"rank and world_size must be those of torch.distributed, {there}, "
                f"got {(self.rank, self.world_size)}"
            )
        return dist.group.WORLD

    def _own(self, rows: Tensor) -> Tensor:
        """(B,) int64, where each row of this rank's lies among the rows of all."""
        count, device = len(rows), rows.device
        own = self.labels.get((device, count))
        if own is None:
            own = torch.arange(count, device=device) + count * self.rank
            if self.cache_labels:
                self.labels = {(device, count): own}
        return own

    def _classify(self, tower: _Tower, own: Tensor, scale: float, group: ProcessGroup | None) -> Tensor:
        # With a group a leaf would be taken for a parameter, whose gradient is averaged over the ranks.
        others = tower.others.view_as(tower.others)
        return conic_loss(
            tower.rows[None], others, own, temperature=1 / scale, consistency_weight=0.0, group=group
        )

    def _of_all(self, loss: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over the ranks of a loss and of its derivative in the scale.

        Backward gives a rank the derivative of the sum of all ranks' losses. That is what comes of gathering
        with gradients, where each rank has the mean over all rows and hands on what concerns others; without,
        a rank has the mean's derivative in its own rows alone.
        """
        means = torch.stack([loss.detach(), slope])
        dist.all_reduce(means)
        mean, slope = (means / self.world_size).unbind()
        if not self.gather_with_grad:
            loss = loss / self.world_size
        return loss + (mean - loss.detach()), slope


def _check_scale(logit_scale: Tensor | float, image_features: Tensor, text_features: Tensor) -> float:
    """The scale as a number, when it and the features are what they must be; the host waits once for all."""
    features = {"image_features": image_features, "text_features": text_features}
    for name, rows in features.items():
        check_tensor(name, rows)
        if rows.ndim != 2 or rows.shape != image_features.shape:
            raise ValueError(
                f"{name} must be (B, D) as image_features is, got shapes {tuple(rows.shape)} and "
                f"{tuple(image_features.shape)}"
            )
        check_filled(name, rows)
        check_device(name, rows, "image_features", image_features)
    numbers = [_farthest_from_unit(rows) for rows in features.values()]
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"logit_scale must be one number, got shape {tuple(logit_scale.shape)}")
        numbers.append(logit_scale.detach().reshape(()).to(numbers[0]))
    *distances, last = torch.stack(numbers).tolist()
    if not isinstance(logit_scale, Tensor):
        distances, last = [*distances, last], logit_scale
    for name, distance in zip(features, distances, strict=True):
        if distance > _NEARLY_UNIT:  # which NaN is not: it becomes the loss
            raise ValueError(
                f"{name} must have unit rows, as open_clip's towers give them, got one whose length differs "
                f"from 1 by {distance:.3g}; pass torch.nn.functional.normalize({name}, dim=1)"
            )
    return check_number("logit_scale", last, above=0)


def _farthest_from_unit(rows: Tensor) -> Tensor:
    return (rows.detach().double().norm(dim=1) - 1).abs().max()


@torch.no_grad()
def _slope(tower: _Tower, scale: float, group: ProcessGroup | None) -> Tensor:
    """∂/∂s of the mean over the rows of −log softmax_j(s c_ij)_i: mean_i (E_Q[c_ij] − c_ii).

    CO2's term with a key of zeros has E_Q in it: such a key is as similar to all, its softmax uniform, so
    that L_con = ½ (E_Q[s c_ij] − mean_j s c_ij).
    """
    rows, others = tower.rows.detach(), unit(tower.others)
    spread = consistency_loss(rows, torch.zeros_like(rows), others, temperature=1 / scale, group=group)
    mean = others.mean(dim=0)
    if group is not None:
        dist.all_reduce(mean, group=group)
        mean /= group.size()
    over_positive = (unit(rows) * (mean - others)).sum(dim=1).mean()
    return 2 * spread / scale + over_positive
