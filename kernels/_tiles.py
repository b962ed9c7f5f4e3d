"""Tiles of the kernels that walk: a table for each architecture.

Nothing in it spills registers, and all of it fits the architecture's shared memory (tests/test_triton.py).
"""

from __future__ import annotations

from ..gpu.launch import INTERPRETER
from ..gpu.tiles import Tiling, line_for, lines_of
from ..gpu.tiles import table as _table

# Precisions are those of `precision_of`. Without the consistency term NT-Xent's gradient is "plain", and has
# registers left for longer tiles.

# A100: 163 KiB of shared memory a program. What binds it is how often warps read keys from there: a warp that
# multiplies rows of both kinds reads them once for the two.
AMPERE = _table("""
kernel              precision   D  held walked depth width warps stages programs
co2.statistics      half      128    64     32   128     0     4      3        3  stacked
co2.statistics      half      256   128     32   256     0     8      2        1  stacked
co2.statistics      half     1024    64     64    32     0     4      3        2
co2.statistics      tf32     1024    64     32    32     0     4      2        2
co2.statistics      tf32x3   1024    64     32    16     0     4      2        2
co2.gradient        half      128    64     64   128   128     4      2        2  stacked
co2.gradient        half      256    64     64   256   256     8      2        1  stacked
co2.gradient        half     1024    32     64    64   256     4      2        2
co2.gradient        tf32     1024    64     32    32   128     8      2        1
co2.gradient        tf32x3   1024    64     32    16   256     8      2        1
conic.statistics    half      128   128     32   128     0     4      3        3
conic.statistics    half      256   128     64   256     0     8      2        1
conic.statistics    half     1024    64     64    32     0     4      3        2
conic.statistics    tf32     1024    64     32    32     0     4      2        2
conic.statistics    tf32x3   1024    64     32    16     0     4      2        2
conic.weight        half      128    64     64   128   128     4      2        2
conic.weight        half      256    64     64   256   256     8      2        1
conic.weight        half     1024    32     64    64   256     4      2        2
conic.weight        tf32     1024    64     32    32   128     8      2        1
conic.weight        tf32x3   1024    64     32    16   128     8      2        1
conic.views         half      128    64     64   128   128     4      2        2
conic.views         half      256    64     64   256   256     8      2        1
conic.views         half     1024    32     32    64   256     4      2        2
conic.views         tf32     1024    64     32    32   128     8      2        1
conic.views         tf32x3   1024    64     32    16   128     8      2        1
nt_xent.statistics  half      128    64     32   128     0     4      3        3  stacked
nt_xent.statistics  half      256   128     32   256     0     8      2        1  stacked
nt_xent.statistics  half     1024    64     64    32     0     4      3        2
nt_xent.statistics  tf32     1024    64     32    32     0     4      2        2
nt_xent.statistics  tf32x3   1024    64     32    16     0     4      2        2
nt_xent.gradient    half      128    32     64   128   128     4      2        2  stacked
nt_xent.gradient    half      256    32     64   256   256     8      2        1  stacked
nt_xent.gradient    half     1024    32     64    64   256     8      2        1
nt_xent.gradient    tf32     1024    32     64    32   128     8      2        1
nt_xent.gradient    tf32x3   1024    32     64    16    64     8      2        1
nt_xent.plain       half      128    64     64   128   128     8      2        1  stacked
nt_xent.plain       half      256    32     64   256   256     8      2        1  stacked
nt_xent.plain       half     1024    32     64    64   256     8      2        1
nt_xent.plain       tf32     1024    32     64    32   128     8      2        1
nt_xent.plain       tf32x3   1024    32     64    16    64     8      2        1
""")

