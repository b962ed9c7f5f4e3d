"""What the kernels share on the device: loading, multiplying and merging. `gpu.launch` is the host's side.

A matrix is one argument of a kernel, a `gpu.arguments.Matrix` of its pointer and strides. What is compiled in
about the tiles that a kernel walks is one too, a `Tile`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

NORM_EPSILON = tl.constexpr(1e-12)  # a row shorter than this is divided by this, as in reference.py
LOWEST = tl.constexpr(-1e38)  # below every logit, yet finite: a difference of two is no NaN
LARGEST_FLOAT16 = tl.constexpr(65504.0)


class Block(NamedTuple):
    """Some rows of a matrix that has `count` of them; those outside are read as zeros and not written."""

    matrix: Any
    rows: Any
    count: Any


@triton.jit
def at(matrix, rows, columns):
    """Pointers to the numbers (rows, columns) of a matrix."""
    offsets = rows.to(tl.int64)[:, None] * matrix.row + columns.to(tl.int64)[None, :] * matrix.column
    return matrix.data + offsets


@triton.jit
def load(block, columns, dim, WHOLE_ROWS: tl.constexpr = False, WHOLE_COLUMNS: tl.constexpr = False):
    """A (rows, columns) tile of a block; zeros outside, unless it is known to be inside."""
    if WHOLE_ROWS and WHOLE_COLUMNS:
        return tl.load(at(block.matrix, block.rows, columns))
    inside = (columns < dim)[None, :]
    if not WHOLE_ROWS:
        inside = (block.rows < block.count)[:, None] & inside
    return tl.load(at(block.matrix, block.rows, columns), mask=inside, other=0.0)


@triton.jit
def store(block, tile, columns, dim, WHOLE_ROWS: tl.constexpr = False, WHOLE_COLUMNS: tl.constexpr = False):
    """The reverse of `load`, rounded to the matrix's dtype."""
    to = at(block.matrix, block.rows, columns)
    tile = tile.to(block.matrix.data.dtype.element_ty)
    if WHOLE_ROWS and WHOLE_COLUMNS:
        tl.store(to, tile)
    else:
        tl.store(to, tile, mask=(block.rows < block.count)[:, None] & (columns < dim)[None, :])


@triton.jit
def load_fields(record, COUNT: tl.constexpr, mask=None):
    """The fields of records, a tuple for a class of `_contract.py`; where masked, 0."""
    other: tl.constexpr = None if mask is None else 0.0
    fields = (tl.load(record, mask=mask, other=other),)
    for i in tl.static_range(1, COUNT):  # Triton unpacks no tuple in another.
        fields = fields + (tl.load(record + i, mask=mask, other=other),)  # noqa: RUF005
    return fields


@triton.jit
def four_fields(records, COUNT: tl.constexpr):
    """Records of four numbers, a field each, (COUNT,). They are loaded all at once, for one by one they would
    be as many copies to wait for."""
    x = tl.load(records + tl.arange(0, COUNT)[:, None] * 4 + tl.arange(0, 4)[None, :])
    return split_four(tl.reshape(x, [COUNT, 2, 2]))


@triton.jit
def split_four(x):
    """The last two dimensions, (2, 2), apart."""
    even, odd = tl.split(x)
    zeroth, second = tl.split(even)
    first, third = tl.split(odd)
    return zeroth, first, second, third


@triton.jit
def store_fields(record, fields, mask):
    """The reverse of `load_fields`."""
    for i in tl.static_range(len(fields)):
        tl.store(record + i, fields[i], mask=mask)


