"""What a kernel takes besides numbers: tensors with their strides, and how the work is cut.

In Triton's device code the same classes have pointers for tensors; in CUDA C++ they are structs of the same
names and fields.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Matrix(NamedTuple):
    """A matrix of any strides, counted in numbers. In a kernel `data` is the pointer to its first number."""

    data: Any
    row: Any
    column: Any


class Vector(NamedTuple):
    """A tensor of one dimension of any stride."""

    data: Any
    stride: Any


class Records(NamedTuple):
    """Records [w; v] of rows, (rows, 2, D) of any strides."""

    data: Any
    row: Any
    half: Any
    column: Any


class Views(NamedTuple):
    """The views (2, B, D) of any strides."""

    data: Any
    view: Any
    row: Any
    column: Any


class Tile(NamedTuple):
    """How a kernel that walks cuts its work, and how it multiplies. Known when it is compiled."""

    rows: int
    keys: int
    depth: int  # dimensions multiplied at once
    width: int  # dimensions of the gradient that a program adds up; 0 where there is none
    chunked: bool  # whether rows have more dimensions than `depth`
    whole_keys: bool  # whether no tile ends past the last key
    whole_columns: bool  # whether no chunk ends past the last dimension
    stacked: bool  # whether both rows that meet the same keys are multiplied as one block
    dtype: Any  # in which rows are multiplied: one of torch's on the host
    precision: str  # "half", "tf32" or "tf32x3"; see `precision_of`


NO_MATRIX, NO_VECTOR = Matrix(None, 0, 0), Vector(None, 0)


def matrix(tensor: Tensor) -> Matrix:
    """A tensor of two dimensions as a kernel's argument."""
    return Matrix(tensor, *tensor.stride())


def vector(tensor: Tensor) -> Vector:
    """A tensor of one dimension as a kernel's argument."""
    return Vector(tensor, tensor.stride(0))
