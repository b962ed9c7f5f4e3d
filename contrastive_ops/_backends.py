"""Which implementation serves a call.

A backend is a module that implements the operators of `_ops.py`, each loss in the three steps of
`_contract.py`, and describes itself:

    unavailable() -> str | None                why it cannot serve on this machine
    refuses(operator, rows) -> str | None      why it does not serve a call with this query, views or weight
    PREFERRED_ON                               the types of devices on which it is tried where nobody chose

Adding one means adding its module to `BACKENDS`; `reference.py` is the shortest example. A module that fails
to be imported is taken for unavailable.

Operators that write to their arguments move on the versions of these, when all is written, and the weight's
last: by them the classifier tells whether an operator ran that was interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

ENVIRONMENT_VARIABLE = "CONTRASTIVE_OPS_BACKEND"

# Where nobody chose, those that are preferred on the device are tried in this order, and the reference serves
# where none of them can.
BACKENDS = {
    "reference": "contrastive_ops.reference",
    "cpu": "contrastive_ops._cpu",
    "triton": "contrastive_ops.kernels",
    "cuda": "contrastive_ops.cuda",
}

_ambient: ContextVar[str | None] = ContextVar("contrastive_ops_backend", default=None)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can serve on this machine (its truth value), and if not, why."""

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return "available" if self.available else f"not available: {self.reason}"


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """The module of a backend, or None and the reason why it cannot serve on this machine."""
    try:
        module = importlib.import_module(BACKENDS[name])
        reason = module.unavailable()
    except ImportError as error:
        return None, str(error)
    return (None, reason) if reason else (module, "")


def available_backends() -> dict[str, BackendStatus]:
    """For each backend, whether it can serve on this machine and, if not, why.

    Example:
        >>> from contrastive_ops import available_backends
        >>> available_backends()["reference"].available
        True
    """
    reasons = {name: _load(name)[1] for name in BACKENDS}
    return {name: BackendStatus(not reason, reason) for name, reason in reasons.items()}


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
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
    module, reason = _load(name)
    if module is None:
        raise RuntimeError(f"{source}: the backend {name!r} cannot serve here: {reason}")
    return module


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _choose(requested: str | None, operator: str, rows: Tensor) -> tuple[str, ModuleType]:
    """Name and module of what serves a call: what was asked for, or else the first that is preferred."""
    name, source = requested, "backend="
    if name is None:
        name, source = _ambient.get(), "use_backend()"
    if name is None:
        name, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if name is not None:
        module = _require(name, source)
        reason = module.refuses(operator, rows)
        if reason:
            raise RuntimeError(f"{source}: the backend {name!r} cannot serve this call: {reason}")
        return name, module

    device_type = rows.device.type
    reasons = []
    for name in preferred_on(device_type):
        fused, reason = _load(name)
        reason = reason or fused.refuses(operator, rows)  # type: ignore[union-attr]
        if fused is not None and not reason:
            return name, fused
        reasons.append(f"{name}: {reason}")
    causes = "; ".join(reasons) or f"no fused kernels exist for {device_type} tensors"
    _warn_once(f"contrastive_ops runs its slow reference on {device_type} tensors ({causes})")
    return "reference", _require("reference", "fallback")


@functools.cache
def preferred_on(device_type: str) -> tuple[str, ...]:
    """The backends that are tried on a type of devices where nobody chose, in their order."""
    preferred = []
    for name, path in BACKENDS.items():
        with contextlib.suppress(ImportError):
            if device_type in importlib.import_module(path).PREFERRED_ON:
                preferred.append(name)
    return tuple(preferred)


def select(requested: str | None, operator: str, rows: Tensor) -> ModuleType:
    """The module that serves a call: what was asked for, or else the fastest there is.

    Args:
        requested: a backend's name or None.
        operator: the name of the operator.
        rows: its query, views or weight.
    """
    return _choose(requested, operator, rows)[1]


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
    return _choose(backend, "co2", query)[0]
