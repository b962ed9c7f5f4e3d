"""The CUDA C++ backend: operators on NVIDIA GPUs from compute capability 7.0 (Volta) on.

Its kernels (csrc/cuda) are compiled for the GPU at hand when one is first asked for, by NVRTC, and kept on
disk. This module needs no GPU, nor anything of CUDA.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..gpu import module_of, served_by
from . import _compiler, _driver, _launch

PREFERRED_ON = ("cuda",)  # after Triton, which is tried first
MAX_DIM = 1024  # of a loss's rows

# Of query and views, whatever queue and weight have; and of a weight whose rows are changed.
_OF_LOSSES = (torch.float16, torch.bfloat16, torch.float32)
_OF_ROWS = (*_OF_LOSSES, torch.float64)
# Whose kernels there are, and the dtypes served; gpu.OPERATORS has the functions of each.
SERVED = {
    "co2": _OF_LOSSES,
    "conic": _OF_LOSSES,
    "nt_xent": _OF_LOSSES,
    "sgd": _OF_ROWS,
    "exchange": _OF_ROWS,
}


def _too_old(capability: tuple[int, int]) -> str | None:
    if capability >= _compiler.OLDEST_CAPABILITY:
        return None
    return "it needs a GPU of compute capability 7.0 or newer, this one has {}.{}".format(*capability)


@functools.cache
def _not_compiled_for(capability: tuple[int, int]) -> str | None:
    """Why nothing can be compiled for a GPU, or what is compiled cannot be loaded."""
    if reason := _too_old(capability):
        return reason
    try:
        _compiler.source_folder()
        _compiler.target_for(capability)
    except _compiler.Unsupported as reason:
        return str(reason)
    version = _driver.driver_version()
    return _compiler.driver_too_old(version) if version else None


def unavailable() -> str | None:
    """Why this backend cannot serve on this machine."""
    if torch.version.hip is not None:
        return f"it is for NVIDIA GPUs (this PyTorch is for ROCm {torch.version.hip})"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return _no_device()
    devices = range(torch.cuda.device_count())
    return _not_compiled_for(max(torch.cuda.get_device_capability(each) for each in devices))


def _no_device() -> str:
    """PyTorch says the same of a driver that is too old for it and of a machine without a GPU."""
    version, needed = _driver.driver_version(), int(str(torch.version.cuda).partition(".")[0])
    if version is None or version // 1000 >= needed:
        return "there is no CUDA device"
    return _compiler.driver_reason(
        version, f"is too old for this PyTorch for CUDA {torch.version.cuda}", needed
    )


def refuses(operator: str, rows: Tensor) -> str | None:
    """Why this backend does not serve a call of these rows."""
    if rows.device.type != _launch.KERNELS.device_type:
        return f"it does not serve {rows.device.type} tensors"
    dtypes = next((dtypes for module, dtypes in SERVED.items() if operator.startswith(module)), ())
    if not dtypes:
        return f"it has no kernels for {operator} yet"
    if rows.dtype not in dtypes:
        return f"it does not serve {rows.dtype}"
    if dtypes is _OF_LOSSES and rows.shape[-1] > MAX_DIM:
        return f"it serves rows of up to {MAX_DIM} dimensions, got {rows.shape[-1]}"
    return _not_compiled_for(_launch.KERNELS.device_chip(rows.device).capability)


def __getattr__(name: str) -> Any:
    if module_of(name) not in SERVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = served_by(_launch.KERNELS, name)
    globals()[name] = function  # to be found at once from now on
    return function
