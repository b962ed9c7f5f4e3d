"""All that needs a GPU, in the order of its worth, for one that is had for minutes: `make gpu`.

Each part has a limit of its own, and all together have one. A part that is done is not repeated by a later
run with the same output, and the benchmarks go on where they were cut. A part that fails does not stop the
rest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench.cases import PACKAGES
from bench.files import RESULTS, result_file
from train_ref.machine import describe

CORES = len(os.sched_getaffinity(0))
# A test's compiled kernels are kept for the next: what takes long is compiling, a core each. Of a run that is
# cut, -v leaves the names of what has failed.
PYTEST = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--dist=load", f"--numprocesses={min(CORES, 14)}")
# Without peers that compile or tune for half a minute; the promises are measured against "max-autotune" too.
HEADLINES = r"^\w+-(?!max|liger|cut|inf)\w+-bfloat16-B(256-K65536|8192-K8192|1024-K65536)-D128$"
OPERATORS = tuple(
    f"tests/test_{name}.py" for name in ("launch", "co2", "conic", "nt_xent", "ops", "rows_ops", "seam")
)


class Part(NamedTuple):
    """A command of Python's.

    Attributes:
        name: of the part, and of its log.
        seconds: how long it may take.
        arguments: in which OUTPUT stands for the path of the results without a suffix.
    """

    name: str
    seconds: int
    arguments: tuple[str, ...]


PARTS = (
    Part("smoke", 60, (*PYTEST, "tests/test_gpu.py", "-k", "every_operator")),
    Part("kernels", 90, ("-m", "bench.kernels", "--output", "OUTPUT-kernels.md")),
    Part(
        "headlines", 120,
        ("-m", "bench", "--device", "cuda", "--match", HEADLINES, "--output", "OUTPUT.json"),
    ),
    Part(
        "tests", 300,
        (
            *PYTEST, "-m", "not slow", "-k", "triton or cuda or test_gpu or launch",
            "tests/test_gpu.py", *OPERATORS,
        ),
    ),
    Part("promises", 240, ("-m", "pytest", "-q", "-s", "bench/test_gpu_promises.py")),
    Part(
        "resnet18", 180,
        (
            "-m", "train_ref", "validate", "--network", "resnet18", "--accelerator", "gpu",
            "--output", "OUTPUT-resnet18",
        ),
    ),
    Part("sanitizer", 300, ("-m", "pytest", "-q", "tests/test_gpu.py", "-k", "sanitizer")),
    Part(
        "instances", 300,
        ("-m", "bench.instances", "--device", "cuda", "--output", "OUTPUT-instances.json"),
    ),
    Part("sizes", 3600, ("-m", "bench", "--device", "cuda", "--output", "OUTPUT.json")),
    Part(
        "resnet50", 900,
        (
            "-m", "train_ref", "validate", "--network", "resnet50", "--dataset", "synthetic",
            "--image_size", "224", "--batch_size", "256", "--queue_size", "65536",
            "--precision", "bf16-mixed", "--steps", "10", "--accelerator", "gpu",
            "--output", "OUTPUT-resnet50",
        ),
    ),
)  # fmt: skip


def run(part: Part, seconds: float, output: Path) -> str:
    """What came of it: "done", or why it is not. What it says goes to the log at once."""
    arguments = [argument.replace("OUTPUT", str(output)) for argument in part.arguments]
    environment = {"HYPOTHESIS_PROFILE": "few", "PYTHONUNBUFFERED": "1", **os.environ}
    with Path(f"{output}-log.txt").open("a", encoding="utf-8") as log:
        print(f"== {part.name}: {' '.join(arguments)}", file=log, flush=True)
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            process.wait()
            return f"cut after {seconds:.0f} s"
    return "done" if status == 0 else f"failed ({status})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.parts", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=7200, help="after which nothing goes on (default: 7200)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=[part.name for part in PARTS], help="parts (default: all)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder (default: {RESULTS})")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here")
    begun = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    output = arguments.output / result_file(describe("cuda", PACKAGES.values())).stem
    record = Path(f"{output}-parts.json")
    outcomes = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for part in PARTS:
        if outcomes.get(part.name) == "done" or (arguments.only and part.name not in arguments.only):
            continue
        left = begun + arguments.seconds - time.monotonic()
        if left < 10:
            break
        start = time.monotonic()
        outcomes[part.name] = run(part, min(part.seconds, left), output)
        print(f"{part.name}: {outcomes[part.name]}, {time.monotonic() - start:.0f} s", flush=True)
        record.write_text(json.dumps(outcomes, indent=2) + "\n", encoding="utf-8")
    for part in PARTS:
        print(f"{part.name:10} {outcomes.get(part.name, 'not begun')}")


if __name__ == "__main__":
    main()
