"""The files of the benchmarks: results in JSON, and the README that tells the newest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from train_ref.markdown import replace

RESULTS = Path(__file__).with_name("results")
README = Path(__file__).resolve().parents[1] / "README.md"
DROP_IN = README.parent / "docs/drop_in"
# Suffixes of results that are not the losses'.
OTHERS = ("-instances", "-stores", "-demo", "-parts", "-views", "-backends")


def newest_result(suffix: str) -> Path | None:
    """The newest result with a suffix of `OTHERS`."""
    return max(RESULTS.glob(f"[0-9]*{suffix}.json"), default=None)  # their names begin with the date


def loss_results() -> list[Path]:
    """The results of the losses."""
    return sorted(file for file in RESULTS.glob("[0-9]*.json") if not file.stem.endswith(OTHERS))


def result_file(machine: dict[str, Any], suffix: str = "") -> Path:
    """Where what was measured on a machine is kept."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return RESULTS / f"{machine['date']}-{device}{suffix}.json"


def replace_in_readme(name: str, text: str) -> None:
    replace(README, {name: text})