@triton.jit
def _round_to_tf32(x):
    """To nearest. A NaN whose bits are all ones, as GPUs make them, comes out as 0."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b. "tf32x3" is as exact as float32: of a = high + low, both TF32, only low·low is lost."""
    if PRECISION == "tf32x3":
        a_high, b_high = _round_to_tf32(a), _round_to_tf32(b)
        small = tl.dot(a - a_high, b_high, input_precision="tf32")  # the low part of a NaN is one
        small = tl.dot(a_high, b - b_high, small, input_precision="tf32")
        # Tensor cores cut off what their sum cannot hold, so a long sum shrinks. This addition rounds.
        return total + tl.dot(a_high, b_high, small, input_precision="tf32")
    if PRECISION == "tf32":  # as they are, tensor cores would cut the operands off, not round them
        a, b = tl.where(a == a, _round_to_tf32(a), a), tl.where(b == b, _round_to_tf32(b), b)
    return tl.dot(a, b, total, input_precision="tf32")


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x as it is multiplied. A finite number that float16 cannot hold becomes the nearest that it can."""
    if tl.float16 == DTYPE and x.dtype != tl.float16:
        x = tl.where(tl.abs(x) < float("inf"), tl.clamp(x, -LARGEST_FLOAT16, LARGEST_FLOAT16), x)
    return x.to(DTYPE)


@triton.jit
def move(old, new, scale):
    """λ (old − new) of two maxima, of which the older may be LOWEST."""
    return tl.maximum((old - new) * scale, LOWEST)


@triton.jit
def measure_rows(query, key, dim, DEPTH: tl.constexpr, NORMALIZE: tl.constexpr, WHOLE_COLUMNS: tl.constexpr):
    """max(‖q‖, ε), max(‖k‖, ε) (1 unless NORMALIZE) and q·k̂ of each row; float64 holds any square."""
    zero = tl.zeros_like(query.rows).to(tl.float64)
    qq, kk, qk = zero, zero, zero
    for first in tl.range(0, dim, DEPTH, loop_unroll_factor=4):
        columns = first + tl.arange(0, DEPTH)
        q = load(query, columns, dim, WHOLE_COLUMNS=WHOLE_COLUMNS).to(tl.float32).to(tl.float64)
        k = load(key, columns, dim, WHOLE_COLUMNS=WHOLE_COLUMNS).to(tl.float32).to(tl.float64)
        qq += tl.sum(q * q, axis=1)
        kk += tl.sum(k * k, axis=1)
        qk += tl.sum(q * k, axis=1)
    norm_q, norm_k = zero + 1.0, zero + 1.0
    if NORMALIZE:
        norm_q, norm_k = tl.maximum(tl.sqrt(qq), NORM_EPSILON), tl.maximum(tl.sqrt(kk), NORM_EPSILON)
    return norm_q, norm_k, qk / norm_k


@triton.jit
def stacked(x, y):
    """Two tiles as one: the rows of x, then those of y."""
    return tl.reshape(tl.permute(tl.join(x, y), [2, 0, 1]), [2 * x.shape[0], x.shape[1]])


@triton.jit
def unstacked(both):
    """The reverse of `stacked`. Where a warp multiplies rows of both, no number moves."""
    ROWS: tl.constexpr = both.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(both, [2, ROWS, both.shape[1]]), [1, 2, 0]))


@triton.jit
def similarities(query, key, keys, held, dim, CONSISTENCY: tl.constexpr, TILE: tl.constexpr):
    """q Nᵀ and k Nᵀ of a tile of keys, and the tile.

    `held` are q and k, rounded, or both of them `stacked` where the tile says so and there is a consistency
    term. Of chunked rows these are loaded here, `TILE.depth` dimensions at a time, and no tile is returned.
    """
    ROWS: tl.constexpr = TILE.rows
    KEYS: tl.constexpr = TILE.keys
    PRECISION: tl.constexpr = TILE.precision
    s, y = tl.zeros([ROWS, KEYS], tl.float32), tl.zeros([ROWS, KEYS], tl.float32)
    columns = tl.arange(0, TILE.depth)
    if TILE.chunked:
        tile = columns  # Unused: both branches must give a variable a value.
        for first in range(0, dim, TILE.depth):
            chunk = first + columns
            n = load(keys, chunk, dim, WHOLE_ROWS=TILE.whole_keys, WHOLE_COLUMNS=TILE.whole_columns)
            n = tl.trans(rounded(n, TILE.dtype))
            q = load(query, chunk, dim, WHOLE_COLUMNS=TILE.whole_columns)
            s = product(rounded(q, TILE.dtype), n, s, PRECISION)
            if CONSISTENCY:
                k = load(key, chunk, dim, WHOLE_COLUMNS=TILE.whole_columns)
                y = product(rounded(k, TILE.dtype), n, y, PRECISION)
    else:
        tile = load(keys, columns, dim, WHOLE_ROWS=TILE.whole_keys, WHOLE_COLUMNS=TILE.whole_columns)
        tile = rounded(tile, TILE.dtype)
        if TILE.stacked and CONSISTENCY:
            both = product(held, tl.trans(tile), tl.zeros([2 * ROWS, KEYS], tl.float32), PRECISION)
            s, y = unstacked(both)
        else:
            s = product(held[0], tl.trans(tile), s, PRECISION)
            if CONSISTENCY:
                y = product(held[1], tl.trans(tile), y, PRECISION)
    return s, y, tile


@triton.jit
def move_sums(sums, moved_s, moved_y):
    """Sums of `add_tile` relative to other maxima."""
    z_query, z_key, d_query, d_key = sums
    moved_query, moved_key, shift = tl.exp2(moved_s), tl.exp2(moved_y), moved_s - moved_y
    d_query, d_key = (d_query + shift * z_query) * moved_query, (d_key + shift * z_key) * moved_key
    return z_query * moved_query, z_key * moved_key, d_query, d_key


@triton.jit
def two_exponentials(a, ratio, POWER: tl.constexpr):
    """2^{a ratio} and 2^a. Where the ratio is 1/POWER, one is a power of the other, and special-function
    units have but one exponential to do; POWER is 0 elsewhere."""
    lower = tl.exp2(a * ratio)
    higher = None
    if POWER == 0:
        higher = tl.exp2(a)
    else:
        square = lower
        for bit in tl.static_range(4):
            if (POWER >> bit) % 2 == 1:
                higher = square if higher is None else higher * square
            square *= square
    return lower, higher


@triton.jit
def add_tile(sums, a, b, e_query, e_key):
    """What a tile's logits a and b add to the sums of 2^a, 2^b, 2^a d and 2^b d with d = a − b; e are 2^a and
    2^b."""
    z_query, z_key, d_query, d_key = sums
    d = a - b
    d_query, d_key = d_query + tl.sum(e_query * d, axis=1), d_key + tl.sum(e_key * d, axis=1)
    return z_query + tl.sum(e_query, axis=1), z_key + tl.sum(e_key, axis=1), d_query, d_key


class Merged(NamedTuple):
    """What `merge` returns: the highest maxima, by how much each was moved, and the sums relative to them."""

    max_s: Any
    max_y: Any
    moved_s: Any
    moved_y: Any
    z_query: Any
    z_key: Any
    d_query: Any
    d_key: Any


@triton.jit
def merge(top_s, top_y, sums, scale_q, scale_k, AXIS: tl.constexpr):
    """Sums of `add_tile` that are relative to different maxima, as ones relative to the highest."""
    z_query, z_key, d_query, d_key = sums
    max_s, max_y = tl.max(top_s, axis=AXIS), tl.max(top_y, axis=AXIS)
    moved_s = move(top_s, tl.expand_dims(max_s, AXIS), scale_q)
    moved_y = move(top_y, tl.expand_dims(max_y, AXIS), scale_k)
    factor_query, factor_key = tl.exp2(moved_s), tl.exp2(moved_y)
    shift = moved_s - moved_y  # of every d
    d_query = tl.sum((d_query + shift * z_query) * factor_query, axis=AXIS)
    d_key = tl.sum((d_key + shift * z_key) * factor_key, axis=AXIS)
    z_query, z_key = tl.sum(z_query * factor_query, axis=AXIS), tl.sum(z_key * factor_key, axis=AXIS)
    return Merged(max_s, max_y, moved_s, moved_y, z_query, z_key, d_query, d_key)


@triton.jit
def load_double(numbers, there, other):
    return tl.load(numbers, mask=there, other=other).to(tl.float64)


@triton.jit
def softplus(x):
    """log(1 + e^x) and its derivative, of a float64, to the last digit."""
    e = tl.exp(-tl.abs(x))
    value = tl.maximum(x, 0.0) + tl.where(e < 1e-8, e, tl.log(1.0 + e))
    return value, tl.where(x > 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def largest_size(sizes, count, STRIDE: tl.constexpr = 1):
    """max |x|, which each program that needs it finds for itself."""
    largest = tl.zeros([1024], tl.float32)
    for first in range(0, count, 1024):
        index = first + tl.arange(0, 1024)
        largest = tl.maximum(largest, tl.abs(tl.load(sizes + index * STRIDE, mask=index < count, other=0.0)))
    return tl.max(largest, axis=0)


@triton.jit
def store_unit(unit, unit_rows, block, norm, dim, DEPTH: tl.constexpr):
    """x̂ of some rows, with zeros where a row has less dimensions than `unit`, or is outside."""
    inverse = 1.0 / norm
    for first in range(0, unit.row, DEPTH):
        columns = first + tl.arange(0, DEPTH)
        x = load(block, columns, dim).to(tl.float32).to(tl.float64) * inverse[:, None]
        tl.store(at(unit, unit_rows, columns), x.to(tl.float32).to(unit.data.dtype.element_ty))


@triton.jit
def sum_of_parts(parts, rows, columns, there, ranges, padded_rows):
    """What the ranges of keys added to the gradients of some rows, added up in their order.

    `parts` is a Matrix of (ranges · padded_rows, padded dimensions).
    """
    total = tl.zeros_like(there).to(tl.float32)
    first_part, part_stride = at(parts, rows, columns), padded_rows.to(tl.int64) * parts.row
    for part in tl.range(0, ranges, loop_unroll_factor=8):
        total += tl.load(first_part + part * part_stride, mask=there, other=0.0)
    return total.to(tl.float64)


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
