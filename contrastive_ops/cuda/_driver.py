"""The CUDA driver, through NVIDIA's Python package: it loads compiled kernels and launches them.

A launch through `cuda.bindings`, which converts the arguments too, takes 0.9 µs of the host; through ctypes
it takes 2.5 µs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from operator import methodcaller
from types import ModuleType
from typing import Any, NamedTuple

from ._compiler import Program, compile_program, kernel_name

_INVALID_CONTEXT = 201
_LARGEST_UNASKED = 48 << 10  # bytes of shared memory that a kernel has without being allowed more
_HAS_FUNC_LOAD = 12040  # the first driver that has cuFuncLoad
_data_ptr = methodcaller("data_ptr")


@functools.cache
def driver() -> ModuleType:
    from cuda.bindings import driver

    return driver


def driver_version() -> int | None:
    """The CUDA version that the installed driver is for, 13000 for 13.0; None where there is no driver."""
    try:
        result, version = driver().cuDriverGetVersion()
    except Exception:  # of a class of cuda.pathfinder's that older versions lack
        return None
    return int(version) if int(result) == 0 else None


def _succeed(result: Any, what: str) -> None:
    if int(result) != 0:
        raise RuntimeError(f"CUDA driver: {what}: {result.name}")


def make_context_current(device: int) -> None:
    """In a thread that has not called CUDA's runtime yet no context is: that of torch's current device, whose
    number is `device`."""
    cuda = driver()
    result, context = cuda.cuCtxGetCurrent()
    _succeed(result, "cuCtxGetCurrent")
    if int(context) == 0:
        result, context = cuda.cuDevicePrimaryCtxRetain(device)
        _succeed(result, "cuDevicePrimaryCtxRetain")
        (result,) = cuda.cuCtxSetCurrent(context)
        _succeed(result, "cuCtxSetCurrent")


class Loaded(NamedTuple):
    """A kernel in the memory of a device, where it stays as long as the process runs."""

    function: Any
    shared_bytes: int


@functools.cache
def load(program: Program, device: int) -> Loaded:
    """A kernel, compiled and loaded on the current device, whose number is `device`.

    Loading is no part of what a CUDA graph repeats, and harmless to it: while it lasts, this thread may call
    what a capture would forbid.
    """
    image, cuda = compile_program(program), driver()
    make_context_current(device)
    relaxed = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    result, before = cuda.cuThreadExchangeStreamCaptureMode(relaxed)
    _succeed(result, "cuThreadExchangeStreamCaptureMode")
    try:
        result, module = cuda.cuModuleLoadData(image.code)
        _succeed(result, f"cannot load {program.name}")
        result, function = cuda.cuModuleGetFunction(module, kernel_name(program.name).encode())
        _succeed(result, f"cannot find {program.name}")
        if image.shared_bytes > _LARGEST_UNASKED:
            attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (result,) = cuda.cuFuncSetAttribute(function, attribute, image.shared_bytes)
            _succeed(result, f"{program.name} cannot have {image.shared_bytes} bytes of shared memory")
        if (driver_version() or 0) >= _HAS_FUNC_LOAD:  # else it would be loaded by its first launch
            (result,) = cuda.cuFuncLoad(function)
            _succeed(result, f"cannot load {program.name}")
    finally:
        cuda.cuThreadExchangeStreamCaptureMode(before)
    return Loaded(function, image.shared_bytes)


class Run:
    """A loaded kernel with its grid. Called with the stream, its tensors and its numbers, it is launched."""

    def __init__(
        self,
        program: Program,
        device: int,
        grid: tuple[int, ...],
        threads: int,
        tensors: int,
        numbers: Sequence[type[Any]],
    ) -> None:
        self.loaded = load(program, device)
        self._name, self._device = program.name, device
        self._tensors, self._numbers = tensors, numbers
        self._types = (*[ctypes.c_void_p] * tensors, *numbers)
        self._launch = driver().cuLaunchKernel
        self._shape = (*grid, threads, 1, 1, self.loaded.shared_bytes)

    def __call__(self, stream: int, *arguments: Any) -> None:
        count = self._tensors
        values = (*map(_data_ptr, arguments[:count]), *arguments[count:])
        launched = (self.loaded.function, *self._shape, stream, (values, self._types), 0)
        (result,) = self._launch(*launched)
        if result == _INVALID_CONTEXT:
            make_context_current(self._device)
            (result,) = self._launch(*launched)
        if result:
            raise RuntimeError(f"CUDA driver: cannot launch {self._name}: {result.name}")

    def parameters(self, arguments: Sequence[Any]) -> Iterator[Any]:
        """The arguments as the kernel gets them: tensors, and numbers as they lie in memory."""
        yield from arguments[: self._tensors]
        for kind, number in zip(self._numbers, arguments[self._tensors :], strict=True):
            yield bytes(kind(number))
