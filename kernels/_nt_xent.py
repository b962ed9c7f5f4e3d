"""NT-Xent, and CO2 on it, on GPUs: what contrastive_ops/reference.py specifies, without the similarities of
all rows with all.

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

Rows and keys are the same, unless some instances are given as keys (`NTXentKeys`), which then are prepared
as well. There are no atomics: equal input gives equal bits. Only tiles that have a block's own instances, or
end past the last row, are masked.

    G_ij = c_i e^{s_ij/τ} + e^{s_ij/τc} (k_i + b_i (s_ij − s_p(i)j)) − p_i e^{s_p(i)j/τc}

Where rows are normalised and no temperature is below 0.0226, these exponentials need no maximum, which then
is in the coefficients. So G and Gᵀ share them: two a pair in place of four. Other rows, and float32
multiplied exactly, have them relative to each row's maximum, as the statistics always do.

In float16 a probability of 1e-5, times an incoming gradient of 1/M, would vanish. So all of H is multiplied
by a power of two, in the exponents, where it takes no instruction more.

Bounds. A pair of row and key costs 3 products of 2 D operations (1 in the statistics, 2 in the gradient)
and 4 exponentials, or 2 without the consistency term. At 4096 rows, D = 128 in bfloat16 that is 18 µs of
products on an H100, by the rates measured there, and 17 or 8 µs of exponentials. As compiled (python -m
bench.resources), with the clocks of a multiprocessor that a pair takes of its schedulers, special-function
units and tensor cores, and as measured:

    statistics   0.093   0.125   0.062   bound by exponentials: 8.0 µs at 1.98 GHz; 18.5 µs measured
    gradient     0.148   0.125   0.125   bound by instructions: 9.5 µs; 32.1 µs measured
    and without the consistency term
    statistics   0.054   0.062   0.062   bound by exponentials and products: 4.0 µs; 13.4 µs measured
    gradient     0.055   0.062   0.125   bound by products: 8.0 µs; 21.9 µs measured

So few rows leave each program a few tiles, and much of its time is its beginning and end. Prepare, merge and
finish take 3.8 (in forward and in backward), 4.5 and 5.7 µs. With tiles of 32 keys, all that the registers of
the gradient allow with the consistency term, tensor cores wait for shared memory: 0.156 in place of 0.125.
docs/performance.md tells what was tried.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .._contract import NTXentCoefficients, NTXentPartial
from ..gpu.arguments import Matrix
from ..gpu.nt_xent import Pull as _Pull
from ._device import (
    LARGEST_FLOAT16,
    LOWEST,
    Block,
    add_tile,
    at,
    largest_size,
    load,
    load_double,
    load_fields,
    measure_rows,
    merge,
    move,
    move_sums,
    product,
    similarities,
    softplus,
    split,
    split_four,
    stacked,
    store,
    store_fields,
    store_unit,
    sum_of_parts,
    through_norm,
)

_LN_2 = tl.constexpr(math.log(2))
# The similarity of a pair that is no negative: nothing is left of its exponential, yet d of it is no NaN.
_EXCLUDED = tl.constexpr(-1e30)
_PARTIAL, _COEFFICIENTS = (
    tl.constexpr(len(NTXentPartial._fields)),
    tl.constexpr(len(NTXentCoefficients._fields)),
)
_PULL = tl.constexpr(len(_Pull._fields) + 1)
_LAST_INSTANCE = tl.constexpr(1 << 29)  # more do not fit any memory
_QUERY, _SLOPE, _KEY, _TOP, _QUERY_LOW, _KEY_LOW = (
    tl.constexpr(_Pull._fields.index(name))
    for name in ("query", "slope", "key", "top", "query_low", "key_low")
)

# In float16 H is multiplied by a power of two. The largest of the rows' sizes, which is what all pairs of a
# row pull together, then lies in (2⁵, 2⁶], and |H| is at most twice that times 1 + 4/τc: with the lowest τc
# that needs no maximum, 0.0226, it is 128 · 178 = 22784, and float16 holds 65504. The largest factor is 2⁶⁰,
# for sizes of 2⁻⁵⁴ and less: times e^{s/τ}, which is up to 2⁶⁴, float32 still holds it.
_LOG2_UNIT, _LEAST_LOG2_SIZE = tl.constexpr(6.0), tl.constexpr(-54.0)


@triton.jit(do_not_specialize=["batch"])
def _prepare_kernel(
    views, grad_loss, coefficients, rows, norm, positive, batch, dim,
    scale: tl.float64, scale_c: tl.float64, tau_c: tl.float64, consistency_size: tl.float64,
    NORMALIZE: tl.constexpr, RELATIVE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """z of both views of some instances, padded with zeros, and what is known of them. What is None is left
    out.

    Args:
        views: Views (2, B, D). grad_loss: Vector (2 B,).
        coefficients: `NTXentCoefficients` (2 B, 5) float64.
        rows: Rows to be written.
        norm: (2 B,) float64. positive: (2 B,) float64, s_ip(i).
        consistency_size: what a row's consistency pulls at either of its terms, all keys together.
    """
    instance = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = instance < batch
    block1 = Block(Matrix(views.data, views.row, views.column), instance, batch)
    block2 = Block(Matrix(views.data + views.view, views.row, views.column), instance, batch)
    norm1, norm2, dot = measure_rows(block1, block2, dim, DEPTH, NORMALIZE, False)
    row = 2 * instance.to(tl.int64)
    store_unit(rows.unit, row, block1, norm1, dim, DEPTH)
    store_unit(rows.unit, row + 1, block2, norm2, dim, DEPTH)
    if positive is not None:
        tl.store(positive + instance, dot / norm1, mask=inside)
        tl.store(positive + batch + instance, dot / norm1, mask=inside)
    if norm is not None:
        tl.store(norm + instance, norm1, mask=inside)
        tl.store(norm + batch + instance, norm2, mask=inside)
    if rows.pull is not None:
        for view in tl.static_range(2):
            own, partner = (
                (instance + view * batch).to(tl.int64),
                (instance + (1 - view) * batch).to(tl.int64),
            )
            known = NTXentCoefficients(
                *load_fields(coefficients + own * _COEFFICIENTS, _COEFFICIENTS, inside)
            )
            other = NTXentCoefficients(
                *load_fields(coefficients + partner * _COEFFICIENTS, _COEFFICIENTS, inside)
            )
            grad = load_double(grad_loss.data + own * grad_loss.stride, inside, 0.0)
            instance_weight = grad * known.instance
            query_weight, key_weight = grad * known.query, grad * other.query
            # No pair's exponential, times its coefficient, is larger than those of all pairs together.
            size = tl.abs(grad) * (tl.abs(known.grad_positive) + 2.0 * consistency_size)
            tl.store(rows.sizes + row + view, size.to(tl.float32))

            mean = known.mean
            if not RELATIVE:
                instance_weight *= tl.exp2(-known.max_s * scale)
                query_weight *= tl.exp2(-known.max_s * scale_c)
                key_weight *= tl.exp2(-other.max_s * scale_c)
                mean += known.max_s - other.max_s
            # Logits of millions leave Q one key, whose d − mean is 0, not the rounding of two such numbers.
            slope = tl.where(tl.abs(mean) < 1e6 * tau_c, query_weight / tau_c, 0.0)
            query, query_low = split(query_weight - slope * mean)
            key, key_low = split(key_weight)
            to = rows.pull + row * _PULL + view
            pull = (instance_weight.to(tl.float32), query, slope.to(tl.float32), key)
            if RELATIVE:
                pull = pull + (known.max_s.to(tl.float32), query_low, key_low)  # noqa: RUF005
            for field in tl.static_range(len(pull)):
                tl.store(to + 2 * field, pull[field])


@triton.jit
def _stacked_rows(first, ROWS: tl.constexpr):
    """Rows of the first views of a block's instances, then of the second ones."""
    both = tl.arange(0, 2 * ROWS)
    return 2 * (first + both % ROWS) + both // ROWS


