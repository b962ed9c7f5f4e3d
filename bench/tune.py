"""Finds the fastest tiles for the GPU at hand: `python -m bench.tune half 128`.

First the statistics' tiles vary beside the gradient's of the table, then the gradient's beside the best of
those; each is timed as a whole step, by graph replay over inputs that the cache has forgotten. Prints a line
for the table in kernels/_tiles.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Iterator

import torch
import triton
from contrastive_ops.kernels import _co2
from contrastive_ops.kernels._tiles import Tiles, select_tiles

from bench.cases import Case, implementation, inputs, step
from bench.gpu import copied, graph_times_ms, sets_beyond_cache

DTYPES = {"half": "bfloat16", "tf32": "float32", "tf32x3": "float32"}


def candidates(start: Tiles, precision: str, dim: int) -> Iterator[Tiles]:
    padded = max(16, triton.next_power_of_2(dim))
    depths = {min(depth, padded) for depth in ((64, 128, 256) if precision == "half" else (16, 32))}
    widths = (start.width, 128, 256) if start.width and dim > min(depths) else (start.width,)
    for rows, keys, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)):
        for depth, width, programs in itertools.product(sorted(depths), sorted(set(widths)), (1, 2, 3)):
            yield Tiles(rows, keys, depth, warps, stages, programs, width)


def best(role: int, pair: list[Tiles], case: Case, precision: str) -> list[tuple[float, Tiles]]:
    """Times of all candidates for the statistics (role 0) or the gradient (1), the fastest first."""
    first = inputs(case, "cuda")
    sets = [first, *(copied(first) for _ in range(sets_beyond_cache(first) - 1))]
    loss = implementation(case)
    times = []
    impossible = set()
    for tiles in candidates(pair[role], precision, case.D):
        shape = dataclasses.replace(tiles, programs=1)
        if shape in impossible:
            continue
        chosen = list(pair)
        chosen[role] = tiles
        _co2.select_tiles = lambda *_, chosen=chosen: tuple(chosen)
        _co2._plan.cache_clear()
        try:
            step(loss, *first)
            torch.cuda.synchronize()
        except (triton.runtime.errors.OutOfResources, triton.CompilationError, RuntimeError) as error:
            impossible.add(shape)
            print(f"{tiles}: {type(error).__name__}", flush=True)
            continue
        ms = statistics.median(graph_times_ms(loss, sets, seconds=0.05))
        times.append((ms, tiles))
        print(f"{tiles}: {ms:.4f} ms", flush=True)
    return sorted(times, key=lambda each: each[0])


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
    pair = list(select_tiles(capability, arguments.precision, arguments.dim))
    before = statistics.median(graph_times_ms(implementation(case), [inputs(case, "cuda")] * 4))
    for role in (0, 1):
        times = best(role, pair, case, arguments.precision)
        pair[role] = times[0][1]
        print(f"\nThe best five of {len(times)}:")
        for ms, tiles in times[:5]:
            print(f"  {ms:.4f} ms  {tiles}")
    after = times[0][0]
    print(f"\nThe table's: {before:.4f} ms (inputs in the cache). The best: {after:.4f} ms")
    print(f'("{arguments.precision}", {arguments.dim}): ({pair[0]!r}, {pair[1]!r}),')


if __name__ == "__main__":
    main()
