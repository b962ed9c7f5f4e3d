from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from train_ref.augmentations import TwoViews, augmentation, plain, smallest_image

NAMES = ("moco_v1", "moco_v2", "simclr", "conic", "small", "digits_v1", "digits_v2")


def picture(size: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image", [picture(), v2.functional.pil_to_tensor(picture(8))], ids=["pil", "tensor"])
def test_a_view_is_a_normalised_tensor_of_the_size_asked_for(name, image):
    view = augmentation(name, 16)(image)
    assert type(view) is torch.Tensor
    assert view.shape == (3, 16, 16)
    assert view.dtype == torch.float32
    assert -2.2 < view.min() < view.max() < 2.7


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_views_can_be_drawn_and_smaller_ones_cannot(name):
    def draw(size: int) -> None:
        for seed in range(8):  # every other view is blurred
            torch.manual_seed(seed)
            augmentation(name, size)(picture())

    draw(smallest_image(name))
    if smallest_image(name) > 1:
        with pytest.raises(RuntimeError, match="Padding size"):
            draw(smallest_image(name) - 1)


@pytest.mark.parametrize("name", NAMES)
def test_only_photographs_are_mirrored(name):
    flips = [step for step in augmentation(name, 16).transforms if isinstance(step, v2.RandomHorizontalFlip)]
    assert bool(flips) == (not name.startswith("digits"))


@pytest.mark.parametrize("name", NAMES)
def test_two_views_are_independent_draws_that_the_seed_decides(name):
    make_views = TwoViews(augmentation(name, 16))
    torch.manual_seed(0)
    query, key = make_views(picture())
    torch.manual_seed(0)
    again = make_views(picture())
    assert not torch.equal(query, key)
    assert torch.equal(query, again[0])
    assert torch.equal(key, again[1])


@pytest.mark.parametrize("crop", [False, True])
def test_the_plain_transform_draws_nothing(crop):
    first, second = (plain(16, crop=crop)(picture()) for _ in range(2))
    assert first.shape == (3, 16, 16)
    assert torch.equal(first, second)
