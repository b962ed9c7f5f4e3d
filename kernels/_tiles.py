"""Tiles of the kernels that walk the keys: a table for each architecture.

Nothing in it spills registers, and all of it fits the architecture's shared memory (tests/test_triton.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work.

    Attributes:
        rows: query rows of a program.
        keys: keys of a step of its loop.
        depth: dimensions multiplied at once; longer rows are multiplied in chunks of this many.
        warps: threads of a program, divided by 32.
        stages: tiles of keys in flight.
        programs: programs that a multiprocessor holds at a time.
        width: dimensions of the gradient that a program adds up where rows are multiplied in chunks. Each
            further program for the same rows and keys computes their similarities again.
        stacked: whether NT-Xent's gradient multiplies the rows of both views as one block; where a product
            takes two groups of warps, each then has the rows of a view, and not half of every row.
    """

    rows: int
    keys: int
    depth: int
    warps: int
    stages: int
    programs: int
    width: int = 0
    stacked: bool = False


# By precision and the largest D served: the tiles of the statistics and those of the gradient. "wide" is
# "half" with a queue of another dtype, rounded as it is loaded.
Table = dict[tuple[str, int], tuple[Tiles, Tiles]]

AMPERE: Table = {  # A100: 163 KiB of shared memory a program
    ("half", 128): (Tiles(64, 64, 128, 4, 2, 2), Tiles(64, 64, 128, 4, 2, 2, 128)),
    ("half", 256): (Tiles(128, 64, 256, 8, 2, 1), Tiles(64, 64, 256, 8, 2, 1, 256)),
    ("half", 1024): (Tiles(64, 64, 32, 4, 3, 2), Tiles(32, 64, 64, 4, 2, 2, 256)),
    ("wide", 1024): (Tiles(64, 64, 32, 4, 3, 2), Tiles(64, 64, 32, 8, 2, 1, 256)),
    ("tf32", 1024): (Tiles(64, 32, 32, 4, 2, 2), Tiles(64, 32, 32, 8, 2, 1, 128)),
    ("tf32x3", 1024): (Tiles(64, 32, 16, 4, 2, 2), Tiles(64, 32, 16, 8, 2, 1, 256)),
}
HOPPER: Table = {  # H100, H200: 227 KiB
    ("half", 128): (Tiles(64, 64, 128, 4, 3, 2), Tiles(64, 64, 128, 4, 3, 2, 128)),
    ("half", 256): (Tiles(128, 64, 256, 8, 2, 1), Tiles(128, 64, 256, 8, 2, 1, 256)),
    ("half", 1024): (Tiles(64, 64, 64, 4, 3, 2), Tiles(64, 32, 64, 8, 2, 1, 512)),
    ("tf32", 1024): (Tiles(64, 64, 32, 4, 3, 2), Tiles(64, 32, 32, 4, 2, 2, 128)),
    ("tf32x3", 1024): (Tiles(64, 64, 16, 4, 2, 2), Tiles(64, 32, 16, 4, 2, 2, 128)),
}
BLACKWELL: Table = {  # B200: 227 KiB, and 512 columns of tensor memory for all programs of a multiprocessor
    ("half", 128): (Tiles(64, 64, 128, 4, 3, 2), Tiles(64, 64, 128, 4, 2, 2, 128)),
    ("half", 256): (Tiles(64, 64, 256, 4, 2, 1), Tiles(64, 64, 256, 8, 2, 1, 256)),
    ("half", 1024): (Tiles(64, 64, 32, 4, 3, 2), Tiles(64, 64, 64, 8, 2, 1, 256)),
    ("tf32", 1024): (Tiles(64, 64, 32, 4, 3, 2), Tiles(64, 32, 32, 4, 2, 2, 128)),
    ("tf32x3", 1024): (Tiles(64, 64, 16, 4, 2, 2), Tiles(64, 32, 32, 4, 2, 2, 128)),
}
for _table in (HOPPER, BLACKWELL):  # whose tensor cores take tiles from shared memory, not from registers
    _table.update({("wide", dim): _table["half", dim] for dim in (128, 256, 1024)})
