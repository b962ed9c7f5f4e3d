"""open_clip's ClipLoss by the fused losses, against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_ops.adapters.open_clip import ClipLoss
from tests.adapters import formulas
from tests.adapters.formulas import features, gradients

EXACT: Any = {"rtol": 1e-10, "atol": 1e-12}  # what rounding in float64 leaves at a scale of 100


def towers(*raw: Tensor) -> list[Tensor]:
    """What open_clip's towers end in."""
    return [F.normalize(x, dim=-1) for x in raw]


@pytest.mark.parametrize("scale", [1 / 0.07, 100.0, 1.0, 0.01])
@pytest.mark.parametrize("batch", [1, 9])
def test_all_three_gradients(scale: float, batch: int) -> None:
    image, text = features(2, batch, 12)
    log_scale = torch.tensor(scale, dtype=torch.float64).log().requires_grad_()
    inputs = image, text, log_scale
    ours = ClipLoss()(*towers(image, text), log_scale.exp())
    theirs = formulas.clip(*towers(image, text), log_scale.exp())
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(gradients(ours, *inputs), gradients(theirs, *inputs), **EXACT)


def test_float32_is_near() -> None:
    image, text = features(2, 32, 64, dtype=torch.float32)
    log_scale = torch.tensor(3.0, requires_grad=True)
    inputs = image, text, log_scale
    ours = ClipLoss()(*towers(image, text), log_scale.exp())
    exact = [x.detach().double().requires_grad_() for x in inputs]
    theirs = formulas.clip(*towers(*exact[:2]), exact[2].exp())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    for one, other in zip(gradients(ours, *inputs), gradients(theirs, *exact), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_a_frozen_tower_and_a_scale_that_is_a_number() -> None:
    image, text = features(2, 9, 12)
    ours = ClipLoss()(*towers(image, text.detach()), 20.0)
    theirs = formulas.clip(*towers(image, text.detach()), torch.tensor(20.0))
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(gradients(ours, image), gradients(theirs, image), **EXACT)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_of_either_shape_gets_its_gradient(shape: tuple[int, ...]) -> None:
    scale = torch.full(shape, 10.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = gradients(ClipLoss()(*towers(*features(2, 9, 12)), scale), scale)
    assert gradient.shape == shape
    assert gradient.abs() > 1e-4


def test_a_bias_gets_a_gradient_of_zero() -> None:
    bias = torch.tensor(-10.0, requires_grad=True)
    rows = towers(*features(2, 9, 12))
    with_bias = ClipLoss()(*rows, 10.0, logit_bias=bias)
    assert torch.equal(with_bias, ClipLoss()(*rows, 10.0))
    assert gradients(with_bias, bias)[0] == 0


def test_the_dictionary_that_the_training_loop_wants() -> None:
    rows = towers(*features(2, 9, 12))
    output = ClipLoss()(*rows, 10.0, output_dict=True)
    assert output.keys() == {"contrastive_loss"}
    assert torch.equal(output["contrastive_loss"], ClipLoss()(*rows, 10.0))


def test_cached_places_follow_the_batch() -> None:
    criterion = ClipLoss(cache_labels=True)
    for batch in (9, 9, 4, 9):
        rows = towers(*features(2, batch, 12))
        torch.testing.assert_close(criterion(*rows, 10.0), ClipLoss()(*rows, 10.0), **EXACT)
        assert len(criterion.labels) == 1


def test_products_are_autocasts() -> None:
    rows = towers(*features(2, 9, 64, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = ClipLoss()(*rows, 10.0)
    assert torch.equal(under_autocast, ClipLoss()(*(x.bfloat16() for x in rows), 10.0))


def test_nan_in_gives_nan_out() -> None:
    image, text = (x.detach() for x in towers(*features(2, 9, 12)))
    image[3, 5] = torch.nan
    assert ClipLoss()(image, text, 10.0).isnan()


GOOD = [F.normalize(torch.ones(4, 8), dim=1)] * 2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ClipLoss(use_horovod=True), "use_horovod must be False"),
        (lambda: ClipLoss(rank=2, world_size=2), "rank must be below world_size, 2, got 2"),
        (lambda: ClipLoss(world_size=2)(*GOOD, 10.0), r"those of torch.distributed, \(0, 1\), got \(0, 2\)"),
        (lambda: ClipLoss()(GOOD[0], 3 * GOOD[1], 10.0), "text_features must have unit rows.* by 2; pass"),
        (lambda: ClipLoss()(GOOD[0], GOOD[1][:3], 10.0), r"text_features must be \(B, D\) as image_features"),
        (lambda: ClipLoss()(GOOD[0][:0], GOOD[1][:0], 10.0), "image_features must not be empty"),
        (lambda: ClipLoss()(*GOOD, torch.tensor(-1.0)), "logit_scale must be finite and > 0, got -1.0"),
        (lambda: ClipLoss()(*GOOD, torch.ones(2)), r"logit_scale must be one number, got shape \(2,\)"),
    ],
)
def test_what_is_wrong_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
