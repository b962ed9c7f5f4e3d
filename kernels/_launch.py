"""How Triton's kernels are launched; `gpu.launch` has what is not Triton's."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..gpu.arguments import Tile, matrix, vector
from ..gpu.launch import (
    TENSORS,
    Call,
    Chip,
    Kernels,
    Launch,
    Products,
    Replay,
    Tape,
    current_tape,
    forget_plans,
    precision_of,
    recording,
    steps_a_range,
)
from ..gpu.tiles import Tiling
from ._tiles import select

__all__ = [  # with what those who look at kernels need besides
    "TRITON", "Call", "Chip", "Launch", "Products", "Replay", "TritonKernels", "TritonLaunch", "forget_plans",
    "matrix", "precision_of", "recording", "select", "steps_a_range", "vector",
]  # fmt: skip

# Versions of Triton whose compiled kernels are known to be launched by `run` as below.
_KNOWN_TRITON = (3, 5) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 8)
_MOST_COMPILED = 64  # of one launch; more than a few come from arguments that change from call to call


def _specialization(values: Iterable[Any], key: list[Any]) -> None:
    """Appends what Triton's compiler is told of arguments, and more where that is less work: whether a
    pointer or an integer is divisible by 16, and whether an integer is 1. A number that is no float stands
    for itself, with its type, for 1 and True are equal."""
    for value in values:
        kind = type(value)
        if kind in TENSORS:
            key.append(value.dtype)
            key.append(value.data_ptr() % 16)
        elif kind is float:
            key.append(kind)
        elif issubclass(kind, tuple):
            key.append(kind)
            _specialization(value, key)
        elif isinstance(value, Tensor):  # of a class of its own
            key += kind, value.dtype, value.data_ptr() % 16
        else:
            key.append(kind)
            key.append(value)


def is_observed() -> bool:
    """Whether launches are to be told to somebody, or kernels to be compiled in another way than usual."""
    runtime = triton.knobs.runtime
    return bool(
        runtime.debug
        or _has_calls(runtime.launch_enter_hook)
        or _has_calls(runtime.launch_exit_hook)
        or getattr(runtime, "add_stages_inspection_hook", None)
        or getattr(triton.knobs.compilation, "instrumentation_mode", "")
    )


def _has_calls(hook: Any) -> bool:
    """Whether it is more than an empty chain of hooks."""
    return hook is not None and getattr(hook, "calls", True) != []


class Compiled(NamedTuple):
    """What a launch needs of a compiled kernel, which is kept because it would be unloaded with its last
    reference."""

    kernel: Any
    run: Callable[..., Any]
    function: Any
    metadata: Any


# Numbers as Triton's launcher hands them to a kernel, by their types in its signature.
_NUMBERS: dict[str, type[Any]] = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32,
    "i64": ctypes.c_int64, "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32, "u64": ctypes.c_uint64, "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip
# Every kernel takes the addresses of two pieces of memory of its own last, whether it has any or not.
_NO_SCRATCH = (bytes(8), bytes(8))
_MOST_SHARED_BYTES = 228 << 10  # beyond, a launch has to ask for them in another way


def _is_launched_plainly(metadata: Any) -> bool:
    """Whether a launch is no more than that of a grid of blocks with its arguments: without clusters, without
    memory that its launcher would allocate, and beginning when the launch before it has ended."""
    others = (
        "launch_pdl", "launch_cooperative_grid", "global_scratch_size", "profile_scratch_size",
        "tensordesc_meta", "instrumentation_mode",
    )  # fmt: skip
    is_plain = metadata.num_ctas == 1 and metadata.shared <= _MOST_SHARED_BYTES
    return is_plain and not any(getattr(metadata, each, None) for each in others)


def _parameters(kinds: Iterable[Any], values: Iterable[Any]) -> Iterator[Tensor | bytes]:
    """A kernel's arguments by their types in its signature, without those that are compiled in."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _parameters(kind, value)
        elif kind.startswith("*"):
            yield value
        elif kind != "constexpr":
            yield bytes(_NUMBERS[kind](value))


def _as_triton(value: Any) -> Any:
    """An argument of the host's as Triton compiles it in."""
    if isinstance(value, Tile):
        return value._replace(dtype=getattr(tl, str(value.dtype).removeprefix("torch.")))
    return value


