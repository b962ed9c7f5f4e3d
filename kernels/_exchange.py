"""The exchange of the classifier's active rows for others, which are caught up, in one launch.

Bound by memory: it moves eight numbers for each element of a row and its successor. It has not been measured
on a GPU yet.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["active", "coming", "going"])
def _exchange_kernel(
    weight, momentum_buffer, slots, incoming, incoming_rows, coefficients, outgoing, outgoing_rows, active,
    coming, going, dim,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row out, another in, for a block of its dimensions. Rows outside are read as NaN and not written.

    Args:
        weight, momentum_buffer: Matrix (active, D).
        incoming: Records (coming, 2, D). outgoing: Records (going, 2, D).
        slots, incoming_rows, outgoing_rows: (n,) int64.
        coefficients: (n, 2, 2) float64.
    """
    i = tl.program_id(0)
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = columns < dim
    slot, row, out_row = tl.load(slots + i), tl.load(incoming_rows + i), tl.load(outgoing_rows + i)
    come = incoming.data + row * incoming.row + columns * incoming.column
    go = outgoing.data + out_row * outgoing.row + columns * outgoing.column
    to = weight.data + slot * weight.row + columns * weight.column
    to_buffer = momentum_buffer.data + slot * momentum_buffer.row + columns * momentum_buffer.column
    here = inside & (slot >= 0) & (slot < active)
    comes, goes = inside & (row >= 0) & (row < coming), inside & (out_row >= 0) & (out_row < going)

    w = tl.load(come, mask=comes, other=float("nan")).to(tl.float64)
    v = tl.load(come + incoming.half, mask=comes, other=float("nan")).to(tl.float64)
    old_w = tl.load(to, mask=here, other=float("nan"))
    old_v = tl.load(to_buffer, mask=here, other=float("nan"))
    tl.store(go, old_w, mask=goes)
    tl.store(go + outgoing.half, old_v, mask=goes)

    # [w; v] ← C [w; v]
    c = coefficients + i * 4
    new_w = tl.load(c) * w + tl.load(c + 1) * v
    new_v = tl.load(c + 2) * w + tl.load(c + 3) * v
    tl.store(to, new_w.to(tl.float32).to(weight.data.dtype.element_ty), mask=here)
    tl.store(to_buffer, new_v.to(tl.float32).to(momentum_buffer.data.dtype.element_ty), mask=here)


KERNELS = {"exchange": _exchange_kernel}
