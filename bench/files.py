"""The files of the benchmarks: results in JSON, and the README that tells the newest."""

from __future__ import annotations

import json
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
    return max(RESULTS.glob(f"[0-9]*{suffix}.json"), key=_begun, default=None)


def loss_results() -> list[Path]:
    """The results of the losses, the oldest first."""
    files = RESULTS.glob("[0-9]*.json")
    return sorted((file for file in files if not file.stem.endswith(OTHERS)), key=_begun)


def _begun(file: Path) -> tuple[str, str, str]:
    """The day, with which names begin, and the time of day where a result tells its machine and that."""
    told = json.loads(file.read_text(encoding="utf-8"))
    machine = told.get("machine", {}) if isinstance(told, dict) else {}
    return file.name[: len("2000-01-01")], machine.get("time", ""), file.name


def result_file(machine: dict[str, Any], suffix: str = "") -> Path:
    """Where what was measured on a machine is kept."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return RESULTS / f"{machine['date']}-{device}{suffix}.json"


def replace_in_readme(name: str, text: str) -> None:
    replace(README, {name: text})