OTHER: Table = AMPERE | {  # what fits 99 KiB
    ("half", 128): (Tiles(64, 64, 128, 4, 2, 2), Tiles(64, 64, 128, 4, 2, 1, 128)),
    ("half", 256): (Tiles(64, 32, 256, 8, 2, 1), Tiles(32, 64, 256, 8, 2, 1, 256)),
    ("tf32x3", 1024): (Tiles(64, 32, 16, 4, 1, 2), Tiles(64, 32, 16, 4, 2, 2, 128)),
}
INTERPRETER: Table = {  # few and large: each step costs the interpreter the same
    (precision, 1024): (Tiles(64, 128, 128, 4, 1, 1), Tiles(64, 128, 128, 4, 1, 1, 256))
    for precision in ("half", "wide", "tf32", "tf32x3")
}

TABLES = {(0, 0): INTERPRETER, (8, 0): AMPERE, (9, 0): HOPPER, (10, 0): BLACKWELL, (10, 3): BLACKWELL}


def select_tiles(capability: tuple[int, int], precision: str, dim: int) -> tuple[Tiles, Tiles]:
    """The tiles of the statistics and of the gradient kernel.

    Args:
        capability: compute capability of the device, (major, minor); (0, 0) for the interpreter.
        precision: how rows are multiplied, "half", "wide", "tf32" or "tf32x3".
        dim: D.
    """
    return _entry(TABLES.get(capability, OTHER), precision, dim)


class ConICTiles(NamedTuple):
    """Those of ConIC's kernels that walk. Its keys are the rows of the weight. A program of the first two
    holds keys and walks the views: their `rows` are of keys, and their `keys` of views."""

    statistics: Tiles
    weight: Tiles
    views: Tiles


ConICTable = dict[tuple[str, int], ConICTiles]

CONIC_AMPERE: ConICTable = {
    ("half", 128): ConICTiles(
        Tiles(128, 64, 128, 4, 2, 2), Tiles(64, 32, 128, 4, 2, 2, 128), Tiles(64, 64, 128, 8, 2, 1, 128)
    ),
    ("half", 256): ConICTiles(
        Tiles(128, 64, 256, 8, 2, 1), Tiles(32, 64, 256, 8, 2, 1, 256), Tiles(64, 64, 256, 8, 2, 1, 256)
    ),
    ("half", 1024): ConICTiles(
        Tiles(64, 64, 32, 4, 3, 2), Tiles(32, 64, 64, 4, 2, 2, 256), Tiles(32, 32, 64, 4, 2, 2, 256)
    ),
    ("tf32", 1024): ConICTiles(
        Tiles(64, 32, 32, 4, 2, 2), Tiles(64, 32, 32, 8, 2, 1, 128), Tiles(64, 32, 32, 8, 2, 1, 128)
    ),
    ("tf32x3", 1024): ConICTiles(
        Tiles(64, 32, 16, 4, 2, 2), Tiles(64, 32, 16, 8, 2, 1, 128), Tiles(64, 32, 16, 8, 2, 1, 128)
    ),
}
CONIC_HOPPER: ConICTable = {
    ("half", 128): ConICTiles(
        Tiles(128, 64, 128, 4, 3, 2), Tiles(64, 64, 128, 4, 3, 2, 128), Tiles(128, 64, 128, 8, 3, 1, 128)
    ),
    ("half", 256): ConICTiles(
        Tiles(128, 64, 256, 8, 2, 1), Tiles(64, 64, 256, 8, 3, 1, 256), Tiles(64, 64, 256, 8, 2, 1, 256)
    ),
    ("half", 1024): ConICTiles(
        Tiles(64, 64, 64, 4, 3, 2), Tiles(64, 64, 64, 8, 2, 1, 256), Tiles(64, 32, 64, 8, 2, 1, 512)
    ),
    ("tf32", 1024): ConICTiles(
        Tiles(64, 64, 32, 4, 3, 2), Tiles(64, 64, 32, 8, 2, 1, 128), Tiles(64, 32, 32, 4, 2, 2, 128)
    ),
    ("tf32x3", 1024): ConICTiles(
        Tiles(64, 64, 16, 4, 2, 2), Tiles(64, 64, 16, 8, 2, 1, 128), Tiles(64, 32, 16, 4, 2, 2, 128)
    ),
}
CONIC_BLACKWELL: ConICTable = {
    ("half", 128): ConICTiles(
        Tiles(128, 64, 128, 4, 2, 2), Tiles(64, 64, 128, 4, 2, 2, 128), Tiles(64, 64, 128, 4, 2, 2, 128)
    ),
    ("half", 256): ConICTiles(
        Tiles(64, 64, 256, 8, 2, 1), Tiles(64, 64, 256, 8, 2, 1, 256), Tiles(64, 64, 256, 8, 2, 1, 256)
    ),
    ("half", 1024): ConICTiles(
        Tiles(64, 64, 32, 4, 3, 2), Tiles(64, 64, 64, 8, 2, 1, 256), Tiles(64, 64, 64, 8, 2, 1, 256)
    ),
    ("tf32", 1024): ConICTiles(
        Tiles(64, 64, 32, 4, 3, 2), Tiles(64, 32, 32, 8, 2, 1, 128), Tiles(64, 32, 32, 4, 2, 2, 128)
    ),
    ("tf32x3", 1024): ConICTiles(
        Tiles(64, 64, 16, 4, 2, 2), Tiles(64, 32, 32, 4, 2, 2, 128), Tiles(64, 32, 32, 4, 2, 2, 128)
    ),
}
CONIC_OTHER: ConICTable = CONIC_AMPERE | {
    ("half", 128): ConICTiles(
        Tiles(128, 64, 128, 4, 2, 2), Tiles(64, 64, 128, 8, 2, 1, 128), Tiles(64, 64, 128, 4, 2, 1, 128)
    ),
    ("half", 256): ConICTiles(
        Tiles(64, 64, 256, 8, 2, 1), Tiles(32, 64, 256, 8, 2, 1, 256), Tiles(32, 64, 256, 8, 2, 1, 256)
    ),
    ("tf32x3", 1024): ConICTiles(
        Tiles(64, 32, 16, 4, 1, 2), Tiles(64, 32, 16, 8, 2, 1, 128), Tiles(64, 32, 16, 4, 2, 2, 128)
    ),
}
CONIC_INTERPRETER: ConICTable = {
    (precision, 1024): ConICTiles(
        Tiles(256, 64, 128, 4, 1, 1), Tiles(256, 64, 128, 4, 1, 1, 256), Tiles(64, 256, 128, 4, 1, 1, 256)
    )
    for precision in ("half", "tf32", "tf32x3")
}
CONIC_TABLES = {
    (0, 0): CONIC_INTERPRETER, (8, 0): CONIC_AMPERE, (9, 0): CONIC_HOPPER, (10, 0): CONIC_BLACKWELL,
    (10, 3): CONIC_BLACKWELL,
}  # fmt: skip


