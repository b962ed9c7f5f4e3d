"""The three steps of a loss, in every backend: over parts of the keys they give what the whole loss gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contrastive_ops._backends import BACKENDS
from contrastive_ops._contract import (
    CO2Partial,
    CO2Row,
    CO2Settings,
    ConICCoefficients,
    ConICPartial,
    ConICPositives,
    ConICSettings,
    NTXentCoefficients,
    NTXentKeys,
    NTXentPartial,
    NTXentSettings,
)
from tests.cases import refusal, rows

Cuts = tuple[int, ...]


@pytest.fixture
def steps(backend: str) -> ModuleType:
    return import_module(BACKENDS[backend])


@pytest.fixture
def dtype(backend: str) -> torch.dtype:
    return torch.float32 if refusal(backend, torch.float64) else torch.float64


@st.composite
def cuts(draw: st.DrawFn, largest: int = 300) -> Cuts:
    """Where a matrix is cut into parts: from 0 to its number of rows."""
    count = draw(st.integers(1, largest))
    inner = draw(st.lists(st.integers(1, count), max_size=4))
    return tuple(sorted({0, count, *inner}))


def parts_of(matrix: Tensor, at: Cuts) -> Iterator[Tensor]:
    return (matrix[begin:end] for begin, end in pairwise(at))


def targets_of(target: Tensor, at: Cuts) -> Iterator[Tensor]:
    """For each part the rows of it that are named, −1 for those of other parts."""
    for begin, end in pairwise(at):
        yield torch.where((target >= begin) & (target < end), target - begin, -1)


def close(actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Equal up to the rounding of another order of the same sums, relative to the largest number."""
    bound = {torch.float64: 1e-11, torch.float32: 1e-5}[dtype]
    for a, e in zip(actual, expected, strict=True):
        off = bound * (1 + e.abs().max().item()) if e.is_floating_point() else 0.0
        torch.testing.assert_close(a.to(e.dtype), e, rtol=0, atol=off, equal_nan=True)


def of_unit(gradient: Tensor, x: Tensor) -> Tensor:
    """dx times ‖x‖, which are the sizes of dx̂: its rounding is divided by ‖x‖ where dx is nearly nothing."""
    return gradient * x.norm(dim=-1, keepdim=True)


