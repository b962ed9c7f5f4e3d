"""The exchange of the classifier's active rows for others, which are caught up, in one launch.

Bound by memory: it moves eight numbers for each element of a row and its successor. It has not been measured
on a GPU yet.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ._launch import Launch, current, matrix, plan


class Records(NamedTuple):
    """Records [w; v] of rows, (rows, 2, D) of any strides. In a kernel `data` is a pointer."""

    data: Any
    row: Any
    half: Any
    column: Any


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


@plan
def _plan(rows: int, dim: int) -> Launch:
    block = min(1024, triton.next_power_of_2(dim))
    return Launch("exchange", _exchange_kernel, (rows, triton.cdiv(dim, block)), {"BLOCK": block})


def exchange_rows_(
    weight: Tensor,
    momentum_buffer: Tensor,
    slots: Tensor,
    incoming: Tensor,
    incoming_rows: Tensor,
    coefficients: Tensor,
    outgoing: Tensor,
    outgoing_rows: Tensor,
) -> None:
    """See `reference.exchange_rows_`. `incoming` and `outgoing` may be pinned memory of the host, which the
    GPU then reads and writes across the bus."""
    dim = weight.shape[1]
    with current(weight):
        _plan(len(slots), dim)(
            weight=matrix(weight),
            momentum_buffer=matrix(momentum_buffer),
            slots=slots.contiguous(),
            incoming=Records(incoming, *incoming.stride()),
            incoming_rows=incoming_rows.contiguous(),
            coefficients=coefficients.contiguous(),
            outgoing=Records(outgoing, *outgoing.stride()),
            outgoing_rows=outgoing_rows.contiguous(),
            active=len(weight),
            coming=len(incoming),
            going=len(outgoing),
            dim=dim,
        )
    increment_version((outgoing, momentum_buffer, weight))
