"""Times on a CPU of all implementations of a size by turns, and the memory that goes with them."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import Case, grid, implementation, inputs, step
from bench.records import begun, missing, record, write
from bench.turns import seconds_by_turns
from train_ref.memory import PeakMemory, in_fresh_process

SECONDS = 4.0  # that a size takes, but for its first steps and where a few turns take longer
TURNS = (5, 60)  # at least, at most


def run(machine: dict[str, Any], chosen: Callable[[str], bool], output: Path) -> int:
    """Measure the chosen cases, and write each size down at once. What the file has already is not measured
    again. Then see whether the promises among the chosen tests are kept: returns pytest's exit status.

    Args:
        machine: as results tell it.
        chosen: whether a case or a test of that name is to be measured.
        output: a JSON file.
    """
    result = begun(machine, output)
    cases = missing(result, grid(), chosen)
    for _, of_size in itertools.groupby(cases, lambda case: replace(case, impl="")):
        by_turns = list(of_size)
        for case, seconds in zip(by_turns, times(by_turns), strict=True):
            result["records"].append(record(case, measured(case, seconds), result["ceilings"]))
        write(result, output)
    return promises(chosen)


def times(cases: Sequence[Case]) -> list[list[float]]:
    """The seconds of steps of each case, by turns: a machine that slows down slows all of them, and each case
    finds the caches as another has left them."""
    gc.collect()
    steps = [partial(step, implementation(case), *inputs(case)) for case in cases]
    gc.freeze()  # steps make garbage, but what is there before them is not theirs to look through
    try:
        return seconds_by_turns(steps, TURNS, SECONDS)
    finally:
        gc.unfreeze()


def promises(chosen: Callable[[str], bool]) -> int:
    """pytest's exit status; none of its tests being chosen is no failure."""

    class Choice:
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            items[:] = [item for item in items if not item.name.startswith("test_step") and chosen(item.name)]

    status = pytest.main([str(Path(__file__).with_name("test_losses.py"))], plugins=[Choice()])
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else int(status)


def measured(case: Case, seconds: Sequence[float]) -> dict[str, Any]:
    """The measured fields of a record."""
    try:
        peak_mib = round(in_fresh_process(peak_extra_mib, case), 1)
    except BrokenProcessPool:  # there was not enough of it
        peak_mib = None
    median_ms = round(statistics.median(seconds) * 1e3, 4)
    print(f"{case}: {median_ms} ms, peak memory {peak_mib} MiB", flush=True)
    return {
        "ms": median_ms,
        "ms_all": [round(each * 1e3, 4) for each in seconds],
        "wall_ms": median_ms,  # the same on a CPU
        "peak_mib": peak_mib,
    }


def peak_extra_mib(case: Case) -> float:
    """Peak memory in MiB that a step takes beyond its input."""
    loss, tensors = implementation(case), inputs(case)
    # A small step first, which loads libraries and starts threads. What torch.compile makes serves one size
    # only, and compiling is not part of a step: there it is a whole one.
    step(loss, *(tensors if case.impl == "compile" else inputs(case.small())))
    for tensor in tensors:
        tensor.grad = None
    peak = PeakMemory(torch.device("cpu"))
    step(loss, *tensors)
    return peak.read_mib()
