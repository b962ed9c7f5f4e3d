"""What a checkpoint holds, checked before anything is made of it: it may be damaged, or from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def entry(state: Any, name: str, of: str) -> Any:
    """The entry of that name of a part of a checkpoint, such as its history; what a tuple of one holds."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the checkpoint's {of} must be a mapping, got {type(state).__name__}")
    if name not in state:
        raise ValueError(f"the checkpoint's {of} must hold {name!r}, got {sorted(map(str, state))}")
    return unwrapped(state[name])


def unwrapped(value: Any) -> Any:
    """What a tuple of one holds: torch.distributed.checkpoint keeps that whole, whatever its size."""
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def tensor(
    state: Any, name: str, of: str, dtype: torch.dtype, shape: tuple[int | None, ...], finite: bool = True
) -> Tensor:
    """The entry as a dense tensor of that dtype and shape, None standing for any length.

    Its values are finite, unless they are rows, which a training that diverged has saved as they were.

    A tensor that stands for more numbers than it has, as an expanded one does, is refused: a copy of it could
    take any amount of memory.
    """
    value = entry(state, name, of)
    wanted = f"the checkpoint's {of}: {name} must be a dense {dtype} tensor " + "({})".format(
        ", ".join("any" if length is None else str(length) for length in shape)
    )
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise ValueError(f"{wanted}, got {type(value).__name__}")
    fits = value.ndim == len(shape) and all(
        want is None or length == want for length, want in zip(value.shape, shape, strict=True)
    )
    if value.dtype != dtype or not fits:
        raise ValueError(f"{wanted}, got {value.dtype} {tuple(value.shape)}")
    if value.is_meta or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{wanted} with values of its own, got one of strides {value.stride()}")
    if finite and dtype.is_floating_point and not bool(value.isfinite().all()):
        raise ValueError(f"the checkpoint's {of}: {name} must be finite, got NaN or infinity")
    return value
