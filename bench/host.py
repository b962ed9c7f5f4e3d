"""`python -m bench.host`: what the host does for a step, on a driver that launches nothing.

A GPU is not needed: kernels are compiled and bound, PyTorch's part runs on small tensors of the CPU, and the
driver returns from a launch at once. On a GPU add to it what the driver's own launch costs, 2 to 3 µs, and
what PyTorch's allocator and its kernels for GPUs cost more than those for CPUs.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import gc
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.cases import PROBLEMS, Case, Inputs, Loss, implementation, inputs, step
from tests.gpu_emulator import driver

BATCH, KEYS = 32, 2048  # few, so that the CPU has next to nothing to compute in what is PyTorch's
MULTIPROCESSORS = 132
LOOPS, CALLS = 300, 5  # short, so that some are not interrupted on a busy machine


class Times(NamedTuple):
    """µs of a call: over loops of calls, the median, and the least, which a busy machine disturbs less."""

    median: float
    least: float

    def __str__(self) -> str:
        return f"{self.median:.0f} ({self.least:.0f})"


def measure(call: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Times:
    """Times of `call`; what prepares a loop of calls of it is not counted."""
    times = []
    for _ in range(LOOPS):
        prepare()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return Times(statistics.median(times), min(times))


class _Same(torch.autograd.Function):
    """What of PyTorch's own a loss needs at least: a function of ours."""

    @staticmethod
    def forward(ctx: Any, query: Tensor) -> Tensor:
        return query.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def tell(name: str, loss: Loss, tensors: Inputs, launch_count: Callable[[], int]) -> None:
    """Prints what a step takes, its forward and its backward, each apart."""
    step(loss, *tensors)
    before = launch_count()
    step(loss, *tensors)
    launches = launch_count() - before
    made: list[Tensor] = []

    def prepare() -> None:
        made.extend(loss(*tensors) for _ in range(CALLS))

    def backward() -> None:
        for tensor in tensors:
            tensor.grad = None
        made.pop().backward()

    whole, forward = measure(lambda: step(loss, *tensors)), measure(lambda: loss(*tensors))
    print(
        f"{name:12} {whole!s:>12} {forward!s:>12} {measure(backward, prepare)!s:>12} {launches:9}", flush=True
    )


def profile(loss: Loss, tensors: Inputs, calls: int = 2000) -> None:
    with cProfile.Profile() as profiler:
        for _ in range(calls):
            step(loss, *tensors)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


def _keep_freed_memory() -> None:
    """As PyTorch's allocator for GPUs does: else each large tensor would be a system call or two."""
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
    for parameter in (trim_threshold, mmap_threshold):
        libc.mallopt(parameter, 1 << 30)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("losses", nargs="*", choices=[[], *PROBLEMS], help="which; by default all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    parser.add_argument("--architecture", choices=tuple(driver.CAPABILITIES), default="sm_90")
    parser.add_argument("--profile", action="store_true", help="where the time of each goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _keep_freed_memory()
    launch_count = driver.start_without_launches(arguments.architecture, MULTIPROCESSORS)
    gc.disable()
    print("µs of the host: median (least)")
    print(f"{'loss':12} {'step':>12} {'forward':>12} {'backward':>12} {'launches':>9}")
    tell("none", lambda x: _Same.apply(x).mean(), (torch.ones(BATCH, requires_grad=True),), launch_count)
    for name in arguments.losses or PROBLEMS:
        keys = 2 * BATCH if PROBLEMS[name].among_rows else KEYS
        case = Case(name, arguments.backend, arguments.dtype, 2 * BATCH if keys < KEYS else BATCH, keys)
        loss, tensors = implementation(case), inputs(case, "cpu")
        tell(name, loss, tensors, launch_count)
        if arguments.profile:
            profile(loss, tensors)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