class TritonLaunch(Launch):
    """A kernel of Triton's.

    Triton's own launch, `kernel[grid](...)`, takes 25 to 50 µs to look at all arguments before it finds the
    compiled kernel. Here that is done once for each of their kinds, and then the compiled kernel is called.

    Attributes:
        kernel: Triton's function.
        arguments: Triton's own `num_warps` and `num_stages` are among them.
    """

    def __init__(self, name: str, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        arguments = {each: _as_triton(value) for each, value in arguments.items()}
        super().__init__(name, grid, arguments)
        self.kernel = kernel
        self._compiled: dict[Any, Compiled] = {}
        self._is_compiled = _KNOWN_TRITON and isinstance(kernel, triton.JITFunction)
        if self._is_compiled:
            names = kernel.arg_names
            given = [name for name in names if name not in arguments]
            fixed = [name for name in names if name in arguments]
            self._constants = [
                each.name for each in kernel.params if each.is_constexpr and each.name in given
            ]
            self._fixed = tuple(arguments[name] for name in fixed)
            self._select_given = itemgetter(*given)
            # From given and fixed arguments, one after the other, to the order of the kernel's.
            self._in_order = itemgetter(*map([*given, *fixed].index, names))

    def is_observed(self) -> bool:
        return bool(self.kernel.pre_run_hooks)

    def run(self, arguments: dict[str, Any]) -> None:
        if not self._is_compiled or is_observed() or self.kernel.pre_run_hooks:
            self._leave_to_triton(arguments)
        else:
            self._launch(arguments)

    def _leave_to_triton(self, arguments: dict[str, Any]) -> Any:
        if (tape := current_tape()) is not None:
            tape.is_whole = False
        return self.kernel[self.grid](**arguments, **self.arguments)

    def _launch(self, arguments: dict[str, Any]) -> None:
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        given = self._select_given(arguments)
        specialization = [device]
        _specialization(given, specialization)
        key = tuple(specialization)
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compile(key, arguments)
            return
        ordered = self._in_order(given + self._fixed)
        kernel, run, function, metadata = compiled
        if (tape := current_tape()) is not None:
            self._record(tape, kernel, ordered)
        stream = driver.get_current_stream(device)
        # None for what would be told to hooks, and for the hooks before and after.
        run(*self.whole_grid, stream, function, metadata, None, None, None, *ordered)

    def _record(self, tape: Tape, kernel: Any, arguments: Sequence[Any]) -> None:
        """Tells the tape of a launch, as Triton's own launcher would make it."""
        if not _is_launched_plainly(kernel.metadata):
            tape.is_whole = False
            return
        parameters = _parameters(kernel.src.signature.values(), arguments)
        threads, shared_bytes = 32 * kernel.metadata.num_warps, kernel.metadata.shared
        tape.launches(self, kernel, kernel.function, threads, shared_bytes, (*parameters, *_NO_SCRATCH))

    def _compile(self, key: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """Launches as Triton does, and keeps what it has compiled."""
        kernel = self._leave_to_triton(arguments)
        if kernel is None or any(isinstance(arguments[name], float) for name in self._constants):
            return  # a hook refused it, or it is compiled for a number that is not in the key
        if len(self._compiled) >= _MOST_COMPILED:
            self._compiled.clear()
        self._compiled[key] = Compiled(kernel, kernel.run, kernel.function, kernel.packed_metadata)


class TritonKernels(Kernels):
    """The kernels of this folder, of which each module names its own."""

    def launch(
        self, name: str, grid: tuple[int, ...], arguments: dict[str, Any], tiling: Tiling | None = None
    ) -> TritonLaunch:
        module = importlib.import_module(f"._{name.partition('.')[0]}", __package__)
        options = tiling.options if tiling else {}
        return TritonLaunch(name, module.KERNELS[name], grid, arguments | options)

    def tiling(self, name: str, capability: tuple[int, int], precision: str, dim: int) -> Tiling:
        return select(name, capability, precision, dim)

    def current_stream(self) -> int:
        driver = triton.runtime.driver.active
        return int(driver.get_current_stream(driver.get_current_device()))

    def may_replay(self) -> bool:
        return _KNOWN_TRITON and not is_observed()


TRITON = TritonKernels()
