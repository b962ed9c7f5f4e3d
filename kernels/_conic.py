"""ConIC on GPUs: what contrastive_ops/reference.py specifies, without the V·B × A similarities.

Plan. The V·B views are the rows, and the A rows of the weight their keys; s = x̂ Ŵᵀ is computed three times,
tile by tile. Hats are taken before the product, in float32, and rounded once to the views' dtype, so that a
row of any norm fits float16.

Forward
1. prepare      x̂, padded with zeros so that nothing that walks the views needs a mask; s_n, in float64.
2. unit         ŵ, likewise, and 1/‖w‖; the weight is read this once, and what the others read of it fits the
                cache more easily.
3. statistics   a program holds views and walks a range of keys; per view the maximum and sum of e^{s/τ} over
                its negatives, and how many of them are above s_n. Each range writes these three numbers.
4. merge        the ranges' numbers, in a fixed order and in float64: losses, rank, what backward needs to
                know of a view; and the consistency of an instance's views, straight from its formula.

Backward
1. prepare      x̂ again, and how large a view's gradients are.
2. unit         ŵ again.
3. views        a program holds views and walks a range of keys: s, g = ∂L/∂s, and a part of dx̂ = g Ŵ.
4. finish       adds the parts up in a fixed order, adds the consistency's, differentiates the normalisation.
5. weight       a program holds a tile of keys and walks the views: s, g, dŵ = gᵀ x̂, and at the end dw; or a
                step of SGD in its place, for which it holds whole rows and has read all that it overwrites.
                Rows too wide for that get a gradient, and a step from _sgd.py.

A view whose own row is elsewhere (target −1) owns none of these keys.

There are no atomics: equal input gives equal bits. A view's own key is left out of its negatives, never
subtracted from them, where nothing of a small loss would be left.

In float16 a probability of 1e-5, times an incoming gradient of 1/B, would vanish. So g is multiplied by 2¹⁵,
relative to the pull of a view's own key (views) or to the largest such pull of all views (weight).

Bounds. A pair costs 5 products of 2 D operations and 3 exponentials. At V·B = 512, A = 65536, D = 128 in
bfloat16, the weight too: 61 µs of products on an H100, by the rate measured there, and 25 µs of exponentials;
6 µs to read the weight in forward, and 11 µs to read it and write its gradient in backward. As compiled
(python -m bench.resources), with the clocks of a multiprocessor that a pair takes of its schedulers,
special-function units and tensor cores, and the bytes that it takes from the cache, and as measured:

    statistics   0.079   0.062   0.063   2 bytes   bound by instructions: 10 µs at 1.98 GHz; 22 µs measured
    weight       0.094   0.062   0.125   2 bytes   bound by products: 16 µs; 62 µs measured
    views        0.070   0.062   0.125   2 bytes   bound by products: 16 µs; 29 µs measured

A program of the weight's gradient walks 8 tiles, and what it does before and after takes as long. Unit rows
of the weight move 32 MiB, 12 µs, in forward and again in backward; prepare, merge and finish take 3.8, 6.1
and 6.6 µs.
docs/performance.md tells what was tried.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._contract import ConICCoefficients, ConICPartial, ConICPositives
from ..gpu.arguments import Matrix
from ..gpu.conic import Pull as _Pull
from ._device import (
    LOWEST,
    NORM_EPSILON,
    Block,
    at,
    four_fields,
    largest_size,
    load,
    load_fields,
    move,
    product,
    similarities,
    softplus,
    store,
    store_fields,
    store_unit,
    sum_of_parts,
    through_norm,
)

_SIZE = tl.constexpr(_Pull._fields.index("size"))
_PULL, _POSITIVES, _PARTIAL, _COEFFICIENTS = (
    tl.constexpr(len(record._fields)) for record in (_Pull, ConICPositives, ConICPartial, ConICCoefficients)
)
# Gradients are multiplied relative to the largest. In float16 this leaves them 30 powers of two.
_UNIT = tl.constexpr(32768.0)


@triton.jit
def _norms(block, dim, DEPTH: tl.constexpr, WHOLE_COLUMNS: tl.constexpr):
    """max(‖x‖, ε) of each row; float64 holds any square."""
    squares = tl.zeros_like(block.rows).to(tl.float64)
    for first in tl.range(0, dim, DEPTH, loop_unroll_factor=4):
        x = load(block, first + tl.arange(0, DEPTH), dim, WHOLE_COLUMNS=WHOLE_COLUMNS)
        x = x.to(tl.float32).to(tl.float64)
        squares += tl.sum(x * x, axis=1)
    return tl.maximum(tl.sqrt(squares), NORM_EPSILON)


@triton.jit
def _logits(s, top, scale, BOUNDED: tl.constexpr):
    """λ (s − m); bounded ones, of which rounding leaves enough, in one instruction."""
    return s * scale - top * scale if BOUNDED else (s - top) * scale


@triton.jit(do_not_specialize=["count", "batch", "keys", "padded_rows"])
def _prepare_kernel(
    views, weight, target, positives, grad_loss, coefficients, unit, own, threshold, norm, pull, count,
    batch, keys, dim, padded_rows,
    FIND: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x̂ of some views, and what other kernels need of each. What is None is left out.

    Args:
        views: Matrix (count = V·B, D). weight: Matrix (keys, D). target, grad_loss: Vector (B,).
        positives: `ConICPositives` (V·B, 2) float64, written if FIND.
        coefficients: `ConICCoefficients` (V·B, 3) float64.
        unit: Matrix (padded rows, padded dimensions) for x̂; what is past the last view is 0.
        own: (padded rows,) int32, the key that each view owns, −1 for none.
        threshold: (padded rows,) float32. norm: (V·B,) float64. pull: `_Pull` (padded rows, 4) float32.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    row = rows.to(tl.int64)
    instance = row % batch
    block = Block(views, rows, count)
    length = _norms(block, dim, DEPTH, False)
    if unit.data is not None:
        store_unit(unit, rows, block, length, dim, DEPTH)
    key = tl.load(target.data + instance * target.stride, mask=inside, other=-1)
    exists = (key >= 0) & (key < keys)
    key = tl.where(exists, key, -1)
    if own is not None:
        tl.store(own + row, key.to(tl.int32))
    if norm is not None:
        tl.store(norm + rows, length, mask=inside)
    if pull is not None:
        known = ConICCoefficients(*load_fields(coefficients + row * _COEFFICIENTS, _COEFFICIENTS, inside))
        grad = tl.load(grad_loss.data + instance * grad_loss.stride, mask=inside, other=0.0).to(tl.float64)
        # ∂ℓ_s/∂s_n is less than 0, and as large as all others together.
        size = -known.grad_positive
        share = tl.where(size != 0.0, known.instance / size, 0.0)
        to_be = _Pull(max_s=known.max_s, size=grad * size, instance=grad * known.instance, share=share)
        store_fields(pull + row * _PULL, to_be, None)
    if FIND:
        dot, squares = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
        for first in range(0, dim, DEPTH):
            columns = first + tl.arange(0, DEPTH)
            x = load(block, columns, dim).to(tl.float32).to(tl.float64)
            there = (columns < dim)[None, :] & exists[:, None]
            w = tl.load(at(weight, key, columns), mask=there, other=0.0).to(tl.float32).to(tl.float64)
            dot += tl.sum(x * w, axis=1)
            squares += tl.sum(w * w, axis=1)
        s = dot / length / tl.maximum(tl.sqrt(squares), NORM_EPSILON)
        s = tl.where(exists, s, float("nan"))
        rounded_s = s.to(tl.float32)
        found = ConICPositives(positive=s, threshold=rounded_s.to(tl.float64))
        store_fields(positives + row * _POSITIVES, found, inside)
        if threshold is not None:
            tl.store(threshold + row, rounded_s)
    elif threshold is not None:
        known = ConICPositives(*load_fields(positives + row * _POSITIVES, _POSITIVES, inside))
        tl.store(threshold + row, known.threshold.to(tl.float32))


@triton.jit(do_not_specialize=["keys"])
def _unit_kernel(weight, unit_weight, inverse, keys, dim, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """ŵ of some keys, rounded once, to the dtype of the views, and 1/‖w‖.

    Args:
        weight: Matrix (keys, D).
        unit_weight: Matrix (padded keys, padded dimensions); what is past the last key is 0.
        inverse: (padded keys,) float32.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = Block(weight, rows.to(tl.int64), keys)
    norm = _norms(block, dim, DEPTH, False)
    store_unit(unit_weight, rows.to(tl.int64), block, norm, dim, DEPTH)
    tl.store(inverse + rows, (1.0 / norm).to(tl.float32))


