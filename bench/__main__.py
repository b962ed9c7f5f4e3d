"""`python -m bench`: measure everything on this machine, write it down, and report.

`--device cuda` measures the GPU. What is measured is written at once, on a CPU a size at a time, and what is
written already is not measured again: a run that was cut goes on where it was.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from bench import cpu, gpu, report
from bench.cases import GRIDS, PACKAGES
from bench.files import result_file
from train_ref.machine import describe

HARNESSES = {"cpu": cpu.run, "cuda": gpu.run}

# As for --match. On a CPU not what takes seconds, such as compiling or a quarter of a million keys.
QUICK = {
    "cpu": r"-(?!compile)\w+-\w+-B(256|512)-K(512|4096|65536)-",
    "cuda": r"B256-K(16384|65536)-D128|nt_xent.*-B8192-.*-D128",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=GRIDS, default="cpu")
    parser.add_argument("--quick", action="store_true", help="a check in a minute, written to build/")
    parser.add_argument("--match", default="", help="regular expression of the cases to measure")
    parser.add_argument("--output", type=Path, help="JSON file (default: bench/results/<date>-<device>.json)")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here")

    patterns = [
        re.compile(pattern) for pattern in (QUICK[device] if arguments.quick else "", arguments.match)
    ]
    machine = describe(device, PACKAGES.values())
    # The quick one is not for keeping.
    default = Path("build", "bench", "quick.json") if arguments.quick else result_file(machine)
    output = arguments.output or default
    status = HARNESSES[device](machine, lambda name: all(each.search(name) for each in patterns), output)
    if output.exists():
        report.write(output)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