def select_conic_tiles(capability: tuple[int, int], precision: str, dim: int) -> ConICTiles:
    """The tiles of ConIC's kernels; arguments as of `select_tiles`."""
    return _entry(CONIC_TABLES.get(capability, CONIC_OTHER), precision, dim)


class NTXentTiles(NamedTuple):
    """Those of NT-Xent's kernels that walk: `rows` are of instances, two views each, and `keys` rows of both
    views. Without the consistency term, the plain gradient, registers are left for longer tiles."""

    statistics: Tiles
    gradient: Tiles
    plain: Tiles


NTXentTable = dict[tuple[str, int], NTXentTiles]

NT_XENT_AMPERE: NTXentTable = {
    ("half", 128): NTXentTiles(
        Tiles(64, 64, 128, 4, 2, 2), Tiles(32, 64, 128, 4, 2, 2, 128), Tiles(32, 64, 128, 4, 2, 2, 128)
    ),
    ("half", 256): NTXentTiles(
        Tiles(64, 64, 256, 8, 2, 1), Tiles(32, 64, 256, 8, 2, 1, 256), Tiles(32, 64, 256, 8, 2, 1, 256)
    ),
    ("half", 1024): NTXentTiles(
        Tiles(64, 64, 32, 4, 3, 2), Tiles(32, 64, 64, 8, 2, 1, 256), Tiles(32, 64, 64, 8, 2, 1, 256)
    ),
    ("tf32", 1024): NTXentTiles(
        Tiles(64, 32, 32, 4, 2, 2), Tiles(32, 64, 32, 8, 2, 1, 128), Tiles(32, 64, 32, 8, 2, 1, 128)
    ),
    ("tf32x3", 1024): NTXentTiles(
        Tiles(64, 32, 16, 4, 2, 2), Tiles(32, 64, 16, 8, 2, 1, 64), Tiles(32, 64, 16, 8, 2, 1, 64)
    ),
}
NT_XENT_HOPPER: NTXentTable = {
    ("half", 128): NTXentTiles(
        Tiles(64, 128, 128, 4, 2, 2), Tiles(64, 32, 128, 4, 3, 2, 128), Tiles(64, 64, 128, 4, 3, 2, 128)
    ),
    ("half", 256): NTXentTiles(
        Tiles(128, 64, 256, 8, 2, 1),
        Tiles(64, 64, 256, 8, 2, 1, 256, stacked=True),
        Tiles(64, 64, 256, 8, 2, 1, 256, stacked=True),
    ),
    ("half", 1024): NTXentTiles(
        Tiles(64, 64, 64, 4, 3, 2), Tiles(64, 32, 64, 8, 2, 1, 256), Tiles(64, 64, 32, 8, 2, 1, 256)
    ),
    ("tf32", 1024): NTXentTiles(
        Tiles(64, 64, 32, 4, 3, 2), Tiles(64, 32, 32, 8, 2, 1, 128), Tiles(64, 32, 32, 8, 2, 1, 128)
    ),
    ("tf32x3", 1024): NTXentTiles(
        Tiles(64, 64, 16, 4, 2, 2), Tiles(64, 32, 16, 4, 1, 2, 64), Tiles(64, 32, 16, 4, 2, 2, 64)
    ),
}
NT_XENT_BLACKWELL: NTXentTable = {
    ("half", 128): NTXentTiles(
        Tiles(64, 64, 128, 4, 3, 2), Tiles(64, 32, 128, 4, 2, 2, 128), Tiles(64, 64, 128, 4, 3, 2, 128)
    ),
    ("half", 256): NTXentTiles(
        Tiles(64, 64, 256, 4, 2, 1), Tiles(64, 64, 256, 8, 2, 1, 256), Tiles(64, 64, 256, 8, 2, 1, 256)
    ),
    ("half", 1024): NTXentTiles(
        Tiles(64, 64, 64, 4, 3, 2), Tiles(64, 64, 64, 8, 2, 1, 256), Tiles(64, 64, 64, 8, 2, 1, 256)
    ),
    ("tf32", 1024): NTXentTiles(
        Tiles(64, 64, 32, 4, 3, 2), Tiles(64, 32, 32, 4, 2, 2, 128), Tiles(64, 32, 32, 4, 2, 2, 128)
    ),
    ("tf32x3", 1024): NTXentTiles(
        Tiles(64, 64, 16, 4, 2, 2), Tiles(64, 32, 16, 8, 2, 1, 128), Tiles(64, 32, 16, 8, 2, 1, 128)
    ),
}
NT_XENT_OTHER: NTXentTable = NT_XENT_AMPERE | {
    ("half", 128): NTXentTiles(
        Tiles(64, 32, 128, 4, 2, 2), Tiles(32, 64, 128, 4, 2, 2, 128), Tiles(32, 64, 128, 4, 2, 2, 128)
    ),
    ("half", 256): NTXentTiles(
        Tiles(64, 32, 256, 4, 2, 1), Tiles(32, 64, 256, 8, 2, 1, 256), Tiles(32, 64, 256, 8, 2, 1, 256)
    ),
    ("tf32x3", 1024): NTXentTiles(
        Tiles(64, 32, 16, 4, 2, 2), Tiles(32, 32, 16, 4, 2, 2, 64), Tiles(32, 32, 16, 4, 2, 2, 64)
    ),
}
NT_XENT_INTERPRETER: NTXentTable = {
    (precision, 1024): NTXentTiles(
        Tiles(256, 256, 512, 4, 1, 1),
        Tiles(256, 256, 512, 4, 1, 1, 512),
        Tiles(256, 256, 1024, 4, 1, 1, 1024, stacked=True),
    )
    for precision in ("half", "tf32", "tf32x3")
}
NT_XENT_TABLES = {
    (0, 0): NT_XENT_INTERPRETER, (8, 0): NT_XENT_AMPERE, (9, 0): NT_XENT_HOPPER,
    (10, 0): NT_XENT_BLACKWELL, (10, 3): NT_XENT_BLACKWELL,
}  # fmt: skip


def select_nt_xent_tiles(capability: tuple[int, int], precision: str, dim: int) -> NTXentTiles:
    """The tiles of NT-Xent's kernels; arguments as of `select_tiles`."""
    return _entry(NT_XENT_TABLES.get(capability, NT_XENT_OTHER), precision, dim)


T = TypeVar("T")


def _entry(table: Mapping[tuple[str, int], T], precision: str, dim: int) -> T:
    return table[precision, min(largest for of, largest in table if of == precision and dim <= largest)]
