"""Launches of kernels in CUDA C++: how the host's arguments, which have names, become those of a program.

Arguments of one kind share a program. Its text is made here: it declares a struct `Arguments` of what the
host gives, under the host's names, and a kernel that fills it and calls a function of csrc/cuda with it. That
of "exchange" is in csrc/cuda/exchange.h, that of "co2.merge" in csrc/cuda/co2.h:

    namespace contrastive_ops { template <typename Arguments> __device__ void co2_merge(const Arguments&); }

So the compiler compares names and types of the two sides:

    a tensor                 T*, where T is float, double, Half, BFloat16, int or long long; None is nullptr
    integer, number, flag    long long, double, bool
    Matrix, Vector, Views    the struct templates of these names in csrc/cuda/numbers.h
    another tuple            a struct of its fields
    in capitals              a constant, or a type for a dtype; a Tile is a struct of such; left out where the
                             header does not ask for it, which would but make more programs
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gpu.arguments import Matrix, Tile, Vector, Views
from ..gpu.launch import TENSORS, Chip, Kernels, Launch, current_tape
from ..gpu.tiles import Tiling
from . import tiles
from ._compiler import Program, constants_in, kernel_name, target_for
from ._driver import Run

_TEMPLATES = (Matrix, Vector, Views)
_DTYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int32: "int",
    torch.int64: "long long",
}
_NUMBERS = {
    int: ("long long", ctypes.c_longlong),
    float: ("double", ctypes.c_double),
    bool: ("bool", ctypes.c_bool),
}


class Layout(NamedTuple):
    """How arguments of one kind become those of a program: its text, and the types of its numbers."""

    text: str
    tensors: int
    numbers: tuple[type[Any], ...]


class _Writer:
    """Writes the declarations of the arguments, and collects the kernel's parameters."""

    def __init__(self) -> None:
        self.tensors: list[str] = []
        self.numbers: list[tuple[str, type[Any]]] = []

    def declare(self, name: str, value: Any) -> tuple[str, str]:
        """The declaration of a member of that name, and its initialiser, which a constant has not."""
        if name.isupper():
            return self._constant(name, value), ""
        if value is None:
            return f"decltype(nullptr) {name};", "nullptr"
        if isinstance(value, Tensor):
            kind = f"{_DTYPES[value.dtype]}*"
            self.tensors.append(kind)
            return f"{kind} {name};", f"t{len(self.tensors) - 1}"
        if isinstance(value, _TEMPLATES):
            element = "void" if value.data is None else _DTYPES[value.data.dtype]
            _, parts = zip(*(self.declare(*part) for part in value._asdict().items()), strict=True)
            return f"{type(value).__name__}<{element}> {name};", "{" + ", ".join(parts) + "}"
        if isinstance(value, tuple):
            fields = value._asdict()  # type: ignore[attr-defined]
            members, parts = zip(*(self.declare(*part) for part in fields.items()), strict=True)
            return f"struct {{ {' '.join(members)} }} {name};", "{" + ", ".join(parts) + "}"
        kind, ctype = _NUMBERS[type(value)]
        self.numbers.append((kind, ctype))
        return f"{kind} {name};", f"n{len(self.numbers) - 1}"

    def _constant(self, name: str, value: Any) -> str:
        if isinstance(value, Tile):
            fields = " ".join(self._constant(*part) for part in value._asdict().items())
            return f"struct {name} {{ {fields} }};"
        if isinstance(value, torch.dtype):
            return f"using {name} = {_DTYPES[value]};"
        if isinstance(value, bool):
            return f"static constexpr bool {name} = {str(value).lower()};"
        if isinstance(value, str):
            return f"static constexpr Precision {name} = Precision::{value};"
        return f"static constexpr int {name} = {value};"


def layout(name: str, threads: int, programs: int, arguments: dict[str, Any]) -> Layout:
    """Of a kernel and its arguments, of which tensors count as their dtypes and numbers as their types. A
    multiprocessor is to hold that many `programs` of so many threads."""
    writer = _Writer()
    members, parts = zip(*(writer.declare(*part) for part in arguments.items()), strict=True)
    parameters = [f"{kind} t{i}" for i, kind in enumerate(writer.tensors)]
    parameters += [f"{kind} n{i}" for i, (kind, _) in enumerate(writer.numbers)]
    text = "\n".join(
        [
            f'#include "{header_of(name)}"',
            "",
            "using namespace contrastive_ops;",
            "",
            "struct Arguments {",
            *(f"  {member}" for member in members),
            "};",
            "",
            f'extern "C" __global__ void __launch_bounds__({threads}, {programs})',
            f"{kernel_name(name)}({', '.join(parameters)}) {{",
            f"  const Arguments arguments{{{', '.join(filter(None, parts))}}};",
            f"  {name.replace('.', '_')}(arguments);",
            "}",
            "",
        ]
    )
    return Layout(text, len(writer.tensors), tuple(ctype for _, ctype in writer.numbers))


