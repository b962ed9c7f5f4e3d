"""ConIC on GPUs: the operators that contrastive_ops/reference.py specifies, without the V·B × A similarities.

Plan. The V·B views are the rows, and the A rows of the weight their keys; s = x̂ Ŵᵀ is computed three times,
tile by tile. Hats are taken before the product, in float32, and rounded once to the views' dtype, so that a
row of any norm fits float16.

Forward
1. prepare      x̂, padded with zeros so that nothing that walks the views needs a mask; s_n, in float64.
2. statistics   a program holds a tile of keys, normalises it once, and walks the views; per view the maximum
                and sum of e^{s/τ} over its negatives, and how many of them are above s_n. A program that has
                several tiles of keys merges each into the numbers it wrote of the last: three a view.
3. merge        the ranges' numbers, in a fixed order and in float64: losses, rank, what backward needs to
                know of a view; and the consistency of an instance's views, straight from its formula.

Backward
1. prepare      x̂ again, and how large a view's gradients are.
2. norms        1/‖w‖. To read the weight once for them also brings it into the cache.
3. views        a program holds views and walks a range of keys: s, g = ∂L/∂s, and a part of dx̂ = g Ŵ.
4. finish       adds the parts up in a fixed order, adds the consistency's, differentiates the normalisation.
5. weight       a program holds a tile of keys and walks the views: s, g, dŵ = gᵀ x̂, and at the end dw; or a
                step of SGD in its place, for which it holds whole rows and has read all that it overwrites.
                Rows too wide for that get a gradient, and a step from _rows.py.

There are no atomics: equal input gives equal bits. A view's own key is left out of its negatives, never
subtracted from them, where nothing of a small loss would be left.

In float16 a probability of 1e-5, times an incoming gradient of 1/B, would vanish. So g is multiplied by 2¹⁵,
relative to the pull of a view's own key (views) or to the largest such pull of all views (weight).

Bounds. A pair costs 5 products of 2 D operations and 3 exponentials. At V·B = 1024, A = 65536, D = 128 in
bfloat16, the weight in float32, on an H200: 110 µs of products at 790 TFLOP/s, 48 µs of exponentials; 8 µs
to read the weight in forward, and 31 µs to read and write it and its momentum in backward. As compiled
(python -m bench.resources), with the clocks of a multiprocessor that a pair takes of its schedulers,
special-function units and tensor cores, and the bytes that it takes from the cache:

    statistics   0.101   0.064   0.063   2 bytes   bound by instructions: 26 µs at 1.98 GHz, never idle
    weight       0.113   0.062   0.125   4 bytes   bound by products: 32 µs
    views        0.096   0.062   0.125   4 bytes   bound by products: 32 µs

4 bytes a pair are 256 MiB: 49 µs at 5.5 TB/s, which may turn out to bind the last two. Prepare, merge, norms
and finish move 1, 3, 32 and 9 MiB. None of this has been measured on a GPU yet.

What was tried, by what the compiler made of it (Hopper, D = 128, bfloat16; instructions a pair):

- Not tried: statistics by programs that hold 64 views would read a float32 weight 16 times, 512 MiB, and
  normalise and round it each time.
- The rank as a sum of integers: 13.9, of floats: 13.0. The own key compared in 64 bits: 15.0.
- Views in blocks of 64: 14.8, and twice the bytes from the cache. 128 × 64 with 4 warps: 32 bytes spilled.
- Weight in tiles of 128 with 8 warps: 12.4, and half the bytes from the cache, but a multiprocessor holds one
  such program, whose halves wait for each other.
- −2¹⁵ written as a constant: selected after rounding, 16 bits at a time, for 1.4 instructions more.
- The step of SGD with the weight kept from before the momentum: 280 bytes spilled. Loaded again: none.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ._rows import device_of, sgd_
from ._tiles import Tiles, select_conic_tiles
from ._walk import (
    LOWEST,
    NORM_EPSILON,
    Chip,
    Launch,
    chip_of,
    largest_size,
    load,
    move,
    precision_of,
    product,
    softplus,
    steps_a_range,
    store,
    store_unit,
    sum_of_parts,
    through_norm,
    tile_options,
    walk,
)

# What the statistics need of a view: `record`, (2, padded rows).
_POSITIVE, _OWN = tl.constexpr(0), tl.constexpr(1)
# What the gradients need of it, (5, padded rows); `_OWN` is the same.
_LARGEST, _SIZE, _NEGATIVE, _SHARE = tl.constexpr(0), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
# What a range of keys knows of a view: `partial`, (ranges, padded rows, 3).
_PARTIAL = tl.constexpr(3)
_MAX, _SUM, _RANK = (tl.constexpr(i) for i in range(3))
# Gradients are multiplied relative to the largest. In float16 this leaves them 30 powers of two.
_UNIT = tl.constexpr(32768.0)


@triton.jit
def _norms(
    matrix, rows, count, dim, row_stride, column_stride,
    WHOLE_COLUMNS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """max(‖x‖, ε) of each row; float64 holds any square."""
    squares = tl.zeros([BLOCK], tl.float64)
    for first in tl.range(0, dim, DEPTH, loop_unroll_factor=4):
        columns = first + tl.arange(0, DEPTH)
        x = load(matrix, rows, columns, count, dim, row_stride, column_stride, False, WHOLE_COLUMNS)
        x = x.to(tl.float32).to(tl.float64)
        squares += tl.sum(x * x, axis=1)
    return tl.maximum(tl.sqrt(squares), NORM_EPSILON)


@triton.jit
def _unit_rows(
    weight, inverse, tile_rows, columns, keys, dim, weight_row, weight_column,
    WHOLE_KEYS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """ŵ of a tile, rounded once, to the dtype of the views."""
    w = load(weight, tile_rows, columns, keys, dim, weight_row, weight_column, WHOLE_KEYS, WHOLE_COLUMNS)
    return (w.to(tl.float32) * inverse[:, None]).to(DTYPE)


@triton.jit
def _similarities(
    unit, weight, x, w, rows, tile_rows, inverse, keys, dim, unit_row, weight_row, weight_column,
    BY_KEY: tl.constexpr, WHOLE_KEYS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, CHUNKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x̂ Ŵᵀ of a block of views and a tile of keys; Ŵ x̂ᵀ if BY_KEY; CHUNKED, DEPTH dimensions at a time."""
    s = tl.zeros([BLOCK_K, BLOCK_B] if BY_KEY else [BLOCK_B, BLOCK_K], tl.float32)
    if CHUNKED:
        for first in range(0, dim, DEPTH):
            columns = first + tl.arange(0, DEPTH)
            x_chunk = load(unit, rows, columns, 0, 0, unit_row, 1, True, True)
            w_chunk = _unit_rows(
                weight, inverse, tile_rows, columns, keys, dim, weight_row, weight_column,
                WHOLE_KEYS, WHOLE_COLUMNS, DTYPE,
            )  # fmt: skip
            if BY_KEY:
                s = product(w_chunk, tl.trans(x_chunk), s, PRECISION)
            else:
                s = product(x_chunk, tl.trans(w_chunk), s, PRECISION)
    elif BY_KEY:
        s = product(w, tl.trans(x), s, PRECISION)
    else:
        s = product(x, tl.trans(w), s, PRECISION)
    return s


