"""CO2 and InfoNCE on GPUs: what contrastive_ops/reference.py specifies, in four launches.

Plan. The grid is (block of query rows) × (range of keys), so that a batch of 32 fills the chip as one of 4096
does. A program walks its range a tile of keys at a time; nothing of size B×K leaves it.

0. round        the queue in the query's half precision, where it has another dtype.
   prepare      norms and s_+ of each row, in float64, on chips that are slow in it; else 1. does it.
1. statistics   s = q Nᵀ and y = k Nᵀ of each tile; per row both maxima, three partition sums, both sums of
                d, and the rank of the positive. Each range writes these eight numbers a row.
2. merge        the ranges' numbers, in a fixed order: losses, rank, and what a row's gradient needs.
3. gradient     computes s and y again, makes them g = dL/ds, and adds up g N. Each range writes its part.
4. finish       adds the parts up in a fixed order, adds the positive's, and differentiates the normalisation.

Without a gradient the first two are all. There are no atomics: equal input gives equal bits.

Rows are multiplied as stored, but a queue of another dtype is rounded to the query's; norms divide
similarities, not rows. A pair of row and key has

    a_j = λ (s_j − max s)     b_j = λ (y_j − max y)     d_j = a_j − b_j     with λ = log2(e)/τc,

so that e^{s/τc} ~ 2^a, e^{y/τc} ~ 2^b and e^{s/τ} ~ 2^{a τc/τ}. InfoNCE alone has τ in place of τc. Where τ
is a small multiple of τc, one of the three is a power of another.

Bounds. A pair costs 5 products of 2 D operations (2 in the statistics, 3 in the gradient) and 4 exponentials,
6 where no temperature is a multiple of the other; the queue is read twice, the second time from the cache
where it fits. At B = 256, K = 65536, D = 128 in bfloat16 that is 30 µs on an H100, by the rate of products
measured there. As compiled (python -m bench.resources) a pair takes so many clocks of a multiprocessor's
schedulers, special-function units, tensor cores and shared memory:

    sm_90  statistics   0.153   0.125   0.125   0.101   bound by instructions: 9.8 µs at 1.98 GHz
           gradient     0.146   0.125   0.188   0.132   bound by products: 12.0 µs
    sm_80  statistics   0.193   0.125   0.250   0.287   bound by shared memory: 31.6 µs at 1.41 GHz
           gradient     0.192   0.125   0.375   0.331   bound by products: 41.3 µs

Measured on an H100, with three exponentials a pair in each, whose bound was 12.0 µs: 28.9 and 29.9 µs, of
which 7.6 and 5.9 do not depend on K. The rest was 1.8 and 2 times the bound, for eight warps on each
multiprocessor do not hide a product's latency, and then an exponential's, from each other. Merge and finish
move 0.5 MiB and 2 × 8 MiB, all in the cache, and take 4.6 and 5.4 µs.
docs/performance.md tells what was tried.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .._contract import CO2Partial, CO2Row
from ._device import (
    LARGEST_FLOAT16,
    LOWEST,
    NORM_EPSILON,
    Block,
    add_tile,
    load,
    load_fields,
    measure_rows,
    merge,
    move,
    move_sums,
    product,
    rounded,
    similarities,
    split,
    stacked,
    store,
    store_fields,
    two_exponentials,
)

_LN_2 = tl.constexpr(math.log(2))
# Σ 2^a without those that float32 has no room for; were all of 2²⁴ below 2^−126, they would not count.
_LEAST_SUM = tl.constexpr(2.0**-70)
_LARGEST_SUM = tl.constexpr(2.0**100)  # whose lanes may be added up, and which leaves room for d
# In float16 Q (d − E[d]) may be 256 times as large before it is clamped, and a million equal keys have 2⁻¹²
# each.
_LARGEST_PULL = tl.constexpr(256.0)
_PARTIAL, _ROW = tl.constexpr(len(CO2Partial._fields)), tl.constexpr(len(CO2Row._fields))

# `do_not_specialize`: the last batch of an epoch, or a queue that is still filling, compiles nothing anew.


@triton.jit
def _load_row(row_records, rows, batch):
    """The `CO2Row` of each row; rows past the batch repeat its last."""
    return CO2Row(*load_fields(row_records + tl.minimum(rows, batch - 1).to(tl.int64) * _ROW, _ROW))


@triton.jit
def _scales(scale, norm_q, norm_k):
    """λ/‖q‖ and λ/‖k‖, which make logits of products of stored rows; every kernel rounds them alike."""
    return (scale / norm_q).to(tl.float32), (scale / norm_k).to(tl.float32)


@triton.jit(do_not_specialize=["batch"])
def _prepare_kernel(
    query, key, row_records, batch, dim,
    NORMALIZE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The first three fields of `CO2Row` (B, 11), of query and key, Matrix (B, D)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query_rows, key_rows = Block(query, rows, batch), Block(key, rows, batch)
    measured = measure_rows(query_rows, key_rows, dim, DEPTH, NORMALIZE, False)
    store_fields(row_records + rows.to(tl.int64) * _ROW, measured, rows < batch)


@triton.jit
def _held(query_rows, key_rows, dim, CONSISTENCY: tl.constexpr, TILE: tl.constexpr):
    """q and k as `similarities` takes them, of rows that are not chunked."""
    columns = tl.arange(0, TILE.depth)
    q = rounded(load(query_rows, columns, dim, WHOLE_COLUMNS=TILE.whole_columns), TILE.dtype)
    k = rounded(load(key_rows, columns, dim, WHOLE_COLUMNS=TILE.whole_columns), TILE.dtype)
    held = q, k
    if TILE.stacked and CONSISTENCY:
        held = stacked(q, k)
    return held


@triton.jit(do_not_specialize=["keys"])
def _round_kernel(queue, rounded_queue, keys, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Some rows of a Matrix (K, D) as they are multiplied, in another of that shape."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    x = rounded(load(Block(queue, rows, keys), columns, dim), rounded_queue.data.dtype.element_ty)
    store(Block(rounded_queue, rows, keys), x, columns, dim)


@triton.jit
def _masked(x, valid, other, WHOLE_KEYS: tl.constexpr):
    return x if WHOLE_KEYS else tl.where(valid, x, other)


@triton.jit
def _relative(s, top, scale, valid, WHOLE_KEYS: tl.constexpr):
    """A tile's logits relative to the highest similarity yet, and that one. Masked keys are LOWEST."""
    s = _masked(s, valid, float("-inf"), WHOLE_KEYS)
    top = tl.maximum(top, tl.max(s, axis=1))
    a = (s - top[:, None, :]) * scale[:, :, None]  # in this order it loses nothing near the maximum
    return _masked(a, valid, LOWEST, WHOLE_KEYS), top


