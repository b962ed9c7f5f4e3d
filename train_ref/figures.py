"""What the figures share: one legend for all panels, a caption, and how they are saved."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .files import replacing

WIDTH = 10.0  # inches: where a page shrinks it to a text's width, letters are nearly as large as the text's
LETTERS, SYMBOL = 140, 8  # of nine points in a line of that width, and as many as a legend's symbol takes


def one_legend(figure: Figure) -> None:
    """Tell below all panels what their lines are, each once."""
    known = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    lengths = [len(label) + SYMBOL for label in known]

    def width(columns: int) -> int:
        return sum(max(column) for column in np.array_split(lengths, columns))  # as matplotlib fills them

    columns = max((each for each in range(1, len(known) + 1) if width(each) <= LETTERS), default=1)
    figure.legend(
        known.values(), known.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def caption(figure: Figure, text: str) -> None:
    """Say above all panels what is seen."""
    figure.suptitle(textwrap.fill(text, LETTERS), x=0.01, ha="left", fontsize=9)


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Leave a figure as PNG: the same bytes for the same numbers, fonts and version of matplotlib."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
