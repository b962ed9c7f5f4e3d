"""Functions that torch.compile must not trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(reason: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have the interpreter run a function in compiled code too; with fullgraph=True, raise with the reason.

    torch.compiler.disable does that, and imports the compiler, which takes seconds: not before a first call.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        disabled: Any = None

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal disabled
            if disabled is None:
                disabled = torch.compiler.disable(function, reason=reason)
            return disabled(*args, **kwargs)

        # A code of its own: the compiler counts by code how often it had to compile again, and warns.
        call.__code__ = call.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
        return call

    return decorate
