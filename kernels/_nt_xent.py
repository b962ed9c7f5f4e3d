"""NT-Xent, and CO2 on it, on GPUs: the operators that contrastive_ops/reference.py specifies, without the
similarities of all rows with all.

Plan. Rows are kept in the order of instances, so that a key and its partner are neighbours. A program holds
a block of instances, as many rows of each view, and walks a range of keys, which are the rows of both
views: s = z Zᵀ of the first views and y = z Zᵀ of the second ones. A row and its partner have the same
negatives, and s − y is what CO2 needs of either. Nothing of size M×M, where M = 2 B, leaves a program.

Forward
1. prepare      z, padded with zeros so that no load needs a mask, and s_ip(i), in float64.
2. statistics   s and y of each tile; per row the maximum, Σ e^{s/τ}, and the rank of the positive; with the
                consistency term also Σ e^{s/τc} and Σ d e^{s/τc}. Each range writes these numbers.
3. merge        the ranges' numbers, in a fixed order and in float64: losses, rank, what backward needs to
                know.

Backward
1. prepare      z again, and the coefficients of each row's gradient.
2. gradient     s and y again. Those of an instance's two views with a key and its partner give H = G + Gᵀ
                of all four pairs, G = ∂L/∂s being what the rows' losses pull and Gᵀ what the keys' do. Adds
                up H Z. Each range writes its part.
3. finish       adds the parts up in a fixed order, adds the positive's, differentiates the normalisation.

There are no atomics: equal input gives equal bits. Only tiles that have a block's own instances, or end
past the last row, are masked.

    G_ij = c_i e^{s_ij/τ} + e^{s_ij/τc} (k_i + b_i (s_ij − s_p(i)j)) − p_i e^{s_p(i)j/τc}

Where rows are normalised and no temperature is below 0.0226, these exponentials need no maximum, which then
is in the coefficients. So G and Gᵀ share them: two a pair in place of four. Other rows, and float32
multiplied exactly, have them relative to each row's maximum, as the statistics always do.

In float16 a probability of 1e-5, times an incoming gradient of 1/M, would vanish. So all of H is multiplied
by a power of two, in the exponents, where it takes no instruction more.

Bounds. A pair of row and key costs 3 products of 2 D operations (1 in the statistics, 2 in the gradient)
and 4 exponentials, or 2 without the consistency term. At B = 4096, D = 128 in bfloat16 on an H200: 65 µs of
products at 790 TFLOP/s, and 64 or 32 µs of exponentials. As compiled (python -m bench.resources), with the
clocks of a multiprocessor that a pair takes of its schedulers, special-function units and tensor cores, and
the bytes that it takes from the cache:

    statistics   0.109   0.133   0.062   2 bytes   bound by exponentials: 34 µs at 1.98 GHz, never idle
    gradient     0.150   0.125   0.125   2 bytes   bound by instructions: 38 µs
    and without the consistency term
    statistics   0.068   0.066   0.062   2 bytes   bound by instructions: 17 µs
    gradient     0.055   0.062   0.125   2 bytes   bound by products: 32 µs

2 bytes a pair are 128 MiB: 24 µs at 5.5 TB/s. Prepare, merge and finish move 4, 1 and 20 MiB. With tiles of
32 keys, all that the registers of the gradient allow with the consistency term, tensor cores wait for
shared memory: 0.156 in place of 0.125. None of this has been measured on a GPU yet.

What was tried, by what the compiler made of it (Hopper, D = 128, bfloat16; instructions a pair):

- Every tile masked: 2.2 more in the statistics, 3.8 in the gradient.
- Statistics in tiles of 64 keys: 15.3, and 2.25 exponentials where 13.9 and 2.12 are in tiles of 128. Ranks
  as integers: 15.0.
- The gradient's exponentials relative to each row's maximum: 25.8, and four of them.
- The gradient in tiles of 64 keys: 536 bytes spilled. Without the consistency term none, and 7.0 for 8.9.
- The coefficients of keys loaded one by one: 20.4, and as many copies to wait for.
- Gᵀ added to G block by block, not after all of G: the same here; on Blackwell 20.0 where 17.4 are.
- The rows of both views in one product: the same here. At D = 256, where two groups of warps share a
  product, 21.2 and no spill where two products are 26.5 and spill 188 bytes; on Blackwell two are better.
- The length of a row as a constant: its addresses are kept in registers, and 256 bytes spilled at D = 256.
- Not tried: H is symmetric. Half of its tiles would do if each were added to the gradient of its keys as
  well, which takes atomics, or as many parts as there are blocks.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import device_of
from ._tiles import select_nt_xent_tiles
from ._walk import (
    LOWEST,
    Chip,
    Launch,
    add_tile,
    chip_of,
    lanes,
    largest_size,
    load,
    load_double,
    measure_rows,
    merge,
    move,
    precision_of,
    product,
    similarities,
    softplus,
    split,
    store,
    store_unit,
    sum_of_parts,
    through_norm,
    walk,
)

_LN_2 = tl.constexpr(math.log(2))
# The similarity of a pair that is no negative: nothing is left of its exponential, yet d of it is no NaN.
_EXCLUDED = tl.constexpr(-1e30)

# Rows are in the order of instances: row 2 b + v is view v of instance b.
# What a range of keys knows of a row: `partial`, (ranges, padded rows, 5).
_PARTIAL = tl.constexpr(5)
_MAX, _RANK, _Z_INSTANCE, _Z_QUERY, _D_QUERY = (tl.constexpr(i) for i in range(5))
# What the gradient needs of it: `record`, (padded instances, 8, 2); the second four only where RELATIVE.
_RECORD = tl.constexpr(8)
_INSTANCE, _QUERY, _SLOPE, _KEY, _TOP, _QUERY_LOW, _KEY_LOW = (tl.constexpr(i) for i in range(7))
# What forward returns of it, in float64: `statistics`, (2 B, 5), in the views' order.
_STATISTICS = tl.constexpr(5)
_LARGEST, _OF_INSTANCE, _OF_CONSISTENCY, _MEAN, _OF_POSITIVE = (tl.constexpr(i) for i in range(5))

# log2(e)/τ up to which exponentials of similarities within ±1 need no maximum.
_LARGEST_SCALE = 64.0
# In float16 the largest of the coefficients' sizes becomes 2⁶ or up to half of it, unless that takes a factor
# which overflows with those exponentials. H then fits: at most 2 (1 + 4/τc) times the size, and 4/τc < 2⁸.
_LOG2_UNIT, _LEAST_LOG2_SIZE = tl.constexpr(6.0), tl.constexpr(-54.0)


@triton.jit(do_not_specialize=["batch"])
def _prepare_kernel(
    views, grad_loss, statistics, unit, norm, positive, record, size,
    batch, dim, view_stride, view_row, view_column, grad_loss_stride, unit_row,
    scale: tl.float64, scale_c: tl.float64, tau_c: tl.float64,
    BACKWARD: tl.constexpr, NORMALIZE: tl.constexpr, RELATIVE: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """z of both views of some instances, padded with zeros, and s_ip(i) or what their gradients need."""
    instance = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = instance < batch
    second = views + view_stride
    norm1, norm2, dot = measure_rows(
        views, second, instance, batch, dim, view_row, view_column, view_row, view_column,
        NORMALIZE, False, BLOCK, DEPTH,
    )  # fmt: skip
    row = 2 * instance.to(tl.int64)
    store_unit(unit, row, unit_row, views, norm1, instance, batch, dim, view_row, view_column, DEPTH)
    store_unit(unit, row + 1, unit_row, second, norm2, instance, batch, dim, view_row, view_column, DEPTH)
    if BACKWARD:
        tl.store(norm + instance, norm1, mask=inside)
        tl.store(norm + batch + instance, norm2, mask=inside)
        for view in tl.static_range(2):
            own = (instance + view * batch).to(tl.int64)
            known, of_partner = statistics + own * _STATISTICS, statistics
            of_partner += (instance + (1 - view) * batch).to(tl.int64) * _STATISTICS
            grad = load_double(grad_loss + own * grad_loss_stride, inside, 0.0)
            weight_instance = grad * load_double(known + _OF_INSTANCE, inside, 0.0)
            weight_query = grad * load_double(known + _OF_CONSISTENCY, inside, 0.0)
            weight_key = grad * load_double(of_partner + _OF_CONSISTENCY, inside, 0.0)
            together = tl.abs(weight_instance) + tl.abs(weight_query) + tl.abs(weight_key)
            tl.store(size + row + view, together.to(tl.float32))

            top = load_double(known + _LARGEST, inside, 0.0)
            partner_top = load_double(of_partner + _LARGEST, inside, 0.0)
            mean = load_double(known + _MEAN, inside, 0.0)
            if not RELATIVE:
                weight_instance *= tl.exp2(-top * scale)
                weight_query *= tl.exp2(-top * scale_c)
                weight_key *= tl.exp2(-partner_top * scale_c)
                mean += top - partner_top
            # Logits of millions leave Q one key, whose d − mean is 0, not the rounding of two such numbers.
            slope = tl.where(tl.abs(mean) < 1e6 * tau_c, weight_query / tau_c, 0.0)
            query, query_low = split(weight_query - slope * mean)
            key, key_low = split(weight_key)
            to = record + row * _RECORD + view
            tl.store(to + 2 * _INSTANCE, weight_instance.to(tl.float32))
            tl.store(to + 2 * _QUERY, query)
            tl.store(to + 2 * _SLOPE, slope.to(tl.float32))
            tl.store(to + 2 * _KEY, key)
            if RELATIVE:
                tl.store(to + 2 * _TOP, top.to(tl.float32))
                tl.store(to + 2 * _QUERY_LOW, query_low)
                tl.store(to + 2 * _KEY_LOW, key_low)
    else:
        tl.store(positive + instance, dot / norm1)


@triton.jit
def _has_excluded(start, first, batch, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether a tile of keys has views of a block's own instances, or ends past the last of all."""
    own = (start < 2 * (first + BLOCK_B)) & (start + BLOCK_K > 2 * first)
    return own | (start + BLOCK_K > 2 * batch)


