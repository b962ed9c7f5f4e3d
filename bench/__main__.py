"""`python -m bench`: measure everything on this machine, write it down, and report.

`--device cuda` measures the GPU. There each record is written as soon as it is measured, and one that is
written already is not measured again: a run that was cut goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import re
import tempfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from bench import ceilings, report
from bench.cases import GRIDS, PACKAGES, Case, grid
from bench.files import result_file
from bench.memory import peak_extra_mib
from train_ref.machine import describe

QUICK = {
    # pytest -k
    "cpu": "(B256 or (B512 and (conic or nt_xent))) and not K262144 and not K1048576 and not compile",
    # a regular expression
    "cuda": r"B256-K(16384|65536)-D128|nt_xent.*-B8192-.*-D128",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=GRIDS, default="cpu")
    parser.add_argument("--quick", action="store_true", help="a check in a minute, written to build/")
    parser.add_argument("--match", default="", help="regular expression of the cases to measure")
    parser.add_argument("--output", type=Path, help="JSON file (default: bench/results/<date>-<device>.json)")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        return measure_gpu(arguments)

    print("Measuring what the machine can do at best", flush=True)
    limits = ceilings.measure()
    status, timings = run_benchmarks(arguments.match, QUICK["cpu"] if arguments.quick else "")
    result = {
        "machine": describe("cpu", PACKAGES.values()),
        "ceilings": limits,
        "records": [record(benchmark, limits) for benchmark in timings["benchmarks"]],
    }
    output = arguments.output or default_output(result["machine"], arguments.quick)
    write(result, output)
    report.write(output)
    return status


def measure_gpu(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here")
    from bench import gpu

    machine = describe("cuda", PACKAGES.values())
    output = arguments.output or default_output(machine, arguments.quick)
    if output.exists():
        result = json.loads(output.read_text(encoding="utf-8"))
    else:
        print("Measuring what the GPU can do at best", flush=True)
        result = {"machine": machine, "ceilings": ceilings.measure("cuda"), "records": []}
    pattern = re.compile(QUICK["cuda"] if arguments.quick else arguments.match)
    done = {str(case_of(each)) for each in result["records"]}
    for case in grid("cuda"):
        if not pattern.search(str(case)) or str(case) in done:
            continue
        try:
            measured = gpu.measure(case)
        except torch.OutOfMemoryError:
            print(f"{case}: does not fit", flush=True)
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        floor = ceilings.floor_ms(case, result["ceilings"])
        result["records"].append(
            {
                **dataclasses.asdict(case),
                "direction": "forward+backward",
                **measured,
                "floor_ms": round(floor, 5),
            }
        )
        write(result, output)
        print(
            f"{case}: {measured['ms']:.4f} ms, {measured['ms'] / floor:.2f} × its floor, "
            f"{case.operations / measured['ms'] / 1e9:.0f} TFLOP/s, warm {measured['warm_ms']:.4f} ms, "
            f"wall {measured['wall_ms']:.4f} ms, {measured['peak_mib']:.1f} MiB",
            flush=True,
        )
    if result["records"]:
        report.write(output)
    return 0


def case_of(record: dict) -> Case:
    return Case(**{field.name: record[field.name] for field in dataclasses.fields(Case)})


def run_benchmarks(match: str, selection: str) -> tuple[int, dict]:
    """pytest's exit status and what pytest-benchmark wrote; `selection` is pytest's own -k."""
    pattern = re.compile(match)

    class Matching:
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            items[:] = [item for item in items if pattern.search(item.name)]

    with tempfile.TemporaryDirectory() as folder:
        timings = Path(folder, "timings.json")
        status = pytest.main(
            [
                str(Path(__file__).with_name("test_losses.py")),
                f"-k={selection}",
                f"--benchmark-json={timings}",
                "--benchmark-columns=median,iqr,rounds",
            ],
            plugins=[Matching()],
        )
        if not timings.exists():  # no test ran; pytest has said why
            raise SystemExit(status)
        return int(status), json.loads(timings.read_text(encoding="utf-8"))


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


def default_output(machine: dict, quick: bool) -> Path:
    # The quick one is not for keeping.
    return Path("build", "bench", "quick.json") if quick else result_file(machine)


def write(result: dict, output: Path) -> None:
    """JSON with a line for each record."""
    records = ",\n".join(json.dumps(each) for each in result["records"])
    head = ",\n".join(f'"{key}": {json.dumps(result[key], indent=2)}' for key in ("machine", "ceilings"))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f'{{{head},\n"records": [\n{records}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
