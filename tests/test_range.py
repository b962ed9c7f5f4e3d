"""Numbers far from the papers': a loss is right, or refuses them by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from contrastive_ops import co2_loss, conic_loss, consistency_loss, info_nce_loss, nt_xent_loss
from tests.cases import Case, ConICCase, NTXentCase, require
from tests.oracles import (
    conic_loss_and_gradients,
    distance,
    loss_and_gradient,
    nt_xent_loss_and_gradients,
)
from train_ref.eager import eager_co2, eager_conic, eager_nt_xent

# For each loss and each of its temperatures: the loss, the same in eager PyTorch with the temperature's name
# there, and what makes a call of either.
_QUEUE = (loss_and_gradient, Case(batch=24, keys=60))
_PAIRS = (nt_xent_loss_and_gradients, NTXentCase(batch=24))
_CLASSES = (conic_loss_and_gradients, ConICCase(batch=24))
_CONSISTENCY = partial(eager_co2, instance_weight=0.0, consistency_weight=1.0)
TEMPERATURES: dict[tuple[str, str], Any] = {
    ("co2", "temperature"): (co2_loss, eager_co2, "temperature", *_QUEUE),
    ("co2", "consistency_temperature"): (co2_loss, eager_co2, "consistency_temperature", *_QUEUE),
    ("info_nce", "temperature"): (
        info_nce_loss, partial(eager_co2, consistency_weight=0.0), "temperature", *_QUEUE
    ),
    ("consistency", "temperature"): (consistency_loss, _CONSISTENCY, "consistency_temperature", *_QUEUE),
    ("nt_xent", "temperature"): (nt_xent_loss, eager_nt_xent, "temperature", *_PAIRS),
    ("nt_xent", "consistency_temperature"): (
        partial(nt_xent_loss, consistency_weight=1.0), partial(eager_nt_xent, consistency_weight=1.0),
        "consistency_temperature", *_PAIRS,
    ),
    ("conic", "temperature"): (conic_loss, eager_conic, "temperature", *_CLASSES),
}  # fmt: skip
WEIGHTS = [
    name for name in TEMPERATURES if name[0] in ("co2", "nt_xent", "conic") and name[1] == "temperature"
]
DTYPES = (torch.float32, torch.float64)


def call(name: tuple[str, str], dtype: torch.dtype, **settings: Any) -> Any:
    loss, *_, case = TEMPERATURES[name]
    return loss(*case.replace(dtype=dtype).tensors(), **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "value", [5e-324, 1e-300, 1e-46, 1e-40, 1e-38, 1e-30, 9e-7, 1.1e6, 1e30, 1e38, 1e39, 1e300]
)
@pytest.mark.parametrize("name", TEMPERATURES)
def test_temperatures_out_of_range_are_refused(
    backend: str, name: tuple[str, str], value: float, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=rf"^{name[1]} must be from 1e-06 to 1e\+06, got "):
        call(name, dtype, **{name[1]: value}, backend=backend)


@pytest.mark.parametrize("value", [1.1e6, 1e30, 1e39, 1e300])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_out_of_range_are_refused(name: tuple[str, str], value: float) -> None:
    with pytest.raises(ValueError, match=r"^consistency_weight must be at most 1e\+06, got "):
        call(name, torch.float32, consistency_weight=value)


@pytest.mark.parametrize("name", TEMPERATURES)
def test_numbers_that_are_none_keep_their_messages(name: tuple[str, str]) -> None:
    for value in (0, -1, float("nan"), float("inf"), 10**400):
        with pytest.raises(ValueError, match=f"{name[1]} must be finite and > 0, got"):
            call(name, torch.float32, **{name[1]: value})


@pytest.mark.skipif(np.finfo(np.longdouble).maxexp <= 1024, reason="NumPy has nothing longer than float64")
def test_numbers_that_python_rounds_to_nothing_or_infinity_are_refused() -> None:
    for value in (np.longdouble("1e-400"), np.longdouble("1e400")):
        with pytest.raises(ValueError, match="temperature must be"):
            call(("info_nce", "temperature"), torch.float32, temperature=value)


def test_more_instances_than_any_number_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_instances must be an int64, got 1000"):
        call(("conic", "temperature"), torch.float32, num_instances=10**400)


def results(
    name: tuple[str, str], dtype: torch.dtype, backend: str, **settings: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Losses and gradients, fused, in eager PyTorch of that dtype, and in float64."""
    loss, eager, in_eager, evaluate, case = TEMPERATURES[name]
    require(backend, dtype)
    first, *others = case.replace(dtype=dtype).tensors()
    double = [x.double() if x.is_floating_point() else x for x in (first, *others)]
    of_eager = {in_eager if setting == name[1] else setting: value for setting, value in settings.items()}
    return (
        evaluate(partial(loss, backend=backend), first, *others, **settings),
        evaluate(eager, first, *others, **of_eager),
        evaluate(eager, *double, **of_eager),
    )


def check(actual: list[Tensor], eager: list[Tensor], expected: list[Tensor], allowed: Callable) -> None:
    for a, e, x in zip(actual, eager, expected, strict=True):
        assert distance(a, x) <= 2 * distance(e, x) + allowed(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1e-6, 3e-6, 1e-5, 1e-4, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("name", TEMPERATURES)
def test_temperatures_in_range_are_right(
    backend: str, name: tuple[str, str], value: float, dtype: torch.dtype
) -> None:
    """Finite, and no further from float64 than what a rounding of a similarity does to a logit."""
    of_logit = torch.finfo(dtype).eps * max(1, 1 / value)
    check(
        *results(name, dtype, backend, **{name[1]: value}),
        lambda x: 10 * of_logit * x.norm() + torch.finfo(dtype).eps * len(x) ** 0.5,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [5e-324, 1e-300, 1e-45, 1e-39, 1e-20, 1e3, 1e6])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_in_range_are_right(
    backend: str, name: tuple[str, str], value: float, dtype: torch.dtype
) -> None:
    check(
        *results(name, dtype, backend, consistency_weight=value),
        lambda x: 30 * torch.finfo(dtype).eps * x.norm() + 1e-12,
    )
