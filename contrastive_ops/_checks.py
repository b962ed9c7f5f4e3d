"""What the operators ask of their arguments: once, for all backends, before anything is read or written.

A backend takes memory to be what shapes, strides and indices say. Every call in which it is not is refused
here, by a TypeError or ValueError that names operator and argument.

The values of indices are looked at where the host has them. For those of a GPU it would have to wait: there
kernels neither read nor write rows outside, and what comes of it stands in `reference.py`.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ._calls import Known, signature
from ._contract import computed_in

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DOUBLE, _INDEX = (torch.float64,), (torch.int64,)


def check_tensor(name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOATING, dtype_of: str = "") -> None:
    """Refuse what is no dense tensor of one of these dtypes.

    Args:
        name: the argument's, for the message, with what stands before it.
        value: the argument.
        dtypes: which it may have.
        dtype_of: whose dtype that is, where it is another argument's.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be of dtype {wanted}{dtype_of}, got {value.dtype}")


def check_filled(name: str, tensor: Tensor) -> None:
    """Refuse a tensor without elements."""
    if 0 in tensor.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")


def check_device(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    """Refuse a tensor that is elsewhere than a call's first."""
    if tensor.device != first.device:
        raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}")


def check_number(name: str, value: Any, *, above: float | None = None, minimum: float = 0) -> float:
    """The value as Python's own number; NumPy's are numbers too."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # Written as comparisons, which NaN fails, because torch.compile may trace the value as a symbol. Integers
    # and NumPy's longer floats may be finite and yet beyond Python's own.
    finite = value <= sys.float_info.max if isinstance(value, int) else float(value) < math.inf
    if above is not None:
        valid, wanted = value > above, f"> {above}"
    else:
        valid, wanted = value >= minimum, f">= {minimum}"
    if not (finite and valid):
        raise ValueError(f"{name} must be finite and {wanted}, got {value}")
    return float(value)


def check_integer(name: str, value: Any, minimum: int) -> int:
    """The value as Python's own integer; NumPy's are integers too."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def check_floating(name: str, value: Any) -> None:
    """Whether it is a tensor of a floating-point dtype."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point torch.Tensor, got {got}")


def check_floating_dtype(dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


@dataclass(frozen=True)
class _Wanted:
    """What is asked of a tensor: its sizes, in which a letter stands for one number throughout a call, and
    its dtype, which is one of some, that of another argument, or that of another's loss.

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
_CONIC_BACKWARD = {"grad_loss": _Wanted("B", loss_of="views"), "statistics": _Wanted("V B 3", _DOUBLE)}
_MOMENTUM = {"momentum_buffer": _Wanted("A D", like="weight")}

_NT_XENT = {"views": _Wanted("2 B D")}
_NT_XENT_BACKWARD = _NT_XENT | {
    "grad_loss": _Wanted("2B", loss_of="views"),
    "statistics": _Wanted("2B 5", _DOUBLE),
}
_CO2 = {"query": _Wanted("B D"), "key": _Wanted("B D"), "queue": _Wanted("K D")}

# The targets there are rows of the whole weight, of which this rank has a part.
_CONIC_OF_SHARDS = _CONIC | {"target": _Wanted("B", _INDEX)}
_ACROSS_RANKS = {
    "co2_across_ranks": _CO2,
    "nt_xent_across_ranks": _NT_XENT,
    "nt_xent_across_ranks_backward": _NT_XENT_BACKWARD,
    "conic_across_ranks": _CONIC_OF_SHARDS,
    "conic_across_ranks_backward": _CONIC_OF_SHARDS | _CONIC_BACKWARD,
    "conic_across_ranks_backward_sgd_": _CONIC_OF_SHARDS | _MOMENTUM | _CONIC_BACKWARD,
}

