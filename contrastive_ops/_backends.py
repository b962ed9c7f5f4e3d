"""Which implementation serves a call.

A backend is a module that implements the operators of `_ops.py` under their names. Adding one means adding
one entry to `_BACKENDS`. Operators that write to their arguments move on the versions of these, when all is
written, and the weight's last: by them the classifier tells whether an operator ran that was interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._installation import load_extension

ENVIRONMENT_VARIABLE = "CONTRASTIVE_OPS_BACKEND"


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can serve on this machine (its truth value), and if not, why."""

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return "available" if self.available else f"not available: {self.reason}"


@dataclass(frozen=True)
class _Backend:
    """`load` returns the implementing module, or raises ImportError with the reason why it cannot serve on
    this machine; `refuses` says why it does not serve a call with this query, if so."""

    load: Callable[[], ModuleType]
    refuses: Callable[[Tensor], str | None] = lambda query: None


def _only_on(*device_types: str) -> Callable[[Tensor], str | None]:
    def refuses(query: Tensor) -> str | None:
        return None if query.device.type in device_types else f"it does not serve {query.device.type} tensors"

    return refuses


def _load_reference() -> ModuleType:
    return importlib.import_module("contrastive_ops.reference")


def _load_cpu() -> ModuleType:
    # One extension per instruction set, built from the same source. ATen's own choice is followed, so that
    # ATEN_CPU_CAPABILITY, which caps it, caps both.
    capability = torch.backends.cpu.get_cpu_capability()
    variant = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "default")
    return load_extension(f"_cpu_{variant}")


def _interprets_triton() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _too_old_for_triton(capability: tuple[int, int]) -> str | None:
    if capability >= (8, 0):
        return None
    return "it needs a GPU of compute capability 8.0 or newer, this one has {}.{}".format(*capability)


def _load_triton() -> ModuleType:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise ImportError(f"triton cannot be imported ({error})") from error
    if not _interprets_triton():
        if not torch.cuda.is_available():
            raise ImportError(
                "there is no CUDA device (with TRITON_INTERPRET=1 it serves CPU tensors, slowly)"
            )
        devices = range(torch.cuda.device_count())
        reason = _too_old_for_triton(max(torch.cuda.get_device_capability(device) for device in devices))
        if reason:
            raise ImportError(reason)
    return importlib.import_module("contrastive_ops.kernels")


def _triton_refuses(query: Tensor) -> str | None:
    if _interprets_triton():
        reason = _only_on("cpu")(query)
    else:
        reason = _only_on("cuda")(query) or _too_old_for_triton(
            torch.cuda.get_device_capability(query.device)
        )
    if reason:
        return reason
    kernels = importlib.import_module("contrastive_ops.kernels")
    if query.dtype not in kernels.DTYPES:
        return f"it does not serve {query.dtype}"
    if query.dtype == torch.bfloat16 and _interprets_triton():
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if query.shape[-1] > kernels.MAX_DIM:
        return f"it serves rows of up to {kernels.MAX_DIM} dimensions, got {query.shape[-1]}"
    return None


def _load_cuda() -> ModuleType:
    raise ImportError("this release has no CUDA C++ kernels yet")


_BACKENDS = {
    "reference": _Backend(_load_reference),
    "cpu": _Backend(_load_cpu, _only_on("cpu")),
    "triton": _Backend(_load_triton, _triton_refuses),
    "cuda": _Backend(_load_cuda, _only_on("cuda")),
}

# Tried in this order where nobody chose; what is missing falls through to the reference.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

_ambient: ContextVar[str | None] = ContextVar("contrastive_ops_backend", default=None)


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return _BACKENDS[name].load(), ""
    except ImportError as error:
        return None, str(error)


def available_backends() -> dict[str, BackendStatus]:
    """For each backend, whether it can serve on this machine and, if not, why.

    Example:
        >>> from contrastive_ops import available_backends
        >>> available_backends()["reference"].available
        True
    """
    statuses = {}
    for name in _BACKENDS:
        module, reason = _load(name)
        statuses[name] = BackendStatus(module is not None, reason)
    return statuses


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every loss inside the `with` block by the backend `name`, or raise where it cannot.

    It outranks the environment variable CONTRASTIVE_OPS_BACKEND, and a call's own `backend=` outranks both.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot serve on this machine; the message says why.

    Example:
        >>> import torch
        >>> from contrastive_ops import info_nce_loss, use_backend
        >>> unit = torch.tensor([[0.6, 0.8]])
        >>> with use_backend("reference"):
        ...     loss = info_nce_loss(unit, unit, unit.expand(3, 2))
        >>> torch.exp(loss).round().item()  # all similarities are equal: K + 1
        4.0
    """
    _require(name, "use_backend()")
    token = _ambient.set(name)
    try:
        yield
    finally:
        _ambient.reset(token)


def _require(name: Any, source: str) -> ModuleType:
    if not isinstance(name, str) or name not in _BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(_BACKENDS)}")
    module, reason = _load(name)
    if module is None:
        raise RuntimeError(f"{source}: the backend {name!r} cannot serve here: {reason}")
    return module


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def select(requested: str | None, query: Tensor) -> ModuleType:
    """The module that serves a call with this query: what was asked for, or else the fastest there is."""
    for name, source in (
        (requested, "backend="),
        (_ambient.get(), "use_backend()"),
        (os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE),
    ):
        if name is not None:
            module = _require(name, source)
            reason = _BACKENDS[name].refuses(query)
            if reason:
                raise RuntimeError(f"{source}: the backend {name!r} cannot serve this call: {reason}")
            return module

    device_type = query.device.type
    reasons = []
    for name in _PREFERENCE.get(device_type, ()):
        fused, reason = _load(name)
        reason = reason or _BACKENDS[name].refuses(query)
        if fused is not None and not reason:
            return fused
        reasons.append(f"{name}: {reason}")
    causes = "; ".join(reasons) or f"no fused kernels exist for {device_type} tensors"
    _warn_once(f"contrastive_ops runs its slow reference on {device_type} tensors ({causes})")
    return _require("reference", "fallback")


def serving_backend(query: Tensor, backend: str | None = None) -> str:
    """The name of the backend that serves a loss of this query here and now.

    Args:
        query: of the device, dtype and number of dimensions in question; nothing is computed.
        backend: as a loss's argument of that name.

    Raises:
        ValueError: no backend has the name that was asked for.
        RuntimeError: it cannot serve such a query; the message says why.

    Example:
        >>> import torch
        >>> from contrastive_ops import serving_backend
        >>> serving_backend(torch.ones(1, 128), backend="reference")
        'reference'
    """
    chosen = select(backend, query)
    return next(name for name in _BACKENDS if _load(name)[0] is chosen)