@given(
    batch=st.integers(1, 40),
    dim=st.sampled_from([1, 7, 64]),
    at=cuts(),
    terms=st.sampled_from([(1.0, 0.3), (1.0, 0.0), (0.0, 2.0)]),
    include_positive=st.booleans(),
    normalize=st.booleans(),
)
def test_co2_over_parts_of_the_queue(
    steps: ModuleType,
    dtype: torch.dtype,
    batch: int,
    dim: int,
    at: Cuts,
    terms: tuple[float, float],
    include_positive: bool,
    normalize: bool,
) -> None:
    query, key = rows(batch, dim, 0, dtype), rows(batch, dim, 1, dtype)
    if not normalize:  # Longer rows have logits that multiply the rounding of float32 by thousands.
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    queue = F.normalize(rows(at[-1], dim, 2, dtype), dim=1)
    queue[at[-1] // 2] = 3 * key[0]  # which stands out of its part
    settings = CO2Settings(0.2, 0.1, *terms, include_positive, normalize)
    *whole, gradient = steps.co2(query, key, queue, settings, True)

    partials = []
    for part in parts_of(queue, at):
        partial, known = steps.co2_statistics(query, key, part, settings)
        assert partial.shape[1:] == (batch, len(CO2Partial._fields))
        assert known.shape == (batch, len(CO2Row._fields))
        partials.append(partial)
    *losses, row = steps.co2_merge(torch.cat(partials), known, settings)
    assert losses[0].dtype == torch.float64
    close(losses, whole, dtype)

    # The positive is in one part of the gradient alone.
    others = row.clone()
    others[:, CO2Row._fields.index("grad_positive")] = 0
    first, *rest = (
        steps.co2_gradient(query, key, part, others if i else row, settings)
        for i, part in enumerate(parts_of(queue, at))
    )
    close([of_unit(sum(rest, start=first), query)], [of_unit(gradient, query)], dtype)


@given(
    at=cuts(90),
    shares=cuts(90),
    dim=st.sampled_from([1, 7, 64]),
    consistency_weight=st.sampled_from([0.0, 1.5]),
    normalize=st.booleans(),
)
def test_nt_xent_of_some_rows_over_parts_of_the_keys(
    steps: ModuleType,
    dtype: torch.dtype,
    at: Cuts,
    shares: Cuts,
    dim: int,
    consistency_weight: float,
    normalize: bool,
) -> None:
    batch = at[-1]
    shares = tuple(sorted({0, batch, *(cut for cut in shares if cut < batch)}))
    views = rows(2 * batch, dim, 0, dtype).view(2, batch, dim)
    if not normalize:
        views = F.normalize(views, dim=-1)
    settings = NTXentSettings(0.3, 0.1, consistency_weight, normalize)
    *whole, statistics = steps.nt_xent(views, settings)
    grad_loss = rows(2 * batch, 1, 1, whole[0].dtype).squeeze(1)
    gradient = steps.nt_xent_gradient(grad_loss, views, statistics, settings)

    def of(per_row: Tensor, begin: int, end: int) -> Tensor:
        """What is known of the rows of some instances."""
        return per_row.view(2, batch, *per_row.shape[1:])[:, begin:end].flatten(0, 1)

    for begin, end in pairwise(shares):
        share = views[:, begin:end]
        own = torch.arange(begin, end)
        partials, gradients = [], []
        for (first, last), target in zip(pairwise(at), targets_of(own, at), strict=True):
            keys = NTXentKeys(views[:, first:last], target)
            partial, positive = steps.nt_xent_statistics(share, settings, keys)
            assert partial.shape[1:] == (2 * (end - begin), len(NTXentPartial._fields))
            partials.append(partial)
            keys = keys._replace(
                grad_loss=of(grad_loss, first, last), coefficients=of(statistics, first, last)
            )
            known = of(grad_loss, begin, end), share, of(statistics, begin, end)
            gradients.append(steps.nt_xent_gradient(*known, settings, keys))
        *losses, coefficients = steps.nt_xent_merge(torch.cat(partials), positive, settings)
        assert coefficients.shape == (2 * (end - begin), len(NTXentCoefficients._fields))
        close(losses, [of(each, begin, end) for each in whole], dtype)
        close([coefficients], [of(statistics, begin, end)], dtype)
        wanted = of_unit(gradient[:, begin:end], share)
        close([of_unit(sum(gradients[1:], start=gradients[0]), share)], [wanted], dtype)


@given(
    views_count=st.integers(1, 3),
    batch=st.integers(1, 40),
    dim=st.sampled_from([1, 7, 64]),
    at=cuts(),
    settings=st.sampled_from([ConICSettings(0.2, 2.5, 7.0), ConICSettings(0.1, 0.0)]),
)
def test_conic_over_parts_of_the_weight(
    steps: ModuleType,
    dtype: torch.dtype,
    views_count: int,
    batch: int,
    dim: int,
    at: Cuts,
    settings: ConICSettings,
) -> None:
    views = rows(views_count * batch, dim, 0, dtype).view(views_count, batch, dim)
    weight = rows(at[-1], dim, 1, dtype)
    target = torch.arange(batch) * 7 % at[-1]
    *whole, statistics = steps.conic(views, weight, target, settings)
    grad_loss = rows(batch, 1, 2, whole[0].dtype).squeeze(1)
    wanted = steps.conic_gradient(grad_loss, views, weight, target, statistics, settings, True, True)

    parts = list(zip(parts_of(weight, at), targets_of(target, at), strict=True))
    found = torch.stack([steps.conic_positives(views, *part) for part in parts])
    assert found.shape[1:] == (views_count * batch, len(ConICPositives._fields))
    elsewhere = torch.stack([own.repeat(views_count) < 0 for _, own in parts])
    assert torch.equal(found.isnan().all(-1), elsewhere)
    positives = found.nan_to_num().sum(0)
    partial = torch.cat([steps.conic_statistics(views, *part, positives, settings) for part in parts])
    assert partial.shape[1:] == (views_count * batch, len(ConICPartial._fields))
    *losses, coefficients = steps.conic_merge(partial, positives, views, settings)
    assert coefficients.shape == (views_count, batch, len(ConICCoefficients._fields))
    close(losses, whole, dtype)
    close([coefficients], [statistics], dtype)

    grad_views, grad_weight = zip(
        *(
            steps.conic_gradient(
                grad_loss, views, *part, coefficients,
                settings if i == 0 else settings._replace(consistency_weight=0.0), True, True,
            )
            for i, part in enumerate(parts)
        ),
        strict=True,
    )  # fmt: skip
    actual = sum(grad_views[1:], start=grad_views[0]), torch.cat(grad_weight)
    actual, wanted = (
        [of_unit(grad, x) for grad, x in zip(grads, (views, weight), strict=True)]
        for grads in (actual, wanted)
    )
    close(actual, wanted, dtype)


def test_a_view_whose_own_row_is_in_no_part_has_no_loss(steps: ModuleType, dtype: torch.dtype) -> None:
    views, weight = rows(8, 5, 0, dtype).view(2, 4, 5), rows(6, 5, 1, dtype)
    target, settings = torch.tensor([3, -1, 0, 5]), ConICSettings(0.5, 2.5, 3.0)
    positives = steps.conic_positives(views, weight, target)
    partial = steps.conic_statistics(views, weight, target, positives, settings)
    loss, classification, *_ = steps.conic_merge(partial, positives, views, settings)
    expected, *_ = steps.conic(views[:, [0, 2, 3]], weight, target[[0, 2, 3]], settings)
    close([loss[[0, 2, 3]]], [expected], dtype)
    assert loss[1].isnan()
    assert classification[:, 1].isnan().all()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_equal_partials_in_equal_order_give_equal_bits(
    steps: ModuleType, dtype: torch.dtype, order: Sequence[int]
) -> None:
    query, key, queue = rows(5, 16, 0, dtype), rows(5, 16, 1, dtype), rows(300, 16, 2, dtype)
    settings = CO2Settings(0.2, 0.1, 1.0, 0.3, False, True)
    results = []
    for _ in range(2):
        parts = [steps.co2_statistics(query, key, part, settings) for part in queue.split(100)]
        partial = torch.cat([parts[i][0] for i in order])
        results.append(steps.co2_merge(partial, parts[0][1], settings))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
