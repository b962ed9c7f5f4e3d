from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from train_ref import colours
from train_ref.augmentations import (
    BLUR,
    Crop,
    Drawn,
    Jitter,
    SeveralViews,
    augmentation,
    plain,
    resized,
    smallest_image,
)
from train_ref.colours import Colours, Kind, denormalized, finished, normalized
from train_ref.data import finish, together

from .conftest import Sendings

CPU = torch.device("cpu")
NAMES = ("moco_v1", "moco_v2", "simclr", "conic", "small", "digits_v1", "digits_v2")


def picture(height: int = 40, width: int = 40) -> Tensor:
    """Noise that is smooth enough for its colours to change little from pixel to pixel."""
    coarse = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 9, 9), dtype=np.uint8))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


def finished_view(drawn: Drawn) -> Tensor:
    crop, colours = drawn
    ((view,),) = finished([(crop[None], Colours.together([colours]))], CPU)
    return view


def by_torchvision(name: str) -> tuple[v2.Transform, ...]:
    """What follows the pixels' moves in an augmentation, by torchvision, in the same order."""
    jitter = {
        "moco_v1": v2.ColorJitter(0.4, 0.4, 0.4, 0.4),
        "moco_v2": v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
        "small": v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
        "simclr": v2.ColorJitter(0.8, 0.8, 0.8, 0.2),
        "conic": v2.ColorJitter(0.8, 0.8, 0.8, 0.2),
        "digits_v1": v2.ColorJitter(0.4, 0.4),
        "digits_v2": v2.ColorJitter(0.4, 0.4),
    }[name]
    gray, flip = v2.RandomGrayscale(0.2), v2.RandomHorizontalFlip()
    sigma = (0.1, 1.0 if name == "digits_v2" else 2.0)
    blur = [v2.RandomApply([v2.GaussianBlur(BLUR[name], sigma)], 0.5)] if name in BLUR else []
    if name == "moco_v1":
        return (gray, jitter, flip)
    if name == "digits_v1":
        return (jitter,)
    jitter = v2.RandomApply([jitter], 0.8)
    return {"moco_v2": (jitter, gray, *blur, flip), "digits_v2": (jitter, *blur)}.get(
        name, (flip, jitter, gray, *blur)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [40, 8])
def test_a_view_is_a_normalised_tensor_of_the_size_asked_for(name, size):
    crop, colours = augmentation(name, 16)(picture(size, size))
    assert crop.shape == (3, 16, 16)
    assert crop.dtype == torch.uint8
    view = finished_view((crop, colours))
    assert view.shape == (3, 16, 16)
    assert view.dtype == torch.float32
    assert -2.2 < view.min() < view.max() < 2.7


