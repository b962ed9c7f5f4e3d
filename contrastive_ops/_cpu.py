"""The C++ backend (`csrc/cpu`): a compiled extension for each instruction set, built from the same source."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._contract import RECORDS
from ._installation import load_extension

PREFERRED_ON = ("cpu",)


@functools.cache
def _extension() -> ModuleType:
    # ATen's own choice is followed, so that ATEN_CPU_CAPABILITY, which caps it, caps both.
    capability = torch.backends.cpu.get_cpu_capability()
    variant = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "default")
    extension = load_extension(f"_cpu_{variant}")
    ours = {record.__name__: record._fields for record in RECORDS}
    if getattr(extension, "records", None) != ours:
        raise ImportError(
            f"the C++ extension {extension.__name__} was built from another version of contrastive_ops: its "
            "records have other fields; install contrastive_ops again"
        )
    return extension


def unavailable() -> str | None:
    """Why this backend cannot serve on this machine."""
    try:
        _extension()
    except ImportError as error:
        return str(error)
    return None


def refuses(operator: str, rows: Tensor) -> str | None:
    """Why this backend does not serve a call of these rows."""
    device = rows.device.type
    return None if device == "cpu" else f"it does not serve {device} tensors"


def __getattr__(name: str) -> Any:
    """The operators, under the extension's names."""
    if name.startswith("_"):
        raise AttributeError(name)
    function = getattr(_extension(), name)
    globals()[name] = function
    return function
