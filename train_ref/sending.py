"""Numbers from the CPU's memory to a device that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNED = 8  # bytes, at whose multiples numbers of every type may begin


def sent(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays on a device, in a single copy. A copy takes the host as long as the launch of a kernel; and if
    its memory is not pinned, the host waits until the device has done all that it was told before."""
    starts = np.cumsum([0, *(-(-array.nbytes // ALIGNED) * ALIGNED for array in arrays)]).tolist()
    places = [slice(start, start + array.nbytes) for start, array in zip(starts, arrays, strict=False)]
    parcel = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, array in zip(places, arrays, strict=True):
        parcel.numpy()[place] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = parcel.to(device, non_blocking=True)
    return [
        there[place].view(torch.from_numpy(array).dtype).view(array.shape)
        for place, array in zip(places, arrays, strict=True)
    ]
