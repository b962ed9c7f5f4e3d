"""The host code of the backends for GPUs: how an operator's kernels are planned, and launched or replayed.

A function here is an operator, or one of the steps of a loss, by the kernels of a backend, which it takes
first: a `launch.Kernels`. It needs no GPU, and the compiler of none.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .launch import Kernels

# The functions of each module.
OPERATORS = {
    "co2": ("co2", "co2_statistics", "co2_merge", "co2_gradient"),
    "conic": (
        "conic", "conic_positives", "conic_statistics", "conic_merge", "conic_gradient",
        "conic_gradient_sgd_",
    ),
    "nt_xent": ("nt_xent", "nt_xent_statistics", "nt_xent_merge", "nt_xent_gradient"),
    "sgd": ("sgd_",),
    "exchange": ("exchange_rows_",),
}  # fmt: skip


def module_of(operator: str) -> str | None:
    """The module of an operator or of a step of a loss, if there is one."""
    return next((module for module, operators in OPERATORS.items() if operator in operators), None)


def served_by(kernels: Kernels, operator: str) -> Callable[..., Any]:
    """An operator by the kernels of a backend."""
    module = importlib.import_module(f".{module_of(operator)}", __name__)
    return functools.partial(getattr(module, operator), kernels)
