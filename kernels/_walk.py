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
def rounded(x, DTYPE: tl.constexpr):
    """x as it is multiplied. A finite number that float16 cannot hold becomes the nearest that it can."""
    if tl.float16 == DTYPE and x.dtype != tl.float16:
        x = tl.where(tl.abs(x) < float("inf"), tl.clamp(x, -65504.0, 65504.0), x)
    return x.to(DTYPE)


@triton.jit
def move(old, new, scale):
    """λ (old − new) of two maxima, of which the older may be LOWEST."""
    return tl.maximum((old - new) * scale, LOWEST)


@triton.jit
def measure_rows(
    query, key, rows, batch, dim, query_row, query_column, key_row, key_column,
    NORMALIZE: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, BLOCK_B: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """max(‖q‖, ε), max(‖k‖, ε) (1 unless NORMALIZE) and q·k̂ of each row; float64 holds any square."""
    zero = tl.zeros([BLOCK_B], tl.float64)
    qq, kk, qk = zero, zero, zero
    for first in tl.range(0, dim, DEPTH, loop_unroll_factor=4):
        columns = first + tl.arange(0, DEPTH)
        q = load(query, rows, columns, batch, dim, query_row, query_column, False, WHOLE_COLUMNS)
        k = load(key, rows, columns, batch, dim, key_row, key_column, False, WHOLE_COLUMNS)
        q, k = q.to(tl.float32).to(tl.float64), k.to(tl.float32).to(tl.float64)
        qq += tl.sum(q * q, axis=1)
        kk += tl.sum(k * k, axis=1)
        qk += tl.sum(q * k, axis=1)
    norm_q, norm_k = zero + 1.0, zero + 1.0
    if NORMALIZE:
        norm_q, norm_k = tl.maximum(tl.sqrt(qq), NORM_EPSILON), tl.maximum(tl.sqrt(kk), NORM_EPSILON)
    return norm_q, norm_k, qk / norm_k


@triton.jit
def similarities(
    query, key, queue, q, k, rows, tile_rows, batch, keys, dim,
    query_row, query_column, key_row, key_column, queue_row, queue_column,
    CONSISTENCY: tl.constexpr, WHOLE_KEYS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, CHUNKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """q Nᵀ and k Nᵀ of a tile of keys, and the tile; CHUNKED, DEPTH dimensions at a time, and no tile."""
    s, y = tl.zeros([BLOCK_B, BLOCK_K], tl.float32), tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    columns = tl.arange(0, DEPTH)
    if CHUNKED:
        tile = columns  # stands for none, which Triton cannot return
        for first in range(0, dim, DEPTH):
            these = first + columns
            keys_chunk = load(
                queue, tile_rows, these, keys, dim, queue_row, queue_column, WHOLE_KEYS, WHOLE_COLUMNS
            )  # fmt: skip
            keys_chunk = tl.trans(rounded(keys_chunk, DTYPE))
            q_chunk = load(query, rows, these, batch, dim, query_row, query_column, False, WHOLE_COLUMNS)
            s = product(rounded(q_chunk, DTYPE), keys_chunk, s, PRECISION)
            if CONSISTENCY:
                k_chunk = load(key, rows, these, batch, dim, key_row, key_column, False, WHOLE_COLUMNS)
                y = product(rounded(k_chunk, DTYPE), keys_chunk, y, PRECISION)
    else:
        tile = load(queue, tile_rows, columns, keys, dim, queue_row, queue_column, WHOLE_KEYS, WHOLE_COLUMNS)
        tile = rounded(tile, DTYPE)
        s = product(q, tl.trans(tile), s, PRECISION)
        if CONSISTENCY:
            y = product(k, tl.trans(tile), y, PRECISION)
    return s, y, tile


@triton.jit
def add_tile(z_query, z_key, d_query, d_key, a, b, moved_s, moved_y):
    """What a tile's logits a and b, relative to the highest yet, add to the sums of 2^a, 2^b, 2^a d and 2^b d
    with d = a − b; the older ones are moved to that maximum first."""
    e_query, e_key, d = tl.exp2(a), tl.exp2(b), a - b
    moved_query, moved_key, shift = tl.exp2(moved_s), tl.exp2(moved_y), moved_s - moved_y
    d_query = (d_query + shift * z_query) * moved_query + tl.sum(e_query * d, axis=1)
    d_key = (d_key + shift * z_key) * moved_key + tl.sum(e_key * d, axis=1)
    z_query = z_query * moved_query + tl.sum(e_query, axis=1)
    z_key = z_key * moved_key + tl.sum(e_key, axis=1)
    return z_query, z_key, d_query, d_key


@triton.jit
def merge(top_s, top_y, z_query, z_key, d_query, d_key, scale_q, scale_k, AXIS: tl.constexpr):
    """Sums taken relative to different maxima, as one relative to the highest of them; that, and by how much
    each was moved."""
    max_s, max_y = tl.max(top_s, axis=AXIS), tl.max(top_y, axis=AXIS)
    moved_s = move(top_s, tl.expand_dims(max_s, AXIS), scale_q)
    moved_y = move(top_y, tl.expand_dims(max_y, AXIS), scale_k)
    factor_query, factor_key = tl.exp2(moved_s), tl.exp2(moved_y)
    shift = moved_s - moved_y  # of every d
    d_query = tl.sum((d_query + shift * z_query) * factor_query, axis=AXIS)
    d_key = tl.sum((d_key + shift * z_key) * factor_key, axis=AXIS)
    z_query, z_key = tl.sum(z_query * factor_query, axis=AXIS), tl.sum(z_key * factor_key, axis=AXIS)
    return max_s, max_y, moved_s, moved_y, z_query, z_key, d_query, d_key


@triton.jit
def load_double(field, there, other):
    return tl.load(field, mask=there, other=other).to(tl.float64)


@triton.jit
def softplus(x):
    """log(1 + e^x) and its derivative, of a float64, to the last digit."""
    e = tl.exp(-tl.abs(x))
    value = tl.maximum(x, 0.0) + tl.where(e < 1e-8, e, tl.log(1.0 + e))
    return value, tl.where(x > 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def largest_size(sizes, count):
    """max |x|, which each program that needs it finds for itself."""
    largest = tl.zeros([1024], tl.float32)
    for first in range(0, count, 1024):
        index = first + tl.arange(0, 1024)
        largest = tl.maximum(largest, tl.abs(tl.load(sizes + index, mask=index < count, other=0.0)))
    return tl.max(largest, axis=0)


@triton.jit
def store_unit(
    unit, unit_rows, unit_row, matrix, norm, rows, count, dim, row_stride, column_stride, DEPTH: tl.constexpr
):  # fmt: skip
    """x̂ of some rows, with zeros where a row has less dimensions than `unit`, or is outside."""
    for first in range(0, unit_row, DEPTH):
        columns = first + tl.arange(0, DEPTH)
        x = load(matrix, rows, columns, count, dim, row_stride, column_stride, False, False)
        x = (x.to(tl.float32).to(tl.float64) / norm[:, None]).to(tl.float32)
        store(unit, x, unit_rows, columns, 0, 0, unit_row, 1, True, True)


@triton.jit
def sum_of_parts(
    parts, rows, columns, there, ranges, part_stride, row_stride,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The ranges' parts of some rows, added up in their order."""
    sum = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    of_part = parts + rows[:, None] * row_stride + columns[None, :]
    for part in tl.range(0, ranges, loop_unroll_factor=8):
        sum += tl.load(of_part + part * part_stride, mask=there, other=0.0)
    return sum.to(tl.float64)


@triton.jit
def through_norm(grad, x, norm):
    """dx = (dx̂ − x̂ (x̂·dx̂)) / ‖x‖; a row below the epsilon was only scaled, so it has no projection."""
    radial = tl.where(norm > NORM_EPSILON, tl.sum(x * grad, axis=1), 0.0)
    return (grad - x * radial[:, None]) / norm[:, None]


@triton.jit
def split(x):
    """A float64 as the sum of two float32."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


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


def lanes(capability: tuple[int, int]) -> int:
    """In how many lanes the statistics of a row are kept, to be merged at the end: lane i has the keys that
    are i modulo this number. The registers of a matrix product repeat every 8 columns, so one thread holds
    all of a lane, and threads exchange nothing on the way. From tensor memory a thread loads whole rows."""
    return 1 if capability[0] == 10 else 8


def precision_of(dtype: torch.dtype) -> str:
    """How rows are multiplied: as they are in half precision; float32 exactly, or in TF32 if PyTorch may."""
    if dtype != torch.float32:
        return "half"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
