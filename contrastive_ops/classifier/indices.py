"""The numbers of instances, as the classifiers take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checks import check_tensor

Indices = NDArray[np.int64]

STATEFUL = "it changes what is kept on the host, which compiled code would do once, when it is traced"


def checked_instances(name: str, indices: Any, num_instances: int) -> Indices:
    """The numbers of instances that a tensor (B,) holds, on the host.

    Raises:
        TypeError, ValueError: it is not (B,) int64 in [0, N), or has no values.
    """
    check_tensor(name, indices, (torch.int64,))
    if indices.ndim != 1:
        raise ValueError(f"{name} must be (B,), got shape {tuple(indices.shape)}")
    if indices.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on the meta device")
    array = indices.detach().cpu().contiguous().numpy()
    (outside,) = np.nonzero((array < 0) | (array >= num_instances))
    if len(outside):
        first = outside[0]
        raise ValueError(f"{name} must be in [0, {num_instances}), got {array[first]} at position {first}")
    return array


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The host's array as a tensor on a device, without waiting for a GPU."""
    return torch.from_numpy(array).to(device, non_blocking=True)
