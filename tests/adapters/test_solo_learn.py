"""solo-learn's functions by the fused losses, against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from contrastive_ops.adapters.solo_learn import mocov2plus_loss_func, mocov3_loss_func, simclr_loss_func
from tests.adapters import formulas
from tests.adapters.formulas import features, gradients

EXACT: Any = {"rtol": 1e-11, "atol": 1e-13}  # what rounding in float64 leaves


@pytest.mark.parametrize("order", ["view by view", "image by image", "any"])
def test_simclr_takes_pairs_in_any_order(order: str) -> None:
    (z,) = features(1, 18, 12)
    indexes = {
        "view by view": torch.tensor([40, 2, 7, 11, 5, 0, 3, 9, 8]).repeat(2),
        "image by image": torch.arange(9).repeat_interleave(2),
        "any": torch.arange(9).repeat(2)[torch.randperm(18, generator=torch.Generator().manual_seed(1))],
    }[order]
    ours, theirs = simclr_loss_func(z, indexes, 0.2), formulas.simclr_by_masks(z, indexes, 0.2)
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(gradients(ours, z), gradients(theirs, z), **EXACT)


def test_simclr_holds_where_exponentials_overflow() -> None:
    (z,) = features(1, 16, 12, dtype=torch.float32)
    indexes = torch.arange(8).repeat(2)
    assert not formulas.simclr_by_masks(z, indexes, 0.005).isfinite()
    ours, theirs = simclr_loss_func(z, indexes, 0.005), formulas.simclr_by_masks(z.double(), indexes, 0.005)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("indexes", "said"),
    [
        (
            [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 3, 4],
            "must hold each index twice, got 0 3 times; for another",
        ),
        ([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], "got 0 4 times"),
        ([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 6], "got 5 1 times"),
        ([0, 1, 2], r"for two views of each image, got shapes \(12, 4\) and \(3,\)"),
    ],
)
def test_simclr_refuses_other_than_pairs(indexes: list[int], said: str) -> None:
    (z,) = features(1, 12, 4)
    with pytest.raises(ValueError, match=said):
        simclr_loss_func(z, torch.tensor(indexes))


def test_mocov2plus_takes_rows_as_they_are() -> None:
    query, key = features(2, 9, 12)
    queue = torch.randn(12, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = mocov2plus_loss_func(query, key, queue, 0.7), formulas.info_nce(query, key, queue.T, 0.7)
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(gradients(ours, query, key), gradients(theirs, query, key), **EXACT)


def test_mocov2plus_leaves_the_queue_to_be_overwritten() -> None:
    query, key = (F.normalize(x.detach(), dim=1).requires_grad_() for x in features(2, 9, 12))
    queue = F.normalize(torch.randn(12, 50, dtype=torch.float64), dim=0)
    theirs = gradients(formulas.info_nce(query, key, queue.T.clone(), 0.1), query, key)
    loss = mocov2plus_loss_func(query, key, queue)
    queue.zero_()
    torch.testing.assert_close(gradients(loss, query, key), theirs, **EXACT)


def test_mocov2plus_multiplies_as_autocast_does() -> None:
    query, key = (F.normalize(x.detach(), dim=1) for x in features(2, 9, 64, dtype=torch.float32))
    queue = F.normalize(torch.randn(64, 50), dim=0)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = mocov2plus_loss_func(query, key, queue)
    half = (x.bfloat16() for x in (query, key, queue))
    assert torch.equal(under_autocast, mocov2plus_loss_func(*half))


def test_mocov2plus_refuses_a_queue_with_a_gradient() -> None:
    query, key = features(2, 4, 8)
    with pytest.raises(ValueError, match="queue gets no gradient"):
        mocov2plus_loss_func(query, key, torch.randn(8, 20, dtype=torch.float64, requires_grad=True))


def test_mocov3_has_both_gradients_and_the_factor() -> None:
    query, key = features(2, 9, 12)
    ours, theirs = mocov3_loss_func(query, key, 0.3), formulas.among_keys(query, key, 0.3) * 0.6
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(gradients(ours, query, key), gradients(theirs, query, key), **EXACT)


def test_mocov3_refuses_unequal_batches() -> None:
    with pytest.raises(ValueError, match=r"query and key must both be \(B, D\)"):
        mocov3_loss_func(torch.ones(4, 8), torch.ones(5, 8))
