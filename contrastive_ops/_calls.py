"""How a call is known for one of a kind that was seen before.

A signature is bytes, equal for calls of one kind: with tensors of equal dtypes, devices, shapes and strides,
which begin equally far from an address divisible by 16, lie within their storages or do not, and require a
gradient or do not; with equal numbers, flags and names; in the same state of PyTorch's autocast and of its
recording of gradients. The values of tensors are no part of it. What depends on nothing else need not be
looked at twice. Compiled code makes it (`csrc/calls`): to look at a loss's arguments from Python once takes
half as long as a GPU's work on them.

Some calls have none, and everything is looked at: those with an argument of a class of its own, as where
programs are traced, and all calls where no extension was built.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

import torch
from torch.autograd import forward_ad

from ._installation import load_extension

try:
    extension: Any = load_extension("_calls")
except ImportError:
    extension = None

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_MOST_KINDS = 256  # of calls of one function; more than a few come from shapes that change from call to call


def signature(arguments: tuple[Any, ...]) -> bytes | None:
    """Of a call that PyTorch's dispatcher has come to, or need not be asked about."""
    return None if extension is None else extension.describe(arguments)


def signature_unobserved(arguments: tuple[Any, ...]) -> bytes | None:
    """Of a call from outside. It has none if a mode, a transform, a tracer or a profiler is there to see it;
    else PyTorch's dispatcher would come to nothing but an operator's autograd and its kernel."""
    if extension is None or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return None
    return extension.describe_unobserved(arguments)


class Known(dict[Any, T]):
    """What is known of the kinds of calls of a function, by signatures or what has them in it."""

    def remember(self, kind: Any, value: T) -> T:
        if len(self) >= _MOST_KINDS:
            self.clear()
        self[kind] = value
        return value


def once_a_kind(function: Callable[[*Ts], T]) -> Callable[[*Ts], T]:
    """A function that is run for the first call of each kind. What it returns, which is not None, depends on
    nothing but what is in a signature, and so does whether it raises."""
    known: Known[T] = Known()

    @functools.wraps(function)
    def call(*arguments: *Ts) -> T:
        kind = signature_unobserved(arguments)
        if kind is None:
            return function(*arguments)
        result = known.get(kind)
        return known.remember(kind, function(*arguments)) if result is None else result

    return call
