"""The Triton backend: the operators on NVIDIA GPUs from compute capability 8.0 on.

Its kernels are imported when one is first asked for: this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from ..gpu import module_of, served_by

PREFERRED_ON = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of query and views; queue and weight may have any
MAX_DIM = 1024


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _too_old(capability: tuple[int, int]) -> str | None:
    if capability >= (8, 0):
        return None
    return "it needs a GPU of compute capability 8.0 or newer, this one has {}.{}".format(*capability)


def unavailable() -> str | None:
    """Why this backend cannot serve on this machine."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if _is_interpreted():
        return None
    if torch.version.hip is not None:  # whose GPUs give their gfx numbers as compute capabilities
        return f"its kernels have not been tested on AMD GPUs (this PyTorch is for ROCm {torch.version.hip})"
    if not torch.cuda.is_available():
        return "there is no CUDA device (with TRITON_INTERPRET=1 it serves CPU tensors, slowly)"
    return _too_old(max(torch.cuda.get_device_capability(each) for each in range(torch.cuda.device_count())))


def refuses(operator: str, rows: Tensor) -> str | None:
    """Why this backend does not serve a call of these rows."""
    device = rows.device
    if device.type != ("cpu" if _is_interpreted() else "cuda"):
        return f"it does not serve {device.type} tensors"
    if device.type == "cuda" and (reason := _too_old(torch.cuda.get_device_capability(device))):
        return reason
    if rows.dtype not in DTYPES:
        return f"it does not serve {rows.dtype}"
    if rows.dtype == torch.bfloat16 and _is_interpreted():
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if rows.shape[-1] > MAX_DIM:
        return f"it serves rows of up to {MAX_DIM} dimensions, got {rows.shape[-1]}"
    return None


def __getattr__(name: str) -> Any:
    if module_of(name) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ._launch import TRITON

    function = served_by(TRITON, name)
    globals()[name] = function  # to be found at once from now on
    return function
