"""CO2 and InfoNCE on GPUs: the operator that contrastive_ops/reference.py specifies, in four launches.

Plan. The grid is (block of query rows) × (range of keys), so that a batch of 32 fills the chip as one of 4096
does. A program walks its range a tile of keys at a time; nothing of size B×K leaves it.

1. statistics   s = q Nᵀ and y = k Nᵀ of each tile; per row both maxima, three partition sums, both sums of
                d, and the rank of the positive. Each range writes these eight numbers a row.
2. merge        the ranges' numbers, in a fixed order: losses, rank, and what a row's gradient needs.
3. gradient     computes s and y again, makes them g = dL/ds, and adds up g N. Each range writes its part.
4. finish       adds the parts up in a fixed order, adds the positive's, and differentiates the normalisation.

Without a gradient the first two are all. There are no atomics: equal input gives equal bits.

Rows are multiplied as stored, but a queue of another dtype is rounded to the query's as its tiles are
loaded; norms divide similarities, not rows. A pair of row and key has

    a_j = λ (s_j − max s)     b_j = λ (y_j − max y)     d_j = a_j − b_j     with λ = log2(e)/τc,

so that e^{s/τc} ~ 2^a, e^{y/τc} ~ 2^b and e^{s/τ} ~ 2^{a τc/τ}. InfoNCE alone has τ in place of τc.

Bounds. A pair costs 5 products of 2 D operations (2 in the statistics, 3 in the gradient) and 6 exponentials;
the queue is read twice, the second time from the cache where it fits. At B = 256, K = 65536, D = 128 in
bfloat16 on an H200: 27 µs of products, 24 µs of exponentials, 4 µs of memory. As compiled (python -m
bench.resources), with the clocks of a multiprocessor that a pair takes of its schedulers, special-function
units and tensor cores:

    statistics   0.199   0.211   0.125   bound by exponentials: 13.5 µs at 1.98 GHz, were they never idle
    gradient     0.152   0.188   0.188   bound by exponentials and products: 12.0 µs

Merge and finish move 0.5 MiB and 2 × 8 MiB, all in the cache. None of this has been measured on a GPU yet.

What was tried, by what the compiler made of it (Hopper, D = 128, bfloat16; instructions a pair):

- A row's maxima and sums reduced for each tile: 27.0, one of them a shuffle. In lanes (see _walk.py): 25.4.
- Statistics in tiles of 64 × 128: 23.7, but 255 registers and a spill. 128 × 128 with 8 warps: 22.9, but a
  multiprocessor holds one such program, whose halves wait for each other: tensor cores would idle during its
  exponentials.
- λ s − λ max in one instruction instead of λ (s − max) in two: 23.7. But what λ s loses to rounding is left
  over at the maximum: 1e-6 of a logit at the papers' temperatures, and an overflow where logits are enormous.
- Normalising rows before the product: 255 registers and a spill. Dividing the scale of logits: nothing.
- The merge within the gradient's programs: 608 bytes spilled, and each would read what all ranges wrote.
- e^{s/τc} as a power of e^{s/τ} where τ = 4 τc, as in MoCo v2: 2.4 exponentials for 26.5 instructions, which
  is 0.207 clocks where 0.211 were; the gradient is bound by its products all the same.
- One pass with four accumulators: 6 products, 3 exponentials and no statistics would be 0.375 clocks where
  two passes are 0.399, but 4 × 64 registers of sums for each thread are all there are.
- Triton's own "tf32x3" spends 57 instructions where product spends 44, and cuts operands off where product
  rounds them: in a simulation of tensor cores that truncate, losses were off by 1.2e-6, and are by 2e-7.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import select_tiles
from ._walk import (
    LOWEST,
    NORM_EPSILON,
    Chip,
    Launch,
    add_tile,
    chip_of,
    lanes,
    load,
    load_double,
    measure_rows,
    merge,
    move,
    precision_of,
    product,
    rounded,
    similarities,
    split,
    walk,
)

_LN_2 = tl.constexpr(math.log(2))

# `do_not_specialize`: the last batch of an epoch, or a queue that is still filling, compiles nothing anew.

# What a range of keys knows of a row: `partial`, (ranges, B, 8).
_PARTIAL = tl.constexpr(8)
_MAX_S, _MAX_Y, _Z_INSTANCE, _Z_QUERY, _Z_KEY, _D_QUERY, _D_KEY, _RANK = (tl.constexpr(i) for i in range(8))
# What is known of a row after the statistics (three) and after their merge, in float64: `merged`, (B, 11).
_MERGED = tl.constexpr(11)
_NORM_Q, _NORM_K, _POSITIVE, _TOP_S, _TOP_Y, _MEAN = (tl.constexpr(i) for i in range(6))
_INSTANCE, _QUERY, _KEY, _LARGEST, _GRAD_POSITIVE = (tl.constexpr(i) for i in range(6, 11))


@triton.jit
def _of_row(merged, field: tl.constexpr, rows, batch):
    """A field of `merged` as a column; rows past the batch repeat its last."""
    return tl.load(merged + tl.minimum(rows, batch - 1).to(tl.int64) * _MERGED + field)[:, None]


@triton.jit
def _scales(scale, norm_q, norm_k):
    """λ/‖q‖ and λ/‖k‖, which make logits of products of stored rows; every kernel rounds them alike."""
    return (scale / norm_q).to(tl.float32), (scale / norm_k).to(tl.float32)


@triton.jit
def _relative(s, top, scale, valid, WHOLE_KEYS: tl.constexpr):
    """A tile's logits relative to the highest similarity yet, and that one. Masked keys are LOWEST."""
    if not WHOLE_KEYS:
        s = tl.where(valid, s, float("-inf"))
    top = tl.maximum(top, tl.max(s, axis=1))
    a = (s - top[:, None, :]) * scale[:, :, None]  # in this order it loses nothing near the maximum
    if not WHOLE_KEYS:
        a = tl.where(valid, a, LOWEST)
    return a, top