@triton.jit
def _field(record, field: tl.constexpr, rows, padded_rows):
    """A field of the views' `record`."""
    return tl.load(record + field * padded_rows.to(tl.int64) + rows)


@triton.jit
def _own(record, rows, padded_rows):
    """The key that each view owns, −1 for none."""
    return _field(record, _OWN, rows, padded_rows).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["count", "batch", "keys", "padded_rows"])
def _prepare_kernel(
    views, weight, target, statistics, grad_loss, unit, record, norm, positive,
    count, batch, keys, dim, padded_rows,
    view_row, view_column, weight_row, weight_column, target_stride, grad_loss_stride, unit_row,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x̂ of the views, padded with zeros, and what is known of each: s_n, or how large its gradients are."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < count
    of_view = rows.to(tl.int64)
    instance = of_view % batch
    length = _norms(views, rows, count, dim, view_row, view_column, False, BLOCK, DEPTH)
    tl.store(norm + rows, length, mask=inside)
    store_unit(unit, rows, unit_row, views, length, rows, count, dim, view_row, view_column, DEPTH)
    own = tl.load(target + instance * target_stride, mask=inside, other=-1)
    exists = (own >= 0) & (own < keys)
    own = tl.where(exists, own, -1)
    to = record + of_view
    field = padded_rows.to(tl.int64)
    tl.store(to + _OWN * field, own.to(tl.int32).to(tl.float32, bitcast=True))
    if BACKWARD:
        known = statistics + of_view * 3
        grad = tl.load(grad_loss + instance * grad_loss_stride, mask=inside, other=0.0).to(tl.float64)
        largest = tl.load(known, mask=inside, other=0.0)
        negative = tl.load(known + 1, mask=inside, other=0.0)
        # ∂ℓ_s/∂s_n is less than 0, and as large as all others together.
        size = -tl.load(known + 2, mask=inside, other=0.0)
        tl.store(to + _LARGEST * field, largest.to(tl.float32))
        tl.store(to + _SIZE * field, (grad * size).to(tl.float32))
        tl.store(to + _NEGATIVE * field, (grad * negative).to(tl.float32))
        tl.store(to + _SHARE * field, tl.where(size != 0.0, negative / size, 0.0).to(tl.float32))
    else:
        dot, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for first in range(0, dim, DEPTH):
            columns = first + tl.arange(0, DEPTH)
            x = load(views, rows, columns, count, dim, view_row, view_column, False, False)
            there = (columns < dim)[None, :] & exists[:, None]
            offsets = own[:, None] * weight_row + columns.to(tl.int64)[None, :] * weight_column
            w = tl.load(weight + offsets, mask=there, other=0.0).to(tl.float32).to(tl.float64)
            dot += tl.sum(x.to(tl.float32).to(tl.float64) * w, axis=1)
            squares += tl.sum(w * w, axis=1)
        s = dot / length / tl.maximum(tl.sqrt(squares), NORM_EPSILON)
        s = tl.where(exists, s, float("nan"))
        tl.store(positive + rows, s, mask=inside)
        tl.store(to + _POSITIVE * field, s.to(tl.float32))


@triton.jit(do_not_specialize=["keys", "padded_rows"])
def _statistics_kernel(
    unit, record, weight, partial, keys, dim, padded_rows, unit_row, weight_row, weight_column,
    scale, keys_a_range, rows_a_range,
    WHOLE_KEYS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, CHUNKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, NORM_DEPTH: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK_K)
    begin, first_row = part * keys_a_range, tl.program_id(1) * rows_a_range
    last_row = tl.minimum(first_row + rows_a_range, padded_rows)
    for start in range(begin, tl.minimum(begin + keys_a_range, keys), BLOCK_K):
        tile_rows = start + index
        inverse = _norms(
            weight, tile_rows, keys, dim, weight_row, weight_column, WHOLE_COLUMNS, BLOCK_K, NORM_DEPTH
        )  # fmt: skip
        inverse = (1.0 / inverse).to(tl.float32)
        w = None
        if not CHUNKED:
            w = _unit_rows(
                weight, inverse, tile_rows, tl.arange(0, DEPTH), keys, dim, weight_row, weight_column,
                WHOLE_KEYS, WHOLE_COLUMNS, DTYPE,
            )  # fmt: skip
        tl.debug_barrier()  # what follows is merged with what other threads stored of the last tile
        for first in range(first_row, last_row, BLOCK_B):
            rows = first + tl.arange(0, BLOCK_B)
            x = None
            if not CHUNKED:
                x = load(unit, rows, tl.arange(0, DEPTH), 0, 0, unit_row, 1, True, True)
            s = _similarities(
                unit, weight, x, w, rows, tile_rows, inverse, keys, dim, unit_row, weight_row, weight_column,
                False, WHOLE_KEYS, WHOLE_COLUMNS, CHUNKED, DTYPE, PRECISION, BLOCK_B, BLOCK_K, DEPTH,
            )  # fmt: skip
            own = (_own(record, rows, padded_rows) - start).to(tl.int32)
            excluded = own[:, None] == index[None, :]
            if not WHOLE_KEYS:
                excluded = excluded | (tile_rows >= keys)[None, :]
            s = tl.where(excluded, float("-inf"), s)
            above = s > _field(record, _POSITIVE, rows, padded_rows)[:, None]

            to = partial + (part * padded_rows + rows) * _PARTIAL
            known = (rows >= 0) & (start > begin)
            old = tl.load(to + _MAX, mask=known, other=LOWEST)
            sum = tl.load(to + _SUM, mask=known, other=0.0)
            rank = tl.load(to + _RANK, mask=known, other=0.0).to(tl.int32, bitcast=True)
            top = tl.maximum(old, tl.max(s, axis=1))
            e = tl.exp2((s - top[:, None]) * scale)
            tl.store(to + _MAX, top)
            tl.store(to + _SUM, sum * tl.exp2(move(old, top, scale)) + tl.sum(e, axis=1))
            rank += tl.sum(tl.where(above, 1.0, 0.0), axis=1).to(tl.int32)
            tl.store(to + _RANK, rank.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["padded_rows", "views_count", "batch", "ranges"])
def _merge_kernel(
    partial, views, norm, positive, loss, classification_loss, consistency_loss, positive_rank, statistics,
    padded_rows, views_count, batch, dim, view_row, view_column, ranges,
    scale: tl.float64, tau: tl.float64, log_compensation: tl.float64, consistency_weight: tl.float64,
    BLOCK_B: tl.constexpr, RANGES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The losses of a block of instances, all in float64."""
    instance = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    inside = instance < batch
    part = tl.arange(0, RANGES).to(tl.int64)[:, None]
    there = (part < ranges) & inside[None, :]
    zero = tl.zeros([BLOCK_B], tl.float64)
    classification = zero
    for view in range(views_count):
        row = view * batch + instance
        record = partial + (part * padded_rows + row[None, :]) * _PARTIAL
        tops = tl.load(record + _MAX, mask=there, other=LOWEST).to(tl.float64)
        largest = tl.max(tops, axis=0)
        sums = tl.load(record + _SUM, mask=there, other=0.0).to(tl.float64)
        sum = tl.sum(sums * tl.exp2(move(tops, largest[None, :], scale)), axis=0)
        ranks = tl.load(record + _RANK, mask=there, other=0.0).to(tl.int32, bitcast=True)

        s = tl.load(positive + row, mask=inside, other=0.0)
        largest = tl.where(sum == 0.0, s, largest)  # the only key has no negatives
        value, negatives = softplus(tl.log(sum) + ((largest - s) / tau + log_compensation))  # ℓ_s
        pull = negatives / tau
        classification += value
        tl.store(classification_loss + row, value.to(tl.float32), mask=inside)
        tl.store(positive_rank + row, tl.sum(ranks.to(tl.int64), axis=0), mask=inside)
        to = statistics + row * 3
        tl.store(to, largest, mask=inside)
        tl.store(to + 1, tl.where(sum == 0.0, 0.0, pull / sum), mask=inside)
        tl.store(to + 2, -pull, mask=inside)

    consistency = zero
    for i in range(1, views_count):
        for j in range(i):
            row, other = i * batch + instance, j * batch + instance
            dot = zero
            for first in range(0, dim, DEPTH):
                columns = first + tl.arange(0, DEPTH)
                x = load(views, row, columns, (i + 1) * batch, dim, view_row, view_column, False, False)
                y = load(views, other, columns, (j + 1) * batch, dim, view_row, view_column, False, False)
                dot += tl.sum(
                    x.to(tl.float32).to(tl.float64) * y.to(tl.float32).to(tl.float64), axis=1
                )  # fmt: skip
            dot /= tl.load(norm + row, mask=inside, other=1.0)
            disagreement = 1.0 - dot / tl.load(norm + other, mask=inside, other=1.0)
            consistency += 2.0 * disagreement * disagreement  # (i, j) and (j, i)
    total = classification + consistency_weight * consistency
    tl.store(loss + instance, total.to(tl.float32), mask=inside)
    tl.store(consistency_loss + instance, consistency.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["keys", "padded_rows"])
def _weight_kernel(
    unit, record, weight, gradient, momentum_buffer, keys, dim, padded_rows,
    unit_row, weight_row, weight_column, momentum_row, momentum_column,
    scale, lr, momentum, weight_decay,
    STEP: tl.constexpr, NESTEROV: tl.constexpr,
    WHOLE_KEYS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, CHUNKED: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    NORM_DEPTH: tl.constexpr,
):  # fmt: skip
    """dw of a tile of keys; with STEP, a step of SGD in its place."""
    start, index = tl.program_id(0) * BLOCK_K, tl.arange(0, BLOCK_K)
    tile_rows = start.to(tl.int64) + index
    columns = tl.arange(0, DEPTH)
    out_columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    norm = _norms(
        weight, tile_rows, keys, dim, weight_row, weight_column, WHOLE_COLUMNS, BLOCK_K, NORM_DEPTH
    )  # fmt: skip
    inverse = (1.0 / norm).to(tl.float32)

    unit_scale = 1.0
    if tl.float16 == DTYPE:  # the largest gradient becomes _UNIT, or up to half of it
        largest = largest_size(record + _SIZE * padded_rows.to(tl.int64), padded_rows)
        unit_scale = _UNIT * tl.exp2(-tl.ceil(tl.maximum(tl.log2(largest), -100.0)))

    w = None
    if not CHUNKED:
        w = _unit_rows(
            weight, inverse, tile_rows, columns, keys, dim, weight_row, weight_column,
            WHOLE_KEYS, WHOLE_COLUMNS, DTYPE,
        )  # fmt: skip
    grad = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    radial = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, padded_rows, BLOCK_B):
        rows = first + tl.arange(0, BLOCK_B)
        x = None
        if not CHUNKED:
            x = load(unit, rows, columns, 0, 0, unit_row, 1, True, True)
        s = _similarities(
            unit, weight, x, w, rows, tile_rows, inverse, keys, dim, unit_row, weight_row, weight_column,
            True, WHOLE_KEYS, WHOLE_COLUMNS, CHUNKED, DTYPE, PRECISION, BLOCK_B, BLOCK_K, DEPTH,
        )  # fmt: skip
        own = index[:, None] == (_own(record, rows, padded_rows) - start)[None, :]
        of_own = _field(record, _SIZE, rows, padded_rows) * -unit_scale
        negative = _field(record, _NEGATIVE, rows, padded_rows) * unit_scale
        e = tl.exp2((s - _field(record, _LARGEST, rows, padded_rows)[None, :]) * scale)
        g = tl.where(own, of_own[None, :], e * negative[None, :])
        if not WHOLE_KEYS:
            g = tl.where((tile_rows < keys)[:, None], g, 0.0)
        if not WHOLE_ROWS:
            radial += tl.sum(g * s, axis=1)
        if CHUNKED:
            x = load(unit, rows, out_columns, 0, 0, unit_row, 1, True, True)
        grad = product(g.to(DTYPE), x, grad, PRECISION)

    # dw = (dŵ − ŵ (ŵ·dŵ)) / ‖w‖; a row below the epsilon was only scaled, so it has no projection
    w_out = load(
        weight, tile_rows, out_columns, keys, dim, weight_row, weight_column, WHOLE_KEYS, WHOLE_COLUMNS
    ).to(tl.float32)  # fmt: skip
    if WHOLE_ROWS:
        radial = tl.sum(w_out * grad, axis=1) * inverse
    radial = tl.where(norm > NORM_EPSILON, radial, 0.0)
    grad = (grad - w_out * (inverse * radial)[:, None]) * (inverse / unit_scale)[:, None]
    if STEP:
        grad += weight_decay * w_out
        v = load(
            momentum_buffer, tile_rows, out_columns, keys, dim, momentum_row, momentum_column,
            WHOLE_KEYS, WHOLE_COLUMNS,
        )  # fmt: skip
        v = momentum * v.to(tl.float32) + grad
        store(
            momentum_buffer, v, tile_rows, out_columns, keys, dim, momentum_row, momentum_column,
            WHOLE_KEYS, WHOLE_COLUMNS,
        )  # fmt: skip
        step = grad + momentum * v if NESTEROV else v
        # Loaded again, from the cache: registers are too few to keep it.
        w_out = load(
            weight, tile_rows, out_columns, keys, dim, weight_row, weight_column, WHOLE_KEYS, WHOLE_COLUMNS
        ).to(tl.float32)  # fmt: skip
        tl.debug_barrier()  # all threads have read what one of them overwrites
        store(
            weight, w_out - lr * step, tile_rows, out_columns, keys, dim, weight_row, weight_column,
            WHOLE_KEYS, WHOLE_COLUMNS,
        )  # fmt: skip
    else:
        store(gradient, grad, tile_rows, out_columns, keys, dim, dim, 1, WHOLE_KEYS, WHOLE_COLUMNS)


@triton.jit(do_not_specialize=["keys"])
def _norms_kernel(
    weight, inverse, keys, dim, weight_row, weight_column,
    WHOLE_COLUMNS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """1/‖w‖ of each key, which also brings the weight into the cache."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    norm = _norms(weight, rows, keys, dim, weight_row, weight_column, WHOLE_COLUMNS, BLOCK, DEPTH)
    tl.store(inverse + rows, (1.0 / norm).to(tl.float32), mask=rows < keys)


@triton.jit(do_not_specialize=["keys", "padded_rows"])
def _views_kernel(
    unit, record, weight, inverse, parts, keys, dim, padded_rows,
    unit_row, weight_row, weight_column, scale, keys_a_range,
    WHOLE_KEYS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, CHUNKED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What a range of keys adds to dx̂ of a block of views."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    part = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, DEPTH)
    out_columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)

    own = _own(record, rows, padded_rows)[:, None]
    largest = _field(record, _LARGEST, rows, padded_rows)[:, None]
    share = _field(record, _SHARE, rows, padded_rows)[:, None] * _UNIT
    of_own = tl.where(share == 0.0, 0.0, -_UNIT)
    x = None
    if not CHUNKED:
        x = load(unit, rows, columns, 0, 0, unit_row, 1, True, True)
    grad = tl.zeros([BLOCK_B, WIDTH], tl.float32)
    begin, index = part * keys_a_range, tl.arange(0, BLOCK_K)
    for start in range(begin, tl.minimum(begin + keys_a_range, keys), BLOCK_K):
        tile_rows = start + index
        lengths = tl.load(inverse + tile_rows, mask=tile_rows < keys, other=0.0)
        w = None
        if not CHUNKED:
            w = _unit_rows(
                weight, lengths, tile_rows, columns, keys, dim, weight_row, weight_column,
                WHOLE_KEYS, WHOLE_COLUMNS, DTYPE,
            )  # fmt: skip
        s = _similarities(
            unit, weight, x, w, rows, tile_rows, lengths, keys, dim, unit_row, weight_row, weight_column,
            False, WHOLE_KEYS, WHOLE_COLUMNS, CHUNKED, DTYPE, PRECISION, BLOCK_B, BLOCK_K, DEPTH,
        )  # fmt: skip
        g = tl.exp2((s - largest) * scale) * share
        g = tl.where((own - start).to(tl.int32) == index[None, :], of_own, g)
        if not WHOLE_KEYS:
            g = tl.where((tile_rows < keys)[None, :], g, 0.0)
        if CHUNKED:
            w = _unit_rows(
                weight, lengths, tile_rows, out_columns, keys, dim, weight_row, weight_column,
                WHOLE_KEYS, WHOLE_COLUMNS, DTYPE,
            )  # fmt: skip
        grad = product(g.to(DTYPE), w, grad, PRECISION)
    grad *= _field(record, _SIZE, rows, padded_rows)[:, None] * (1.0 / _UNIT)
    to = parts + (part * padded_rows + rows)[:, None] * unit_row + out_columns[None, :]
    tl.store(to, grad)


@triton.jit(do_not_specialize=["batch", "rows", "padded_rows", "ranges"])
def _finish_kernel(
    views, norm, parts, grad_loss, gradient, rows, batch, dim, padded_rows,
    view_row, view_column, grad_loss_stride, unit_row, ranges, consistency_weight: tl.float64,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx of some views: the ranges' parts, the consistency's −4 α Σ_j (1 − x̂ⁱ·x̂ʲ) x̂ʲ, and the chain rule."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.arange(0, BLOCK_D)
    inside = row < rows
    there = inside[:, None] & (columns < dim)[None, :]
    part_stride = padded_rows.to(tl.int64) * unit_row
    grad = sum_of_parts(parts, row, columns, there, ranges, part_stride, unit_row, BLOCK_B, BLOCK_D)
    length = tl.load(norm + row, mask=inside, other=1.0)
    x = load(views, row, columns, rows, dim, view_row, view_column, False, False)
    x = x.to(tl.float32).to(tl.float64) / length[:, None]
    instance = row % batch
    factor = tl.load(grad_loss + instance * grad_loss_stride, mask=inside, other=0.0).to(tl.float64)
    factor *= -4.0 * consistency_weight
    for first in range(0, rows, batch):
        other = first + instance
        y = load(views, other, columns, rows, dim, view_row, view_column, False, False)
        y = y.to(tl.float32).to(tl.float64)
        y /= tl.load(norm + other, mask=other < rows, other=1.0)[:, None]
        disagreement = tl.where(other != row, 1.0 - tl.sum(x * y, axis=1), 0.0)
        grad += (factor * disagreement)[:, None] * y
    grad = through_norm(grad, x, length)
    store(gradient, grad.to(tl.float32), row, columns, rows, dim, dim, 1, False, False)


@dataclass(frozen=True)
class _Plan:
    padded_rows: int
    padded_dim: int
    rows_a_range: int
    prepare: Launch
    statistics: Launch
    merge: Launch
    weight: Launch
    norms: Launch
    views: Launch
    finish: Launch


@functools.lru_cache(maxsize=1024)
def _plan(
    count: int, batch: int, keys: int, dim: int, dtype: torch.dtype, precision: str, chip: Chip
) -> _Plan:
    """How the kernels are started for a problem's size. Made once: a call has no time for it."""
    capability, multiprocessors = chip
    few = 4 if capability == (0, 0) else 1  # each program costs the interpreter the same
    tiles = select_conic_tiles(capability, precision, dim)
    numbers = {"DTYPE": getattr(tl, str(dtype).removeprefix("torch.")), "PRECISION": precision}
    rows, block = count * batch, max(tiles.statistics.keys, tiles.weight.keys, tiles.views.rows)
    padded_rows = triton.cdiv(rows, block) * block

    def holds_keys(tiles: Tiles) -> dict[str, Any]:
        options = tile_options(tiles, dim) | numbers
        options |= {"BLOCK_K": tiles.rows, "BLOCK_B": tiles.keys, "WHOLE_KEYS": keys % tiles.rows == 0}
        return options | {"NORM_DEPTH": min(32, options["DEPTH"])}

    # Ranges of keys for the chip to be full, and ranges of views where either they or the keys do not do it:
    # with few keys, or with so many views that each range's numbers of them would be too much.
    blocks, slots = triton.cdiv(keys, tiles.statistics.rows), tiles.statistics.programs * multiprocessors
    keys_a_range = steps_a_range(blocks, triton.cdiv(rows, 4096), slots)
    ranges, steps = triton.cdiv(blocks, keys_a_range), triton.cdiv(rows, tiles.statistics.keys)
    steps_of_views = steps_a_range(steps, ranges, slots)
    statistics = Launch(
        (ranges, triton.cdiv(steps, steps_of_views)),
        holds_keys(tiles.statistics),
        keys_a_range * tiles.statistics.rows,
    )
    padded_ranges = triton.next_power_of_2(ranges)
    instances = max(1, min(8 * few, 512 // padded_ranges))
    depth = min(64, max(16, triton.next_power_of_2(dim)))
    merge = Launch(
        (triton.cdiv(batch, instances),), {"BLOCK_B": instances, "RANGES": padded_ranges, "DEPTH": depth}
    )

    weight = Launch((triton.cdiv(keys, tiles.weight.rows), 0), holds_keys(tiles.weight))
    width = weight.options["WIDTH"]
    weight = Launch((weight.grid[0], triton.cdiv(dim, width)), weight.options | {"WHOLE_ROWS": dim <= width})

    views = walk(tiles.views, rows, keys, dim, multiprocessors)
    views.options.update(numbers)
    columns = triton.next_power_of_2(dim)
    block = max(1, few * 512 // columns)
    finish = Launch((triton.cdiv(rows, block),), {"BLOCK_B": block, "BLOCK_D": columns})

    cut = max(each.options.get("WIDTH", each.options["DEPTH"]) for each in (statistics, weight, views))
    padded_dim = triton.cdiv(dim, cut) * cut
    norm_depth = min(32, depth)
    return _Plan(
        padded_rows, padded_dim, steps_of_views * tiles.statistics.keys,
        prepare=Launch((padded_rows // (16 * few),), {"BLOCK": 16 * few, "DEPTH": depth}),
        statistics=statistics, merge=merge, weight=weight,
        norms=Launch(
            (triton.cdiv(keys, 64 * few),),
            {"BLOCK": 64 * few, "DEPTH": norm_depth, "WHOLE_COLUMNS": dim % norm_depth == 0},
        ),
        views=views, finish=finish,
    )  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """What the kernels of a call share: its plan, the rows x of the views (V·B, D), their x̂, and more."""

    plan: _Plan
    rows: Tensor
    unit: Tensor
    record: Tensor
    norm: Tensor
    positive: Tensor | None
    scale: float


def _prepare(
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    grad_loss: Tensor | None = None,
    statistics: Tensor | None = None,
) -> _Call:
    (count, batch, dim), keys, device = views.shape, len(weight), views.device
    precision = precision_of(views.dtype)
    plan = _plan(count, batch, keys, dim, views.dtype, precision, chip_of(device))
    rows = views.flatten(0, 1)  # a copy where their strides are not of one matrix
    unit = torch.empty((plan.padded_rows, plan.padded_dim), dtype=views.dtype, device=device)
    record = torch.empty((5, plan.padded_rows), dtype=torch.float32, device=device)
    norm = torch.empty(len(rows), dtype=torch.float64, device=device)
    positive = torch.empty_like(norm) if grad_loss is None else None
    _prepare_kernel[plan.prepare.grid](
        rows, weight, target, statistics, grad_loss, unit, record, norm, positive,
        len(rows), batch, keys, dim, plan.padded_rows, *rows.stride(), *weight.stride(), target.stride(0),
        0 if grad_loss is None else grad_loss.stride(0), plan.padded_dim,
        BACKWARD=grad_loss is not None, **plan.prepare.options,
    )  # fmt: skip
    return _Call(plan, rows, unit, record, norm, positive, math.log2(math.e) / temperature)


def conic(
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    compensation: float,
    consistency_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.conic`; float16, bfloat16 and float32 views, D up to 1024. The loss of an instance whose
    target is not a row of the weight is NaN."""
    (count, batch, dim), keys, device = views.shape, len(weight), views.device
    with device_of(views):
        call = _prepare(views, weight, target, temperature)
        plan, launch = call.plan, call.plan.statistics
        partial = torch.empty(
            (launch.grid[0], plan.padded_rows, _PARTIAL.value), dtype=torch.float32, device=device
        )
        _statistics_kernel[launch.grid](
            call.unit, call.record, weight, partial, keys, dim, plan.padded_rows, plan.padded_dim,
            *weight.stride(), call.scale, launch.keys_a_range, plan.rows_a_range, **launch.options,
        )  # fmt: skip
        loss, consistency = (torch.empty(batch, dtype=torch.float32, device=device) for _ in range(2))
        classification = torch.empty((count, batch), dtype=torch.float32, device=device)
        rank = torch.empty((count, batch), dtype=torch.int64, device=device)
        statistics = torch.empty((count, batch, 3), dtype=torch.float64, device=device)
        _merge_kernel[plan.merge.grid](
            partial, call.rows, call.norm, call.positive, loss, classification, consistency, rank, statistics,
            plan.padded_rows, count, batch, dim, *call.rows.stride(), launch.grid[0],
            call.scale, temperature, math.log(compensation), consistency_weight, **plan.merge.options,
        )  # fmt: skip
    return loss, classification, consistency, rank, statistics


def conic_backward(
    grad_loss: Tensor,
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    statistics: Tensor,
    temperature: float,
    consistency_weight: float,
    views_need_grad: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.conic_backward`."""
    count, batch, dim = views.shape
    grad_views = views.new_empty((count if views_need_grad else 0, batch, dim))
    grad_weight = weight.new_empty((len(weight) if weight_needs_grad else 0, dim))
    with device_of(views):
        call = _prepare(views, weight, target, temperature, grad_loss, statistics.contiguous())
        if views_need_grad:
            _gradient_of_views(call, grad_loss, weight, consistency_weight, batch, grad_views)
        if weight_needs_grad:
            _gradient_of_weight(call, weight, grad_weight)
    return grad_views, grad_weight


def conic_backward_sgd_(
    grad_loss: Tensor,
    views: Tensor,
    weight: Tensor,
    momentum_buffer: Tensor,
    target: Tensor,
    statistics: Tensor,
    temperature: float,
    consistency_weight: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> Tensor:
    """See `reference.conic_backward_sgd_`."""
    grad_views = torch.empty(views.shape, dtype=views.dtype, device=views.device)
    settings = (lr, momentum, weight_decay)
    with device_of(views):
        call = _prepare(views, weight, target, temperature, grad_loss, statistics.contiguous())
        # First, from the weight as it was in forward.
        _gradient_of_views(call, grad_loss, weight, consistency_weight, views.shape[1], grad_views)
        if call.plan.weight.grid[1] == 1:
            _gradient_of_weight(call, weight, None, momentum_buffer, settings, nesterov)
        else:  # other programs still need what one would overwrite
            grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            _gradient_of_weight(call, weight, grad_weight)
            sgd_(weight, momentum_buffer, grad_weight, *settings, nesterov)
    increment_version((momentum_buffer, weight))
    return grad_views


def _gradient_of_views(
    call: _Call,
    grad_loss: Tensor,
    weight: Tensor,
    consistency_weight: float,
    batch: int,
    gradient: Tensor,
) -> None:
    plan, launch = call.plan, call.plan.views
    keys, dim = weight.shape
    inverse = torch.empty(keys, dtype=torch.float32, device=weight.device)
    parts = torch.empty(
        (launch.ranges, plan.padded_rows, plan.padded_dim), dtype=torch.float32, device=weight.device
    )
    _norms_kernel[plan.norms.grid](weight, inverse, keys, dim, *weight.stride(), **plan.norms.options)
    _views_kernel[launch.grid](
        call.unit, call.record, weight, inverse, parts, keys, dim, plan.padded_rows, plan.padded_dim,
        *weight.stride(), call.scale, launch.keys_a_range, **launch.options,
    )  # fmt: skip
    _finish_kernel[plan.finish.grid](
        call.rows, call.norm, parts, grad_loss, gradient, len(call.rows), batch, dim, plan.padded_rows,
        *call.rows.stride(), grad_loss.stride(0), plan.padded_dim, launch.ranges, consistency_weight,
        **plan.finish.options,
    )  # fmt: skip


def _gradient_of_weight(
    call: _Call,
    weight: Tensor,
    gradient: Tensor | None,
    momentum_buffer: Tensor | None = None,
    settings: tuple[float, float, float] = (0.0, 0.0, 0.0),
    nesterov: bool = False,
) -> None:
    """Stores the gradient, or takes a step of SGD where there is a momentum buffer."""
    plan, launch = call.plan, call.plan.weight
    keys, dim = weight.shape
    _weight_kernel[launch.grid](
        call.unit, call.record, weight, gradient, momentum_buffer, keys, dim, plan.padded_rows,
        plan.padded_dim, *weight.stride(), *((0, 0) if momentum_buffer is None else momentum_buffer.stride()),
        call.scale, *settings, STEP=momentum_buffer is not None, NESTEROV=nesterov, **launch.options,
    )  # fmt: skip
