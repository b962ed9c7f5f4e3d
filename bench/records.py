"""A result of the losses' benchmarks: the machine, what it can do at best, and a record a case."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import ceilings
from bench.cases import Case

Result = dict[str, Any]  # as the JSON file has it


def begun(machine: dict[str, Any], output: Path, device: str = "cpu") -> Result:
    """The result that a run before this one has left, or one without records."""
    if output.exists():
        return json.loads(output.read_text(encoding="utf-8"))
    print("Measuring what the machine can do at best", flush=True)
    return {"machine": machine, "ceilings": ceilings.measure(device), "records": []}


def missing(result: Result, cases: Iterable[Case], chosen: Callable[[str], bool]) -> list[Case]:
    """The chosen cases that a result has no record of."""
    done = {case_of(each) for each in result["records"]}
    return [case for case in cases if chosen(str(case)) and case not in done]


def record(case: Case, measured: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """What was measured of a case, and the floor under its time."""
    return {
        **dataclasses.asdict(case),
        "direction": "forward+backward",
        **measured,
        "floor_ms": round(ceilings.floor_ms(case, limits), 5),
    }


def case_of(record: dict[str, Any]) -> Case:
    return Case(**{field.name: record[field.name] for field in dataclasses.fields(Case)})


def write(result: Result, output: Path) -> None:
    """JSON with a line for each record."""
    records = ",\n".join(json.dumps(each) for each in result["records"])
    head = ",\n".join(f'"{key}": {json.dumps(result[key], indent=2)}' for key in ("machine", "ceilings"))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f'{{{head},\n"records": [\n{records}\n]}}\n', encoding="utf-8")