@triton.jit
def _held(unit, first, TILE: tl.constexpr):
    """Both views of a block's instances as `similarities` takes them, of rows that are not chunked. A block
    of both is loaded as one: tiles that were put together would be moved once more."""
    columns, instance = tl.arange(0, TILE.depth), first + tl.arange(0, TILE.rows)
    if TILE.stacked:
        held = tl.load(at(unit, _stacked_rows(first, TILE.rows), columns))
    else:
        held = tl.load(at(unit, 2 * instance, columns)), tl.load(at(unit, 2 * instance + 1, columns))
    return held


@triton.jit
def _own_keys(target, first, batch, ROWS: tl.constexpr):
    """The key instance that each instance of a block owns, −1 for none, and from where to where they are.

    Without a target rows and keys are the same instances.
    """
    instance = first + tl.arange(0, ROWS)
    if target.data is None:
        own, first_own, last_own = instance, first, first + ROWS - 1
    else:
        own = tl.load(target.data + instance * target.stride, mask=instance < batch, other=-1).to(tl.int32)
        first_own, last_own = tl.min(tl.where(own < 0, _LAST_INSTANCE, own)), tl.max(own)
    return own, first_own, last_own


@triton.jit
def _has_excluded(start, first, last, keys, KEYS: tl.constexpr):
    """Whether a tile of keys has views of the instances from `first` to `last`, or ends past the last key."""
    own = (start < 2 * (last + 1)) & (start + KEYS > 2 * first)
    return own | (start + KEYS > 2 * keys)


