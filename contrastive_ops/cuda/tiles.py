"""Tiles of the kernels of csrc/cuda that walk: a table for each generation of tensor cores.

Nothing in it spills registers, and all of it fits the shared memory of its architectures
(tests/test_cuda_kernels.py). A warp holds 16 rows of each of a program's blocks; ConIC has two blocks, of
which `held` counts all rows.
"""

from __future__ import annotations

from ..gpu.tiles import Table, Tiling, line_for, lines_of
from ..gpu.tiles import table as _table

# Compute capability 8.0 and newer: mma.m16n8k16 and asynchronous copies; 99 KiB of shared memory a program.
AMPERE = _table("""
kernel              precision   D  held walked depth width warps stages programs
co2.statistics      half      128    64     32   128     0     4      3        3
co2.statistics      half      256    64     32   256     0     4      3        2
co2.statistics      half     1024    64     64    32     0     4      3        2
co2.statistics      tf32     1024    64     32    32     0     4      3        2
co2.statistics      tf32x3   1024    64     32    32     0     4      2        2
co2.gradient        half      128    64     32   128   128     4      3        2
co2.gradient        half      256    64     32   256   256     4      2        1
co2.gradient        half     1024    64     32    64   256     4      2        2
co2.gradient        tf32     1024    64     32    32   128     4      2        2
co2.gradient        tf32x3   1024    64     32    16   128     4      2        2
conic.statistics    half      128   128     32   128     0     4      3        3
conic.statistics    half      256   128     32   256     0     4      3        2
conic.statistics    half     1024   128     64    32     0     4      3        2
conic.statistics    tf32     1024   128     32    32     0     4      2        2
conic.statistics    tf32x3   1024   128     32    32     0     4      2        2
conic.weight        half      128   128     32   128   128     4      2        2
conic.weight        half     1024   128     32    64   128     4      2        2
conic.weight        tf32     1024   128     32    32   128     4      2        1
conic.weight        tf32x3   1024   128     32    16    64     4      2        1
conic.views         half      128   128     32   128   128     4      2        2
conic.views         half     1024   128     32    64   128     4      2        2
conic.views         tf32     1024   128     32    32   128     4      2        1
conic.views         tf32x3   1024   128     32    16    64     4      2        1
nt_xent.statistics  half      128    64     32   128     0     4      3        3
nt_xent.statistics  half      256    64     32   256     0     4      3        2
nt_xent.statistics  half     1024    64     64    32     0     4      3        2
nt_xent.statistics  tf32     1024    64     32    32     0     4      2        2
nt_xent.statistics  tf32x3   1024    64     32    32     0     4      2        2
nt_xent.gradient    half      128    64     32   128   128     4      2        2
nt_xent.gradient    half     1024    64     32    64   128     4      2        1
nt_xent.gradient    tf32     1024    64     32    32   128     4      2        1
nt_xent.gradient    tf32x3   1024    64     32    16    64     4      2        1
nt_xent.plain       half      128    64     32   128   128     4      2        2
nt_xent.plain       half     1024    64     32    64   128     4      2        1
nt_xent.plain       tf32     1024    64     32    32   128     4      2        1
nt_xent.plain       tf32x3   1024    64     32    16    64     4      2        1
""")

# Compute capability 9.0: half precision is multiplied by groups of four warps.
HOPPER = AMPERE | _table("""
kernel              precision   D  held walked depth width warps stages programs
co2.statistics      half      128    64     64   128     0     4      3        2
co2.statistics      half      256    64     32   256     0     4      3        2
co2.gradient        half      128    64     64   128   128     4      4        2
co2.gradient        half      256    64     32   256   256     4      5        1
conic.statistics    half      128   128     64   128     0     4      3        2
conic.statistics    half      256   128     32   256     0     4      3        2
conic.weight        half      128   128     32   128   128     4      5        2
conic.views         half      128   128     32   128   128     4      5        2
nt_xent.statistics  half      128    64     32   128     0     4      4        2
nt_xent.statistics  half      256    64     32   256     0     4      3        2
nt_xent.gradient    half      128    64     32   128   128     4      5        2
nt_xent.plain       half      128    64     32   128   128     4      5        2
""")

# Compute capability 7.x: float16 on tensor cores, all else by multiply-adds; 64 KiB on 7.5, 96 KiB on 7.0.
TURING = _table("""
kernel              precision   D  held walked depth width warps stages programs
co2.statistics      half      128    64     32   128     0     4      2        3
co2.statistics      half     1024    64     32    32     0     4      2        2
co2.statistics      tf32x3   1024    64     32    16     0     4      2        2
co2.gradient        half      128    64     32   128   128     4      2        2
co2.gradient        half     1024    64     32    32   128     4      2        2
co2.gradient        tf32x3   1024    64     32    16   128     4      2        2
conic.statistics    half      128   128     32   128     0     4      2        2
conic.statistics    half     1024   128     32    32     0     4      2        2
conic.statistics    tf32x3   1024   128     32    16     0     4      2        2
conic.weight        half      128   128     32   128   128     4      2        1
conic.weight        half     1024   128     32    64    64     4      2        1
conic.weight        tf32x3   1024   128     32    32    64     4      2        1
conic.views         half      128   128     32   128   128     4      2        1
conic.views         half     1024   128     32    64    64     4      2        1
conic.views         tf32x3   1024   128     32    32    64     4      2        1
nt_xent.statistics  half      128    64     32   128     0     4      2        3
nt_xent.statistics  half     1024    64     32    32     0     4      2        2
nt_xent.statistics  tf32x3   1024    64     32    16     0     4      2        2
nt_xent.gradient    half      128    64     32   128   128     4      2        1
nt_xent.gradient    half     1024    64     32    64    64     4      2        1
nt_xent.gradient    tf32x3   1024    64     32    32    64     4      2        1
nt_xent.plain       half      128    64     16   128   128     4      2        1
nt_xent.plain       half     1024    64     32    64    64     4      2        1
nt_xent.plain       tf32x3   1024    64     32    32    64     4      2        1
""")

# Its tensor cores take rows from shared memory alone, where those of a program leave room for no other.
VOLTA = TURING | _table("""
kernel              precision   D  held walked depth width warps stages programs
co2.statistics      half      128   128     32   128     0     8      2        1
co2.gradient        half      128   128     32   128   128     8      2        1
conic.statistics    half      128   256     32   128     0     8      2        1
conic.weight        half      128   256     32   128   128     8      2        1
conic.views         half      128   256     32   128   128     8      2        1
nt_xent.statistics  half      128   128     32   128     0     8      2        1
nt_xent.gradient    half      128   128     32   128   128     8      2        1
nt_xent.plain       half      128   128     32   128   128     8      2        1
""")


def table_of(capability: tuple[int, int]) -> Table:
    """The table for a device of that compute capability."""
    if capability == (9, 0):
        return HOPPER
    if capability >= (8, 0):
        return AMPERE
    return TURING if capability == (7, 5) else VOLTA


def entries(name: str, capability: tuple[int, int]) -> dict[tuple[str, int], Tiling]:
    """The lines of a kernel, by precision and the largest D served."""
    return lines_of(table_of(capability), name)


def select(name: str, capability: tuple[int, int], precision: str, dim: int) -> Tiling:
    """The tiles of a kernel for rows of D dimensions."""
    return line_for(table_of(capability), name, precision, dim)
