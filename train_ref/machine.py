"""The machine that something was measured on, as results tell it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def describe(device: str, packages: Iterable[str] = ()) -> dict[str, Any]:
    """What a result depends on beside its settings.

    Args:
        device: "cpu" or "cuda"; `device` in the description is the name of the processor or of the GPU.
        packages: names of distributions whose versions are told besides torch's and triton's.

    Returns:
        Names and numbers, ready for JSON; None where something is not known.
    """
    import cpuinfo  # runs CPUID for a second when it is asked

    now = datetime.datetime.now()
    common = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", *packages)},
        "date": now.date().isoformat(),
        "time": now.strftime("%H:%M"),
        "commit": _commit(),
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


def version(package: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that this code is of, "-dirty" where anything has changed since; None of an installed copy.

    A package may be installed inside a checkout of something else, whose commit would say nothing about it:
    the checkout must know this file.
    """
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git("rev-parse", "--short=12", "HEAD")
    return commit and commit + ("-dirty" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    """What git prints in this file's folder; None where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
