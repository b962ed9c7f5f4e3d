"""Times of the losses, and the ratios that are promised of them.

python -m bench                        all cases by turns, memory, promises and a report
python -m bench --match K4096          some of them
python -m pytest bench/test_losses.py  for one's own comparison, with what pytest-benchmark has for it:
    --benchmark-save NAME before a change, --benchmark-compare after it
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import cpuinfo
import pytest
import torch

from bench.cases import (
    GRIDS,
    PROBLEMS,
    WITHOUT_CONSISTENCY_GRADIENT,
    Case,
    grid,
    implementation,
    inputs,
    step,
)
from bench.turns import seconds_by_turns


def rounds(case: Case) -> int:
    """Twenty for what takes milliseconds, three for what takes ten seconds."""
    return max(3, min(20, 2**27 // (case.B * case.K)))


@pytest.mark.parametrize("case", list(grid()), ids=str)
def test_step(benchmark, case: Case) -> None:
    benchmark.group = f"{case.loss} {case.dtype} B={case.B} K={case.K} D={case.D}"
    benchmark.extra_info.update(dataclasses.asdict(case))
    arguments = (implementation(case), *inputs(case))
    benchmark.pedantic(step, args=arguments, rounds=rounds(case), warmup_rounds=1)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in grid()
        if case.dtype == "float32" and case.K == 4096 and case.problem.headline[0] == case.B
    ],
    ids=str,
)
def test_implementations_compute_the_same(case: Case) -> None:
    """Gradients like eager's; a language model's loss is ConIC without compensation and consistency, and what
    lightly's CO2Regularizer adds has none."""
    tensors = inputs(case)
    step(implementation(case), *tensors)
    exact = tuple(
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in tensors
    )
    eager_loss = implementation(dataclasses.replace(case, impl="eager"))
    if (case.loss, case.impl) in WITHOUT_CONSISTENCY_GRADIENT:
        eager_loss = implementation(dataclasses.replace(case, loss="info_nce", impl="eager"))
    if case.impl == "linear_cross_entropy":
        plain = partial(case.problem.eager, temperature=0.1, consistency_weight=0.0)

        def eager_loss(*tensors: torch.Tensor) -> torch.Tensor:
            return plain(*tensors) / len(tensors[0])  # of the mean over views, not their sum

    step(eager_loss, *exact)
    for actual, eager in zip(tensors, exact, strict=True):
        if actual.requires_grad:
            assert (actual.grad - eager.grad).norm() <= 1e-4 * eager.grad.norm()


class Promise(NamedTuple):
    """What holds of a loss at its headline size."""

    faster: float  # times as fast as eager float32, at least
    faster_in_half: float  # the same in bfloat16, where the processor multiplies that
    of_products: float  # times the time of its matrix products, at most


PROMISES = {
    "co2": Promise(faster=5, faster_in_half=8, of_products=1.25),
    "nt_xent": Promise(faster=4, faster_in_half=6, of_products=1),
    "nt_xent_co2": Promise(faster=10, faster_in_half=15, of_products=1),
    "conic": Promise(faster=2.2, faster_in_half=4, of_products=1.25),
}


@pytest.mark.parametrize("loss", PROMISES)
@pytest.mark.parametrize("backend", GRIDS["cpu"].fused)
def test_ratios_at_full_size(loss: str, backend: str, capsys: pytest.CaptureFixture) -> None:
    """In float32 and, where the processor multiplies that, in bfloat16 beside eager float32."""
    case = Case(loss, backend, "float32", *PROBLEMS[loss].headline)
    half = dataclasses.replace(case, dtype="bfloat16")
    eager = dataclasses.replace(case, impl="eager")
    fused_s, half_s, eager_s, products_s = interleaved(
        *(partial(step, implementation(each), *inputs(each)) for each in (case, half, eager)),
        products(case),
    )
    with capsys.disabled():
        print(
            f"\n{case}: {fused_s * 1e3:.0f} ms, {eager_s / fused_s:.2f} × faster than eager, "
            f"{fused_s / products_s:.2f} × the time of its matrix products; "
            f"bfloat16: {half_s * 1e3:.0f} ms, {eager_s / half_s:.2f} × faster than float32 eager"
        )
    promise = PROMISES[loss]
    assert eager_s / fused_s >= promise.faster
    assert fused_s / products_s <= promise.of_products
    if {"avx512_bf16", "amx_bf16"} & set(cpuinfo.get_cpu_info()["flags"]):
        assert eager_s / half_s >= promise.faster_in_half


def products(case: Case) -> Callable[[], None]:
    """The matrix products of a step and nothing else, into memory that is there already."""
    rows, keys = torch.randn(case.B, case.D), torch.randn(case.K, case.D)
    logits = torch.empty(case.B, case.K)
    rows_gradient, keys_gradient = torch.empty_like(rows), torch.empty_like(keys)

    def run() -> None:
        if case.loss == "conic":
            torch.mm(logits.T, rows, out=keys_gradient)
        for _ in range(case.problem.products - (2 if case.loss == "conic" else 1)):
            torch.mm(rows, keys.T, out=logits)
        torch.mm(logits, keys, out=rows_gradient)

    return run


def interleaved(*runs: Callable[[], None], rounds: int = 7) -> list[float]:
    """Median seconds of each, by turns."""
    return [statistics.median(times) for times in seconds_by_turns(runs, (rounds, rounds), 0)]