@triton.jit
def _sum_up(
    rows, queue, held, measured, part, keys, keys_a_range, dim, ratio,
    INSTANCE: tl.constexpr, CONSISTENCY: tl.constexpr, POWER: tl.constexpr, BOUNDED: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr = None,
):  # fmt: skip
    """What a range of keys adds to each lane of some rows: Σ 2^{a τc/τ}, Σ 2^a, Σ 2^b, Σ 2^a d, Σ 2^b d, both
    maxima that a and b are relative to, and how many similarities are above the positive's.

    Args:
        rows: Blocks of query and key. queue: Matrix (K, D). held: see `similarities`.
        measured: λ/‖q‖, λ/‖k‖ and the positive's similarity of each row.
        POWER: see `two_exponentials`.
        BOUNDED: whether logits are relative to 0, so that no maximum is looked for.
    """
    ROWS: tl.constexpr = rows[0].rows.shape[0]
    KEYS: tl.constexpr = TILE.keys
    WHOLE_KEYS: tl.constexpr = TILE.whole_keys
    scale_q, scale_k, positive = measured
    shape: tl.constexpr = [ROWS, LANES]
    tile_shape: tl.constexpr = [ROWS, KEYS // LANES, LANES]
    start_at = 0.0 if BOUNDED else LOWEST
    top_s, top_y = tl.full(shape, start_at, tl.float32), tl.full(shape, start_at, tl.float32)
    zero = tl.zeros(shape, tl.float32)
    z_instance, sums = zero, (zero, zero, zero, zero)
    rank = zero  # exact up to 2²⁴

    begin = part.to(tl.int64) * keys_a_range
    for start in tl.range(begin, tl.minimum(begin + keys_a_range, keys), KEYS, num_stages=STAGES):
        tile_rows = start + tl.arange(0, KEYS)
        queue_rows = Block(queue, tile_rows, keys)
        s, y, _ = similarities(rows[0], rows[1], queue_rows, held, dim, CONSISTENCY, TILE)
        valid = tl.reshape(tile_rows < keys, [1, KEYS // LANES, LANES])
        s, y = tl.reshape(s, tile_shape), tl.reshape(y, tile_shape)
        if BOUNDED:
            a, b = s * scale_q[:, :, None], y * scale_k[:, :, None]
            if not WHOLE_KEYS:  # noqa: SIM102  (known when this is compiled; what follows is not)
                if start + KEYS > keys:
                    s = tl.where(valid, s, float("-inf"))
                    a, b = tl.where(valid, a, LOWEST), tl.where(valid, b, LOWEST)
            rank += tl.sum(tl.where(s > positive, 1.0, 0.0), axis=1)
            e_instance, e_query = two_exponentials(a, ratio, POWER)
            if INSTANCE:
                z_instance += tl.sum(e_instance, axis=1)
            if CONSISTENCY:
                sums = add_tile(sums, a, b, e_query, tl.exp2(b))
        else:
            above = s > positive
            if not WHOLE_KEYS:
                above = above & valid
            rank += tl.sum(tl.where(above, 1.0, 0.0), axis=1)
            a, new_s = _relative(s, top_s, scale_q, valid, WHOLE_KEYS)
            moved_s = move(top_s, new_s, scale_q)  # what older sums are to be moved by
            e_instance, e_query = two_exponentials(a, ratio, POWER)
            if INSTANCE:
                z_instance = z_instance * tl.exp2(moved_s * ratio) + tl.sum(e_instance, axis=1)
            if CONSISTENCY:
                b, new_y = _relative(y, top_y, scale_k, valid, WHOLE_KEYS)
                moved = move_sums(sums, moved_s, move(top_y, new_y, scale_k))
                sums, top_y = add_tile(moved, a, b, e_query, tl.exp2(b)), new_y
            top_s = new_s
    return z_instance, sums, top_s, top_y, rank


@triton.jit
def _fits(z, d, inside):
    """Whether float32 holds all sums of exponentials, also times d, and too few are too small for it."""
    fits = (z > _LEAST_SUM) & (z < _LARGEST_SUM) & (tl.abs(d) < _LARGEST_SUM)
    return tl.min((fits | ~inside[:, None]).to(tl.int32)) == 1


@triton.jit(do_not_specialize=["batch", "keys"])
def _statistics_kernel(
    query, key, queue, partial, row_records, batch, keys, dim, scale, ratio, keys_a_range,
    INSTANCE: tl.constexpr, CONSISTENCY: tl.constexpr, POWER: tl.constexpr, NORMALIZE: tl.constexpr,
    BOUNDED: tl.constexpr, PREPARED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a range of keys knows of a block of rows.

    Args:
        query, key: Matrix (B, D). queue: Matrix (K, D).
        partial: `CO2Partial` (ranges, B, 8) float32.
        row_records: `CO2Row` (B, 11) float64, of which it writes the first three, or reads them if PREPARED.
        scale, ratio: λ and τc/τ.
        POWER: see `two_exponentials`.
        BOUNDED: whether float32 holds the exponentials of all logits as they are, if no key is longer than 1.
            Where one is, the range is walked again.
    """
    ROWS: tl.constexpr = TILE.rows
    NORM_DEPTH: tl.constexpr = 32 if TILE.depth > 32 else TILE.depth
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    inside = rows < batch
    query_rows, key_rows = Block(query, rows, batch), Block(key, rows, batch)

    if PREPARED:
        row = row_records + tl.minimum(rows, batch - 1).to(tl.int64) * _ROW
        norm_q, norm_k, positive = load_fields(row, 3)
    else:
        norm_q, norm_k, positive = measure_rows(
            query_rows, key_rows, dim, NORM_DEPTH, NORMALIZE, TILE.whole_columns
        )
        if part == 0:
            row = row_records + rows.to(tl.int64) * _ROW
            store_fields(row, (norm_q, norm_k, positive), inside)
    scale_q, scale_k = _scales(scale, norm_q[:, None], norm_k[:, None])
    measured = (scale_q, scale_k, positive.to(tl.float32)[:, None, None])

    held = None, None
    if not TILE.chunked:
        held = _held(query_rows, key_rows, dim, CONSISTENCY, TILE)

    z_instance, sums, top_s, top_y, rank = _sum_up(
        (query_rows, key_rows), queue, held, measured, part, keys, keys_a_range, dim, ratio,
        INSTANCE, CONSISTENCY, POWER, BOUNDED, LANES, TILE,
    )  # fmt: skip
    if BOUNDED:
        fits = True
        if INSTANCE:
            fits = fits & _fits(z_instance, z_instance, inside)
        if CONSISTENCY:
            fits = fits & _fits(sums[0], sums[2], inside) & _fits(sums[1], sums[3], inside)
        if not fits:
            z_instance, sums, top_s, top_y, rank = _sum_up(
                (query_rows, key_rows), queue, held, measured, part, keys, keys_a_range, dim, ratio,
                INSTANCE, CONSISTENCY, POWER, False, LANES, TILE, 1,
            )  # fmt: skip

    merged = merge(top_s, top_y, sums, scale_q, scale_k, 1)
    known = CO2Partial(
        max_s=merged.max_s,
        max_y=merged.max_y,
        z_instance=tl.sum(z_instance * tl.exp2(merged.moved_s * ratio), axis=1),
        z_query=merged.z_query,
        z_key=merged.z_key,
        d_query=merged.d_query,
        d_key=merged.d_key,
        rank=tl.sum(rank, axis=1),
    )
    store_fields(partial + (part.to(tl.int64) * batch + rows) * _PARTIAL, known, inside)


@triton.jit
def _sums_of_parts(partial, rows, batch, parts, scale_q, scale_k, ratio, PARTS: tl.constexpr):
    """The `CO2Partial` over all parts, in float64; the rank is an integer."""
    part = tl.arange(0, PARTS)[:, None]
    there = (part < parts) & (rows < batch)[None, :]
    known = CO2Partial(
        *load_fields(partial + (part.to(tl.int64) * batch + rows[None, :]) * _PARTIAL, _PARTIAL, there)
    )
    merged = merge(
        tl.where(there, known.max_s, LOWEST).to(tl.float64),
        tl.where(there, known.max_y, LOWEST).to(tl.float64),
        (
            known.z_query.to(tl.float64),
            known.z_key.to(tl.float64),
            known.d_query.to(tl.float64),
            known.d_key.to(tl.float64),
        ),
        scale_q[None, :],
        scale_k[None, :],
        0,
    )
    return CO2Partial(
        max_s=merged.max_s,
        max_y=merged.max_y,
        z_instance=tl.sum(known.z_instance.to(tl.float64) * tl.exp2(merged.moved_s * ratio), axis=0),
        z_query=merged.z_query,
        z_key=merged.z_key,
        d_query=merged.d_query,
        d_key=merged.d_key,
        rank=tl.sum(known.rank.to(tl.int64), axis=0),
    )


@triton.jit(do_not_specialize=["batch", "parts"])
def _join_kernel(
    partial, joined, row_records, batch, parts, scale, ratio, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """One part of several, in the same units.

    Args:
        partial: `CO2Partial` (parts, B, 8) float32. joined: (1, B, 8) float32.
        row_records: `CO2Row` (B, 11) float64, of which it reads the norms.
        PARTS: the power of two from `parts` on.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    norm_query, norm_key, _ = load_fields(row_records + tl.minimum(rows, batch - 1).to(tl.int64) * _ROW, 3)
    scale_q, scale_k = _scales(scale, norm_query, norm_key)
    scale_q, scale_k = scale_q.to(tl.float64), scale_k.to(tl.float64)
    sums = _sums_of_parts(partial, rows, batch, parts, scale_q, scale_k, ratio, PARTS)
    store_fields(joined + rows.to(tl.int64) * _PARTIAL, sums, rows < batch)


@triton.jit(do_not_specialize=["batch", "parts"])
def _merge_kernel(
    partial, losses, batch, parts, scale, ratio,
    tau: tl.float64, tau_c: tl.float64, instance_weight: tl.float64, consistency_weight: tl.float64,
    INSTANCE: tl.constexpr, CONSISTENCY: tl.constexpr, INCLUDE_POSITIVE: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """In float64, which costs nothing here: what a row's sums lose now, all of its gradient loses.

    Args:
        partial: `CO2Partial` (parts, B, 8) float32.
        losses: `Losses` of pointers, (B,) each; its coefficients are `CO2Row` (B, 11) float64, whose first
            three fields it reads, and writes all others.
        PARTS: the power of two from `parts` on.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < batch
    zero = tl.zeros([ROWS], tl.float64)
    record = losses.coefficients + tl.minimum(rows, batch - 1).to(tl.int64) * _ROW
    norm_query, norm_key, measured = load_fields(record, 3)
    scale_q, scale_k = _scales(scale, norm_query, norm_key)
    scale_q, scale_k = scale_q.to(tl.float64), scale_k.to(tl.float64)
    sums = _sums_of_parts(partial, rows, batch, parts, scale_q, scale_k, ratio, PARTS)
    top_s, top_y, z_instance, z_query, z_key, d_query, d_key, rank = sums

    # λ (s_+ − max), among the s_j and among the y_j
    positive = measured * scale_q
    positive_s, positive_y = positive - top_s * scale_q, positive - top_y * scale_k
    value_instance, value_consistency, grad_positive = zero, zero, zero
    weight_instance, weight_query, weight_key, mean = zero, zero, zero, zero
    size_instance, size_consistency = zero, zero

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
        size_instance = weight * negatives
        grad_positive -= size_instance  # (p_+ − 1)/τ

    if CONSISTENCY:
        weight = consistency_weight / (2.0 * tau_c)
        negatives_query, negatives_key = z_query, z_key
        factor_query, factor_key = zero + weight, zero + weight
        if INCLUDE_POSITIVE:  # s_+ joins both lists, where it may be the largest entry
            moved_query, moved_key = (
                tl.exp2(tl.minimum(-positive_s, 0.0)),
                tl.exp2(tl.minimum(-positive_y, 0.0)),
            )
            e_query, e_key = tl.exp2(tl.minimum(positive_s, 0.0)), tl.exp2(tl.minimum(positive_y, 0.0))
            d_positive = positive_s - positive_y
            negatives_query, negatives_key = z_query * moved_query, z_key * moved_key
            z_query, z_key = negatives_query + e_query, negatives_key + e_key
            d_query = d_query * moved_query + d_positive * e_query
            d_key = d_key * moved_key + d_positive * e_key
            e_query, e_key = e_query / z_query, e_key / z_key
            grad_positive += weight * (
                (e_query - e_key) + e_query * ((d_positive - d_query / z_query) * _LN_2)
            )
            factor_query, factor_key = factor_query * moved_query, factor_key * moved_key
        size_consistency = weight * (negatives_query / z_query + negatives_key / z_key)
        # L_con = ½ (E_Q[d] − E_P[d]), and the coefficients of ½ [Q (d − E_Q[d] + 1) − P]/τc
        mean = d_query / z_query
        value_consistency = (0.5 * _LN_2) * (mean - d_key / z_key)
        weight_query, weight_key = factor_query / z_query, factor_key / z_key

    value = instance_weight * value_instance + consistency_weight * value_consistency
    tl.store(losses.loss + rows, value, mask=inside)
    tl.store(losses.instance_loss + rows, value_instance, mask=inside)
    tl.store(losses.consistency_loss + rows, value_consistency, mask=inside)
    tl.store(losses.positive_rank + rows, rank, mask=inside)

    # Relative to what all keys of a row, without its positive, pull together: of the largest one no more is
    # known where exponentials are relative to 0.
    together = size_instance + size_consistency
    relative = tl.where(together > 0.0, _LARGEST_PULL / together, 0.0)
    complete = CO2Row(
        norm_query=norm_query,
        norm_key=norm_key,
        positive=measured,
        max_s=top_s,
        max_y=top_y,
        mean=mean,
        instance=weight_instance * relative,
        query=weight_query * relative,
        key=weight_key * relative,
        scale=together / _LARGEST_PULL,
        grad_positive=grad_positive,
    )
    store_fields(record, complete, inside)


@triton.jit(do_not_specialize=["batch", "keys"])
def _gradient_kernel(
    query, key, queue, row_records, grad_parts, batch, keys, dim, scale, ratio, keys_a_range,
    INSTANCE: tl.constexpr, CONSISTENCY: tl.constexpr, POWER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a range of keys adds to g N of a block of rows, for a chunk of dimensions.

    Args:
        query, key: Matrix (B, D). queue: Matrix (K, D).
        row_records: `CO2Row` (B, 11) float64.
        grad_parts: (ranges, B, D) float32.
        scale, ratio: λ and τc/τ.
        POWER: see `two_exponentials`.
    """
    ROWS: tl.constexpr = TILE.rows
    KEYS: tl.constexpr = TILE.keys
    PRECISION: tl.constexpr = TILE.precision
    EXACT: tl.constexpr = PRECISION == "tf32x3"
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1).to(tl.int64)
    out_columns = tl.program_id(2) * TILE.width + tl.arange(0, TILE.width)
    query_rows, key_rows = Block(query, rows, batch), Block(key, rows, batch)

    row = _load_row(row_records, rows, batch)
    scale_q, scale_k = _scales(scale, row.norm_query[:, None], row.norm_key[:, None])
    top_s, top_y = row.max_s[:, None].to(tl.float32), row.max_y[:, None].to(tl.float32)
    mean = row.mean[:, None].to(tl.float32)
    # Logits of millions leave Q one key, whose d − mean is 0, not the rounding of two such numbers.
    ln_2 = tl.where(tl.abs(mean) < 1e6, _LN_2, 0.0)
    weight_instance = row.instance[:, None].to(tl.float32)
    weight_query, weight_query_low = split(row.query[:, None])
    weight_key, weight_key_low = split(row.key[:, None])
    # Q (1 + d − E_Q[d]) is 2^a (base + slope d).
    slope = weight_query * ln_2
    base = weight_query - slope * mean

    held = None, None
    if not TILE.chunked:
        held = _held(query_rows, key_rows, dim, CONSISTENCY, TILE)
    shape: tl.constexpr = [ROWS, TILE.width]
    grad = tl.zeros(shape, tl.float32)
    begin = part * keys_a_range
    for start in range(begin, tl.minimum(begin + keys_a_range, keys), KEYS):
        tile_rows = start + tl.arange(0, KEYS)
        queue_rows = Block(queue, tile_rows, keys)
        s, y, tile = similarities(query_rows, key_rows, queue_rows, held, dim, CONSISTENCY, TILE)
        g = tl.zeros([ROWS, KEYS], tl.float32)
        a, b = (s - top_s) * scale_q, (y - top_y) * scale_k
        e_instance, e_query = two_exponentials(a, ratio, POWER)
        if CONSISTENCY:
            e_key = tl.exp2(b)
            if EXACT:
                Q = e_query * weight_query
                # Where Q and P nearly cancel, what their weights lost would be left.
                g = Q - e_key * weight_key + (e_query * weight_query_low - e_key * weight_key_low)
                g += Q * ((a - b - mean) * ln_2)
            else:
                g = e_query * (base + slope * (a - b)) - e_key * weight_key
        if INSTANCE:
            g += e_instance * weight_instance
        if not TILE.whole_keys:  # noqa: SIM102
            if start + KEYS > keys:
                g = tl.where((tile_rows < keys)[None, :], g, 0.0)
        if tl.float16 == TILE.dtype:
            g = tl.clamp(g, -LARGEST_FLOAT16, LARGEST_FLOAT16)
        if TILE.chunked:
            tile = load(
                queue_rows, out_columns, dim, WHOLE_ROWS=TILE.whole_keys, WHOLE_COLUMNS=TILE.whole_columns
            )
            tile = rounded(tile, TILE.dtype)
        grad = product(g.to(TILE.dtype), tile, grad, PRECISION)
    grad *= _load_row(row_records, rows, batch).scale[:, None].to(tl.float32)
    to = grad_parts + (part * batch + rows)[:, None] * dim + out_columns[None, :]
    tl.store(to, grad, mask=(rows < batch)[:, None] & (out_columns < dim)[None, :])


@triton.jit(do_not_specialize=["batch", "ranges"])
def _finish_kernel(
    query, key, row_records, grad_parts, gradient, batch, dim, ranges,
    NORMALIZE: tl.constexpr, RANGES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient in a row: the ranges' parts, the positive's pull, and the chain rule.

    Args:
        query, key: Matrix (B, D).
        row_records: `CO2Row` (B, 11) float64.
        grad_parts: (ranges, B, D) float32.
        gradient: (B, D) float32.
        RANGES: how many ranges are read at once.
    """
    row_index = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS).to(tl.int64)
    inside = columns < dim
    grad = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, ranges, RANGES):
        part = first + tl.arange(0, RANGES).to(tl.int64)
        offsets = (part * batch + row_index)[:, None] * dim + columns[None, :]
        there = (part < ranges)[:, None] & inside[None, :]
        grad += tl.sum(tl.load(grad_parts + offsets, mask=there, other=0.0), axis=0)

    row = CO2Row(*load_fields(row_records + row_index * _ROW, _ROW))
    norm_q, norm_k = row.norm_query.to(tl.float32), row.norm_key.to(tl.float32)
    q = tl.load(query.data + row_index * query.row + columns * query.column, mask=inside, other=0.0)
    k = tl.load(key.data + row_index * key.row + columns * key.column, mask=inside, other=0.0)
    q, k = q.to(tl.float32) / norm_q, k.to(tl.float32) / norm_k
    grad += k * row.grad_positive.to(tl.float32)
    if NORMALIZE:
        # dq = (dq̂ − q̂ (q̂·dq̂)) / ‖q‖; a row below the epsilon was only scaled, so it has no projection
        radial = tl.where(norm_q > NORM_EPSILON, tl.sum(q * grad, axis=0), 0.0)
        grad = (grad - q * radial) / norm_q
    tl.store(gradient + row_index * dim + columns, grad, mask=inside)


KERNELS = {
    "co2.prepare": _prepare_kernel,
    "co2.round": _round_kernel,
    "co2.statistics": _statistics_kernel,
    "co2.merge": _merge_kernel,
    "co2.join": _join_kernel,
    "co2.gradient": _gradient_kernel,
    "co2.finish": _finish_kernel,
}
