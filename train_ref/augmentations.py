"""Where the views of an image come from: the papers' augmentations, and their like for small images.

A view is made in two parts. Image by image a crop is taken, and colours and blur are drawn, as torchvision's
transforms draw them. Then a batch of crops gets its colours, on the device that trains: a crop has a quarter
of a view's bytes to send, and CPUs are left to decode and to crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from .colours import Change, Colours, Kind, normalized

Augmentation = Literal["moco_v1", "moco_v2", "simclr", "conic", "small", "digits_v1", "digits_v2"]

# Pixels that a blur takes its means over: 3 σ and more to each side.
BLUR = {"moco_v2": 13, "simclr": 13, "conic": 13, "digits_v2": 3}
DIGITS_RATIO = (0.75, 1.33)  # of a crop's sides
# Parts of an image's area in SwAV's crops of two sizes, "multi-crop" (Caron et al., NeurIPS 2020).
LARGE, SMALL = (0.14, 1.0), (0.05, 0.14)
# In units of σ. A 16,000th of a Gaussian is left out beyond it, which moves no value by a tenth of a level.
REACH = 4
Drawn = tuple[Tensor, Colours]  # a crop (3, H, W) of bytes, and its colours; or of a batch


class Drawing:
    """The random part of a view: image (3, H, W) of bytes to a crop, and what will be done to its colours.

    Args:
        *steps: in the paper's order, in which they are drawn. Those that move pixels are taken here, on
            whichever side of the colours they are: a mirror image has the same ones.
    """

    def __init__(self, *steps: Callable[[Tensor], Tensor] | Jitter | Gray | Blur) -> None:
        self.steps = steps

    def __call__(self, image: Tensor) -> Drawn:
        changes: list[Change] = []
        taps = (1.0,)
        for step in self.steps:
            if isinstance(step, Blur):
                taps = step.draw()
            elif isinstance(step, Jitter | Gray):
                changes += step.draw()
            else:
                image = step(image)
        kinds, factors = zip(*changes, strict=True) if changes else ((), ())
        return image, Colours(kinds, factors, taps)


class SeveralViews:
    """An image to independent views of it, one a drawing; in MoCo the query's, and then the key's."""

    def __init__(self, *drawings: Callable[[Any], Any]) -> None:
        self.drawings = drawings

    def __call__(self, image: Any) -> tuple[Any, ...]:
        return tuple(drawing(image) for drawing in self.drawings)


class Jitter:
    """Some views get other brightness, contrast, saturation and hue, as far as given, in random order.

    Args:
        *strengths: those of `ColorJitter`.
        p: how often.
    """

    def __init__(self, *strengths: float, p: float = 1.0) -> None:
        self.jitter, self.p, self.count = v2.ColorJitter(*strengths), p, len(strengths)

    def draw(self) -> list[Change]:
        if not happens(self.p):
            return [(Kind.NOTHING, 1.0)] * self.count
        drawn = self.jitter.make_params([])
        factors = {kind: drawn.get(f"{kind.name.lower()}_factor") for kind in Kind}
        order = map(Kind, drawn["fn_idx"].tolist())
        return [(kind, factors[kind]) for kind in order if factors[kind] is not None]


class Gray:
    """Some views lose their colours.

    Args:
        p: how often.
    """

    def __init__(self, p: float) -> None:
        self.p = p

    def draw(self) -> list[Change]:
        return [(Kind.SATURATION, 0.0) if happens(self.p) else (Kind.NOTHING, 1.0)]


class Blur:
    """Every other view is blurred, with a σ from 0.1 pixels to the strongest.

    Args:
        pixels: that a mean is taken over, an odd number.
        strongest: σ.
    """

    def __init__(self, pixels: int, strongest: float) -> None:
        self.radius, self.strongest = pixels // 2, strongest

    def draw(self) -> tuple[float, ...]:
        if not happens(0.5):
            return (1.0, *[0.0] * self.radius)
        sigma = torch.empty(1).uniform_(0.1, self.strongest).item()
        weights = [
            math.exp(-0.5 * (distance / sigma) ** 2) if distance <= REACH * sigma else 0.0
            for distance in range(self.radius + 1)
        ]
        total = weights[0] + 2 * sum(weights[1:])
        return tuple(weight / total for weight in weights)


def happens(p: float) -> bool:
    """Whether what happens with probability p does; what always happens takes no random number."""
    return p == 1 or bool(torch.rand(1) < p)


class Crop(v2.RandomResizedCrop):
    """torchvision's in half the time: on CPUs with AVX-512 its own resizes bytes as floats."""

    def __init__(self, size: int, scale: tuple[float, float] = (0.08, 1.0), **ratio: Any) -> None:
        super().__init__(size, scale, **ratio)

    def transform(self, image: Tensor, params: dict[str, Any]) -> Tensor:
        top, left, height, width = (params[name] for name in ("top", "left", "height", "width"))
        return resized(image[:, top : top + height, left : left + width], *self.size)


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """An image (3, H, W) of bytes in another size: what becomes a pixel is averaged."""
    # In the order of its file a pixel's colours are side by side, which is three times as fast.
    pixels = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0]