@triton.jit
def _excluded(own, index, keys):
    return ((index // 2)[None, :] == own[:, None]) | (index >= 2 * keys)[None, :]


@triton.jit(do_not_specialize=["batch", "keys", "padded_rows"])
def _statistics_kernel(
    unit, key_unit, target, positive, partial, batch, keys, padded_rows, scale, ratio, keys_a_range,
    CONSISTENCY: tl.constexpr, BOUNDED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """s of a block's first views and y of its second ones; what a range of keys knows of both.

    Args:
        unit: Matrix (padded rows, padded dimensions), z. key_unit: the same of the keys.
        target: Vector (B,) int64 or None; see `_own_keys`.
        positive: (2 B,) float64.
        partial: `NTXentPartial` (ranges, 2 B, 5) float32.
        batch, keys: numbers of instances.
        scale, ratio: log2(e)/τc and τc/τ; without the consistency term log2(e)/τ and 1.
        BOUNDED: whether float32 holds the exponentials as they are: no maximum is looked for.
    """
    ROWS: tl.constexpr = TILE.rows
    KEYS: tl.constexpr = TILE.keys
    first = tl.program_id(0) * ROWS
    instance = first + tl.arange(0, ROWS)
    part = tl.program_id(1).to(tl.int64)
    index = tl.arange(0, KEYS)
    view1 = Block(Matrix(unit.data, 2 * unit.row, unit.column), instance, padded_rows)
    view2 = Block(Matrix(unit.data + unit.row, 2 * unit.row, unit.column), instance, padded_rows)
    threshold = tl.load(positive + tl.minimum(instance, batch - 1)).to(tl.float32)[:, None, None]
    own, first_own, last_own = _own_keys(target, first, batch, ROWS)
    if target.data is None:  # One register less: there is none to spare.
        key_unit, keys = unit, batch

    held = None, None
    if not TILE.chunked:
        held = _held(unit, first, TILE)
    shape: tl.constexpr = [ROWS, LANES]
    tile_shape: tl.constexpr = [ROWS, KEYS // LANES, LANES]
    start_at: tl.constexpr = 0.0 if BOUNDED else LOWEST
    top_s, top_y = tl.full(shape, start_at, tl.float32), tl.full(shape, start_at, tl.float32)
    zero = tl.zeros(shape, tl.float32)
    sum_s, sum_y, sums = zero, zero, (zero, zero, zero, zero)
    rank_s, rank_y = zero, zero  # exact up to 2²⁴, and an instruction less than integers

    begin = part * keys_a_range
    for start in range(begin, tl.minimum(begin + keys_a_range, 2 * keys), KEYS):
        tile = Matrix(key_unit.data + start * key_unit.row, key_unit.row, key_unit.column)
        s, y, _ = similarities(view1, view2, Block(tile, index, 0), held, unit.row, True, TILE)
        if _has_excluded(start, first_own, last_own, keys, KEYS):
            excluded = _excluded(own, start + index, keys)
            s, y = tl.where(excluded, _EXCLUDED, s), tl.where(excluded, _EXCLUDED, y)
        s, y = tl.reshape(s, tile_shape), tl.reshape(y, tile_shape)
        rank_s += tl.sum(tl.where(s > threshold, 1.0, 0.0), axis=1)
        rank_y += tl.sum(tl.where(y > threshold, 1.0, 0.0), axis=1)
        if BOUNDED:
            a, b = s * scale, y * scale
        else:
            new_s, new_y = tl.maximum(top_s, tl.max(s, axis=1)), tl.maximum(top_y, tl.max(y, axis=1))
            a, b = (s - new_s[:, None, :]) * scale, (y - new_y[:, None, :]) * scale
            moved_s, moved_y = move(top_s, new_s, scale), move(top_y, new_y, scale)
            sum_s, sum_y = sum_s * tl.exp2(moved_s * ratio), sum_y * tl.exp2(moved_y * ratio)
            if CONSISTENCY:
                sums = move_sums(sums, moved_s, moved_y)
            top_s, top_y = new_s, new_y
        sum_s += tl.sum(tl.exp2(a * ratio if CONSISTENCY else a), axis=1)
        sum_y += tl.sum(tl.exp2(b * ratio if CONSISTENCY else b), axis=1)
        if CONSISTENCY:
            sums = add_tile(sums, a, b, tl.exp2(a), tl.exp2(b))

    merged = merge(top_s, top_y, sums, scale, scale, 1)
    known1 = NTXentPartial(
        max_s=merged.max_s,
        rank=tl.sum(rank_s, axis=1),
        z_instance=tl.sum(sum_s * tl.exp2(merged.moved_s * ratio), axis=1),
        z_query=merged.z_query,
        d_query=merged.d_query,
    )
    known2 = NTXentPartial(
        max_s=merged.max_y,
        rank=tl.sum(rank_y, axis=1),
        z_instance=tl.sum(sum_y * tl.exp2(merged.moved_y * ratio), axis=1),
        z_query=merged.z_key,
        d_query=merged.d_key,
    )
    inside = instance < batch
    row = part * 2 * batch + instance
    store_fields(partial + row * _PARTIAL, known1, inside)
    store_fields(partial + (row + batch) * _PARTIAL, known2, inside)


@triton.jit(do_not_specialize=["batch", "parts"])
def _merge_kernel(
    partial, positive, losses, batch, parts,
    scale: tl.float64, ratio: tl.float64, tau: tl.float64, tau_c: tl.float64,
    consistency_weight: tl.float64,
    CONSISTENCY: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A view of a block of instances, all in float64.

    Args:
        partial: `NTXentPartial` (parts, 2 B, 5) float32. positive: (2 B,) float64.
        losses: `Losses` of pointers, (2 B,) each; coefficients: `NTXentCoefficients` (2 B, 5) float64.
        scale, ratio: as of the statistics.
        PARTS: the power of two from `parts` on.
    """
    instance = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    view = tl.program_id(1)
    inside = instance < batch
    part = tl.arange(0, PARTS).to(tl.int64)[:, None]
    there = (part < parts) & inside[None, :]
    row, partner = view * batch + instance, (1 - view) * batch + instance
    parts_of_row = partial + (part * 2 * batch + row[None, :]) * _PARTIAL
    parts_of_partner = partial + (part * 2 * batch + partner[None, :]) * _PARTIAL
    known = NTXentPartial(*load_fields(parts_of_row, _PARTIAL, there))
    other = NTXentPartial(*load_fields(parts_of_partner, _PARTIAL, there))
    sign = 1.0 - 2.0 * view  # of d, where a row is its partner's partner
    merged = merge(
        tl.where(there, known.max_s, LOWEST).to(tl.float64),
        tl.where(there, other.max_s, LOWEST).to(tl.float64),
        (
            known.z_query.to(tl.float64),
            other.z_query.to(tl.float64),
            sign * known.d_query.to(tl.float64),
            sign * other.d_query.to(tl.float64),
        ),
        scale,
        scale,
        0,
    )
    # Where none of a part's keys is a negative, those were summed that are excluded.
    z_instance = tl.where(known.max_s == _EXCLUDED, 0.0, known.z_instance).to(tl.float64)
    z_instance = tl.sum(z_instance * tl.exp2(merged.moved_s * ratio), axis=0)
    rank = tl.sum(known.rank.to(tl.float64), axis=0)
    s = tl.load(positive + row, mask=inside, other=0.0)

    has_negatives = z_instance != 0.0  # The only instance has none, nor a consistency term.
    top = tl.where(has_negatives, merged.max_s, s)
    value, negatives = softplus(tl.log(z_instance) + (top - s) / tau)  # L_ins
    pull = negatives / tau
    consistency, weight_query, mean = tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(s)
    if CONSISTENCY:
        mean = merged.d_query / merged.z_query
        difference = (0.5 * _LN_2) * (mean - merged.d_key / merged.z_key)  # ½ (E_Q[d] − E_P[d])/τc
        consistency = tl.where(has_negatives, difference, 0.0)
        weight_query = consistency_weight / (2.0 * tau_c) / merged.z_query

    tl.store(losses.loss + row, value + consistency_weight * consistency, mask=inside)
    tl.store(losses.instance_loss + row, value, mask=inside)
    tl.store(losses.consistency_loss + row, consistency, mask=inside)
    tl.store(losses.positive_rank + row, rank.to(tl.int64), mask=inside)
    coefficients = NTXentCoefficients(
        max_s=top,
        instance=tl.where(has_negatives, pull / z_instance, 0.0),
        query=tl.where(has_negatives, weight_query, 0.0),
        mean=tl.where(has_negatives, mean / scale, 0.0),
        grad_positive=-pull,
    )
    store_fields(losses.coefficients + row * _COEFFICIENTS, coefficients, inside)


@triton.jit
def _pull_of_rows(pull, instance, view, CONSISTENCY: tl.constexpr, RELATIVE: tl.constexpr, LOW: tl.constexpr):
    """`_Pull` of a view of a block's instances, a column each."""
    record = (pull + 2 * _PULL * instance.to(tl.int64) + view)[:, None]
    weight, query, slope, key = tl.load(record), 0.0, 0.0, 0.0  # Triton 3.6 returns no None.
    top, query_low, key_low = 0.0, 0.0, 0.0
    if CONSISTENCY:
        query, slope = tl.load(record + 2 * _QUERY), tl.load(record + 2 * _SLOPE)
        key = tl.load(record + 2 * _KEY)
    if RELATIVE:
        top = tl.load(record + 2 * _TOP)
        if CONSISTENCY and LOW:
            query_low, key_low = tl.load(record + 2 * _QUERY_LOW), tl.load(record + 2 * _KEY_LOW)
    return weight, query, slope, key, top, query_low, key_low


@triton.jit
def _four_fields(half, KEYS: tl.constexpr):
    """Half of the records of a tile's rows: four fields of first views, and four of second ones. They are
    loaded all at once, for one by one they would be as many copies to wait for."""
    instance = tl.arange(0, KEYS // 2)[:, None, None]
    field, view = tl.arange(0, 4)[None, :, None], tl.arange(0, 2)[None, None, :]
    view1, view2 = tl.split(tl.load(half + instance * (2 * _PULL) + field * 2 + view))
    return _of_keys(view1, KEYS), _of_keys(view2, KEYS)


@triton.jit
def _of_keys(fields, KEYS: tl.constexpr):
    zeroth, first, second, third = split_four(tl.reshape(fields, [KEYS // 2, 2, 2]))
    return zeroth[None, :], first[None, :], second[None, :], third[None, :]


@triton.jit
def _pull_of_keys(pull, start, KEYS: tl.constexpr, RELATIVE: tl.constexpr):
    """`_Pull` of a tile's first views and of its second ones, a row each."""
    high1, high2 = _four_fields(pull + start * _PULL, KEYS)
    low1, low2 = (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)
    if RELATIVE:
        low1, low2 = _four_fields(pull + start * _PULL + 2 * _TOP, KEYS)
    return (
        (high1[0], high1[1], high1[2], high1[3], low1[0], low1[1], low1[2]),
        (high2[0], high2[1], high2[2], high2[3], low2[0], low2[1], low2[2]),
    )


@triton.jit
def _add_pull(
    g, s, y, known, other, scales, CONSISTENCY: tl.constexpr, RELATIVE: tl.constexpr, LOW: tl.constexpr
):
    """g + ∂L/∂s of a row's similarities s, where y are those of its partner; `known` and `other` are their
    pulls, and `scales` log2(e)/τ, log2(e)/τc and log2 of what all is multiplied by."""
    scale, scale_c, shift = scales
    instance, query, slope, key, top, query_low, key_low = known
    if RELATIVE:
        s -= top
        y -= other[_TOP]
    g += instance * tl.exp2(s * scale + shift)
    if CONSISTENCY:
        e_query, e_key = tl.exp2(s * scale_c + shift), tl.exp2(y * scale_c + shift)
        g -= e_key * key
        g += e_query * (query + slope * (s - y))  # Q (1 + (d − E_Q[d])/τc)
        if LOW:  # where Q and P nearly cancel, what their weights lost would be left
            g += e_query * query_low - e_key * key_low
    return g


@triton.jit(do_not_specialize=["batch", "keys", "padded_rows", "padded_keys"])
def _gradient_kernel(
    rows, key_rows, target, grad_parts, batch, keys, padded_rows, padded_keys, scale, scale_c, keys_a_range,
    CONSISTENCY: tl.constexpr, RELATIVE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a range of keys adds to dz of both views of a block of instances.

    Args:
        rows, key_rows: Rows.
        target: Vector (B,) int64 or None; see `_own_keys`.
        grad_parts: Matrix (ranges · padded rows, padded dimensions) float32.
        batch, keys: numbers of instances.
        scale, scale_c: log2(e)/τ, log2(e)/τc.
    """
    ROWS: tl.constexpr = TILE.rows
    KEYS: tl.constexpr = TILE.keys
    PRECISION: tl.constexpr = TILE.precision
    LOW: tl.constexpr = PRECISION == "tf32x3"
    if target.data is None:  # Registers less: there is none to spare.
        key_rows, keys = rows, batch
    unit, key_unit = rows.unit, key_rows.unit
    first = tl.program_id(0) * ROWS
    instance = first + tl.arange(0, ROWS)
    part = tl.program_id(1).to(tl.int64)
    index = tl.arange(0, KEYS)
    out_columns = tl.program_id(2) * TILE.width + tl.arange(0, TILE.width)
    view1 = Block(Matrix(unit.data, 2 * unit.row, unit.column), instance, padded_rows)
    view2 = Block(Matrix(unit.data + unit.row, 2 * unit.row, unit.column), instance, padded_rows)
    own, first_own, last_own = _own_keys(target, first, batch, ROWS)

    shift = 0.0
    if tl.float16 == TILE.dtype:
        largest = largest_size(rows.sizes, padded_rows)
        if target.data is not None:
            largest = tl.maximum(largest, largest_size(key_rows.sizes, padded_keys))
        shift = _LOG2_UNIT - tl.ceil(tl.maximum(tl.log2(largest), _LEAST_LOG2_SIZE))
    row1 = _pull_of_rows(rows.pull, instance, 0, CONSISTENCY, RELATIVE, LOW)
    row2 = _pull_of_rows(rows.pull, instance, 1, CONSISTENCY, RELATIVE, LOW)
    held = None, None
    if not TILE.chunked:
        held = _held(unit, first, TILE)
    shape: tl.constexpr = [ROWS, TILE.width]
    stacked_shape: tl.constexpr = [2 * ROWS, TILE.width]
    grad = tl.zeros(stacked_shape, tl.float32)
    grad1, grad2 = tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32)

    begin = part * keys_a_range
    for start in range(begin, tl.minimum(begin + keys_a_range, 2 * keys), KEYS):
        tile_rows = Matrix(key_unit.data + start * key_unit.row, key_unit.row, key_unit.column)
        s, y, tile = similarities(view1, view2, Block(tile_rows, index, 0), held, unit.row, True, TILE)
        key1, key2 = _pull_of_keys(key_rows.pull, start, KEYS, RELATIVE)
        # A key and its partner are neighbours, which one thread holds, as it does a row and its partner.
        s1, s2 = tl.split(tl.reshape(s, [ROWS, KEYS // 2, 2]))
        y1, y2 = tl.split(tl.reshape(y, [ROWS, KEYS // 2, 2]))
        # What the rows' losses pull, then what the keys' do. (In another order registers are too few.)
        g = tl.zeros_like(s1)
        scales = (scale, scale_c, shift)
        g11 = _add_pull(g, s1, y1, row1, row2, scales, CONSISTENCY, RELATIVE, LOW)
        g12 = _add_pull(g, s2, y2, row1, row2, scales, CONSISTENCY, RELATIVE, LOW)
        g21 = _add_pull(g, y1, s1, row2, row1, scales, CONSISTENCY, RELATIVE, LOW)
        g22 = _add_pull(g, y2, s2, row2, row1, scales, CONSISTENCY, RELATIVE, LOW)
        g11 = _add_pull(g11, s1, s2, key1, key2, scales, CONSISTENCY, RELATIVE, LOW)
        g12 = _add_pull(g12, s2, s1, key2, key1, scales, CONSISTENCY, RELATIVE, LOW)
        g21 = _add_pull(g21, y1, y2, key1, key2, scales, CONSISTENCY, RELATIVE, LOW)
        g22 = _add_pull(g22, y2, y1, key2, key1, scales, CONSISTENCY, RELATIVE, LOW)
        g1 = tl.reshape(tl.join(g11, g12), [ROWS, KEYS])
        g2 = tl.reshape(tl.join(g21, g22), [ROWS, KEYS])
        if _has_excluded(start, first_own, last_own, keys, KEYS):
            excluded = _excluded(own, start + index, keys)
            g1, g2 = tl.where(excluded, 0.0, g1), tl.where(excluded, 0.0, g2)
        if tl.float16 == TILE.dtype and RELATIVE:
            g1 = tl.clamp(g1, -LARGEST_FLOAT16, LARGEST_FLOAT16, propagate_nan=tl.PropagateNan.ALL)
            g2 = tl.clamp(g2, -LARGEST_FLOAT16, LARGEST_FLOAT16, propagate_nan=tl.PropagateNan.ALL)
        g1, g2 = g1.to(TILE.dtype), g2.to(TILE.dtype)
        if TILE.chunked:
            tile = tl.load(at(tile_rows, index, out_columns))
        if TILE.stacked:
            grad = product(stacked(g1, g2), tile, grad, PRECISION)
        else:
            grad1 = product(g1, tile, grad1, PRECISION)
            grad2 = product(g2, tile, grad2, PRECISION)
    if TILE.stacked:
        row = part * padded_rows + _stacked_rows(first, ROWS)
        tl.store(at(grad_parts, row, out_columns), grad * tl.exp2(-shift))
    else:
        to = at(grad_parts, part * padded_rows + 2 * instance, out_columns)
        tl.store(to, grad1 * tl.exp2(-shift))
        tl.store(to + grad_parts.row, grad2 * tl.exp2(-shift))


@triton.jit(do_not_specialize=["batch", "padded_rows", "ranges"])
def _finish_kernel(
    views, norm, grad_parts, coefficients, grad_loss, target, gradient, batch, dim, padded_rows, ranges,
    NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of some rows of a view: the ranges' parts, the positive's pull, and the chain rule.

    Args:
        views: Views (2, B, D). gradient: (2, B, D). norm: (2 B,) float64.
        grad_parts: Matrix (ranges · padded rows, padded dimensions) float32.
        coefficients: `NTXentCoefficients` (2 B, 5) float64.
        grad_loss: Vector (2 B,). target: Vector (B,) int64 or None; see `_own_keys`.
    """
    instance = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    view = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = instance < batch
    own, partner = view * batch + instance, (1 - view) * batch + instance
    there = inside[:, None] & (columns < dim)[None, :]
    grad = sum_of_parts(grad_parts, 2 * instance + view, columns, there, ranges, padded_rows)
    # s_ip(i) is in the loss of both, and counts with the keys that have the row's own instance.
    known = NTXentCoefficients(*load_fields(coefficients + own * _COEFFICIENTS, _COEFFICIENTS, inside))
    other = NTXentCoefficients(*load_fields(coefficients + partner * _COEFFICIENTS, _COEFFICIENTS, inside))
    pull = load_double(grad_loss.data + own * grad_loss.stride, inside, 0.0) * known.grad_positive
    pull += load_double(grad_loss.data + partner * grad_loss.stride, inside, 0.0) * other.grad_positive
    if target.data is not None:
        is_here = tl.load(target.data + instance * target.stride, mask=inside, other=-1) >= 0
        pull = tl.where(is_here, pull, 0.0)
    x_rows = Matrix(views.data + view * views.view, views.row, views.column)
    y_rows = Matrix(views.data + (1 - view) * views.view, views.row, views.column)
    x = load(Block(x_rows, instance, batch), columns, dim).to(tl.float32).to(tl.float64)
    y = load(Block(y_rows, instance, batch), columns, dim).to(tl.float32).to(tl.float64)
    norm_x = tl.load(norm + own, mask=inside, other=1.0)
    grad += (pull / tl.load(norm + partner, mask=inside, other=1.0))[:, None] * y
    if NORMALIZE:
        grad = through_norm(grad, x / norm_x[:, None], norm_x)
    to = Matrix(gradient + view * batch * dim, dim, 1)
    store(Block(to, instance, batch), grad.to(tl.float32), columns, dim)


KERNELS = {
    "nt_xent.prepare": _prepare_kernel,
    "nt_xent.statistics": _statistics_kernel,
    "nt_xent.merge": _merge_kernel,
    "nt_xent.gradient": _gradient_kernel,
    "nt_xent.plain": _gradient_kernel,
    "nt_xent.finish": _finish_kernel,
}