# H100, H200: 227 KiB. The lines of half precision up to D = 256 are the fastest of 220 on an H100.
HOPPER = _table("""
kernel              precision   D  held walked depth width warps stages programs
co2.statistics      half      128    64     64   128     0     4      3        2
co2.statistics      half      256   128     64   256     0     8      3        1
co2.statistics      half     1024    64     64    64     0     4      3        2
co2.statistics      tf32     1024    64     64    32     0     4      3        2
co2.statistics      tf32x3   1024    64     64    16     0     4      2        2
co2.gradient        half      128    64     64   128   128     4      2        2
co2.gradient        half      256   128     64   256   256     8      3        1
co2.gradient        half     1024    64     32    64   512     8      2        1
co2.gradient        tf32     1024    64     32    32   128     4      2        2
co2.gradient        tf32x3   1024    64     32    16   128     4      2        2
conic.statistics    half      128    64     64   128     0     4      4        2
conic.statistics    half      256   128     64   256     0     8      3        1
conic.statistics    half     1024    64     64    64     0     4      3        2
conic.statistics    tf32     1024    64     64    32     0     4      3        2
conic.statistics    tf32x3   1024    64     64    16     0     4      2        2
conic.weight        half      128    64     64   128   128     4      3        2
conic.weight        half      256   128     64   256   256     8      3        1
conic.weight        half     1024    64     64    64   256     8      2        1
conic.weight        tf32     1024    64     64    32   128     8      2        1
conic.weight        tf32x3   1024    64     64    16   128     8      2        1
conic.views         half      128    64     64   128   128     4      3        3
conic.views         half      256   128     64   256   256     8      3        1
conic.views         half     1024    64     32    64   512     8      2        1
conic.views         tf32     1024    64     32    32   128     4      2        2
conic.views         tf32x3   1024    64     32    16   128     4      2        2
nt_xent.statistics  half      128    64     64   128     0     4      3        2
nt_xent.statistics  half      256   128     64   256     0     8      2        1
nt_xent.statistics  half     1024    64     64    64     0     4      3        2
nt_xent.statistics  tf32     1024    64     64    32     0     4      3        2
nt_xent.statistics  tf32x3   1024    64     64    16     0     4      2        2
nt_xent.gradient    half      128    64     32   128   128     4      2        2
nt_xent.gradient    half      256    64     64   256   256     8      2        1  stacked
nt_xent.gradient    half     1024    64     32    64   256     8      2        1
nt_xent.gradient    tf32     1024    64     32    32   128     8      2        1
nt_xent.gradient    tf32x3   1024    64     32    16    64     4      1        2
nt_xent.plain       half      128   128     64   128   128     8      3        1
nt_xent.plain       half      256    64     64   256   256     8      2        1  stacked
nt_xent.plain       half     1024    64     64    32   256     8      2        1
nt_xent.plain       tf32     1024    64     32    32   128     8      2        1
nt_xent.plain       tf32x3   1024    64     32    16    64     4      2        2
""")

# B200: 227 KiB, and 512 columns of tensor memory for all programs of a multiprocessor.
BLACKWELL = _table("""
kernel              precision   D  held walked depth width warps stages programs
co2.statistics      half      128    64    128   128     0     8      2        1
co2.statistics      half      256    64     64   256     0     4      2        1
co2.statistics      half     1024    64     64    32     0     4      3        2
co2.statistics      tf32     1024    64     64    32     0     4      3        2
co2.statistics      tf32x3   1024    64     64    16     0     4      2        2
co2.gradient        half      128    64     64   128   128     4      2        2
co2.gradient        half      256    64     64   256   256     8      2        1
co2.gradient        half     1024    64     64    64   256     8      2        1
co2.gradient        tf32     1024    64     32    32   128     4      2        2
co2.gradient        tf32x3   1024    64     32    32   128     4      2        2
conic.statistics    half      128   128     64   128     0     4      2        2
conic.statistics    half      256    64     64   256     0     8      2        1
conic.statistics    half     1024    64     64    32     0     4      3        2
conic.statistics    tf32     1024    64     64    32     0     4      3        2
conic.statistics    tf32x3   1024    64     64    16     0     4      2        2
conic.weight        half      128    64     64   128   128     4      2        2
conic.weight        half      256    64     64   256   256     8      2        1
conic.weight        half     1024    64     64    64   256     8      2        1
conic.weight        tf32     1024    64     32    32   128     8      2        1
conic.weight        tf32x3   1024    64     32    32   128     4      2        2
conic.views         half      128    64     64   128   128     4      2        2
conic.views         half      256    64     64   256   256     8      2        1
conic.views         half     1024    64     64    64   256     8      2        1
conic.views         tf32     1024    64     32    32   128     4      2        2
conic.views         tf32x3   1024    64     32    32   128     4      2        2
nt_xent.statistics  half      128    64     64   128     0     4      3        2
nt_xent.statistics  half      256    64     64   256     0     4      2        1
nt_xent.statistics  half     1024    64     64    64     0     4      3        2
nt_xent.statistics  tf32     1024    64     64    32     0     4      3        2
nt_xent.statistics  tf32x3   1024    64     64    16     0     4      2        2
nt_xent.gradient    half      128    64     32   128   128     4      2        2
nt_xent.gradient    half      256    64     64   256   256     8      2        1
nt_xent.gradient    half     1024    64     64    64   256     8      2        1
nt_xent.gradient    tf32     1024    64     32    32   128     4      2        2
nt_xent.gradient    tf32x3   1024    64     32    16   128     8      2        1
nt_xent.plain       half      128    64     64   128   128     4      3        2
nt_xent.plain       half      256    64     64   256   256     8      2        1
nt_xent.plain       half     1024    64     64    64   256     8      2        1
nt_xent.plain       tf32     1024    64     32    32   128     4      2        2
nt_xent.plain       tf32x3   1024    64     32    16   128     8      2        1
""")

