"""Finds the fastest tiles for the GPU at hand: `python -m bench.tune half 128`.

First the statistics' tiles vary beside the gradient's of the table, then the gradient's beside the best of
those; each is timed as a whole step, by graph replay over inputs that the cache has forgotten. Prints the
lines for the table in kernels/_tiles.py.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator

import torch
import triton
from contrastive_ops.kernels._tiles import OTHER, TABLES, entries, select

from bench.cases import Case, implementation, inputs, step
from bench.gpu import copied, graph_times_ms, sets_beyond_cache
from contrastive_ops.gpu.launch import forget_plans
from contrastive_ops.gpu.tiles import Table, Tiling

DTYPES = {"half": "bfloat16", "tf32": "float32", "tf32x3": "float32"}


def candidates(start: Tiling, precision: str, dim: int) -> Iterator[Tiling]:
    padded = max(16, triton.next_power_of_2(dim))
    depths = {min(depth, padded) for depth in ((64, 128, 256) if precision == "half" else (16, 32))}
    widths = (start.width, 128, 256) if start.width and dim > min(depths) else (start.width,)
    for held, walked, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)):
        for depth, width, programs in itertools.product(sorted(depths), sorted(set(widths)), (1, 2, 3)):
            yield Tiling(held, walked, depth, width, warps, stages, programs)


def best(name: str, table: Table, case: Case, precision: str) -> list[tuple[float, Tiling]]:
    """Times of all candidates for a kernel, the fastest first; leaves that one in the table."""
    capability = torch.cuda.get_device_capability()
    line = min(dim for of, dim in entries(name, capability) if of == precision and dim >= case.D)
    first = inputs(case, "cuda")
    sets = [first, *(copied(first) for _ in range(sets_beyond_cache(first) - 1))]
    loss = implementation(case)
    times = []
    impossible = set()
    for tiling in candidates(table[name, precision, line], precision, case.D):
        if tiling._replace(programs=1) in impossible:
            continue
        table[name, precision, line] = tiling
        forget_plans()
        try:
            step(loss, *first)
            torch.cuda.synchronize()
        except (triton.TritonError, RuntimeError) as error:  # ptxas and the compiler fail, or it does not fit
            impossible.add(tiling._replace(programs=1))
            print(f"{tiling}: {type(error).__name__}", flush=True)
            continue
        ms = statistics.median(graph_times_ms(loss, sets, seconds=0.05))
        times.append((ms, tiling))
        print(f"{tiling}: {ms:.4f} ms", flush=True)
    if not times:
        raise SystemExit(f"none of the tiles of {name} compiles and runs for {precision} and D = {case.D}")
    times.sort(key=lambda each: each[0])
    table[name, precision, line] = times[0][1]
    forget_plans()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("precision", choices=DTYPES)
    parser.add_argument("dim", type=int)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--keys", type=int, default=65536)
    arguments = parser.parse_args()
    if arguments.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    case = Case("co2", "triton", DTYPES[arguments.precision], arguments.batch, arguments.keys, arguments.dim)
    capability = torch.cuda.get_device_capability()
    table = TABLES.setdefault(capability, dict(OTHER))
    before = statistics.median(graph_times_ms(implementation(case), [inputs(case, "cuda")] * 4))
    for name in ("co2.statistics", "co2.gradient"):
        times = best(name, table, case, arguments.precision)
        print(f"\nThe best five of {len(times)}:")
        for ms, tiling in times[:5]:
            print(f"  {ms:.4f} ms  {tiling}")
    print(f"\nThe table's: {before:.4f} ms (inputs in the cache). The best: {times[0][0]:.4f} ms")
    for name in ("co2.statistics", "co2.gradient"):
        print(
            name,
            arguments.precision,
            arguments.dim,
            *select(name, capability, arguments.precision, arguments.dim),
        )


if __name__ == "__main__":
    main()
