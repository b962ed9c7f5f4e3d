"""How a call is known for one of a kind that was seen before: compiled (`csrc/calls`), for it takes half of what a
GPU computes in to look at a call's arguments from Python.

A signature is bytes, equal for calls of one kind: of tensors of equal dtypes, devices, shapes and strides, which begin
equally far from an address divisible by 16, lie within their storages and require a gradient or not, and of equal
numbers, flags and names, in PyTorch's same state of recording gradients and of autocast. The values of tensors are no
part of it. What depends on nothing else need not be looked at twice.

Where a call has none, everything is looked at: where an argument is of a class of its own, as in programs that are
traced, or where no extension was built.
"""

from __future__ import annotations

from typing import Any

import torch

from ._installation import load_extension

try:
    extension: Any = load_extension("_calls")
except ImportError:
    extension = None


def signature(arguments: tuple[Any, ...]) -> bytes | None:
    """Of a call within an operator."""
    return None if extension is None else extension.describe(arguments)


def signature_unobserved(arguments: tuple[Any, ...]) -> bytes | None:
    """Of a call from outside, which has none if a mode, a transform, a tracer or a profiler of PyTorch is there to
    see the operator. Else PyTorch's dispatcher would come to nothing but its autograd, and then its kernel."""
    if extension is None or torch.compiler.is_compiling():
        return None
    return extension.describe_unobserved(arguments)
