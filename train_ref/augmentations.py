"""Where two views of an image come from: the papers' augmentations, and their like for small images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

Augmentation = Literal["moco_v1", "moco_v2", "simclr", "conic", "small", "digits_v1", "digits_v2"]

# ImageNet's, of each colour, for every set: batch norm makes up for the rest.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TO_NORMALIZED_TENSOR = (
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(MEAN, STD),
    v2.ToPureTensor(),
)


# Pixels that a blur takes its means over: 3 σ and more to each side.
BLUR = {"moco_v2": 13, "simclr": 13, "conic": 13, "digits_v2": 3}


def smallest_image(name: Augmentation) -> int:
    """Height and width that an augmentation's views must have: a blur mirrors half of its pixels at the edge,
    and there must be so many beside it."""
    return BLUR.get(name, 1) // 2 + 1


def augmentation(name: Augmentation, size: int) -> v2.Transform:
    """The random transform of that name, from an image to a normalised (3, size, size) tensor."""
    steps = {
        # As InstDisc's (Wu et al., CVPR 2018).
        "moco_v1": (
            v2.RandomResizedCrop(size, scale=(0.2, 1.0)),
            v2.RandomGrayscale(p=0.2),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.4),
            v2.RandomHorizontalFlip(),
        ),
        # SimCLR's, with weaker colours.
        "moco_v2": (
            v2.RandomResizedCrop(size, scale=(0.2, 1.0)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            _blur("moco_v2", strongest=2.0),
            v2.RandomHorizontalFlip(),
        ),
        # SimCLR's colours and blur, in the order of ConIC's section 4, which gives no strengths.
        "conic": (
            v2.RandomResizedCrop(size, scale=(0.15, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            _blur("conic", strongest=2.0),
        ),
        "simclr": (
            v2.RandomResizedCrop(size, scale=(0.08, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            _blur("simclr", strongest=2.0),
        ),
        # For a few dozen pixels: MoCo v2's without blur, as SimCLR goes without it on CIFAR.
        "small": (
            v2.RandomResizedCrop(size, scale=(0.2, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
        ),
        # Digits are gray and a few pixels wide, and their mirror images are no digits: no colours, no flips,
        # a gentler crop, and the slant and turn of handwriting instead.
        "digits_v1": (*_handwriting(size), v2.ColorJitter(0.4, 0.4)),
        "digits_v2": (
            *_handwriting(size),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4)], p=0.8),
            _blur("digits_v2", strongest=1.0),
        ),
    }
    return v2.Compose([*steps[name], *_TO_NORMALIZED_TENSOR])


def _blur(name: Augmentation, strongest: float) -> v2.Transform:
    """Blurs every other view, with a σ from 0.1 pixels to the strongest."""
    return v2.RandomApply([v2.GaussianBlur(kernel_size=BLUR[name], sigma=(0.1, strongest))], p=0.5)


def _handwriting(size: int) -> tuple[v2.Transform, ...]:
    bilinear = v2.InterpolationMode.BILINEAR
    return (
        v2.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.75, 1.33)),
        v2.RandomAffine(degrees=10, shear=10, interpolation=bilinear),
    )


def plain(size: int, *, crop: bool) -> v2.Transform:
    """The evaluation's transform to a normalised (3, size, size) tensor: the whole image, or its centre."""
    shape = (v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)) if crop else (v2.Resize((size, size)),)
    return v2.Compose([*shape, *_TO_NORMALIZED_TENSOR])


def denormalized(image: Tensor) -> Tensor:
    """A normalised image (3, H, W), its values from 0 to 1 again."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return image * std + mean


def supervised(size: int, *, digits: bool) -> v2.Transform:
    """The random transform of training with labels: ImageNet's crop and flip, or digits' crop and slant."""
    views = (v2.RandomResizedCrop(size), v2.RandomHorizontalFlip())  # of 8 to 100 % of the area
    return v2.Compose([*(_handwriting(size) if digits else views), *_TO_NORMALIZED_TENSOR])


class TwoViews:
    """An image to two independent draws of a random transform; in MoCo the query's view and the key's."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> tuple[Tensor, Tensor]:
        return self.transform(image), self.transform(image)