def smallest_image(name: Augmentation) -> int:
    """Height and width that an augmentation's views must have: a blur mirrors half of its pixels at the edge,
    and there must be so many beside it."""
    return BLUR.get(name, 1) // 2 + 1


def augmentation(name: Augmentation, size: int, scale: tuple[float, float] | None = None) -> Drawing:
    """The augmentation of that name.

    Args:
        name: which.
        size: views are (3, size, size).
        scale: parts of an image's area that a crop may take, in place of the augmentation's own.
    """

    def crop(smallest: float, **ratio: Any) -> Crop:
        return Crop(size, scale or (smallest, 1.0), **ratio)

    handwriting = (crop(0.7, ratio=DIGITS_RATIO), _slant())
    steps: dict[Augmentation, tuple[Any, ...]] = {
        # As InstDisc's (Wu et al., CVPR 2018).
        "moco_v1": (
            crop(0.2),
            Gray(p=0.2),
            Jitter(0.4, 0.4, 0.4, 0.4),
            v2.RandomHorizontalFlip(),
        ),
        # SimCLR's, with weaker colours.
        "moco_v2": (
            crop(0.2),
            Jitter(0.4, 0.4, 0.4, 0.1, p=0.8),
            Gray(p=0.2),
            Blur(BLUR["moco_v2"], strongest=2.0),
            v2.RandomHorizontalFlip(),
        ),
        # SimCLR's colours and blur, in the order of ConIC's section 4, which gives no strengths.
        "conic": (
            crop(0.15),
            v2.RandomHorizontalFlip(),
            Jitter(0.8, 0.8, 0.8, 0.2, p=0.8),
            Gray(p=0.2),
            Blur(BLUR["conic"], strongest=2.0),
        ),
        "simclr": (
            crop(0.08),
            v2.RandomHorizontalFlip(),
            Jitter(0.8, 0.8, 0.8, 0.2, p=0.8),
            Gray(p=0.2),
            Blur(BLUR["simclr"], strongest=2.0),
        ),
        # For a few dozen pixels: MoCo v2's without blur, as SimCLR goes without it on CIFAR.
        "small": (
            crop(0.2),
            v2.RandomHorizontalFlip(),
            Jitter(0.4, 0.4, 0.4, 0.1, p=0.8),
            Gray(p=0.2),
        ),
        # Digits are gray and a few pixels wide, and their mirror images are no digits: no colours, no flips,
        # a gentler crop, and the slant and turn of handwriting instead.
        "digits_v1": (*handwriting, Jitter(0.4, 0.4)),
        "digits_v2": (
            *handwriting,
            Jitter(0.4, 0.4, p=0.8),
            Blur(BLUR["digits_v2"], strongest=1.0),
        ),
    }
    return Drawing(*steps[name])


def _slant() -> v2.Transform:
    return v2.RandomAffine(degrees=10, shear=10, interpolation=v2.InterpolationMode.BILINEAR)


class Resize:
    """The whole image, whose shorter side gets that many pixels; or both sides do."""

    def __init__(self, size: int, *, square: bool) -> None:
        self.size, self.square = size, square

    def __call__(self, image: Tensor) -> Tensor:
        if self.square:
            return resized(image, self.size, self.size)
        _, height, width = image.shape
        shorter = min(height, width)
        return resized(image, self.size * height // shorter, self.size * width // shorter)


def plain(size: int, *, crop: bool) -> v2.Transform:
    """The evaluation's transform to a normalised (3, size, size) tensor: the whole image, or its centre."""
    if not crop:
        return v2.Compose([Resize(size, square=True), normalized])
    return v2.Compose([Resize(round(size * 256 / 224), square=False), v2.CenterCrop(size), normalized])


def supervised(size: int, *, digits: bool) -> v2.Transform:
    """The random transform of training with labels: ImageNet's crop and flip, or digits' crop and slant."""
    views = (Crop(size), v2.RandomHorizontalFlip())  # of 8 to 100 % of the area
    handwriting = (Crop(size, (0.7, 1.0), ratio=DIGITS_RATIO), _slant())
    return v2.Compose([*(handwriting if digits else views), normalized])
