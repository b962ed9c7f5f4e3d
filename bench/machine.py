"""The machine that something was measured on, as it stands in the results."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import cpuinfo
import torch

from bench.cases import PACKAGES

RESULTS = Path(__file__).with_name("results")


def describe(device: str) -> dict:
    """Of "cpu" or "cuda"; `device` in it is the name of the processor or of the GPU."""
    common = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", *PACKAGES.values())},
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short=12", "HEAD")
        + ("-dirty" if _git("status", "--porcelain") else ""),
    }
    if device == "cpu":
        return {"device": cpuinfo.get_cpu_info()["brand_raw"], **common}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        **common,
    }


OTHERS = ("-instances", "-demo")  # suffixes of results that are not the losses'


def newest_result(suffix: str = "") -> Path | None:
    """The newest result with a suffix of `OTHERS` or, without one, of the losses."""
    files = RESULTS.glob(f"*{suffix}.json")  # their names begin with the date
    return max((file for file in files if suffix or not file.stem.endswith(OTHERS)), default=None)


def result_file(machine: dict, suffix: str = "") -> Path:
    """Where what was measured on a machine is kept."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return RESULTS / f"{machine['date']}-{device}{suffix}.json"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()
