"""Times of the losses over a queue, and the ratios that are promised of them.

python -m pytest bench                 all cases, a quarter of an hour on two cores
python -m pytest bench -k "K4096"      some of them
python -m bench                        all cases, with memory, ceilings and a report
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial

import cpuinfo
import pytest
import torch

from bench.cases import GRIDS, Case, grid, implementation, inputs, step


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
    "case", [case for case in grid() if (case.dtype, case.B, case.K) == ("float32", 256, 4096)], ids=str
)
def test_implementations_compute_the_same(case: Case) -> None:
    query, key, queue = inputs(case)
    step(implementation(case), query, key, queue)
    expected = query.detach().double().requires_grad_()
    step(implementation(dataclasses.replace(case, impl="eager")), expected, key.double(), queue.double())
    torch.testing.assert_close(query.grad.double(), expected.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", GRIDS["cpu"].fused)
def test_ratios_at_B256_K65536(backend: str, capsys: pytest.CaptureFixture) -> None:
    """Fused CO2 in float32 is 5 times faster than eager and takes at most a quarter more than its matrix
    products alone; in bfloat16, where the processor multiplies that, 8 times faster than float32 eager."""
    case = Case("co2", backend, "float32", B=256, K=65536)
    half = dataclasses.replace(case, dtype="bfloat16")
    eager = dataclasses.replace(case, impl="eager")
    fused_s, half_s, eager_s, products_s = interleaved(
        *(partial(step, implementation(each), *inputs(each)) for each in (case, half, eager)), products(case)
    )
    with capsys.disabled():
        print(
            f"\n{case}: {fused_s * 1e3:.0f} ms, {eager_s / fused_s:.2f} × faster than eager, "
            f"{fused_s / products_s:.2f} × the time of its matrix products; "
            f"bfloat16: {half_s * 1e3:.0f} ms, {eager_s / half_s:.2f} × faster than float32 eager"
        )
    assert eager_s / fused_s >= 5
    assert fused_s / products_s <= 1.25
    if {"avx512_bf16", "amx_bf16"} & set(cpuinfo.get_cpu_info()["flags"]):
        assert eager_s / half_s >= 8


def products(case: Case) -> Callable[[], None]:
    """The matrix products of a CO2 step and nothing else, into memory that is there already."""
    query, key, queue = (x.detach() for x in inputs(case))
    logits, gradient = torch.empty(case.B, case.K), torch.empty(case.B, case.D)

    def run() -> None:
        for rows in (query, key, query, key):
            torch.mm(rows, queue.T, out=logits)
        torch.mm(logits, queue, out=gradient)

    return run


def interleaved(*runs: Callable[[], None], rounds: int = 7) -> list[float]:
    """Median seconds of each, taken in turns so that a machine that slows down slows all of them."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + rounds):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in seconds]  # the first of each warms up