@pytest.mark.parametrize("name", NAMES)
def test_views_are_those_of_torchvisions_transforms_without_their_roundings(name):
    """The same random numbers, in the same order, and the same values to a tenth of a level of 255: what a
    blur leaves out, and a mean of brightness that is taken of whole levels."""
    drawing, image = augmentation(name, 32), picture(60, 50)
    moves = [step for step in drawing.steps if isinstance(step, v2.Transform)]
    moves = [step for step in moves if not isinstance(step, v2.RandomHorizontalFlip)]
    for seed in range(25):
        torch.manual_seed(seed)
        view = denormalized(finished_view(drawing(image)))
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        expected = image
        for move in moves:
            expected = move(expected)
        expected = v2.functional.to_dtype(expected, torch.float32, scale=True)
        for step in by_torchvision(name):
            expected = step(expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert (view - expected).abs().max() * 255 < 0.1


@pytest.mark.parametrize("height", [20, 70])
def test_a_crop_is_torchvisions_to_a_level(height):
    image, size = picture(60, 50), (height, 40)
    for crop in (Crop(24, scale=(0.2, 1.0)), Crop(24, scale=(0.9, 1.0))):
        torch.manual_seed(1)
        ours = crop(image)
        torch.manual_seed(1)
        theirs = v2.RandomResizedCrop(24, scale=crop.scale)(v2.functional.to_pil_image(image))
        assert (ours.int() - v2.functional.pil_to_tensor(theirs).int()).abs().max() <= 1
    theirs = v2.functional.resize(v2.functional.to_pil_image(image), list(size))
    assert (resized(image, *size).int() - v2.functional.pil_to_tensor(theirs).int()).abs().max() <= 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("at_once", [1, 3 * 17 * 17 * 4, 2**20])
def test_a_view_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(monkeypatch, threads, at_once):
    drawing = augmentation("simclr", 17)
    torch.manual_seed(0)
    drawn = [drawing(picture()) for _ in range(24)]
    alone = torch.stack([finished_view(each) for each in drawn])
    monkeypatch.setitem(finished.__globals__["AT_ONCE"], "cpu", at_once)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for some in (range(24), range(5, 18), range(23, -1, -3)):
            crops, colours = zip(*[drawn[i] for i in some], strict=True)
            (views,) = finished([(torch.stack(crops), Colours.together(colours))], CPU)
            assert torch.equal(views, alone[list(some)])
    finally:
        torch.set_num_threads(before)


def test_colours_that_are_not_changed_stay_as_they_are():
    image = picture()
    expected = v2.functional.normalize(image / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(normalized(image), expected)
    for kind, factor in (
        (Kind.BRIGHTNESS, 1.0),
        (Kind.CONTRAST, 1.0),
        (Kind.SATURATION, 1.0),
        (Kind.HUE, 0.0),
    ):
        view = finished_view((image, Colours((kind,), (factor,), (1.0,))))
        torch.testing.assert_close(view, expected, atol=1e-4, rtol=0)


def test_jitter_is_drawn_as_often_as_asked_for():
    drawn = [Jitter(0.4, 0.4, p=0.8).draw() for _ in range(1000)]
    assert 740 < sum(changes[0][0] is not Kind.NOTHING for changes in drawn) < 860
    assert {len(changes) for changes in drawn} == {2}


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_views_can_be_drawn_and_smaller_ones_cannot(name):
    def draw(size: int) -> None:
        for seed in range(16):  # every other view is blurred, and most as far as can be
            torch.manual_seed(seed)
            finished_view(augmentation(name, size)(picture()))

    draw(smallest_image(name))
    if smallest_image(name) > 1:
        with pytest.raises(RuntimeError, match="Padding size"):
            draw(smallest_image(name) - 1)


@pytest.mark.parametrize("name", NAMES)
def test_only_photographs_are_mirrored(name):
    flips = [step for step in augmentation(name, 16).steps if isinstance(step, v2.RandomHorizontalFlip)]
    assert bool(flips) == (not name.startswith("digits"))


@pytest.mark.parametrize("name", NAMES)
def test_two_views_are_independent_draws_that_the_seed_decides(name):
    drawing = augmentation(name, 16)
    make_views = SeveralViews(drawing, drawing)
    torch.manual_seed(0)
    query, key = map(finished_view, make_views(picture()))
    torch.manual_seed(0)
    again = list(map(finished_view, make_views(picture())))
    assert not torch.equal(query, key)
    assert torch.equal(query, again[0])
    assert torch.equal(key, again[1])


@pytest.mark.parametrize("crop", [False, True])
def test_the_plain_transform_draws_nothing(crop):
    first, second = (plain(16, crop=crop)(picture(40, 50)) for _ in range(2))
    assert first.shape == (3, 16, 16)
    assert torch.equal(first, second)


def test_what_is_sent_to_a_device_is_seen():
    there = torch.device("meta")
    with Sendings(there) as sendings:
        values = torch.zeros(4, 2, device=there)
        values[torch.tensor([1, 2])] = values[torch.tensor([0, 1])]
        values.copy_(torch.zeros(4, 2))
        torch.zeros(3).to(there, non_blocking=True)
        torch.tensor([1.0], device=there) + values.sum()
    assert (len(sendings.copies), len(sendings.blocking)) == (5, 4)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_sent_in_as_many_copies_however_large_it_is(monkeypatch, name):
    """To a device without memory, as none is needed to count: the crops of two sizes, and all that was drawn.
    Parts as small as these have every change of some of their images, and others of all."""
    there = torch.device("meta")
    drawing = SeveralViews(augmentation(name, 24), augmentation(name, 20))
    finish(together([(drawing(picture()), 0, 0)]), there)  # constants are sent once
    for images, at_once in ((1, 8), (8, 8), (24, 8)):
        monkeypatch.setattr(colours, "AT_ONCE_ELSEWHERE", at_once * 3 * 24 * 24)
        torch.manual_seed(images)
        batch = together([(drawing(picture()), 0, i) for i in range(images)])
        with Sendings(there) as sendings:
            views, _, _ = finish(batch, there)
        assert [view.shape for view in views] == [(images, 3, size, size) for size in (24, 20)]
        assert len(sendings.copies) == 2 + 1
        assert not sendings.blocking


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_colours_as_a_cpu_does(name):
    torch.manual_seed(0)
    crops, colours = zip(*[augmentation(name, 24)(picture()) for _ in range(32)], strict=True)
    batch = [(torch.stack(crops), Colours.together(colours))]
    here, there = (finished(batch, torch.device(device)) for device in ("cpu", "cuda"))
    torch.testing.assert_close(there[0].cpu(), here[0], atol=1e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nobody_waits_for_a_gpu_to_colour():
    batch = together([(SeveralViews(augmentation("simclr", 24))(picture()), 0, i) for i in range(32)])
    ((crops, drawn),), *rest = batch
    finish(batch, "cuda")  # constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        finish(([(crops.pin_memory(), drawn)], *rest), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
