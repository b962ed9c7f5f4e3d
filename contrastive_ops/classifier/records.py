"""Records of rows outside the weight, and the exchange of rows with it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .. import _ops
from .indices import Indices, on_device


class Records(NamedTuple):
    """Weight and momentum of n rows, somewhere in a larger tensor.

    Attributes:
        values: (·, 2, D), of the weight's dtype, on its device or where that reads and writes by itself.
        at: (n,) which of them, an array of the host.
    """

    values: Tensor
    at: Indices


def exchange_rows(
    rows: tuple[Tensor, Tensor],
    slots: Indices,
    incoming: Records,
    coefficients: NDArray[np.float64],
    outgoing: Records,
) -> None:
    """Write the rows at `slots` to the outgoing records, and in their place the incoming ones, caught up.

        outgoing ← [w; v][slots]        [w; v][slots] ← coefficients · incoming

    Args:
        rows: w and v, two (A, D).
        slots: (n,) distinct.
        incoming: n records.
        coefficients: (n, 2, 2) from `History`.
        outgoing: n records, distinct.
    """
    weight, momentum = rows
    device = weight.device
    _ops.exchange_rows_(
        weight, momentum, on_device(slots, device),
        incoming.values, on_device(incoming.at, device), on_device(coefficients, device),
        outgoing.values, on_device(outgoing.at, device), None,
    )  # fmt: skip