@triton.jit(do_not_specialize=["keys", "padded_rows"])
def _statistics_kernel(
    unit, own, threshold, unit_weight, partial, keys, padded_rows, scale, keys_a_range,
    BOUNDED: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a range of keys knows of a block of views.

    Args:
        unit: Matrix (padded rows, padded dimensions), x̂. unit_weight: the same of the keys, ŵ.
        own: (padded rows,) int32. threshold: (padded rows,) float32.
        partial: `ConICPartial` (ranges, padded rows, 3) float32.
        scale: log2(e)/τ.
        BOUNDED: whether float32 holds the exponentials as they are: no maximum is looked for.
    """
    ROWS: tl.constexpr = TILE.rows
    KEYS: tl.constexpr = TILE.keys
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1).to(tl.int64)
    index = tl.arange(0, KEYS)
    own_key, limit = tl.load(own + rows)[:, None], tl.load(threshold + rows)[:, None, None]
    block = Block(unit, rows, padded_rows)
    held = None, None
    if not TILE.chunked:
        x = tl.load(at(unit, rows, tl.arange(0, TILE.depth)))
        held = x, x
    shape: tl.constexpr = [ROWS, LANES]
    tile_shape: tl.constexpr = [ROWS, KEYS // LANES, LANES]
    start_at: tl.constexpr = 0.0 if BOUNDED else LOWEST
    top = tl.full(shape, start_at, tl.float32)
    z, rank = tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32)  # exact up to 2²⁴

    begin = part * keys_a_range
    for start in range(begin, tl.minimum(begin + keys_a_range, keys), KEYS):
        tile = Matrix(unit_weight.data + start * unit_weight.row, unit_weight.row, unit_weight.column)
        s, _, _ = similarities(block, block, Block(tile, index, 0), held, unit.row, False, TILE)
        if start + KEYS > keys:
            s = tl.where((start + index >= keys)[None, :], float("-inf"), s)
        s = tl.where((own_key - start).to(tl.int32) == index[None, :], float("-inf"), s)
        s = tl.reshape(s, tile_shape)
        rank += tl.sum(tl.where(s > limit, 1.0, 0.0), axis=1)
        if BOUNDED:
            z += tl.sum(tl.exp2(s * scale), axis=1)
        else:
            new = tl.maximum(top, tl.max(s, axis=1))
            e = tl.exp2((s - new[:, None, :]) * scale)
            z = z * tl.exp2(move(top, new, scale)) + tl.sum(e, axis=1)
            top = new

    highest = tl.max(top, axis=1)
    known = ConICPartial(
        max_s=highest,
        z_instance=tl.sum(z * tl.exp2(move(top, highest[:, None], scale)), axis=1),
        rank=tl.sum(rank, axis=1),
    )
    store_fields(partial + (part * padded_rows + rows) * _PARTIAL, known, None)


@triton.jit
def _sums_of_parts(partial, rows, inside, part_stride, parts, scale, PARTS: tl.constexpr):
    """The `ConICPartial` over all parts, in float64; the rank is an integer."""
    part = tl.arange(0, PARTS).to(tl.int64)[:, None]
    there = (part < parts) & inside[None, :]
    record = partial + part * part_stride + rows[None, :] * _PARTIAL
    known = ConICPartial(*load_fields(record, _PARTIAL, there))
    tops = tl.where(there, known.max_s, LOWEST).to(tl.float64)
    top = tl.max(tops, axis=0)
    moved = tl.exp2(move(tops, top[None, :], scale))
    z_instance = tl.sum(known.z_instance.to(tl.float64) * moved, axis=0)
    return ConICPartial(max_s=top, z_instance=z_instance, rank=tl.sum(known.rank.to(tl.int64), axis=0))


@triton.jit(do_not_specialize=["part_stride", "rows", "parts"])
def _join_kernel(
    partial, joined, part_stride, rows, parts, scale: tl.float64, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """One part of several.

    Args:
        partial: `ConICPartial` (parts, V·B, 3) float32, with `part_stride` numbers from part to part.
        joined: (1, V·B, 3) float32.
        PARTS: the power of two from `parts` on.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    sums = _sums_of_parts(partial, row, row < rows, part_stride, parts, scale, PARTS)
    store_fields(joined + row * _PARTIAL, sums, row < rows)


@triton.jit(do_not_specialize=["part_stride", "views_count", "batch", "parts"])
def _merge_kernel(
    partial, positives, views, losses, part_stride, views_count, batch, dim, parts,
    scale: tl.float64, tau: tl.float64, log_compensation: tl.float64, consistency_weight: tl.float64,
    ROWS: tl.constexpr, PARTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The losses of a block of instances, all in float64.

    Args:
        partial: `ConICPartial` (parts, V·B, 3) float32, with `part_stride` numbers from part to part.
        positives: `ConICPositives` (V·B, 2) float64. views: Matrix (V·B, D). losses: `ConICLosses`.
        PARTS: the power of two from `parts` on.
    """
    instance = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = instance < batch
    zero = tl.zeros([ROWS], tl.float64)
    classification = zero
    for view in range(views_count):
        row = view * batch + instance
        top, z_instance, rank = _sums_of_parts(partial, row, inside, part_stride, parts, scale, PARTS)

        s = tl.load(positives + row * _POSITIVES, mask=inside, other=0.0)
        top = tl.where(z_instance == 0.0, s, top)  # the only key has no negatives
        value, negatives = softplus(tl.log(z_instance) + ((top - s) / tau + log_compensation))  # ℓ_s
        pull = negatives / tau
        classification += value
        tl.store(losses.classification_loss + row, value, mask=inside)
        tl.store(losses.positive_rank + row, rank, mask=inside)
        coefficients = ConICCoefficients(
            max_s=top,
            instance=tl.where(z_instance == 0.0, 0.0, pull / z_instance),
            grad_positive=-pull,
        )
        store_fields(losses.coefficients + row * _COEFFICIENTS, coefficients, inside)

    consistency = zero
    for i in range(1, views_count):
        for j in range(i):
            xx, yy, xy = zero, zero, zero
            for first in range(0, dim, DEPTH):
                columns = first + tl.arange(0, DEPTH)
                x = load(Block(views, i * batch + instance, (i + 1) * batch), columns, dim)
                y = load(Block(views, j * batch + instance, (j + 1) * batch), columns, dim)
                x, y = x.to(tl.float32).to(tl.float64), y.to(tl.float32).to(tl.float64)
                xx += tl.sum(x * x, axis=1)
                yy += tl.sum(y * y, axis=1)
                xy += tl.sum(x * y, axis=1)
            norm_x, norm_y = tl.maximum(tl.sqrt(xx), NORM_EPSILON), tl.maximum(tl.sqrt(yy), NORM_EPSILON)
            disagreement = 1.0 - xy / norm_x / norm_y
            consistency += 2.0 * disagreement * disagreement  # (i, j) and (j, i)
    tl.store(losses.loss + instance, classification + consistency_weight * consistency, mask=inside)
    tl.store(losses.consistency_loss + instance, consistency, mask=inside)


@triton.jit
def _halves(x):
    """The first and the second half of the columns."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


# What follows takes MOST columns at a time: registers hold no second tile of whole rows.


@triton.jit
def _radial(
    grad, weight, first_column, dim,
    MOST: tl.constexpr, WHOLE_KEYS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """w·dŵ of each key."""
    COLUMNS: tl.constexpr = grad.shape[1]
    if COLUMNS > MOST:
        left, right = _halves(grad)
        first_right = first_column + COLUMNS // 2
        of_left = _radial(left, weight, first_column, dim, MOST, WHOLE_KEYS, WHOLE_COLUMNS)
        return of_left + _radial(right, weight, first_right, dim, MOST, WHOLE_KEYS, WHOLE_COLUMNS)
    columns = first_column + tl.arange(0, COLUMNS)
    w = load(weight, columns, dim, WHOLE_ROWS=WHOLE_KEYS, WHOLE_COLUMNS=WHOLE_COLUMNS)
    return tl.sum(w.to(tl.float32) * grad, axis=1)


@triton.jit
def _write(
    grad, factors, blocks, first_column, dim, sgd,
    NESTEROV: tl.constexpr, MOST: tl.constexpr, WHOLE_KEYS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dw of some columns, or a step of SGD with it.

    Args:
        grad: dŵ. factors: what it, and w, are multiplied by.
        blocks: of weight, momentum buffer and gradient.
        sgd: learning rate, momentum and weight decay.
    """
    COLUMNS: tl.constexpr = grad.shape[1]
    if COLUMNS > MOST:
        left, right = _halves(grad)
        _write(left, factors, blocks, first_column, dim, sgd, NESTEROV, MOST, WHOLE_KEYS, WHOLE_COLUMNS)
        first_right = first_column + COLUMNS // 2
        _write(right, factors, blocks, first_right, dim, sgd, NESTEROV, MOST, WHOLE_KEYS, WHOLE_COLUMNS)
        return
    weight, buffer, gradient = blocks
    lr, momentum, weight_decay = sgd
    columns = first_column + tl.arange(0, COLUMNS)
    w = load(weight, columns, dim, WHOLE_ROWS=WHOLE_KEYS, WHOLE_COLUMNS=WHOLE_COLUMNS).to(tl.float32)
    grad = grad * factors[0][:, None] + w * factors[1][:, None]
    if buffer.matrix.data is None:
        store(gradient, grad, columns, dim, WHOLE_ROWS=WHOLE_KEYS, WHOLE_COLUMNS=WHOLE_COLUMNS)
    else:
        grad += weight_decay * w
        v = load(buffer, columns, dim, WHOLE_ROWS=WHOLE_KEYS, WHOLE_COLUMNS=WHOLE_COLUMNS)
        v = momentum * v.to(tl.float32) + grad
        store(buffer, v, columns, dim, WHOLE_ROWS=WHOLE_KEYS, WHOLE_COLUMNS=WHOLE_COLUMNS)
        w -= lr * (grad + momentum * v if NESTEROV else v)
        tl.debug_barrier()  # all threads have read what one of them overwrites
        store(weight, w, columns, dim, WHOLE_ROWS=WHOLE_KEYS, WHOLE_COLUMNS=WHOLE_COLUMNS)


@triton.jit(do_not_specialize=["keys", "padded_rows"])
def _weight_kernel(
    unit, own, pull, unit_weight, inverse, weight, gradient, momentum_buffer, keys, dim, padded_rows, scale,
    lr, momentum, weight_decay,
    NESTEROV: tl.constexpr, WHOLE_ROWS: tl.constexpr, WHOLE_KEYS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr,
    BOUNDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dw of a tile of keys; where there is a momentum buffer, a step of SGD in its place.

    Args:
        unit: Matrix (padded rows, padded dimensions), x̂. unit_weight: the same of the keys, ŵ.
        own: (padded rows,) int32. pull: `_Pull` (padded rows, 4) float32. inverse: (padded keys,) float32.
        weight, gradient, momentum_buffer: Matrix (keys, D); one of the last two has no data.
        scale: log2(e)/τ.
        WHOLE_ROWS: whether a program has all dimensions of its keys.
        WHOLE_KEYS, WHOLE_COLUMNS: whether no program's keys, or dimensions, end past the last.
        TILE: holds keys in its rows, and walks the views.
    """
    KEYS: tl.constexpr = TILE.rows
    ROWS: tl.constexpr = TILE.keys
    PRECISION: tl.constexpr = TILE.precision
    start, index = tl.program_id(0) * KEYS, tl.arange(0, KEYS)
    tile_rows = start.to(tl.int64) + index
    out_columns = tl.program_id(1) * TILE.width + tl.arange(0, TILE.width)

    unit_scale = 1.0
    if tl.float16 == TILE.dtype:  # the largest gradient becomes _UNIT, or up to half of it
        largest = largest_size(pull + _SIZE, padded_rows, _PULL)
        unit_scale = _UNIT * tl.exp2(-tl.ceil(tl.maximum(tl.log2(largest), -100.0)))

    block = Block(unit_weight, tile_rows, keys)
    held = None, None
    if not TILE.chunked:
        w = tl.load(at(unit_weight, tile_rows, tl.arange(0, TILE.depth)))
        held = w, w
    shape: tl.constexpr = [KEYS, TILE.width]
    grad = tl.zeros(shape, tl.float32)
    radial = tl.zeros([KEYS], tl.float32)
    for first in range(0, padded_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        s, _, x = similarities(block, block, Block(unit, rows, 0), held, unit.row, False, TILE)
        is_own = index[:, None] == (tl.load(own + rows) - start)[None, :]
        max_s, size, instance, _ = four_fields(pull + first * _PULL, ROWS)
        pull_of_own, instance = size * -unit_scale, instance * unit_scale
        e = tl.exp2(_logits(s, max_s[None, :], scale, BOUNDED))
        g = tl.where(is_own, pull_of_own[None, :], e * instance[None, :])
        if not WHOLE_ROWS:
            radial += tl.sum(g * s, axis=1)
        if TILE.chunked:
            x = tl.load(at(unit, rows, out_columns))
        grad = product(g.to(TILE.dtype), x, grad, PRECISION)

    # dw = (dŵ − ŵ (ŵ·dŵ)) / ‖w‖; a row below the epsilon was only scaled, so it has no projection
    inverse_norm = tl.load(inverse + tile_rows)
    of = (
        Block(weight, tile_rows, keys),
        Block(momentum_buffer, tile_rows, keys),
        Block(gradient, tile_rows, keys),
    )
    first_column = tl.program_id(1) * TILE.width
    MOST: tl.constexpr = 64 if TILE.width <= 128 else 32
    if WHOLE_ROWS:
        radial = _radial(grad, of[0], first_column, dim, MOST, WHOLE_KEYS, WHOLE_COLUMNS) * inverse_norm
    radial = tl.where(inverse_norm < 1.0 / NORM_EPSILON, radial, 0.0)
    factor = inverse_norm / unit_scale
    of_w = -inverse_norm * radial * factor
    _write(
        grad, (factor, of_w), of, first_column, dim, (lr, momentum, weight_decay),
        NESTEROV, MOST, WHOLE_KEYS, WHOLE_COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["keys", "padded_rows"])
def _views_kernel(
    unit, own, pull, unit_weight, grad_parts, keys, padded_rows, scale, keys_a_range,
    WHOLE_KEYS: tl.constexpr, BOUNDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a range of keys adds to dx̂ of a block of views.

    Args:
        unit: Matrix (padded rows, padded dimensions), x̂. unit_weight: the same of the keys, ŵ.
        own: (padded rows,) int32. pull: `_Pull` (padded rows, 4) float32.
        grad_parts: Matrix (ranges · padded rows, padded dimensions) float32.
        scale: log2(e)/τ.
        WHOLE_KEYS: whether no tile ends past the last key.
    """
    ROWS: tl.constexpr = TILE.rows
    PRECISION: tl.constexpr = TILE.precision
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1).to(tl.int64)
    out_columns = tl.program_id(2) * TILE.width + tl.arange(0, TILE.width)

    own_key = tl.load(own + rows)[:, None]
    known = _Pull(*load_fields(pull + rows.to(tl.int64) * _PULL, _PULL))
    max_s, share = known.max_s[:, None], known.share[:, None] * _UNIT
    pull_of_own = tl.where(share == 0.0, 0.0, -_UNIT)
    block = Block(unit, rows, padded_rows)
    held = None, None
    if not TILE.chunked:
        x = tl.load(at(unit, rows, tl.arange(0, TILE.depth)))
        held = x, x
    shape: tl.constexpr = [ROWS, TILE.width]
    grad = tl.zeros(shape, tl.float32)
    begin, index = part * keys_a_range, tl.arange(0, TILE.keys)
    for start in range(begin, tl.minimum(begin + keys_a_range, keys), TILE.keys):
        tile = Matrix(unit_weight.data + start * unit_weight.row, unit_weight.row, unit_weight.column)
        s, _, w = similarities(block, block, Block(tile, index, 0), held, unit.row, False, TILE)
        g = tl.exp2(_logits(s, max_s, scale, BOUNDED)) * share
        g = tl.where((own_key - start).to(tl.int32) == index[None, :], pull_of_own, g)
        if not WHOLE_KEYS:  # noqa: SIM102
            if start + TILE.keys > keys:  # where all negatives are below 0, no dtype holds g of a padded key
                g = tl.where((start + index < keys)[None, :], g, 0.0)
        if TILE.chunked:
            w = tl.load(at(tile, index, out_columns))
        grad = product(g.to(TILE.dtype), w, grad, PRECISION)
    grad *= known.size[:, None] * (1.0 / _UNIT)
    tl.store(at(grad_parts, part * padded_rows + rows, out_columns), grad)


@triton.jit(do_not_specialize=["count", "batch", "padded_rows", "ranges"])
def _finish_kernel(
    views, norm, grad_parts, grad_loss, gradient, count, batch, dim, padded_rows, ranges,
    consistency_weight: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx of some views: the ranges' parts, the consistency's −4 α Σ_j (1 − x̂ⁱ·x̂ʲ) x̂ʲ, and the chain rule.

    Args:
        views, gradient: Matrix (count = V·B, D). norm: (V·B,) float64. grad_loss: Vector (B,).
        grad_parts: Matrix (ranges · padded rows, padded dimensions) float32.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = row < count
    there = inside[:, None] & (columns < dim)[None, :]
    grad = sum_of_parts(grad_parts, row, columns, there, ranges, padded_rows)
    length = tl.load(norm + row, mask=inside, other=1.0)
    x = load(Block(views, row, count), columns, dim)
    x = x.to(tl.float32).to(tl.float64) / length[:, None]
    instance = row % batch
    factor = tl.load(grad_loss.data + instance * grad_loss.stride, mask=inside, other=0.0).to(tl.float64)
    factor *= -4.0 * consistency_weight
    for first in range(0, count, batch):
        other = first + instance
        y = load(Block(views, other, count), columns, dim).to(tl.float32).to(tl.float64)
        y /= tl.load(norm + other, mask=other < count, other=1.0)[:, None]
        disagreement = tl.where(other != row, 1.0 - tl.sum(x * y, axis=1), 0.0)
        grad += (factor * disagreement)[:, None] * y
    grad = through_norm(grad, x, length)
    store(Block(gradient, row, count), grad.to(tl.float32), columns, dim)


KERNELS = {
    "conic.prepare": _prepare_kernel,
    "conic.unit": _unit_kernel,
    "conic.statistics": _statistics_kernel,
    "conic.merge": _merge_kernel,
    "conic.join": _join_kernel,
    "conic.weight": _weight_kernel,
    "conic.views": _views_kernel,
    "conic.finish": _finish_kernel,
}
