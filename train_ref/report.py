"""Puts tables and figures into docs/results.md: ``python -m train_ref.report [FOLDER]``.

The folder, by default docs/figures, has the studies' JSON files and those that validate left, there named
``validate-*.json`` and, of a queue of 65,536 keys, ``step-*.json``. What stands between a table's markers is
replaced; where a file is missing, it stays as it is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .evaluation import cells
from .markdown import replace, table
from .studies import STUDIES
from .studies.common import texts

DOCS = Path(__file__).resolve().parents[1] / "docs"


def section(result: dict[str, Any], folder: str) -> str:
    """A study's figure, its tables, and how to have them again."""
    name = result["study"]
    parts = [f"![{name}: what the tables say, drawn]({folder}/{name}.png)"]
    for title, rows in result["tables"].items():
        header, *lines = cells(texts(rows))
        parts += [f"{title}:", table(header, lines)]
    settings = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in result["settings"].items())
    parts.append(
        f"`python -m train_ref study {name} --directory docs/figures`: {settings}; torch {result['torch']}."
    )
    return "\n\n".join(parts)


def agreement(results: Sequence[dict[str, Any]]) -> str:
    """A row a validation: the largest differences between fused and eager of all methods and steps."""

    def row(result: dict[str, Any]) -> list[str]:
        settings, verdicts = result["settings"], result["verdicts"]

        def largest(value: str) -> str:
            return f"{max(verdict[value] for verdict in verdicts):.1e}"

        return [
            f"{settings['network']}, {settings['precision']}",
            str(settings["batch_size"]),
            f"{settings['learning_rate']:.2g}",
            str(settings["steps"]),
            largest("loss_difference"),
            largest("gradient_difference"),
            largest("drift"),
            largest("eager_drift") if verdicts[0]["permuted"] else "–",
            f"{sum(verdict['passed'] for verdict in verdicts)} of {len(verdicts)}",
        ]

    header = ["network", "batch", "learning rate", "steps", "losses", "gradients", "drift"]
    return table([*header, "eager's own drift", "passed"], map(row, results))


def step(results: Sequence[dict[str, Any]]) -> str:
    """A row a method and network: the loss in a training step, and memory at its peak."""

    def part(run: dict[str, Any]) -> str:
        share = run["loss_ms"] / run["step_ms"]
        return f"{run['loss_ms']:,.0f} of {run['step_ms']:,.0f} ms ({share:.1%})".replace("%", " %")

    rows = [
        [
            f"{verdict['method']}, {settings['network']}, {settings['image_size']}²",
            str(settings["batch_size"]),
            part(verdict["fused"]),
            part(verdict["eager"]),
            f"{verdict['fused']['peak_mib']:,.0f}",
            f"{verdict['eager']['peak_mib']:,.0f} MiB",
        ]
        for result in results
        for settings in [result["settings"]]
        for verdict in result["verdicts"]
    ]
    machine, steps = results[0]["machine"], results[0]["settings"]["steps"]
    header = ["method, network, images", "batch", "loss, fused", "loss, eager", "peak memory, fused", "eager"]
    where = f"{machine['device']}, {machine['threads']} threads; torch {machine['torch']}; {machine['date']}"
    return f"{table(header, rows)}\n\nMedians of {steps} steps. {where}."


def main(folder: Path, document: Path = DOCS / "results.md") -> None:
    for name in STUDIES:
        file = folder / f"{name}.json"
        if file.exists():
            replace(
                document,
                name,
                section(json.loads(file.read_text()), os.path.relpath(folder, document.parent)),
            )
    for name, told in (("validate", agreement), ("step", step)):
        results = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{name}-*.json"))]
        if results:
            replace(document, name, told(results))


if __name__ == "__main__":
    main(Path(*sys.argv[1:2]) if sys.argv[1:] else DOCS / "figures")
