"""`python -m bench.host`: what the host does for a step, on a driver that launches nothing.

A GPU is not needed: kernels are compiled and bound, PyTorch's part runs on small tensors of the CPU, and the
driver returns from a launch at once. On a GPU add to it what the driver's own launch costs, 2 to 3 µs, and
what PyTorch's allocator and its kernels for GPUs cost more than those for CPUs.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import PROBLEMS, Case, Inputs, Loss, implementation, inputs, step
from tests.gpu_emulator import driver

BATCH, KEYS = 32, 2048  # few, so that the CPU has next to nothing to compute in what is PyTorch's
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class HostTime:
    """µs of a step, medians of a few loops, and how many kernels of the backend it launches."""

    forward: float
    backward: float
    step: float
    launches: int


def measure(case: Case, launch_count: Callable[[], int], loops: int = 15) -> HostTime:
    loss, tensors = implementation(case), inputs(case, "cpu")
    step(loss, *tensors)
    before = launch_count()
    step(loss, *tensors)
    launches = launch_count() - before
    return HostTime(
        forward=_median_us(lambda: loss(*tensors), loops),
        backward=_backward_us(loss, tensors, loops),
        step=_median_us(lambda: step(loss, *tensors), loops),
        launches=launches,
    )


def _median_us(call: Callable[[], object], loops: int, calls: int = 100) -> float:
    times = []
    for _ in range(loops):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e6


def _backward_us(loss: Loss, tensors: Inputs, loops: int, calls: int = 100) -> float:
    """Of losses that are made beforehand, so that the forward is not measured."""
    times = []
    for _ in range(loops):
        made: list[Tensor] = [loss(*tensors) for _ in range(calls)]
        start = time.perf_counter()
        for each in made:
            for tensor in tensors:
                tensor.grad = None
            each.backward()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e6


def profile(case: Case, calls: int = 2000) -> None:
    loss, tensors = implementation(case), inputs(case, "cpu")
    step(loss, *tensors)
    with cProfile.Profile() as profiler:
        for _ in range(calls):
            step(loss, *tensors)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("losses", nargs="*", choices=[[], *PROBLEMS], help="which; by default all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--architecture", choices=("sm_80", "sm_90"), default="sm_90")
    parser.add_argument("--profile", action="store_true", help="where the time of each goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    launch_count = driver.start_without_launches(arguments.architecture, MULTIPROCESSORS)
    gc.disable()
    for name in arguments.losses or PROBLEMS:
        keys = 2 * BATCH if PROBLEMS[name].among_rows else KEYS
        case = Case(name, "triton", arguments.dtype, 2 * BATCH if keys < KEYS else BATCH, keys)
        if arguments.profile:
            profile(case)
            continue
        found = measure(case, launch_count)
        print(
            f"{name}: {found.step:.0f} µs a step, forward {found.forward:.0f}, backward {found.backward:.0f}, "
            f"{found.launches} launches",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
