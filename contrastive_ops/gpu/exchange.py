"""The exchange of the classifier's active rows for others, which are caught up, in one launch."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from .arguments import Records, matrix
from .launch import Kernels, Launch, ceil_div, current, next_power_of_2, plan


@plan
def _plan(kernels: Kernels, rows: int, dim: int) -> Launch:
    block = min(1024, next_power_of_2(dim))
    return kernels.launch("exchange", (rows, ceil_div(dim, block)), {"BLOCK": block})


def exchange_rows_(
    kernels: Kernels,
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
        _plan(kernels, len(slots), dim)(
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