# The tensors of each operator in the order in which they are looked at; all are on the device of the first.
_TENSORS = {
    **_ACROSS_RANKS,
    "co2": _CO2,
    "scale_gradient": {
        "query": _Wanted("B D"),
        "gradient": _Wanted("B D", loss_of="query"),
        "grad_loss": _Wanted("B", loss_of="query"),
    },
    "nt_xent": _NT_XENT,
    "nt_xent_backward": _NT_XENT_BACKWARD,
    "conic": _CONIC,
    "conic_backward": _CONIC | _CONIC_BACKWARD,
    "conic_backward_sgd_": _CONIC | _MOMENTUM | _CONIC_BACKWARD,
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
# Where nothing is done then, or other ranks have what this one lacks. Alone a loss needs something of
# everything.
_MAY_BE_EMPTY = ("sgd_", "exchange_rows_", *_ACROSS_RANKS)
_MAY_BE_ZERO = ("instance_weight", "consistency_weight", "lr", "momentum", "weight_decay")
_FIXED = {"2": 2, "3": 3, "5": 5}


class Checks:
    """The checks of one operator, whose schema says where its arguments stand, and which it writes."""

    def __init__(self, name: str, schema: torch._C.FunctionSchema) -> None:
        place = {argument.name: i for i, argument in enumerate(schema.arguments)}
        self._operator = f"contrastive_ops::{name}"
        self._wanted = _TENSORS[name]
        self._places = [place[each] for each in self._wanted]
        self._numbers = [
            (each.name, place[each.name], each.name in _MAY_BE_ZERO)
            for each in schema.arguments
            if str(each.type) == "float"
        ]
        self._rows = [(each, wanted) for each, wanted in self._wanted.items() if wanted.rows_of]
        self._may_be_empty = name in _MAY_BE_EMPTY
        self._known: Known[list[int]] = Known()
        self.written = [each.name for each in schema.arguments if each.is_write]

    def without_memory(self, arguments: Sequence[Any]) -> None:
        """What can be asked of meta tensors too: layout, dtype, shape, device; and numbers."""
        self._check_tensors([arguments[place] for place in self._places])
        self._check_numbers(arguments)

    def __call__(self, arguments: Sequence[Any]) -> None:
        """All checks."""
        tensors = [arguments[place] for place in self._places]
        # Nearly every call has tensors like those of another, and to see that takes little of the time.
        kind = signature(tuple(tensors))
        reaches = None if kind is None else self._known.get(kind)
        if reaches is None:
            reaches = self._check_storages(self._check_tensors(tensors))
            if kind is not None:
                self._known.remember(kind, reaches)
        self._check_numbers(arguments)
        if not (self.written or self._rows):
            return
        named = dict(zip(self._wanted, tensors, strict=True))
        if self.written:
            self._check_places(named, reaches)
        for name, wanted in self._rows:
            if named[name].is_cpu and named[name].numel():
                self._check_rows(name, wanted, named)

    def _check_tensors(self, given: Sequence[Any]) -> dict[str, Tensor]:
        """Layout, dtype, shape and device; returns the tensors by name."""
        tensors = dict(zip(self._wanted, given, strict=True))
        sizes: dict[str, int] = dict(_FIXED)
        first = next(iter(tensors))
        for name, wanted in self._wanted.items():
            tensor, shape, said = tensors[name], wanted.shape.split(), f"{self._operator}: {name}"
            dtypes, why = wanted.dtypes, ""
            if wanted.like:
                dtypes, why = (tensors[wanted.like].dtype,), f", that of {wanted.like}"
            elif wanted.loss_of:
                dtypes, why = (computed_in(tensors[wanted.loss_of]),), f", that of a loss of {wanted.loss_of}"
            check_tensor(said, tensor, dtypes, why)
            if tensor.ndim != len(shape):
                self._refuse_shape(name, tensor, shape, sizes)
            for dimension, size in zip(shape, tensor.shape, strict=True):
                if dimension == "2B":
                    sizes[dimension] = 2 * sizes["B"]
                if sizes.setdefault(dimension, size) != size:
                    self._refuse_shape(name, tensor, shape, sizes)
            if not self._may_be_empty:
                check_filled(said, tensor)
            if not (wanted.or_host and tensor.is_cpu and tensors[first].device.type != "meta"):
                check_device(said, tensor, first, tensors[first])
        return tensors

    def _check_numbers(self, arguments: Sequence[Any]) -> None:
        for name, place, may_be_zero in self._numbers:
            number = arguments[place]
            if not (0 < number < math.inf or (may_be_zero and number == 0)):
                self._refuse(ValueError, name, f"be finite and {'>=' if may_be_zero else '>'} 0", number)

    def _check_storages(self, tensors: Mapping[str, Tensor]) -> list[int]:
        """A tensor lies within its storage, and one that is written has a place for each element. Returns how
        far each reaches."""
        for name, tensor in tensors.items():
            there = tensor.untyped_storage().nbytes()
            if tensor.numel() and tensor.storage_offset() * tensor.itemsize + _reach(tensor) > there:
                self._refuse(ValueError, name, "lie within its storage", f"one of {there} bytes")
            if name in self.written and _overlaps_itself(tensor):
                self._refuse(ValueError, name, "not overlap itself", f"strides {tensor.stride()}")
        return [_reach(tensor) for tensor in tensors.values()]

    def _check_places(self, tensors: Mapping[str, Tensor], reaches: Sequence[int]) -> None:
        """What is written is no other argument's memory, and a GPU reaches all memory."""
        if tensors["weight"].is_cuda:
            for name, tensor in tensors.items():
                if tensor.is_cpu and not tensor.is_pinned():
                    self._refuse(ValueError, name, "be on a GPU or in pinned memory", "other memory")
        starts = [tensor.data_ptr() for tensor in tensors.values()]
        spans = list(zip(tensors, starts, map(operator.add, starts, reaches), strict=True))
        for name, begin, end in spans:
            if name not in self.written:
                continue
            for other, other_begin, other_end in spans:
                if begin < other_end and other_begin < end and other != name:
                    self._check_pair(name, other, tensors)

    def _check_pair(self, name: str, other: str, tensors: Mapping[str, Tensor]) -> None:
        """Refuse two tensors whose spans overlap, and of which the first is written, if they share memory."""
        if name != "outgoing" or other != "incoming" or not _same_records(tensors[name], tensors[other]):
            if _share_memory(tensors[name], tensors[other]):
                self._refuse(ValueError, name, f"share no memory with {other}", "tensors that do")
        elif tensors["incoming_rows"].is_cpu:
            come, go = (np.sort(tensors[rows].numpy()) for rows in ("incoming_rows", "outgoing_rows"))
            if _repeated(np.concatenate([come, go])).size and (both := np.intersect1d(come, go)).size:
                words = "be other rows than incoming_rows where outgoing is incoming"
                self._refuse(ValueError, "outgoing_rows", words, f"{both[0]} in both")

    def _check_rows(self, name: str, wanted: _Wanted, tensors: Mapping[str, Tensor]) -> None:
        rows, count = tensors[name], tensors[wanted.rows_of].shape[0]
        lowest, highest = (extreme.item() for extreme in torch.aminmax(rows))
        if lowest < 0 or highest >= count:
            words = f"be rows of {wanted.rows_of}, from 0 to {count - 1}"
            self._refuse(ValueError, name, words, f"values from {lowest} to {highest}")
        if wanted.distinct and (repeated := _repeated(np.sort(rows.numpy()))).size:
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


def _repeated(rows: np.ndarray) -> np.ndarray:
    """What comes more than once in rows that are sorted, or one after the other in two parts that are."""
    rows = np.sort(rows, kind="stable")
    return rows[1:][rows[1:] == rows[:-1]]


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
