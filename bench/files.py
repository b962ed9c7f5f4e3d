"""The files of the benchmarks: results in JSON, and the README that tells the newest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from train_ref.markdown import replace

RESULTS = Path(__file__).with_name("results")
README = Path(__file__).resolve().parents[1] / "README.md"
OTHERS = ("-instances", "-demo")  # suffixes of results that are not the losses'


def newest_result(suffix: str = "") -> Path | None:
    """The newest result with a suffix of `OTHERS` or, without one, of the losses."""
    files = RESULTS.glob(f"*{suffix}.json")  # their names begin with the date
    return max((file for file in files if suffix or not file.stem.endswith(OTHERS)), default=None)


def result_file(machine: dict[str, Any], suffix: str = "") -> Path:
    """Where what was measured on a machine is kept."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return RESULTS / f"{machine['date']}-{device}{suffix}.json"


def replace_in_readme(name: str, text: str) -> None:
    replace(README, name, text)