def take(values: Iterable[Any], kinds: list[Any], tensors: list[Tensor], numbers: list[Any]) -> None:
    """Appends what a program depends on of arguments that are not in capitals, which are the types of numbers
    and dtypes, and the arguments in the order of a layout's parameters."""
    for value in values:
        kind = type(value)
        if kind in TENSORS or isinstance(value, Tensor):
            kinds.append(value.dtype)
            tensors.append(value)
        elif kind in _NUMBERS:
            kinds.append(kind)
            numbers.append(value)
        else:
            kinds.append(kind)
            if value is not None:
                take(value, kinds, tensors, numbers)


def header_of(name: str) -> str:
    """The file of csrc that has a kernel."""
    return f"cuda/{name.partition('.')[0]}.h"


def _has_vectors(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether rows are stored as they are multiplied, and can be read 16 bytes at a time."""
    row, column = rows.stride()
    return (
        rows.dtype == dtype
        and column == 1
        and row * rows.itemsize % 16 == 0
        and rows.shape[1] * rows.itemsize % 16 == 0
        and (rows.is_meta or rows.data_ptr() % 16 == 0)
    )


@functools.lru_cache(maxsize=1024)
def _sorted(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The names of constants, which are in capitals, and the others."""
    return [each for each in names if each.isupper()], [each for each in names if not each.isupper()]


class CudaLaunch(Launch):
    """A kernel in CUDA C++. What a program needs besides the arguments is looked up by their kinds."""

    def __init__(
        self,
        kernels: CudaKernels,
        name: str,
        grid: tuple[int, ...],
        arguments: dict[str, Any],
        warps: int,
        programs: int,
    ) -> None:
        super().__init__(name, grid, arguments)
        self._kernels, self.threads, self.programs = kernels, 32 * warps, programs
        self._own_numbers: list[Any] = []
        take((value for each, value in arguments.items() if not each.isupper()), [], [], self._own_numbers)
        self._runs: dict[Any, Run] = {}

    def asked_for(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What device code wants of the arguments, to which those of the launch itself belong."""
        given = {name: value for name, value in arguments.items() if name not in self.arguments}
        constants = constants_in(header_of(self.name))
        every = (given | self.arguments).items()
        return {name: value for name, value in every if not name.isupper() or name in constants}

    def layout(self, arguments: dict[str, Any]) -> Layout:
        return layout(self.name, self.threads, self.programs, self.asked_for(arguments))

    def program(self, arguments: dict[str, Any], target: str) -> Program:
        """What is compiled for arguments of these kinds."""
        return Program(self.name, self.layout(arguments).text, target)

    def run(self, arguments: dict[str, Any]) -> None:
        device, names = self._kernels.current_device(), tuple(arguments)
        constant, varying = _sorted(names)
        key: list[Any] = [device, names, *map(arguments.__getitem__, constant)]
        tensors: list[Tensor] = []
        numbers: list[Any] = []
        take(map(arguments.__getitem__, varying), key, tensors, numbers)
        exact = tuple(key)
        run = self._runs.get(exact)
        if run is None:
            self._runs[exact] = run = self._load(device, arguments)
        parameters = (*tensors, *numbers, *self._own_numbers)
        if (tape := current_tape()) is not None:
            shared_bytes = run.loaded.shared_bytes
            tape.launches(
                self, run, int(run.loaded.function), self.threads, shared_bytes, run.parameters(parameters)
            )
        run(self._kernels.current_stream(), *parameters)

    def _load(self, device: int, arguments: dict[str, Any]) -> Run:
        text, tensors, numbers = self.layout(arguments)
        program = Program(self.name, text, self._kernels.target(device))
        return self._kernels.run(program, device, self.whole_grid, self.threads, tensors, numbers)


class CudaKernels(Kernels):
    """The kernels of csrc/cuda on the GPUs of this process."""

    device_type = "cuda"

    def launch(
        self, name: str, grid: tuple[int, ...], arguments: dict[str, Any], tiling: Tiling | None = None
    ) -> Launch:
        if tiling is None:
            # Kernels that merge parts have a warp for each row.
            warps = arguments["ROWS"] if "PARTS" in arguments else 4
            return CudaLaunch(self, name, grid, arguments, warps, 1)
        stages = {"STAGES": tiling.stages}
        return CudaLaunch(self, name, grid, arguments | stages, tiling.warps, tiling.programs)

    def tiling(self, name: str, capability: tuple[int, int], precision: str, dim: int) -> Tiling:
        return tiles.select(name, capability, precision, dim)

    def operands_of(self, dtype: torch.dtype, chip: Chip) -> tuple[torch.dtype, str]:
        """Before Ampere tensor cores know neither bfloat16 nor TF32: both are multiplied in float32."""
        if chip.capability < (8, 0) and dtype != torch.float16:
            return torch.float32, "tf32x3"
        return super().operands_of(dtype, chip)

    def reading(self, dtype: torch.dtype, matrices: Sequence[Tensor]) -> dict[str, Any]:
        return {"VECTORS": all(_has_vectors(each, dtype) for each in matrices)}

    def current_device(self) -> int:
        return torch.cuda.current_device()

    def current_stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())

    @functools.cache  # noqa: B019  (there is one for the process)
    def target(self, device: int) -> str:
        """What is compiled for a device."""
        return target_for(torch.cuda.get_device_capability(device))

    def run(self, program: Program, device: int, *shape_and_types: Any) -> Run:
        """A kernel on the current device, ready to be launched."""
        return Run(program, device, *shape_and_types)


KERNELS = CudaKernels()
