"""GPU time of each kernel of a step at the headline sizes: `python -m bench.kernels`.

The profiler's times, of steps one after the other on sets of inputs that the second-level cache has
forgotten.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import defaultdict
from pathlib import Path

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from bench.cases import GRIDS, PROBLEMS, Case, implementation, inputs, step
from bench.gpu import compile_ahead, copied, sets_beyond_cache
from train_ref.markdown import table

STEPS = 30


def headlines() -> list[Case]:
    return [
        Case(loss, impl, dtype, *problem.headline, dim)
        for loss, problem in PROBLEMS.items()
        for dtype, dims in GRIDS["cuda"].dims.items()
        for dim, impl in itertools.product(dims, GRIDS["cuda"].fused)
    ]


def times_us(case: Case) -> dict[str, tuple[float, float]]:
    """By kernel, in the order of their first launch: launches a step, and microseconds of all of them."""
    first = inputs(case, "cuda")
    sets = [first, *(copied(first) for _ in range(sets_beyond_cache(first) - 1))]
    loss = implementation(case)
    for one in sets:
        step(loss, *one)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _, one in zip(range(STEPS), itertools.cycle(sets), strict=False):
            step(loss, *one)
        torch.cuda.synchronize()
    count: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    kernels = [each for each in profiled.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    for each in sorted(kernels, key=lambda each: each.time_range.start):
        name = re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", each.name)[:60]
        count[name] += 1
        total[name] += each.time_range.elapsed_us()
    return {name: (count[name] / STEPS, total[name] / STEPS) for name in total}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--match", default="", help="regular expression of the cases to measure")
    parser.add_argument("--output", type=Path, help="a file for the tables, besides the screen")
    arguments = parser.parse_args()
    chosen = [case for case in headlines() if re.search(arguments.match, str(case))]
    compile_ahead(chosen)
    tables = []
    for case in chosen:
        times = times_us(case)
        rows = [(name, f"{launches:g}", f"{us:.2f}") for name, (launches, us) in times.items()]
        total = sum(us for _, us in times.values())
        tables.append(f"## {case}: {total:.1f} µs\n\n{table(['kernel', 'launches', 'µs'], rows)}\n")
        print(tables[-1], flush=True)
        if arguments.output:
            device = torch.cuda.get_device_name()
            versions = f"torch {torch.__version__}, Triton {triton.__version__}"
            title = f"# GPU time of each kernel: {device}, {versions}\n"
            arguments.output.write_text("\n".join([title, *tables]), encoding="utf-8")


if __name__ == "__main__":
    main()