@triton.jit
def _excluded(instance, keys, batch):
    return ((keys // 2)[None, :] == instance[:, None]) | (keys >= 2 * batch)[None, :]


@triton.jit(do_not_specialize=["batch", "padded_rows"])
def _statistics_kernel(
    unit, positive, partial, batch, padded_rows, unit_row, scale, ratio, keys_a_range,
    CONSISTENCY: tl.constexpr, CHUNKED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    LANES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """s of a block's first views and y of its second ones; what a range of keys knows of both."""
    first = tl.program_id(0) * BLOCK_B
    instance = first + tl.arange(0, BLOCK_B)
    part = tl.program_id(1).to(tl.int64)
    columns, index = tl.arange(0, DEPTH), tl.arange(0, BLOCK_K)
    view1, view2, pair_row = unit, unit + unit_row, 2 * unit_row
    positives = tl.load(positive + instance).to(tl.float32)[:, None, None]

    z1, z2 = None, None
    if not CHUNKED:
        z1 = load(view1, instance, columns, 0, 0, pair_row, 1, True, True)
        z2 = load(view2, instance, columns, 0, 0, pair_row, 1, True, True)
    shape: tl.constexpr = [BLOCK_B, LANES]
    tile_shape: tl.constexpr = [BLOCK_B, BLOCK_K // LANES, LANES]
    top_s, top_y = tl.full(shape, LOWEST, tl.float32), tl.full(shape, LOWEST, tl.float32)
    zero = tl.zeros(shape, tl.float32)
    sum_s, sum_y, z_s, z_y, d_s, d_y = zero, zero, zero, zero, zero, zero
    rank_s, rank_y = zero, zero  # exact up to 2²⁴, and an instruction less than integers

    begin = part * keys_a_range
    for start in range(begin, tl.minimum(begin + keys_a_range, 2 * batch), BLOCK_K):
        s, y, _ = similarities(
            view1, view2, unit + start * unit_row, z1, z2, instance, index, padded_rows, 0, unit_row,
            pair_row, 1, pair_row, 1, unit_row, 1,
            True, True, True, CHUNKED, DTYPE, PRECISION, BLOCK_B, BLOCK_K, DEPTH,
        )  # fmt: skip
        if _has_excluded(start, first, batch, BLOCK_B, BLOCK_K):
            excluded = _excluded(instance, start + index, batch)
            s, y = tl.where(excluded, _EXCLUDED, s), tl.where(excluded, _EXCLUDED, y)
        s, y = tl.reshape(s, tile_shape), tl.reshape(y, tile_shape)
        rank_s += tl.sum(tl.where(s > positives, 1.0, 0.0), axis=1)
        rank_y += tl.sum(tl.where(y > positives, 1.0, 0.0), axis=1)
        new_s, new_y = tl.maximum(top_s, tl.max(s, axis=1)), tl.maximum(top_y, tl.max(y, axis=1))
        a, b = (s - new_s[:, None, :]) * scale, (y - new_y[:, None, :]) * scale
        moved_s, moved_y = move(top_s, new_s, scale), move(top_y, new_y, scale)
        # ratio is τc/τ, or 1 where there is no consistency term
        e_s, e_y = a * ratio if CONSISTENCY else a, b * ratio if CONSISTENCY else b
        sum_s = sum_s * tl.exp2(moved_s * ratio) + tl.sum(tl.exp2(e_s), axis=1)
        sum_y = sum_y * tl.exp2(moved_y * ratio) + tl.sum(tl.exp2(e_y), axis=1)
        if CONSISTENCY:
            z_s, z_y, d_s, d_y = add_tile(z_s, z_y, d_s, d_y, a, b, moved_s, moved_y)
        top_s, top_y = new_s, new_y

    # New names: a variable keeps its shape.
    max_s, max_y, moves_s, moves_y, query_s, query_y, of_s, of_y = merge(
        top_s, top_y, z_s, z_y, d_s, d_y, scale, scale, 1
    )  # fmt: skip
    to = partial + (part * padded_rows + 2 * instance) * _PARTIAL
    tl.store(to + _MAX, max_s)
    tl.store(to + _RANK, tl.sum(rank_s, axis=1))
    tl.store(to + _Z_INSTANCE, tl.sum(sum_s * tl.exp2(moves_s * ratio), axis=1))
    tl.store(to + _PARTIAL + _MAX, max_y)
    tl.store(to + _PARTIAL + _RANK, tl.sum(rank_y, axis=1))
    tl.store(to + _PARTIAL + _Z_INSTANCE, tl.sum(sum_y * tl.exp2(moves_y * ratio), axis=1))
    if CONSISTENCY:
        tl.store(to + _Z_QUERY, query_s)
        tl.store(to + _D_QUERY, of_s)
        tl.store(to + _PARTIAL + _Z_QUERY, query_y)
        tl.store(to + _PARTIAL + _D_QUERY, of_y)


@triton.jit(do_not_specialize=["batch", "padded_rows", "ranges"])
def _merge_kernel(
    partial, positive, loss, instance_loss, consistency_loss, positive_rank, statistics,
    batch, padded_rows, ranges, scale: tl.float64, ratio: tl.float64,
    tau: tl.float64, tau_c: tl.float64, consistency_weight: tl.float64,
    CONSISTENCY: tl.constexpr, BLOCK_B: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """A view of a block of instances, all in float64."""
    instance = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    view = tl.program_id(1)
    inside = instance < batch
    part = tl.arange(0, RANGES).to(tl.int64)[:, None]
    there = (part < ranges) & inside[None, :]
    first = partial + (part * padded_rows + 2 * instance[None, :]) * _PARTIAL
    own, partner = first + view * _PARTIAL, first + (1 - view) * _PARTIAL
    known = there & CONSISTENCY
    sign = 1.0 - 2.0 * view  # of d, where a row is its partner's partner
    top, _, moved, _, z_query, z_key, d_query, d_key = merge(
        load_double(own + _MAX, there, LOWEST), load_double(partner + _MAX, there, LOWEST),
        load_double(own + _Z_QUERY, known, 1.0), load_double(partner + _Z_QUERY, known, 1.0),
        sign * load_double(own + _D_QUERY, known, 0.0), sign * load_double(partner + _D_QUERY, known, 0.0),
        scale, scale, 0,
    )  # fmt: skip
    z_instance = tl.sum(load_double(own + _Z_INSTANCE, there, 0.0) * tl.exp2(moved * ratio), axis=0)
    rank = tl.sum(load_double(own + _RANK, there, 0.0), axis=0)
    s = tl.load(positive + instance, mask=inside, other=0.0)

    # The only instance has no negatives; what was summed are excluded keys.
    z_instance = tl.where(batch > 1, z_instance, 0.0)
    top = tl.where(batch > 1, top, s)
    value, negatives = softplus(tl.log(z_instance) + (top - s) / tau)  # L_ins
    pull = negatives / tau
    mean = d_query / z_query
    consistency = tl.where(batch > 1, (0.5 * _LN_2) * (mean - d_key / z_key), 0.0)  # ½ (E_Q[d] − E_P[d])/τc
    of_consistency = consistency_weight / (2.0 * tau_c) / z_query

    row = view * batch + instance
    tl.store(loss + row, (value + consistency_weight * consistency).to(tl.float32), mask=inside)
    tl.store(instance_loss + row, value.to(tl.float32), mask=inside)
    tl.store(consistency_loss + row, consistency.to(tl.float32), mask=inside)
    tl.store(positive_rank + row, rank.to(tl.int64), mask=inside)
    to = statistics + row * _STATISTICS
    tl.store(to + _LARGEST, top, mask=inside)
    tl.store(to + _OF_INSTANCE, tl.where(batch > 1, pull / z_instance, 0.0), mask=inside)
    tl.store(to + _OF_CONSISTENCY, tl.where(batch > 1, of_consistency, 0.0), mask=inside)
    tl.store(to + _MEAN, tl.where(batch > 1, mean / scale, 0.0), mask=inside)
    tl.store(to + _OF_POSITIVE, -pull, mask=inside)


@triton.jit
def _known_of_rows(
    record, rows, CONSISTENCY: tl.constexpr, RELATIVE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The records of a block's rows, a column each."""
    of = (record + rows)[:, None]
    instance, query, slope, key = tl.load(of), None, None, None
    top, query_low, key_low = None, None, None
    if CONSISTENCY:
        query, slope, key = tl.load(of + 2 * _QUERY), tl.load(of + 2 * _SLOPE), tl.load(of + 2 * _KEY)
    if RELATIVE:
        top = tl.load(of + 2 * _TOP)
        if CONSISTENCY and PRECISION == "tf32x3":
            query_low, key_low = tl.load(of + 2 * _QUERY_LOW), tl.load(of + 2 * _KEY_LOW)
    return instance, query, slope, key, top, query_low, key_low


@triton.jit
def _four_fields(half, BLOCK_K: tl.constexpr):
    """Half of the records of a tile's rows: four fields of first views, and four of second ones. They are
    loaded all at once, for one by one they would be as many copies to wait for."""
    instance = tl.arange(0, BLOCK_K // 2)[:, None, None]
    field, view = tl.arange(0, 4)[None, :, None], tl.arange(0, 2)[None, None, :]
    view1, view2 = tl.split(tl.load(half + instance * (2 * _RECORD) + field * 2 + view))
    return _unpack(view1, BLOCK_K), _unpack(view2, BLOCK_K)


@triton.jit
def _unpack(x, BLOCK_K: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [BLOCK_K // 2, 2, 2]))
    zeroth, second = tl.split(even)
    first, third = tl.split(odd)
    return zeroth[None, :], first[None, :], second[None, :], third[None, :]


@triton.jit
def _known_of_keys(record, start, BLOCK_K: tl.constexpr, RELATIVE: tl.constexpr):
    """The records of a tile's first views and of its second ones, a row each."""
    of1, of2 = _four_fields(record + start * _RECORD, BLOCK_K)
    low1, low2 = (None, None, None, None), (None, None, None, None)
    if RELATIVE:
        low1, low2 = _four_fields(record + start * _RECORD + 2 * _TOP, BLOCK_K)
    known1 = (of1[0], of1[1], of1[2], of1[3], low1[0], low1[1], low1[2])
    known2 = (of2[0], of2[1], of2[2], of2[3], low2[0], low2[1], low2[2])
    return known1, known2


@triton.jit
def _add_pull(
    g, s, y, known, of_partner, scale, scale_c, shift,
    CONSISTENCY: tl.constexpr, RELATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """g + ∂L/∂s of a row's similarities s, where y are those of its partner."""
    instance, query, slope, key, top, query_low, key_low = known
    if RELATIVE:
        s -= top
        y -= of_partner[4]
    g += instance * tl.exp2(s * scale + shift)
    if CONSISTENCY:
        e_query, e_key = tl.exp2(s * scale_c + shift), tl.exp2(y * scale_c + shift)
        g -= e_key * key
        g += e_query * (query + slope * (s - y))  # Q (1 + (d − E_Q[d])/τc)
        if PRECISION == "tf32x3":  # where Q and P nearly cancel, what their weights lost would be left
            g += e_query * query_low - e_key * key_low
    return g


@triton.jit(do_not_specialize=["batch", "padded_rows"])
def _gradient_kernel(
    unit, record, size, parts, batch, padded_rows, unit_row, scale, scale_c, keys_a_range,
    CONSISTENCY: tl.constexpr, RELATIVE: tl.constexpr, STACKED: tl.constexpr,
    CHUNKED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What a range of keys adds to dz of both views of a block of instances."""
    first = tl.program_id(0) * BLOCK_B
    instance = first + tl.arange(0, BLOCK_B)
    part = tl.program_id(1).to(tl.int64)
    columns, index = tl.arange(0, DEPTH), tl.arange(0, BLOCK_K)
    out_columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    view1, view2, pair_row = unit, unit + unit_row, 2 * unit_row

    shift = 0.0
    if tl.float16 == DTYPE:
        shift = _LOG2_UNIT - tl.ceil(tl.maximum(tl.log2(largest_size(size, padded_rows)), _LEAST_LOG2_SIZE))
    row1 = _known_of_rows(record, 2 * _RECORD * instance.to(tl.int64), CONSISTENCY, RELATIVE, PRECISION)
    row2 = _known_of_rows(record, 2 * _RECORD * instance.to(tl.int64) + 1, CONSISTENCY, RELATIVE, PRECISION)
    stacked = tl.arange(0, 2 * BLOCK_B)
    stacked = 2 * (first + stacked % BLOCK_B) + stacked // BLOCK_B
    z, z1, z2 = None, None, None
    if STACKED:
        z = load(unit, stacked, columns, 0, 0, unit_row, 1, True, True)
    elif not CHUNKED:
        z1 = load(view1, instance, columns, 0, 0, pair_row, 1, True, True)
        z2 = load(view2, instance, columns, 0, 0, pair_row, 1, True, True)
    grad = tl.zeros([2 * BLOCK_B, WIDTH], tl.float32)
    grad1, grad2 = tl.zeros([BLOCK_B, WIDTH], tl.float32), tl.zeros([BLOCK_B, WIDTH], tl.float32)

    begin = part * keys_a_range
    for start in range(begin, tl.minimum(begin + keys_a_range, 2 * batch), BLOCK_K):
        of_tile = unit + start * unit_row
        if STACKED:
            tile = load(of_tile, index, columns, 0, 0, unit_row, 1, True, True)
            s = product(z, tl.trans(tile), tl.zeros([2 * BLOCK_B, BLOCK_K], tl.float32), PRECISION)
            s, y = tl.split(tl.permute(tl.reshape(s, [2, BLOCK_B, BLOCK_K]), [1, 2, 0]))
        else:
            s, y, tile = similarities(
                view1, view2, of_tile, z1, z2, instance, index, padded_rows, 0, unit_row,
                pair_row, 1, pair_row, 1, unit_row, 1,
                True, True, True, CHUNKED, DTYPE, PRECISION, BLOCK_B, BLOCK_K, DEPTH,
            )  # fmt: skip
        key1, key2 = _known_of_keys(record, start, BLOCK_K, RELATIVE)
        # A key and its partner are neighbours, which one thread holds, as it does a row and its partner.
        s1, s2 = tl.split(tl.reshape(s, [BLOCK_B, BLOCK_K // 2, 2]))
        y1, y2 = tl.split(tl.reshape(y, [BLOCK_B, BLOCK_K // 2, 2]))
        # What the rows' losses pull, then what the keys' do. (In another order registers are too few.)
        g = tl.zeros_like(s1)
        g11 = _add_pull(g, s1, y1, row1, row2, scale, scale_c, shift, CONSISTENCY, RELATIVE, PRECISION)
        g12 = _add_pull(g, s2, y2, row1, row2, scale, scale_c, shift, CONSISTENCY, RELATIVE, PRECISION)
        g21 = _add_pull(g, y1, s1, row2, row1, scale, scale_c, shift, CONSISTENCY, RELATIVE, PRECISION)
        g22 = _add_pull(g, y2, s2, row2, row1, scale, scale_c, shift, CONSISTENCY, RELATIVE, PRECISION)
        g11 = _add_pull(g11, s1, s2, key1, key2, scale, scale_c, shift, CONSISTENCY, RELATIVE, PRECISION)
        g12 = _add_pull(g12, s2, s1, key2, key1, scale, scale_c, shift, CONSISTENCY, RELATIVE, PRECISION)
        g21 = _add_pull(g21, y1, y2, key1, key2, scale, scale_c, shift, CONSISTENCY, RELATIVE, PRECISION)
        g22 = _add_pull(g22, y2, y1, key2, key1, scale, scale_c, shift, CONSISTENCY, RELATIVE, PRECISION)
        g1 = tl.reshape(tl.join(g11, g12), [BLOCK_B, BLOCK_K])
        g2 = tl.reshape(tl.join(g21, g22), [BLOCK_B, BLOCK_K])
        if _has_excluded(start, first, batch, BLOCK_B, BLOCK_K):
            excluded = _excluded(instance, start + index, batch)
            g1, g2 = tl.where(excluded, 0.0, g1), tl.where(excluded, 0.0, g2)
        if tl.float16 == DTYPE and RELATIVE:
            g1 = tl.clamp(g1, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
            g2 = tl.clamp(g2, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        g1, g2 = g1.to(DTYPE), g2.to(DTYPE)
        if CHUNKED:
            tile = load(of_tile, index, out_columns, 0, 0, unit_row, 1, True, True)
        if STACKED:
            both = tl.reshape(tl.permute(tl.join(g1, g2), [2, 0, 1]), [2 * BLOCK_B, BLOCK_K])
            grad = product(both, tile, grad, PRECISION)
        else:
            grad1 = product(g1, tile, grad1, PRECISION)
            grad2 = product(g2, tile, grad2, PRECISION)
    rows = part * padded_rows + (stacked if STACKED else 2 * instance)
    to = parts + rows[:, None] * unit_row + out_columns[None, :]
    if STACKED:
        tl.store(to, grad * tl.exp2(-shift))
    else:
        tl.store(to, grad1 * tl.exp2(-shift))
        tl.store(to + unit_row, grad2 * tl.exp2(-shift))


@triton.jit(do_not_specialize=["batch", "padded_rows", "ranges"])
def _finish_kernel(
    views, norm, parts, statistics, grad_loss, gradient, batch, dim, padded_rows,
    view_stride, view_row, view_column, grad_loss_stride, unit_row, ranges,
    NORMALIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of some rows of a view: the ranges' parts, the positive's pull, and the chain rule."""
    instance = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    view = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = instance < batch
    own, partner = view * batch + instance, (1 - view) * batch + instance
    part_stride = padded_rows.to(tl.int64) * unit_row
    grad = sum_of_parts(
        parts, 2 * instance + view, columns, inside[:, None] & (columns < dim)[None, :], ranges, part_stride,
        unit_row, BLOCK_B, BLOCK_D,
    )  # fmt: skip
    # s_ip(i) is in the loss of both.
    pull = load_double(grad_loss + own * grad_loss_stride, inside, 0.0)
    pull *= tl.load(statistics + own * _STATISTICS + _OF_POSITIVE, mask=inside, other=0.0)
    of_partner = load_double(grad_loss + partner * grad_loss_stride, inside, 0.0)
    pull += of_partner * tl.load(statistics + partner * _STATISTICS + _OF_POSITIVE, mask=inside, other=0.0)
    x = load(views + view * view_stride, instance, columns, batch, dim, view_row, view_column, False, False)
    y = load(
        views + (1 - view) * view_stride, instance, columns, batch, dim, view_row, view_column, False, False
    )
    x, y = x.to(tl.float32).to(tl.float64), y.to(tl.float32).to(tl.float64)
    of_x = tl.load(norm + own, mask=inside, other=1.0)
    grad += (pull / tl.load(norm + partner, mask=inside, other=1.0))[:, None] * y
    if NORMALIZE:
        grad = through_norm(grad, x / of_x[:, None], of_x)
    to = gradient + view * batch * dim
    store(to, grad.to(tl.float32), instance, columns, batch, dim, dim, 1, False, False)


@dataclass(frozen=True)
class _Plan:
    padded_rows: int
    padded_dim: int
    prepare: Launch
    statistics: Launch
    merge: Launch
    gradient: Launch
    finish: Launch


@functools.lru_cache(maxsize=1024)
def _plan(batch: int, dim: int, dtype: torch.dtype, precision: str, consistency: bool, chip: Chip) -> _Plan:
    """How the kernels are started for a problem's size. Made once: a call has no time for it."""
    capability, multiprocessors = chip
    few = 16 if capability == (0, 0) else 1  # each program costs the interpreter the same
    tiles = select_nt_xent_tiles(capability, precision, dim)
    numbers = {"DTYPE": getattr(tl, str(dtype).removeprefix("torch.")), "PRECISION": precision}
    tiles = (tiles.statistics, tiles.gradient if consistency else tiles.plain)
    statistics, gradient = (walk(each, batch, 2 * batch, dim, multiprocessors) for each in tiles)
    cut = max(gradient.options["WIDTH"], statistics.options["DEPTH"])
    padded_dim = triton.cdiv(dim, cut) * cut
    for launch in (statistics, gradient):
        del launch.options["WHOLE_KEYS"], launch.options["WHOLE_COLUMNS"]  # of padded rows all are
        launch.options.update(numbers, CONSISTENCY=consistency)
    statistics.options["LANES"] = lanes(capability)
    gradient.options["STACKED"] = tiles[1].stacked

    instances = 16 * few
    block = max(instances, *(max(each.rows, each.keys // 2) for each in tiles))
    padded_batch = triton.cdiv(batch, block) * block
    depth = min(64 * few, max(16, triton.next_power_of_2(dim)))
    prepare = Launch((padded_batch // instances,), {"BLOCK": instances, "DEPTH": depth})

    padded_ranges = triton.next_power_of_2(statistics.ranges)
    instances = max(1, min(8 * few, 512 // padded_ranges))
    merge = Launch((triton.cdiv(batch, instances), 2), {"BLOCK_B": instances, "RANGES": padded_ranges})
    columns = triton.next_power_of_2(dim)
    instances = max(1, few * 512 // columns)
    finish = Launch((triton.cdiv(batch, instances), 2), {"BLOCK_B": instances, "BLOCK_D": columns})
    return _Plan(2 * padded_batch, padded_dim, prepare, statistics, merge, gradient, finish)


def _plan_of(views: Tensor, consistency: bool) -> _Plan:
    _, batch, dim = views.shape
    return _plan(batch, dim, views.dtype, precision_of(views.dtype), consistency, chip_of(views.device))


def _is_relative(scale: float, scale_c: float, normalize: bool, precision: str) -> bool:
    """Whether the gradient's exponentials are taken relative to each row's maximum."""
    return not normalize or max(scale, scale_c) > _LARGEST_SCALE or precision == "tf32x3"


def nt_xent(
    views: Tensor,
    temperature: float,
    consistency_temperature: float,
    consistency_weight: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.nt_xent`; float16, bfloat16 and float32, D up to 1024."""
    (_, batch, dim), device, consistency = views.shape, views.device, consistency_weight != 0
    plan = _plan_of(views, consistency)
    launch = plan.statistics
    base = consistency_temperature if consistency else temperature
    scale, ratio = math.log2(math.e) / base, base / temperature
    with device_of(views):
        unit = torch.empty((plan.padded_rows, plan.padded_dim), dtype=views.dtype, device=device)
        positive = torch.empty(plan.padded_rows // 2, dtype=torch.float64, device=device)
        _prepare_kernel[plan.prepare.grid](
            views, None, None, unit, None, positive, None, None,
            batch, dim, *views.stride(), 0, plan.padded_dim, 0.0, 0.0, 0.0,
            BACKWARD=False, NORMALIZE=normalize, RELATIVE=False, **plan.prepare.options,
        )  # fmt: skip
        partial = torch.empty(
            (launch.ranges, plan.padded_rows, _PARTIAL.value), dtype=torch.float32, device=device
        )
        _statistics_kernel[launch.grid](
            unit, positive, partial, batch, plan.padded_rows, plan.padded_dim, scale, ratio,
            launch.keys_a_range, **launch.options,
        )  # fmt: skip
        loss, instance_loss, consistency_loss = (
            torch.empty(2 * batch, dtype=torch.float32, device=device) for _ in range(3)
        )
        rank = torch.empty(2 * batch, dtype=torch.int64, device=device)
        statistics = torch.empty((2 * batch, _STATISTICS.value), dtype=torch.float64, device=device)
        _merge_kernel[plan.merge.grid](
            partial, positive, loss, instance_loss, consistency_loss, rank, statistics,
            batch, plan.padded_rows, launch.ranges, scale, ratio,
            temperature, consistency_temperature, consistency_weight,
            CONSISTENCY=consistency, **plan.merge.options,
        )  # fmt: skip
    return loss, instance_loss, consistency_loss, rank, statistics


def nt_xent_backward(
    grad_loss: Tensor,
    views: Tensor,
    statistics: Tensor,
    temperature: float,
    consistency_temperature: float,
    consistency_weight: float,
    normalize: bool,
) -> Tensor:
    """See `reference.nt_xent_backward`."""
    (_, batch, dim), device, consistency = views.shape, views.device, consistency_weight != 0
    plan = _plan_of(views, consistency)
    launch = plan.gradient
    scale, scale_c = math.log2(math.e) / temperature, math.log2(math.e) / consistency_temperature
    relative = _is_relative(scale, scale_c if consistency else 0.0, normalize, launch.options["PRECISION"])
    gradient = torch.empty(views.shape, dtype=views.dtype, device=device)
    statistics = statistics.contiguous()
    with device_of(views):
        unit = torch.empty((plan.padded_rows, plan.padded_dim), dtype=views.dtype, device=device)
        norm = torch.empty(2 * batch, dtype=torch.float64, device=device)
        record = torch.empty((plan.padded_rows, _RECORD.value), dtype=torch.float32, device=device)
        size = torch.empty(plan.padded_rows, dtype=torch.float32, device=device)
        _prepare_kernel[plan.prepare.grid](
            views, grad_loss, statistics, unit, norm, None, record, size,
            batch, dim, *views.stride(), grad_loss.stride(0), plan.padded_dim,
            scale, scale_c, consistency_temperature,
            BACKWARD=True, NORMALIZE=normalize, RELATIVE=relative, **plan.prepare.options,
        )  # fmt: skip
        parts = torch.empty(
            (launch.ranges, plan.padded_rows, plan.padded_dim), dtype=torch.float32, device=device
        )
        _gradient_kernel[launch.grid](
            unit, record, size, parts, batch, plan.padded_rows, plan.padded_dim, scale, scale_c,
            launch.keys_a_range, RELATIVE=relative, **launch.options,
        )  # fmt: skip
        _finish_kernel[plan.finish.grid](
            views, norm, parts, statistics, grad_loss, gradient, batch, dim, plan.padded_rows,
            *views.stride(), grad_loss.stride(0), plan.padded_dim, launch.ranges,
            NORMALIZE=normalize, **plan.finish.options,
        )  # fmt: skip
    return gradient
