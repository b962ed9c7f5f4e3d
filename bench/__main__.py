"""`python -m bench`: measure everything on this machine, write it down, and report."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import tempfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from bench import ceilings, report
from bench.cases import Case
from bench.memory import peak_extra_mib

QUICK = "B256 and not K262144 and not K1048576 and not compile"  # pytest -k


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a check in a minute, written to build/")
    parser.add_argument("--output", type=Path, help="JSON file (default: bench/results/<date>-<device>.json)")
    arguments = parser.parse_args()

    print("Measuring what the machine can do at best", flush=True)
    limits = ceilings.measure()
    status, timings = run_benchmarks(QUICK if arguments.quick else "")
    result = {
        "machine": describe_machine(timings),
        "ceilings": limits,
        "records": [record(benchmark, limits) for benchmark in timings["benchmarks"]],
    }
    output = arguments.output or default_output(result["machine"], arguments.quick)
    write(result, output)
    report.write(output)
    return status


def run_benchmarks(selection: str) -> tuple[int, dict]:
    """pytest's exit status and what pytest-benchmark wrote."""
    with tempfile.TemporaryDirectory() as folder:
        timings = Path(folder, "timings.json")
        status = pytest.main(
            [
                str(Path(__file__).parent),
                f"-k={selection}",
                f"--benchmark-json={timings}",
                "--benchmark-columns=median,iqr,rounds",
            ]
        )
        if not timings.exists():  # no test ran; pytest has said why
            raise SystemExit(status)
        return int(status), json.loads(timings.read_text())


def record(benchmark: dict, limits: dict) -> dict:
    """One row of the results, from pytest-benchmark's; measures the memory that goes with it."""
    case = Case(**benchmark["extra_info"])
    try:
        peak_mib = round(peak_extra_mib(case), 1)
    except BrokenProcessPool:  # there was not enough of it
        peak_mib = None
    print(f"{case}: peak memory {peak_mib} MiB", flush=True)
    median_ms = benchmark["stats"]["median"] * 1e3
    return {
        **dataclasses.asdict(case),
        "direction": "forward+backward",
        "ms": round(median_ms, 4),
        "ms_all": [round(seconds * 1e3, 4) for seconds in benchmark["stats"]["data"]],
        "wall_ms": round(median_ms, 4),  # the same on a CPU
        "peak_mib": peak_mib,
        "floor_ms": round(ceilings.floor_ms(case, limits), 4),
    }


def describe_machine(timings: dict) -> dict:
    machine, commit = timings["machine_info"], timings["commit_info"]
    processor = machine["cpu"]["brand_raw"]
    return {
        "device": processor,
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{machine['system']} {machine['machine']}",
        "python": machine["python_version"],
        **{package: version(package) for package in ("torch", "triton", "lightly")},
        "date": timings["datetime"][:10],
        "commit": commit["id"][:12] + ("-dirty" if commit["dirty"] else ""),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def default_output(machine: dict, quick: bool) -> Path:
    if quick:  # not for keeping
        return Path("build", "bench", "quick.json")
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return report.RESULTS / f"{machine['date']}-{device}.json"


def write(result: dict, output: Path) -> None:
    """JSON with a line for each record."""
    records = ",\n".join(json.dumps(each) for each in result["records"])
    head = ",\n".join(f'"{key}": {json.dumps(result[key], indent=2)}' for key in ("machine", "ceilings"))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f'{{{head},\n"records": [\n{records}\n]}}\n')


if __name__ == "__main__":
    raise SystemExit(main())
