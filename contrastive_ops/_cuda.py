"""The CUDA C++ backend: not in this release."""

from __future__ import annotations

from torch import Tensor

PREFERRED_ON = ("cuda",)


def unavailable() -> str | None:
    """Why this backend cannot serve on this machine."""
    return "this release has no CUDA C++ kernels yet"


def refuses(operator: str, rows: Tensor) -> str | None:
    """Why this backend does not serve a call of these rows."""
    return unavailable()
