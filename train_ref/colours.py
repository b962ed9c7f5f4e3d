"""The colours and the blur of views, a batch at a time, on whatever device the batch is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .sending import sent

# ImageNet's, of each colour, for every set: batch norm makes up for the rest.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRAY = (0.2989, 0.587, 0.114)  # of red, green and blue: their part in brightness

# Values that are coloured at once: on a CPU what its core's cache holds, elsewhere what its memory can spare.
AT_ONCE = {"cpu": 2**17}
AT_ONCE_ELSEWHERE = 2**26


class Kind(IntEnum):
    """What is done to colours. By these numbers `ColorJitter` draws the order of the first four."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3
    NOTHING = 4


Change = tuple[Kind, float]  # and its factor, which is a shift of hue


class Colours(NamedTuple):
    """What is done to the colours of a view, and how it is blurred then. Those of a batch are tensors.

    Attributes:
        kinds: the changes, one after the other.
        factors: theirs.
        taps: weights of a pixel and of its neighbours at distance 1, 2, … to each side.
    """

    kinds: Any
    factors: Any
    taps: Any

    @classmethod
    def together(cls, views: Iterable[Colours]) -> Colours:
        """Those of a batch, as tensors."""
        return cls(*map(torch.tensor, zip(*views, strict=True)))


UNCHANGED = Colours(kinds=(), factors=(), taps=(1.0,))


class Step(NamedTuple):
    """A change of some images of a part of a batch.

    Attributes:
        change: in place, of images (n, 3, H, W) by their numbers (n, W, 1, 1).
        numbers: where these are among the plan's arrays.
        rows: where the images' indices (n,) are among them; None where all images are changed.
    """

    change: Callable[[Tensor, Tensor], None]
    numbers: int
    rows: int | None

    def take(self, values: Tensor, arrays: Sequence[Tensor]) -> None:
        """Change the values (B, 3, H, W) of a part, on the device that has them and the arrays."""
        if self.rows is None:
            self.change(values, arrays[self.numbers])
        else:
            rows = arrays[self.rows]
            some = values[rows]
            self.change(some, arrays[self.numbers])
            values[rows] = some


class Plan:
    """The steps that the colours of views are, and the arrays of numbers that they take.

    Which images a step changes is decided here, on a CPU, so that nobody waits for a GPU to tell; and all
    arrays are known before the first step, so that they are sent at once.
    """

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def steps(self, colours: Colours, at_once: int) -> list[list[Step]]:
        """The steps of each part of a batch of views, so many of them at a time."""
        kinds, factors, taps = (field.numpy() for field in colours)
        return [
            self._steps(
                kinds[first : first + at_once],
                factors[first : first + at_once],
                taps[first : first + at_once],
            )
            for first in range(0, len(taps), at_once)
        ]

    def _steps(self, kinds: np.ndarray, factors: np.ndarray, taps: np.ndarray) -> list[Step]:
        steps = [
            self._step(CHANGES[kind], kinds[:, place] == kind, factors[:, place, None])
            for place in range(kinds.shape[1])
            for kind in CHANGES.keys() & set(kinds[:, place].tolist())
        ]
        blurred = taps[:, 1:].any(axis=1)
        if blurred.any():
            radius = taps.any(axis=0).nonzero()[0].max()
            steps.append(self._step(blur_, blurred, taps[:, : radius + 1]))
        return steps

    def _step(
        self, change: Callable[[Tensor, Tensor], None], chosen: np.ndarray, numbers: np.ndarray
    ) -> Step:
        """A change of the chosen ones (B,) of a part, by numbers (B, W)."""
        rows = None if chosen.all() else self._place(chosen.nonzero()[0])
        return Step(change, self._place(numbers[chosen, :, None, None]), rows)

    def _place(self, array: np.ndarray) -> int:
        self.arrays.append(array)
        return len(self.arrays) - 1


@functools.cache
def normalization(device: torch.device) -> Tensor:
    """What values from 0 to 255 are multiplied by, and what is added then: (2, 3, 1, 1)."""
    scale, shift = (
        [1 / (255 * std) for std in STD],
        [-mean / std for mean, std in zip(MEAN, STD, strict=True)],
    )
    return torch.tensor([scale, shift], device=device).view(2, 3, 1, 1)


def finished(views: Sequence[tuple[Tensor, Colours]], device: torch.device) -> list[Tensor]:
    """Views (B, 3, H, W) on a device, of batches of crops: coloured, blurred and normalised.

    A view has the same bits in every batch and on any number of threads: each value is computed for itself,
    and a view's mean is a sum of integers.

    Args:
        views: crops (B, 3, H, W) of bytes, and the colours of each batch of them in the CPU's memory.
        device: that computes. All that it needs besides the crops reaches it in one copy.
    """
    plan = Plan()
    planned = []
    for crops, colours in views:
        at_once = max(1, AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE) // crops[0].numel())
        planned.append((crops.to(device, non_blocking=True), at_once, plan.steps(colours, at_once)))
    arrays = sent(plan.arrays, device)
    return [coloured(*each, arrays) for each in planned]


