"""Times on a CPU, by pytest-benchmark, and the memory that goes with them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ceilings
from bench.cases import Case, implementation, inputs, step
from bench.records import Result, record, write
from train_ref.memory import PeakMemory, in_fresh_process


def run(machine: dict[str, Any], chosen: Callable[[str], bool], output: Path) -> int:
    """Measure the chosen cases, and write them down together. The promises among the chosen tests are kept
    or not: returns pytest's exit status.

    Args:
        machine: as results tell it.
        chosen: whether a test of that name is to be run; a case's has the case in it.
        output: a JSON file.
    """
    print("Measuring what the machine can do at best", flush=True)
    limits = ceilings.measure()
    status, benchmarks = timings(chosen)
    records = [record(case, measured(case, stats), limits) for case, stats in benchmarks]
    result: Result = {"machine": machine, "ceilings": limits, "records": records}
    write(result, output)
    return status


def timings(chosen: Callable[[str], bool]) -> tuple[int, list[tuple[Case, dict[str, Any]]]]:
    """pytest's exit status, and of each case pytest-benchmark's statistics, in seconds."""

    class Choice:
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            items[:] = [item for item in items if chosen(item.name)]

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "timings.json")
        status = pytest.main(
            [
                str(Path(__file__).with_name("test_losses.py")),
                f"--benchmark-json={file}",
                "--benchmark-columns=median,iqr,rounds",
            ],
            plugins=[Choice()],
        )
        if not file.exists():  # no test ran; pytest has said why
            raise SystemExit(status)
        benchmarks = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
        return int(status), [(Case(**each["extra_info"]), each["stats"]) for each in benchmarks]


def measured(case: Case, stats: dict[str, Any]) -> dict[str, Any]:
    """The measured fields of a record."""
    try:
        peak_mib = round(in_fresh_process(peak_extra_mib, case), 1)
    except BrokenProcessPool:  # there was not enough of it
        peak_mib = None
    print(f"{case}: peak memory {peak_mib} MiB", flush=True)
    median_ms = round(stats["median"] * 1e3, 4)
    return {
        "ms": median_ms,
        "ms_all": [round(seconds * 1e3, 4) for seconds in stats["data"]],
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
