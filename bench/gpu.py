"""Times on a GPU, by its own clock, of steps that a graph replays: what launching costs is told apart.

Every record has three times. `ms`: the GPU's, with inputs that the second-level cache has forgotten.
`warm_ms`: the same on one set of inputs over and over. `wall_ms`: the host's, of plain calls one after the
other, which is the GPU's time or the host's own, whichever is longer.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.cases import GRIDS, Case, Inputs, Loss, grid, implementation, inputs, step
from bench.records import begun, missing, record, write
from train_ref.memory import PeakMemory

MOST_SETS = 32


def run(machine: dict[str, Any], chosen: Callable[[str], bool], output: Path) -> int:
    """Measure the chosen cases, and write each down at once. What the file has already is not measured again.

    Args:
        machine: as results tell it.
        chosen: whether a case of that name is to be measured.
        output: a JSON file.

    Returns:
        The exit status, which is always good: what does not fit the GPU's memory is left out.
    """
    result = begun(machine, output, "cuda")
    cases = missing(result, grid("cuda"), chosen)
    compile_ahead(cases)
    for case in cases:
        try:
            measured = measure(case)
        except torch.OutOfMemoryError:
            print(f"{case}: does not fit", flush=True)
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        result["records"].append(record(case, measured, result["ceilings"]))
        write(result, output)
        print(told(case, result["records"][-1]), flush=True)
    return 0


def compile_ahead(cases: Sequence[Case]) -> None:
    """Compiles what the cases need, on all cores. It then lies in the compilers' caches on the disk."""
    cores = len(os.sched_getaffinity(0))
    # Of a size each of our kernels is one; with eager's matrices, few fit the memory side by side.
    fused = {replace(case, K=min(case.K, 65536)): None for case in cases if case.impl in GRIDS["cuda"].fused}
    compiled = [case for case in cases if case.impl == "compile" and case.B * case.K <= 1 << 27]
    for chosen, processes in ((fused, cores), (compiled, cores // 4)):
        if len(chosen) > 2 and processes > 1:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(len(chosen), processes), context) as pool:
                for _ in pool.map(_step_once, chosen):
                    pass


def _step_once(case: Case) -> None:
    try:
        step(implementation(case), *inputs(case, "cuda"))
    except RuntimeError as error:  # is met again, and told, where it is measured
        print(f"{case}: {str(error).splitlines()[0]}", flush=True)


def told(case: Case, record: dict[str, Any]) -> str:
    ms, floor = record["ms"], record["floor_ms"]
    return (
        f"{case}: {ms:.4f} ms, {ms / floor:.2f} × its floor, {case.operations / ms / 1e9:.0f} TFLOP/s, "
        f"warm {record['warm_ms']:.4f} ms, wall {record['wall_ms']:.4f} ms, {record['peak_mib']:.1f} MiB"
    )


def measure(case: Case) -> dict:
    """The measured fields of a record.

    Raises:
        torch.OutOfMemoryError: the GPU cannot hold the case.
    """
    first = inputs(case, "cuda")
    wall_ms = None
    if case.impl == "max-autotune":  # as its users call it, with graphs of its own
        torch.compiler.reset()
        own_graphs = torch.compile(case.problem.eager, dynamic=False, mode="max-autotune")
        wall_ms = wall_time_ms(partial(own_graphs, **case.problem.settings), first)
    loss = implementation(case)
    for _ in range(3):  # compiles, and fills the allocator's pools
        step(loss, *first)
    peak_mib = peak_extra_mib(loss, first)
    if wall_ms is None:
        wall_ms = wall_time_ms(loss, first)
    sets = [first, *(copied(first) for _ in range(sets_beyond_cache(first) - 1))]
    ms_all = graph_times_ms(loss, sets)
    warm_all = graph_times_ms(loss, sets[:1] * len(sets))
    return {
        "ms": round(statistics.median(ms_all), 5),
        "ms_all": [round(ms, 5) for ms in ms_all],
        "warm_ms": round(statistics.median(warm_all), 5),
        "wall_ms": round(wall_ms, 5),
        "peak_mib": round(peak_mib, 2),
    }


def sets_beyond_cache(one: Inputs) -> int:
    """How many sets of inputs it takes, one after the other, to find none of them in the cache again."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    bytes_a_set = sum(x.nbytes for x in one)
    return max(2, min(MOST_SETS, -(-3 * cache // bytes_a_set)))


def copied(one: Inputs) -> Inputs:
    return tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in one)


def forget_gradients(one: Inputs) -> None:
    for tensor in one:
        tensor.grad = None


def peak_extra_mib(loss: Loss, one: Inputs) -> float:
    """What a step allocates at its peak, beyond what was there before it, its gradient included."""
    forget_gradients(one)
    torch.cuda.synchronize()
    peak = PeakMemory(torch.device("cuda"))
    step(loss, *one)
    torch.cuda.synchronize()
    return peak.read_mib()


def wall_time_ms(loss: Loss, one: Inputs) -> float:
    """Median over a few loops of the host's time a call."""
    for _ in range(3):
        step(loss, *one)
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(loss, *one)
    torch.cuda.synchronize()
    calls = max(3, min(200, int(0.1 / (time.perf_counter() - start))))
    loops = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            step(loss, *one)
        torch.cuda.synchronize()
        loops.append((time.perf_counter() - start) / calls)
    return statistics.median(loops) * 1e3


def graph_times_ms(loss: Loss, sets: Sequence[Inputs], seconds: float = 0.3) -> list[float]:
    """GPU time a step of replays of one graph that takes a step on each set; of plain calls where a loss
    cannot be captured (because it waits for the GPU, say)."""

    def run() -> None:
        for one in sets:
            step(loss, *one)

    torch.cuda.empty_cache()  # each stream, and the graph, has a pool of its own
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    try:
        graph = torch.cuda.CUDAGraph()
        for one in sets:
            forget_gradients(one)  # they are to be allocated within the graph
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    except RuntimeError as error:
        print(f"    not captured, so timed by plain calls: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.synchronize()
        replay = run

    replay()
    times: list[float] = []
    while len(times) < 5 or (len(times) < 100 and sum(times) * len(sets) < seconds * 1e3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(sets))
    return times
