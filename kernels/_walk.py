"""What kernels that walk the rows of a matrix share: loading and multiplying its tiles, launching them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._tiles import Tiles

NORM_EPSILON = tl.constexpr(1e-12)  # a row shorter than this is divided by this, as in reference.py
LOWEST = tl.constexpr(-1e38)  # below every logit, yet finite: a difference of two is no NaN


@triton.jit
def load(
    matrix, rows, columns, count, dim, row_stride, column_stride,
    WHOLE_ROWS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A (rows, columns) tile of a matrix of any strides; zeros outside, unless it is known to be inside."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    if WHOLE_ROWS and WHOLE_COLUMNS:
        return tl.load(matrix + offsets)
    inside = (columns < dim)[None, :]
    if not WHOLE_ROWS:
        inside = (rows < count)[:, None] & inside
    return tl.load(matrix + offsets, mask=inside, other=0.0)


@triton.jit
def store(
    matrix, tile, rows, columns, count, dim, row_stride, column_stride,
    WHOLE_ROWS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The reverse of `load`, rounded to the matrix's dtype."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    tile = tile.to(matrix.dtype.element_ty)
    if WHOLE_ROWS and WHOLE_COLUMNS:
        tl.store(matrix + offsets, tile)
    else:
        tl.store(matrix + offsets, tile, mask=(rows < count)[:, None] & (columns < dim)[None, :])


@triton.jit
def _round_to_tf32(x):
    """To nearest. A NaN whose bits are all ones, as GPUs make them, comes out as 0."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, sum, PRECISION: tl.constexpr):
    """sum + a b. "tf32x3" is as exact as float32: of a = high + low, both TF32, only low·low is lost."""
    if PRECISION == "tf32x3":
        a_high, b_high = _round_to_tf32(a), _round_to_tf32(b)
        small = tl.dot(a - a_high, b_high, input_precision="tf32")  # the low part of a NaN is one
        small = tl.dot(a_high, b - b_high, small, input_precision="tf32")
        # Tensor cores cut off what their sum cannot hold, so a long sum shrinks. This addition rounds.
        return sum + tl.dot(a_high, b_high, small, input_precision="tf32")
    if PRECISION == "tf32":  # as they are, tensor cores would cut the operands off, not round them
        a, b = tl.where(a == a, _round_to_tf32(a), a), tl.where(b == b, _round_to_tf32(b), b)
    return tl.dot(a, b, sum, input_precision="tf32")


@triton.jit
def move(old, new, scale):
    """λ (old − new) of two maxima, of which the older may be LOWEST."""
    return tl.maximum((old - new) * scale, LOWEST)


@dataclass(frozen=True)
class Launch:
    """Grid and compile-time arguments of a kernel."""

    grid: tuple[int, ...]
    options: dict[str, Any]
    keys_a_range: int = 0

    @property
    def ranges(self) -> int:
        return self.grid[1]


def walk(tiles: Tiles, batch: int, keys: int, dim: int, multiprocessors: int) -> Launch:
    """Of a kernel that walks the keys: row blocks × ranges of keys × chunks of the gradient's dimensions."""
    options = tile_options(tiles, dim)
    options |= {"BLOCK_B": tiles.rows, "BLOCK_K": tiles.keys, "WHOLE_KEYS": keys % tiles.keys == 0}
    blocks, steps = triton.cdiv(batch, tiles.rows), triton.cdiv(keys, tiles.keys)
    chunks = triton.cdiv(dim, options.get("WIDTH", dim))
    keys_a_range = steps_a_range(steps, blocks * chunks, tiles.programs * multiprocessors)
    return Launch((blocks, triton.cdiv(steps, keys_a_range), chunks), options, keys_a_range * tiles.keys)


def tile_options(tiles: Tiles, dim: int) -> dict[str, Any]:
    """The compile-time arguments that say how rows of D dimensions are cut, and Triton's own."""
    padded_dim = max(16, triton.next_power_of_2(dim))
    depth = min(tiles.depth, padded_dim)
    options: dict[str, Any] = {"CHUNKED": dim > depth, "DEPTH": depth}
    if tiles.width:  # the gradient's
        options["WIDTH"] = min(tiles.width, padded_dim) if dim > depth else depth
    options["WHOLE_COLUMNS"] = dim % depth == 0 and dim % options.get("WIDTH", dim) == 0
    return options | {"num_warps": tiles.warps, "num_stages": tiles.stages}


def steps_a_range(steps: int, blocks: int, slots: int) -> int:
    """How many tiles of keys make a range, so that `blocks` programs for each range, of which `slots` run at
    a time, are done first. Beginning and end of a program cost about as much as two tiles."""

    def time(size: int) -> int:
        return triton.cdiv(blocks * triton.cdiv(steps, size), slots) * (size + 2)

    most_ranges = min(steps, max(1, 4 * slots // blocks))
    candidates = {triton.cdiv(steps, ranges) for ranges in range(1, most_ranges + 1)}
    return min(sorted(candidates, reverse=True), key=time)


Chip = tuple[tuple[int, int], int]  # compute capability, multiprocessors


@functools.cache
def chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return (0, 0), 1  # the interpreter
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def precision_of(dtype: torch.dtype) -> str:
    """How rows are multiplied: as they are in half precision; float32 exactly, or in TF32 if PyTorch may."""
    if dtype != torch.float32:
        return "half"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
