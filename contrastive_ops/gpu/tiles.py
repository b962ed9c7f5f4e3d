"""Tiles of the kernels that walk, as they stand in a backend's tables."""

from __future__ import annotations

from typing import NamedTuple


class Tiling(NamedTuple):
    """How a kernel cuts its work; a line of a table.

    Attributes:
        held: rows that a program holds. They are the query's, or views of ConIC; those of a program of
            `conic.statistics` and `conic.weight` are keys, which are the weight's rows. NT-Xent's are
            instances, two views each.
        walked: rows of a step of its loop: keys, or views where keys are held.
        depth: dimensions multiplied at once; longer rows are multiplied in chunks of this many.
        width: dimensions of the gradient that a program adds up where rows are multiplied in chunks. Each
            further program for the same rows and keys computes their similarities again.
        warps: threads of a program, divided by 32.
        stages: tiles of what is walked in flight.
        programs: programs that a multiprocessor holds at a time.
        stacked: whether the rows of query and key, or of both views, are multiplied as one block: a warp
            reads keys once for both; where a product takes two groups of warps, each has the rows of one
            kind, and not half of every row.
    """

    held: int
    walked: int
    depth: int
    width: int
    warps: int
    stages: int
    programs: int
    stacked: bool = False

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# By the kernel, the precision, and the largest D served.
Table = dict[tuple[str, str, int], Tiling]


def table(text: str) -> Table:
    """A table from its lines, of which the first names the columns."""
    header, *lines = text.strip().splitlines()
    columns = header.split()[3:]
    table = {}
    for line in lines:
        name, precision, dim, *numbers = line.split("#")[0].split()
        stacked = numbers[-1] == "stacked"
        fields = dict(zip(columns, (int(number) for number in numbers[: len(columns)]), strict=True))
        table[name, precision, int(dim)] = Tiling(**fields, stacked=stacked)
    return table


def lines_of(table: Table, name: str) -> dict[tuple[str, int], Tiling]:
    """The lines of a kernel, by precision and the largest D served."""
    return {(precision, dim): tiling for (kernel, precision, dim), tiling in table.items() if kernel == name}


def line_for(table: Table, name: str, precision: str, dim: int) -> Tiling:
    """The tiles of a kernel for rows of D dimensions."""
    lines = lines_of(table, name)
    return lines[precision, min(most for of, most in lines if of == precision and dim <= most)]
