"""Runs the examples of docs/examples and writes their pages: `python -m bench.examples`.

An example is a Python file of cells in the percent format, which editors and Jupyter open as a notebook.
Its cells run one after the other in one namespace. The page beside it has the text, the code, and under
each cell of code what that printed and drew; pictures go to docs/figures. What a cell with the tag
"measured" prints differs from run to run, in its numbers: the page says so above it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot

from bench.files import README
from train_ref.files import write_text
from train_ref.machine import describe

EXAMPLES = README.with_name("docs") / "examples"
FIGURES = README.with_name("docs") / "figures"

HEAD = re.compile(r"^# %%(.*)\n", re.MULTILINE)
TEXT, CODE, MEASURED = " [markdown]", "", ' tags=["measured"]'  # what may follow a head's "# %%"
COMMENT = re.compile(r"^# ?", re.MULTILINE)
TITLE = "measured, and different in every run"  # of the block with such numbers
MEASUREMENTS = re.compile(rf'^```text title="{TITLE}"\n.*?^```$', re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r" *\d[\d.,]*(e[-+]\d+)?")
MACHINE = re.compile(r"(?<= Ran on: ).*")


@dataclass(frozen=True)
class Cell:
    """A cell of an example, with the line of the file that it begins in."""

    kind: str
    source: str
    line: int


def cells(example: Path) -> Iterator[Cell]:
    """The cells of a file.

    Raises:
        ValueError: a line is in no cell, or a cell of a kind that no page has a place for.
    """
    content = example.read_text(encoding="utf-8")
    heads = list(HEAD.finditer(content))
    if not heads or heads[0].start():
        raise ValueError(f"{example} begins with lines that are in no cell")
    ends = [head.start() for head in heads[1:]] + [len(content)]
    for head, end in zip(heads, ends, strict=True):
        line = content.count("\n", 0, head.end()) + 1
        if head[1] not in (TEXT, CODE, MEASURED):
            raise ValueError(f"{example}, line {line - 1}: there is no such cell as {head[0].rstrip()}")
        yield Cell(head[1], content[head.end() : end].strip("\n"), line)


def page(example: Path, pictures: Path, machine: str) -> str:
    """Runs an example, and returns its page in Markdown.

    Args:
        example: a file of cells.
        pictures: the folder that its pictures are written to. The page looks for them in docs/figures.
        machine: what it runs on, as the page tells it.
    """
    matplotlib.use("agg")
    parts = [f"<!-- `python -m bench.examples` writes this page from {example.name}. -->"]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    drawn = 0
    for cell in cells(example):
        if cell.kind == TEXT:
            parts.append(COMMENT.sub("", cell.source))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            # The empty lines give an error the line of the file that it is in.
            exec(compile("\n" * (cell.line - 1) + cell.source, str(example), "exec"), namespace)
        if printed.getvalue():
            title = f' title="{TITLE}"' if cell.kind == MEASURED else ""
            parts.append(f"```text{title}\n{printed.getvalue()}```")
        for number in pyplot.get_fignums():
            drawn += 1
            figure, name = pyplot.figure(number), f"example-{example.stem}-{drawn}.png"
            figure.savefig(pictures / name, dpi=130)
            pyplot.close(figure)
            parts.append(f"![{figure.get_suptitle()}](../figures/{name})")
    parts.append(f"[{example.name}]({example.name}) opens as a notebook of this page. Ran on: {machine}")
    return "\n\n".join(parts) + "\n"


def comparable(text: str) -> str:
    """A page without what differs from run to run: the machine, and the numbers of the blocks that say so."""
    text = MACHINE.sub("", text)
    return MEASUREMENTS.sub(lambda found: NUMBER.sub(" #", found[0]), text)


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.examples", description=__doc__).parse_args()
    torch.set_num_threads(1)
    of = describe("cpu")
    machine = f"{of['device']}, 1 thread; torch {of['torch']}, Python {of['python']}; {of['date']}"
    for example in sorted(EXAMPLES.glob("*.py")):
        write_text(example.with_suffix(".md"), page(example, FIGURES, machine))
        print(f"Wrote {example.with_suffix('.md')}")


if __name__ == "__main__":
    main()