# Other chips have the tiles of Ampere, but where these do not fit their 99 KiB.
OTHER = AMPERE | _table("""
kernel              precision   D  held walked depth width warps stages programs
co2.statistics      half      128    64     32   128     0     4      2        2
co2.statistics      half      256    64     32   256     0     8      2        1
co2.statistics      tf32x3   1024    64     32    16     0     4      1        2
co2.gradient        half      128    64     64   128   128     4      2        1
co2.gradient        half      256    32     64   256   256     8      2        1
co2.gradient        tf32x3   1024    64     32    16   128     4      2        2
conic.statistics    half      128    64     64   128     0     4      2        2
conic.statistics    half      256    64     64   256     0     8      2        1
conic.statistics    tf32x3   1024    64     32    16     0     4      1        2
conic.weight        half      128    64     64   128   128     8      2        1
conic.weight        half      256    32     64   256   256     8      2        1
conic.weight        tf32x3   1024    64     32    16   128     8      2        1
conic.views         half      128    64     64   128   128     4      2        1
conic.views         half      256    32     64   256   256     8      2        1
conic.views         tf32x3   1024    64     32    16   128     8      2        1
nt_xent.statistics  half      128    64     32   128     0     4      2        2
nt_xent.statistics  half      256    64     32   256     0     4      2        1
nt_xent.statistics  tf32x3   1024    64     32    16     0     4      2        2
nt_xent.gradient    half      128    32     64   128   128     4      2        2
nt_xent.gradient    half      256    32     64   256   256     8      2        1
nt_xent.gradient    tf32x3   1024    32     32    16    64     4      2        2
nt_xent.plain       half      128    32     64   128   128     4      2        2
nt_xent.plain       half      256    32     64   256   256     8      2        1
nt_xent.plain       tf32x3   1024    32     32    16    64     4      2        2
""")

# Few and large: each step costs the interpreter the same.
INTERPRETED = _table("""
kernel              precision   D  held walked depth width warps stages programs
co2.statistics      half     1024    64    128   128     0     4      1        1
co2.gradient        half     1024    64    128   128   256     4      1        1
conic.statistics    half     1024   256     64   128     0     4      1        1
conic.weight        half     1024   256     64   128   256     4      1        1
conic.views         half     1024    64    256   128   256     4      1        1
nt_xent.statistics  half     1024   256    256   512     0     4      1        1
nt_xent.gradient    half     1024   256    256   512   512     4      1        1
nt_xent.plain       half     1024   256    256  1024  1024     4      1        1  stacked
""")

TABLES = {INTERPRETER: INTERPRETED, (8, 0): AMPERE, (9, 0): HOPPER, (10, 0): BLACKWELL, (10, 3): BLACKWELL}


def entries(name: str, capability: tuple[int, int]) -> dict[tuple[str, int], Tiling]:
    """The lines of a kernel in the table of an architecture, by precision and the largest D served.

    Args:
        name: of the loss and the kernel, as in the table.
        capability: compute capability of the device, (major, minor); (0, 0) for the interpreter.
    """
    return lines_of(TABLES.get(capability, OTHER), name)


def select(name: str, capability: tuple[int, int], precision: str, dim: int) -> Tiling:
    """The tiles of a kernel for rows of D dimensions; arguments as of `entries`."""
    if capability == INTERPRETER:
        precision = "half"
    return line_for(TABLES.get(capability, OTHER), name, precision, dim)