def coloured(
    crops: Tensor, at_once: int, parts: Sequence[Sequence[Step]], arrays: Sequence[Tensor]
) -> Tensor:
    """The views of crops (B, 3, H, W), so many at a time, by the steps of each part."""
    scale, shift = normalization(crops.device)
    views = torch.empty(crops.shape, device=crops.device)
    for number, steps in enumerate(parts):
        part = slice(number * at_once, (number + 1) * at_once)
        values = crops[part].to(torch.float32, memory_format=torch.contiguous_format)  # 0 … 255
        for step in steps:
            step.take(values, arrays)
        torch.mul(values, scale, out=views[part]).add_(shift)
    return views


def brightness_(values: Tensor, factors: Tensor) -> None:
    values.mul_(factors).clamp_(0, 255)


def contrast_(values: Tensor, factors: Tensor) -> None:
    levels = gray_of(values).round_().to(torch.int32)
    # Integers have the same sum in whatever order they are added.
    mean = levels.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64).float() / levels[0].numel()
    blend_(values, mean, factors)


def saturation_(values: Tensor, factors: Tensor) -> None:
    blend_(values, gray_of(values), factors)


def blend_(values: Tensor, others: Tensor, factors: Tensor) -> None:
    """f · values + (1 − f) · others."""
    values.mul_(factors).add_(others * (1 - factors)).clamp_(0, 255)


def hue_(values: Tensor, shifts: Tensor) -> None:
    """Turn the hue by a part of the circle, in HSV.

    With V the largest colour, C its difference from the smallest and h the hue from 0 to 1, a colour is
    V − min(C, max(0, 2 C − 6 C d)), where d is how far h is on the circle from the colour's opposite: 3/6 for
    red, 5/6 for green and 1/6 for blue. Everything is kept times C, so nothing is divided by it; and what is
    the largest is told by signs, for comparisons take CPUs longer than all else.
    """
    red, green, blue = values.unbind(dim=1)  # (B, H, W) each
    largest = torch.maximum(torch.maximum(red, green), blue)
    chroma = largest - torch.minimum(torch.minimum(red, green), blue)
    not_red = (largest - red).sign_()
    is_blue = (largest - green).sign_().mul_(not_red)
    rest = (chroma * 2).sub_(red).sub_(green).sub_(blue)
    # 6 C h is g − b where red is the largest, 2 C + b − r where green is, and 4 C + r − g where blue is.
    hue = (green - blue).add_(torch.add(rest, blue, alpha=3).mul_(not_red))
    hue.add_(torch.add(rest, red, alpha=3).mul_(is_blue))
    circle = chroma * 6
    hue.add_(circle * shifts[:, 0])
    distance = torch.stack([torch.sub(hue, chroma, alpha=opposite) for opposite in (3, 5, 1)], dim=1).abs_()
    # Once around the circle is as far as not at all.
    torch.minimum(distance, torch.sub(circle[:, None], distance).abs_(), out=distance)
    part = torch.sub((chroma * 2)[:, None], distance, out=distance).clamp_min_(0)
    torch.minimum(part, chroma[:, None], out=part)
    torch.sub(largest[:, None], part, out=values)


def gray_of(values: Tensor) -> Tensor:
    """The brightness (B, 1, H, W) of colours (B, 3, H, W)."""
    red, green, blue = values.split(1, dim=1)
    return (red * GRAY[0]).add_(green * GRAY[1]).add_(blue * GRAY[2])


def blur_(values: Tensor, taps: Tensor) -> None:
    """Means along rows, and then along columns; at the edge, pixels are mirrored."""
    weights = taps.split(1, dim=1)
    radius = len(weights) - 1
    for dim, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded, size = F.pad(values, padding, mode="reflect"), values.shape[dim]
        torch.mul(padded.narrow(dim, radius, size), weights[0], out=values)
        for distance in range(1, radius + 1):
            before, after = (padded.narrow(dim, radius + step, size) for step in (-distance, distance))
            values.addcmul_(before + after, weights[distance])


CHANGES = {
    Kind.BRIGHTNESS: brightness_,
    Kind.CONTRAST: contrast_,
    Kind.SATURATION: saturation_,
    Kind.HUE: hue_,
}


def normalized(image: Tensor) -> Tensor:
    """An image (3, H, W) of bytes as it is, normalised."""
    ((view,),) = finished([(image[None], Colours.together([UNCHANGED]))], image.device)
    return view


def denormalized(image: Tensor) -> Tensor:
    """A normalised image (3, H, W), its values from 0 to 1 again."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return image * std + mean
