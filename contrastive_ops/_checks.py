"""What the operators ask of their arguments: once, for all backends, before anything is read or written.

A backend takes memory to be what shapes, strides and indices say. Every call in which it is not is refused
here, by a TypeError or ValueError that names operator and argument.

The values of indices are looked at where the host has them. For those of a GPU it would have to wait: there
kernels neither read nor write rows outside, and what comes of it stands in `reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .reference import computed_in

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DOUBLE, _INDEX = (torch.float64,), (torch.int64,)


@dataclass(frozen=True)
class _Wanted:
    """Of a tensor: its sizes, in which a letter stands for one number throughout a call, and its dtype, which
    is one of some, that of another argument, or that of another's loss.

    It may be in the host's memory while others are on a GPU (`or_host`). Its values may be rows of another
    argument, each of them once (`distinct`).
    """

    shape: str
    dtypes: tuple[torch.dtype, ...] = FLOATING
    like: str = ""
    loss_of: str = ""
    or_host: bool = False
    rows_of: str = ""
    distinct: bool = False


_CONIC = {
    "views": _Wanted("V B D"),
    "weight": _Wanted("A D"),
    "target": _Wanted("B", _INDEX, rows_of="weight"),
}
_OF_CONIC = {"grad_loss": _Wanted("B", loss_of="views"), "statistics": _Wanted("V B 3", _DOUBLE)}
_MOMENTUM = {"momentum_buffer": _Wanted("A D", like="weight")}

# Of each operator in the order in which they are looked at; all are on the device of the first.
_TENSORS = {
    "co2": {"query": _Wanted("B D"), "key": _Wanted("B D", like="query"), "queue": _Wanted("K D")},
    "scale_gradient": {
        "query": _Wanted("B D"),
        "gradient": _Wanted("B D", loss_of="query"),
        "grad_loss": _Wanted("B", loss_of="query"),
    },
    "nt_xent": {"views": _Wanted("2 B D")},
    "nt_xent_backward": {
        "views": _Wanted("2 B D"),
        "grad_loss": _Wanted("2B", loss_of="views"),
        "statistics": _Wanted("2B 5", _DOUBLE),
    },
    "conic": _CONIC,
    "conic_backward": _CONIC | _OF_CONIC,
    "conic_backward_sgd_": _CONIC | _MOMENTUM | _OF_CONIC,
    "sgd_": {"weight": _Wanted("A D"), **_MOMENTUM, "grad": _Wanted("A D")},
    "exchange_rows_": {
        "weight": _Wanted("A D"),
        **_MOMENTUM,
        "slots": _Wanted("n", _INDEX, rows_of="weight", distinct=True),
        "incoming": _Wanted("R 2 D", like="weight", or_host=True),
        "incoming_rows": _Wanted("n", _INDEX, rows_of="incoming"),
        "coefficients": _Wanted("n 2 2", _DOUBLE),
        "outgoing": _Wanted("S 2 D", like="weight", or_host=True),
        "outgoing_rows": _Wanted("n", _INDEX, rows_of="outgoing", distinct=True),
    },
}
_MAY_BE_EMPTY = ("sgd_", "exchange_rows_")  # nothing is done then; a loss needs something of everything
_MAY_BE_ZERO = ("instance_weight", "consistency_weight", "lr", "momentum", "weight_decay")
_FIXED = {"2": 2, "3": 3, "5": 5}


class Checks:
    """Those of one operator, whose schema says where its arguments stand, and which it writes."""

    def __init__(self, name: str, schema: torch._C.FunctionSchema) -> None:
        place = {argument.name: i for i, argument in enumerate(schema.arguments)}
        self._operator = f"contrastive_ops::{name}"
        self._tensors = [
            (each, place[each], wanted, wanted.shape.split()) for each, wanted in _TENSORS[name].items()
        ]
        self._numbers = [
            (each.name, place[each.name], each.name in _MAY_BE_ZERO)
            for each in schema.arguments
            if str(each.type) == "float"
        ]
        self._rows = [
            (each, wanted.rows_of, wanted.distinct) for each, _, wanted, _ in self._tensors if wanted.rows_of
        ]
        self._may_be_empty = name in _MAY_BE_EMPTY
        self.written = [each.name for each in schema.arguments if each.is_write]

    def without_memory(self, arguments: Sequence[Any]) -> dict[str, Tensor]:
        """What can be asked of meta tensors too: layout, dtype, shape, device; and numbers."""
        tensors: dict[str, Tensor] = {}
        sizes: dict[str, int] = dict(_FIXED)
        first, device = self._tensors[0][0], None
        for name, place, wanted, shape in self._tensors:
            tensor = tensors[name] = arguments[place]
            if tensor is None:  # which schemas take for a tensor
                self._refuse(TypeError, name, "be a torch.Tensor", None)
            if tensor.layout is not torch.strided:
                self._refuse(TypeError, name, "be a dense tensor", f"layout {tensor.layout}")
            self._check_dtype(name, wanted, tensors)
            given = tensor.shape
            if len(given) != len(shape):
                self._refuse_shape(name, tensor, shape, sizes)
            for dimension, size in zip(shape, given, strict=True):
                if dimension == "2B":
                    sizes[dimension] = 2 * sizes["B"]
                if sizes.setdefault(dimension, size) != size:
                    self._refuse_shape(name, tensor, shape, sizes)
                if size == 0 and not self._may_be_empty:
                    self._refuse(ValueError, name, "not be empty", f"shape {tuple(given)}")
            device = device or tensor.device
            on_host = wanted.or_host and tensor.device.type == "cpu" and device.type != "meta"
            if tensor.device != device and not on_host:
                self._refuse(ValueError, name, f"be on the device of {first}, {device}", tensor.device)
        for name, place, may_be_zero in self._numbers:
            number = arguments[place]
            if not (0 < number < math.inf or (may_be_zero and number == 0)):
                self._refuse(ValueError, name, f"be finite and {'>=' if may_be_zero else '>'} 0", number)
        return tensors

    def __call__(self, arguments: Sequence[Any]) -> None:
        """All of them."""
        tensors = self.without_memory(arguments)
        reaches = {name: _reach(tensor) for name, tensor in tensors.items()}
        for name, reach in reaches.items():
            tensor, there = tensors[name], tensors[name].untyped_storage().nbytes()
            if reach and tensor.storage_offset() * tensor.itemsize + reach > there:
                self._refuse(ValueError, name, "lie within its storage", f"one of {there} bytes")
        if self.written:
            self._check_written(tensors, reaches)
        for name, of, distinct in self._rows:
            if tensors[name].device.type == "cpu" and len(tensors[name]):
                self._check_rows(name, of, distinct, tensors)

    def _check_dtype(self, name: str, wanted: _Wanted, tensors: Mapping[str, Tensor]) -> None:
        dtypes, why = wanted.dtypes, ""
        if wanted.like:
            dtypes, why = (tensors[wanted.like].dtype,), f", that of {wanted.like}"
        elif wanted.loss_of:
            dtypes, why = (computed_in(tensors[wanted.loss_of]),), f", that of a loss of {wanted.loss_of}"
        if tensors[name].dtype not in dtypes:
            words = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            self._refuse(TypeError, name, f"be of dtype {words}{why}", tensors[name].dtype)

    def _check_written(self, tensors: Mapping[str, Tensor], reaches: Mapping[str, int]) -> None:
        """No memory is written in two places, or read in one and written in another; a GPU reaches all."""
        for name, tensor in tensors.items():
            weight = tensors["weight"]
            if weight.is_cuda and not (tensor.is_cuda or tensor.is_pinned()):
                self._refuse(ValueError, name, "be on a GPU or in pinned memory", "memory that is not pinned")
        spans = [(name, x, x.data_ptr(), x.data_ptr() + reaches[name]) for name, x in tensors.items()]
        for name, tensor, begin, end in spans:
            if name not in self.written:
                continue
            if _overlaps_itself(tensor):
                self._refuse(ValueError, name, "not overlap itself", f"strides {tensor.stride()}")
            for other, x, other_begin, other_end in spans:
                if begin >= other_end or other_begin >= end or other == name:
                    continue
                if name == "outgoing" and other == "incoming" and _same_records(tensor, x):
                    self._check_none_comes_and_goes(tensors)
                elif _share_memory(tensor, x):
                    self._refuse(ValueError, name, f"share no memory with {other}", "tensors that do")

    def _check_none_comes_and_goes(self, tensors: Mapping[str, Tensor]) -> None:
        """Where `incoming` and `outgoing` are the same."""
        if tensors["incoming_rows"].device.type != "cpu":
            return
        both = np.intersect1d(tensors["incoming_rows"].numpy(), tensors["outgoing_rows"].numpy())
        if len(both):
            wanted = "be other rows than incoming_rows where outgoing is incoming"
            self._refuse(ValueError, "outgoing_rows", wanted, f"{both[0]} in both")

    def _check_rows(self, name: str, of: str, distinct: bool, tensors: Mapping[str, Tensor]) -> None:
        rows, count = np.sort(tensors[name].numpy()), len(tensors[of])
        if rows[0] < 0 or rows[-1] >= count:
            wanted = f"be rows of {of}, from 0 to {count - 1}"
            self._refuse(ValueError, name, wanted, f"values from {rows[0]} to {rows[-1]}")
        if distinct and (repeated := rows[1:][rows[1:] == rows[:-1]]).size:
            self._refuse(ValueError, name, "be distinct", f"{repeated[0]} more than once")

    def _refuse_shape(
        self, name: str, tensor: Tensor, shape: Sequence[str], sizes: Mapping[str, int]
    ) -> NoReturn:
        wanted = f"be ({', '.join(shape)}{',' * (len(shape) == 1)})"
        known = [f"{each} = {sizes[each]}" for each in shape if each in sizes and each not in _FIXED]
        if known:
            wanted += f" with {' and '.join(known)}"
        self._refuse(ValueError, name, wanted, f"shape {tuple(tensor.shape)}")

    def _refuse(self, error: type[Exception], name: str, wanted: str, got: object) -> NoReturn:
        raise error(f"{self._operator}: {name} must {wanted}, got {got}")


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to behind its last."""
    if tensor.is_contiguous() or not tensor.numel():
        return tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.itemsize


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether an element may be in another's place: whether a step along one dimension ends among what the
    dimensions of smaller steps reach."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += max(size - 1, 0) * stride
    return False


def _same_records(a: Tensor, b: Tensor) -> bool:
    """Whether rows of the same number are the same memory, and others are not."""
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Exactly, for tensors whose spans overlap, as those of columns beside each other do."""
    try:
        return np.shares_memory(_addresses(a), _addresses(b), max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _addresses(tensor: Tensor) -> np.ndarray:
    """An array where the tensor is, be it on a GPU: never to be read."""
    size = tensor.itemsize
    interface = {
        "version": 3,
        "data": (tensor.data_ptr(), True),
        "typestr": f"|V{size}",
        "shape": tuple(tensor.shape),
        "strides": tuple(size * stride for stride in tensor.stride()),
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