@triton.jit(do_not_specialize=["batch", "keys"])
def _statistics_kernel(
    query, key, queue, partial, merged,
    batch, keys, dim,
    query_row, query_column, key_row, key_column, queue_row, queue_column,
    scale, ratio, keys_a_range,
    INSTANCE: tl.constexpr, CONSISTENCY: tl.constexpr, NORMALIZE: tl.constexpr,
    WHOLE_KEYS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, CHUNKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    LANES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    part = tl.program_id(1)
    inside = rows < batch
    columns = tl.arange(0, DEPTH)

    norm_q, norm_k, positive = measure_rows(
        query, key, rows, batch, dim, query_row, query_column, key_row, key_column,
        NORMALIZE, WHOLE_COLUMNS, BLOCK_B, 32 if DEPTH > 32 else DEPTH,
    )  # fmt: skip
    if part == 0:
        row = merged + rows.to(tl.int64) * _MERGED
        tl.store(row + _NORM_Q, norm_q, mask=inside)
        tl.store(row + _NORM_K, norm_k, mask=inside)
        tl.store(row + _POSITIVE, positive, mask=inside)
    scale_q, scale_k = _scales(scale, norm_q[:, None], norm_k[:, None])
    positive = positive.to(tl.float32)[:, None, None]

    q, k = None, None
    if not CHUNKED:
        q = load(query, rows, columns, batch, dim, query_row, query_column, False, WHOLE_COLUMNS)
        k = load(key, rows, columns, batch, dim, key_row, key_column, False, WHOLE_COLUMNS)
        q, k = rounded(q, DTYPE), rounded(k, DTYPE)

    shape: tl.constexpr = [BLOCK_B, LANES]
    tile_shape: tl.constexpr = [BLOCK_B, BLOCK_K // LANES, LANES]
    top_s, top_y = tl.full(shape, LOWEST, tl.float32), tl.full(shape, LOWEST, tl.float32)
    zero = tl.zeros(shape, tl.float32)
    z_instance, z_query, z_key, d_query, d_key = zero, zero, zero, zero, zero
    rank = tl.zeros(shape, tl.int32)

    begin = part.to(tl.int64) * keys_a_range
    for start in range(begin, tl.minimum(begin + keys_a_range, keys), BLOCK_K):
        tile_rows = start + tl.arange(0, BLOCK_K)
        s, y, _ = similarities(
            query, key, queue, q, k, rows, tile_rows, batch, keys, dim,
            query_row, query_column, key_row, key_column, queue_row, queue_column,
            CONSISTENCY, WHOLE_KEYS, WHOLE_COLUMNS, CHUNKED, DTYPE, PRECISION, BLOCK_B, BLOCK_K, DEPTH,
        )  # fmt: skip
        valid = tl.reshape(tile_rows < keys, [1, BLOCK_K // LANES, LANES])
        s = tl.reshape(s, tile_shape)
        above = s > positive
        if not WHOLE_KEYS:
            above = above & valid
        rank += tl.sum(above.to(tl.int32), axis=1)
        a, new_s = _relative(s, top_s, scale_q, valid, WHOLE_KEYS)
        moved_s = move(top_s, new_s, scale_q)  # what older sums are to be moved by
        if INSTANCE:
            z_instance = z_instance * tl.exp2(moved_s * ratio) + tl.sum(tl.exp2(a * ratio), axis=1)
        if CONSISTENCY:
            b, new_y = _relative(tl.reshape(y, tile_shape), top_y, scale_k, valid, WHOLE_KEYS)
            moved_y = move(top_y, new_y, scale_k)
            z_query, z_key, d_query, d_key = add_tile(
                z_query, z_key, d_query, d_key, a, b, moved_s, moved_y
            )  # fmt: skip
            top_y = new_y
        top_s = new_s

    # New names: a variable keeps its shape.
    max_s, max_y, moves, _, z_q, z_k, d_q, d_k = merge(
        top_s, top_y, z_query, z_key, d_query, d_key, scale_q, scale_k, 1
    )  # fmt: skip
    z_i = tl.sum(z_instance * tl.exp2(moves * ratio), axis=1)
    to = partial + (part.to(tl.int64) * batch + rows) * _PARTIAL
    tl.store(to + _MAX_S, max_s, mask=inside)
    tl.store(to + _MAX_Y, max_y, mask=inside)
    tl.store(to + _Z_INSTANCE, z_i, mask=inside)
    tl.store(to + _Z_QUERY, z_q, mask=inside)
    tl.store(to + _Z_KEY, z_k, mask=inside)
    tl.store(to + _D_QUERY, d_q, mask=inside)
    tl.store(to + _D_KEY, d_k, mask=inside)
    tl.store(to + _RANK, tl.sum(rank, axis=1).to(tl.float32, bitcast=True), mask=inside)


@triton.jit(do_not_specialize=["batch", "ranges"])
def _merge_kernel(
    partial, merged, loss, instance_loss, consistency_loss, positive_rank, batch, ranges,
    scale, ratio, tau: tl.float64, tau_c: tl.float64,
    instance_weight: tl.float64, consistency_weight: tl.float64,
    INSTANCE: tl.constexpr, CONSISTENCY: tl.constexpr, INCLUDE_POSITIVE: tl.constexpr,
    BLOCK_B: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """In float64, which costs nothing here: what a row's sums lose now, all of its gradient loses."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = rows < batch
    part = tl.arange(0, RANGES)[:, None]
    there = (part < ranges) & inside[None, :]
    record = partial + (part.to(tl.int64) * batch + rows[None, :]) * _PARTIAL
    row = merged + rows.to(tl.int64) * _MERGED
    zero = tl.zeros([BLOCK_B], tl.float64)
    norm_q = tl.load(row + _NORM_Q, mask=inside, other=1.0)
    norm_k = tl.load(row + _NORM_K, mask=inside, other=1.0)
    scale_q, scale_k = _scales(scale, norm_q, norm_k)
    scale_q, scale_k = scale_q.to(tl.float64), scale_k.to(tl.float64)

    top_s, top_y, moved_s, _, z_query, z_key, d_query, d_key = merge(
        load_double(record + _MAX_S, there, LOWEST), load_double(record + _MAX_Y, there, LOWEST),
        load_double(record + _Z_QUERY, there, 0.0), load_double(record + _Z_KEY, there, 0.0),
        load_double(record + _D_QUERY, there, 0.0), load_double(record + _D_KEY, there, 0.0),
        scale_q[None, :], scale_k[None, :], 0,
    )  # fmt: skip
    z_instance = tl.sum(load_double(record + _Z_INSTANCE, there, 0.0) * tl.exp2(moved_s * ratio), axis=0)
    ranks = tl.load(record + _RANK, mask=there, other=0.0).to(tl.int32, bitcast=True)
    tl.store(positive_rank + rows, tl.sum(ranks.to(tl.int64), axis=0), mask=inside)

    # λ (s_+ − max), among the s_j and among the y_j
    positive = tl.load(row + _POSITIVE, mask=inside, other=0.0) * scale_q
    positive_s, positive_y = positive - top_s * scale_q, positive - top_y * scale_k
    value_instance, value_consistency, grad_positive = zero, zero, zero
    weight_instance, weight_query, weight_key, mean = zero, zero, zero, zero

    if INSTANCE:
        # Relative to the largest logit, be it the positive's.
        gap = positive_s * (ratio * _LN_2)
        to_top = tl.exp(tl.minimum(-gap, 0.0))
        negatives = z_instance * to_top
        total = negatives + tl.exp(tl.minimum(gap, 0.0))
        value_instance = tl.where(gap > 0.0, tl.log(1.0 + negatives), tl.log(total) - gap)
        value_instance = tl.where((gap > 0.0) & (negatives < 1e-9), negatives, value_instance)
        weight = instance_weight / tau / total
        weight_instance = weight * to_top
        grad_positive -= weight * negatives  # (p_+ − 1)/τ

    if CONSISTENCY:
        weight = consistency_weight / (2.0 * tau_c)
        factor_query, factor_key = zero + weight, zero + weight
        if INCLUDE_POSITIVE:  # s_+ joins both lists, where it may be the largest entry
            moved_query, moved_key = (
                tl.exp2(tl.minimum(-positive_s, 0.0)),
                tl.exp2(tl.minimum(-positive_y, 0.0)),
            )
            e_query, e_key = tl.exp2(tl.minimum(positive_s, 0.0)), tl.exp2(tl.minimum(positive_y, 0.0))
            d_positive = positive_s - positive_y
            z_query, z_key = z_query * moved_query + e_query, z_key * moved_key + e_key
            d_query = d_query * moved_query + d_positive * e_query
            d_key = d_key * moved_key + d_positive * e_key
            e_query, e_key = e_query / z_query, e_key / z_key
            grad_positive += weight * (
                (e_query - e_key) + e_query * ((d_positive - d_query / z_query) * _LN_2)
            )
            factor_query, factor_key = factor_query * moved_query, factor_key * moved_key
        # L_con = ½ (E_Q[d] − E_P[d]), and the coefficients of ½ [Q (d − E_Q[d] + 1) − P]/τc
        mean = d_query / z_query
        value_consistency = (0.5 * _LN_2) * (mean - d_key / z_key)
        weight_query, weight_key = factor_query / z_query, factor_key / z_key

    total = instance_weight * value_instance + consistency_weight * value_consistency
    tl.store(loss + rows, total, mask=inside)
    tl.store(instance_loss + rows, value_instance, mask=inside)
    tl.store(consistency_loss + rows, value_consistency, mask=inside)

    # In float16 the weights of a long queue would vanish: they are kept relative to their sum.
    largest = weight_instance + weight_query + weight_key
    relative = tl.where(largest > 0.0, 1.0 / largest, 0.0)
    tl.store(row + _TOP_S, top_s, mask=inside)
    tl.store(row + _TOP_Y, top_y, mask=inside)
    tl.store(row + _MEAN, mean, mask=inside)
    tl.store(row + _INSTANCE, weight_instance * relative, mask=inside)
    tl.store(row + _QUERY, weight_query * relative, mask=inside)
    tl.store(row + _KEY, weight_key * relative, mask=inside)
    tl.store(row + _LARGEST, largest, mask=inside)
    tl.store(row + _GRAD_POSITIVE, grad_positive, mask=inside)


@triton.jit(do_not_specialize=["batch", "keys"])
def _gradient_kernel(
    query, key, queue, merged, parts,
    batch, keys, dim,
    query_row, query_column, key_row, key_column, queue_row, queue_column,
    scale, ratio, keys_a_range,
    INSTANCE: tl.constexpr, CONSISTENCY: tl.constexpr,
    WHOLE_KEYS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, CHUNKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    part = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, DEPTH)
    out_columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)

    scale_q, scale_k = _scales(
        scale, _of_row(merged, _NORM_Q, rows, batch), _of_row(merged, _NORM_K, rows, batch)
    )  # fmt: skip
    top_s = _of_row(merged, _TOP_S, rows, batch).to(tl.float32)
    top_y = _of_row(merged, _TOP_Y, rows, batch).to(tl.float32)
    mean = _of_row(merged, _MEAN, rows, batch).to(tl.float32)
    # Logits of millions leave Q one key, whose d − mean is 0, not the rounding of two such numbers.
    ln_2 = tl.where(tl.abs(mean) < 1e6, _LN_2, 0.0)
    weight_instance = _of_row(merged, _INSTANCE, rows, batch).to(tl.float32)
    weight_query, weight_query_low = split(_of_row(merged, _QUERY, rows, batch))
    weight_key, weight_key_low = split(_of_row(merged, _KEY, rows, batch))

    q, k = None, None
    if not CHUNKED:
        q = load(query, rows, columns, batch, dim, query_row, query_column, False, WHOLE_COLUMNS)
        k = load(key, rows, columns, batch, dim, key_row, key_column, False, WHOLE_COLUMNS)
        q, k = rounded(q, DTYPE), rounded(k, DTYPE)
    grad = tl.zeros([BLOCK_B, WIDTH], tl.float32)
    begin = part * keys_a_range
    for start in range(begin, tl.minimum(begin + keys_a_range, keys), BLOCK_K):
        tile_rows = start + tl.arange(0, BLOCK_K)
        s, y, tile = similarities(
            query, key, queue, q, k, rows, tile_rows, batch, keys, dim,
            query_row, query_column, key_row, key_column, queue_row, queue_column,
            CONSISTENCY, WHOLE_KEYS, WHOLE_COLUMNS, CHUNKED, DTYPE, PRECISION, BLOCK_B, BLOCK_K, DEPTH,
        )  # fmt: skip
        a = (s - top_s) * scale_q
        g = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
        if CONSISTENCY:
            b = (y - top_y) * scale_k
            e_query, e_key = tl.exp2(a), tl.exp2(b)
            Q = e_query * weight_query
            g = Q - e_key * weight_key
            if PRECISION == "tf32x3":  # where Q and P nearly cancel, what their weights lost would be left
                g += e_query * weight_query_low - e_key * weight_key_low
            g += Q * ((a - b - mean) * ln_2)
        if INSTANCE:
            g += tl.exp2(a * ratio) * weight_instance
        if not WHOLE_KEYS:
            g = tl.where((tile_rows < keys)[None, :], g, 0.0)
        if tl.float16 == DTYPE:
            g = tl.clamp(g, -65504.0, 65504.0)
        if CHUNKED:
            tile = load(
                queue, tile_rows, out_columns, keys, dim, queue_row, queue_column, WHOLE_KEYS, WHOLE_COLUMNS
            )  # fmt: skip
            tile = rounded(tile, DTYPE)
        grad = product(g.to(DTYPE), tile, grad, PRECISION)
    grad *= _of_row(merged, _LARGEST, rows, batch).to(tl.float32)
    to = parts + (part * batch + rows)[:, None] * dim + out_columns[None, :]
    tl.store(to, grad, mask=(rows < batch)[:, None] & (out_columns < dim)[None, :])


@triton.jit(do_not_specialize=["batch", "ranges"])
def _finish_kernel(
    query, key, merged, parts, gradient,
    batch, dim, query_row, query_column, key_row, key_column, ranges,
    NORMALIZE: tl.constexpr, RANGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = columns < dim
    grad = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, ranges, RANGES):
        part = first + tl.arange(0, RANGES).to(tl.int64)
        offsets = (part * batch + row)[:, None] * dim + columns[None, :]
        there = (part < ranges)[:, None] & inside[None, :]
        grad += tl.sum(tl.load(parts + offsets, mask=there, other=0.0), axis=0)

    record = merged + row * _MERGED
    norm_q, norm_k = tl.load(record + _NORM_Q).to(tl.float32), tl.load(record + _NORM_K).to(tl.float32)
    q = (
        tl.load(query + row * query_row + columns * query_column, mask=inside, other=0.0).to(tl.float32)
        / norm_q
    )
    k = tl.load(key + row * key_row + columns * key_column, mask=inside, other=0.0).to(tl.float32) / norm_k
    grad += k * tl.load(record + _GRAD_POSITIVE).to(tl.float32)
    if NORMALIZE:
        # dq = (dq̂ − q̂ (q̂·dq̂)) / ‖q‖; a row below the epsilon was only scaled, so it has no projection
        radial = tl.where(norm_q > NORM_EPSILON, tl.sum(q * grad, axis=0), 0.0)
        grad = (grad - q * radial) / norm_q
    tl.store(gradient + row * dim + columns, grad, mask=inside)


@dataclass(frozen=True)
class _Plan:
    statistics: Launch
    merge: Launch
    gradient: Launch
    finish: Launch


@functools.lru_cache(maxsize=1024)
def _plan(batch: int, keys: int, dim: int, dtype: torch.dtype, precision: str, chip: Chip) -> _Plan:
    """How the four kernels are started for a problem's size. Made once: a call has no time for it."""
    capability, multiprocessors = chip
    tiles = select_tiles(capability, precision, dim)
    statistics, gradient = (walk(each, batch, keys, dim, multiprocessors) for each in tiles)
    numbers = {"DTYPE": getattr(tl, str(dtype).removeprefix("torch.")), "PRECISION": precision}
    statistics.options.update(numbers, LANES=lanes(capability))
    gradient.options.update(numbers)

    ranges = triton.next_power_of_2(statistics.ranges)
    rows = max(1, min(8, 512 // ranges))
    merge = Launch((triton.cdiv(batch, rows),), {"BLOCK_B": rows, "RANGES": ranges})
    columns = triton.next_power_of_2(dim)
    ranges = min(triton.next_power_of_2(gradient.ranges), max(1, 4096 // columns))
    return _Plan(statistics, merge, gradient, Launch((batch,), {"RANGES": ranges, "BLOCK_D": columns}))


def co2(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    consistency_temperature: float,
    instance_weight: float,
    consistency_weight: float,
    include_positive: bool,
    normalize: bool,
    compute_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.co2`; float16, bfloat16 and float32, D up to 1024."""
    (batch, dim), keys, device = query.shape, len(queue), query.device
    # Rows are multiplied in the query's dtype; a float64 queue, which no table has tiles for, in float32.
    dtype = query.dtype if queue.dtype != torch.float64 else torch.float32
    precision = precision_of(dtype)
    if precision == "half" and queue.dtype != dtype:
        precision = "wide"
    if normalize and query.dtype == torch.float16 and key.dtype != torch.float16:
        # Keys are multiplied as they are stored, and float16 does not hold rows of any length.
        norm = torch.linalg.vector_norm(key, dim=1, keepdim=True, dtype=torch.float64)
        key = (key / norm.clamp_min(NORM_EPSILON.value)).float()
    plan = _plan(batch, keys, dim, dtype, precision, chip_of(device))

    base = consistency_temperature if consistency_weight else temperature
    scale, ratio = math.log2(math.e) / base, base / temperature
    terms = {"INSTANCE": instance_weight != 0, "CONSISTENCY": consistency_weight != 0}
    rows_strides = (*query.stride(), *key.stride())
    strides = (*rows_strides, *queue.stride())

    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        loss, instance_loss, consistency_loss = (torch.empty(batch, device=device) for _ in range(3))
        rank = torch.empty(batch, dtype=torch.int64, device=device)
        gradient = torch.empty((batch if compute_gradient else 0, dim), device=device)
        partial = torch.empty((plan.statistics.ranges, batch, _PARTIAL.value), device=device)
        merged = torch.empty((batch, _MERGED.value), dtype=torch.float64, device=device)

        _statistics_kernel[plan.statistics.grid](
            query, key, queue, partial, merged, batch, keys, dim, *strides,
            scale, ratio, plan.statistics.keys_a_range, NORMALIZE=normalize,
            **terms, **plan.statistics.options,
        )  # fmt: skip
        _merge_kernel[plan.merge.grid](
            partial, merged, loss, instance_loss, consistency_loss, rank, batch, plan.statistics.ranges,
            scale, ratio, temperature, consistency_temperature, instance_weight, consistency_weight,
            INCLUDE_POSITIVE=include_positive, **terms, **plan.merge.options,
        )  # fmt: skip
        if compute_gradient:
            parts = torch.empty((plan.gradient.ranges, batch, dim), device=device)
            _gradient_kernel[plan.gradient.grid](
                query, key, queue, merged, parts, batch, keys, dim, *strides,
                scale, ratio, plan.gradient.keys_a_range, **terms, **plan.gradient.options,
            )  # fmt: skip
            _finish_kernel[plan.finish.grid](
                query, key, merged, parts, gradient, batch, dim, *rows_strides, plan.gradient.ranges,
                NORMALIZE=normalize, **plan.finish.options,
            )  # fmt: skip
    return loss, instance_loss, consistency_loss, rank, gradient
