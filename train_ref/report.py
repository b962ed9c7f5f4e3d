"""The command ``report``: tables and figures of studies and validations into docs/results.md."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .commands import STUDIES
from .errors import UsageError
from .evaluation import cells
from .figures import save
from .markdown import replace, table
from .parsing import empty_parser
from .studies.common import texts
from .validate import draw

DESCRIPTION = """\
Puts the tables of studies and validations into a document.

FOLDER has the studies' JSON files and those that validate left, there named validate-*.json and, of a queue
of 65,536 keys, step-*.json. What stands between a table's markers in the document, <!-- NAME:begin --> and
<!-- NAME:end -->, is replaced. Where a file is missing, it stays as it is."""


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


def report(args: list[str], called: str, examples: str) -> None:
    """Do as a command line says.

    Args:
        args: its words.
        called: what stands before them.
        examples: of command lines, to be shown at the end of the help.
    """
    parser = empty_parser(called, DESCRIPTION, examples)
    parser.add_argument(
        "folder", nargs="?", default="docs/figures", metavar="FOLDER", help="of the JSON files"
    )
    parser.add_argument("--document", default="docs/results.md", help="in Markdown, with the markers")
    parser.add_argument("--redraw", action="store_true", help="the figures beside the JSON files, too")
    given = parser.parse_args(args)
    told = put(Path(given.folder), Path(given.document))
    if given.redraw:
        redraw(Path(given.folder))
    print(f"{given.document} tells what {given.folder} has of {', '.join(told)}")


def put(source: Path, target: Path) -> list[str]:
    """Replace the tables of a document by those of a folder's results; returns their names.

    Raises:
        UsageError: there is no such document, or it lacks a marker; there are no results, or a file is none.
            The document stays as it was.
    """
    if not target.is_file():
        raise UsageError(f"document: there is no {target} in {Path.cwd()}")
    texts = {}
    for name in STUDIES:
        file = source / f"{name}.json"
        if file.exists():
            with results_in([file]) as (result,):
                texts[name] = section(result, os.path.relpath(source, target.parent))
    for name, tell in (("validate", agreement), ("step", step)):
        if files := sorted(source.glob(f"{name}-*.json")):
            with results_in(files) as results:
                texts[name] = tell(results)
    if not texts:
        raise UsageError(f"folder: {source} has no results of studies or validations")
    replace(target, texts)
    return list(texts)


def redraw(source: Path) -> None:
    """Draw the figures of studies and validations in a folder anew, from the JSON files beside them."""
    for file in sorted(source.glob("*.json")):
        figure, name = file.with_suffix(".png"), file.stem
        if figure.exists() and (name in STUDIES or name.startswith("validate")):
            with results_in([file]) as (result,):
                save(STUDIES[name].function().figure(result) if name in STUDIES else draw(result), figure)


@contextmanager
def results_in(files: Sequence[Path]) -> Iterator[list[dict[str, Any]]]:
    """What files of results hold. Where one turns out to hold something else, its name is told."""
    results = []
    for file in files:
        try:
            results.append(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:  # no UTF-8, or no JSON
            raise UsageError(f"folder: {file} cannot be read as JSON: {error}") from error
    try:
        yield results
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        named = ", ".join(map(str, files))
        raise UsageError(
            f"folder: {named} lacks what a result of its name has ({type(error).__name__}: {error})"
        ) from error
