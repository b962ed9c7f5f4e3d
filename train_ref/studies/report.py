"""Puts the studies' tables and figures into docs/results.md: ``python -m train_ref.studies.report [FOLDER]``.

The folder has their JSON files, by default docs/figures. What stands between a study's markers is replaced;
studies without a file there stay as they are.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from bench.markdown import replace, table

from . import STUDIES
from .common import texts

DOCS = Path(__file__).resolve().parents[2] / "docs"


def section(result: dict[str, Any], folder: str) -> str:
    """A study's figure, its tables, and how to have them again."""
    name = result["study"]
    parts = [f"![{name}: what the tables say, drawn]({folder}/{name}.png)"]
    for title, rows in result["tables"].items():
        cells = texts(rows)
        parts += [f"{title}:", table(list(cells[0]), [row.values() for row in cells])]
    settings = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in result["settings"].items())
    parts.append(
        f"`python -m train_ref study {name} --directory docs/figures`: {settings}; torch {result['torch']}."
    )
    return "\n\n".join(parts)


def main(folder: Path, document: Path = DOCS / "results.md") -> None:
    for name in STUDIES:
        file = folder / f"{name}.json"
        if file.exists():
            replace(
                document,
                name,
                section(json.loads(file.read_text()), os.path.relpath(folder, document.parent)),
            )


if __name__ == "__main__":
    main(Path(*sys.argv[1:2]) if sys.argv[1:] else DOCS / "figures")
