"""Runs the kernels of csrc/cuda on CPU tensors: compiled by NVRTC, and their PTX executed in the emulator.

A kernel's text declares what the host gives as a struct, under its names, and calls the kernel's function in
csrc/cuda with it; see `text_of`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from contrastive_ops.kernels import _launch as host
from torch import Tensor

from contrastive_ops.cuda import tiles
from tests.gpu_emulator import machine
from tests.gpu_emulator.memory import GlobalMemory
from tests.gpu_emulator.ptx import parse

SOURCES = Path(__file__).parents[1] / "csrc"
# The last NVRTC that knows compute capabilities below 7.5: pip install --target build/nvrtc-12
# nvidia-cuda-nvrtc-cu12.
NVRTC_12 = Path(__file__).parents[1] / "build" / "nvrtc-12"
MULTIPROCESSORS = 4  # few, so that small problems have few programs, and yet several
KERNEL = "contrastive_ops_kernel"
SHARED_BYTES = "contrastive_ops_shared_bytes"
DTYPES = {
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "float",
    torch.float64: "double",
    torch.int32: "int",
    torch.int64: "long long",
}


@functools.cache
def nvrtc(architecture: int) -> ctypes.CDLL | None:
    """The compiler for an architecture, 75 for compute capability 7.5; None where it is not installed."""
    if architecture < 75:
        folders = [NVRTC_12]
    else:
        found = importlib.util.find_spec("nvidia")
        folders = [Path(place) for place in found.submodule_search_locations or ()] if found else []
    libraries = [file for folder in folders for file in sorted(folder.rglob("libnvrtc.so.1[23]"))]
    if not libraries:
        return None
    for builtins in libraries[-1].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # else it looks for this where the system's libraries are
    return ctypes.CDLL(str(libraries[-1]))


class Compiled(NamedTuple):
    """What NVRTC makes of a kernel.

    Attributes:
        code: PTX as text in ASCII, or an ELF file.
        log: what the assembler says of registers and spilled bytes, if it was asked.
    """

    code: bytes
    log: str


@functools.cache
def compile_text(text: str, architecture: int, machine_code: bool = False) -> Compiled:
    """PTX of a text, or machine code with a report on it."""
    compiler = nvrtc(architecture)
    assert compiler is not None, f"no NVRTC for {architecture}"
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    target = f"--gpu-architecture={'sm' if machine_code else 'compute'}_{architecture}"
    options = [target, "--std=c++20", f"-I{SOURCES}", *(["--ptxas-options=-v"] if machine_code else [])]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))

    def output(kind: str) -> bytes:
        getattr(compiler, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(compiler, f"nvrtcGet{kind}")(program, buffer)
        return buffer.raw

    compiler.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    failed = compiler.nvrtcCompileProgram(program, len(options), encoded)
    log = output("ProgramLog").rstrip(b"\0").decode()
    assert not failed, f"{log}\n{text}"
    return Compiled(output("CUBIN") if machine_code else output("PTX").rstrip(b"\0"), log)


def _declared(name: str, value: Any, parameters: list[str]) -> tuple[str, str]:
    """The declaration of a member of the arguments, and its initialiser, which a constant has none of."""
    if name.isupper() and hasattr(value, "_fields"):
        parts = " ".join(_declared(field.upper(), part, [])[0].replace(field.upper(), field)
                         for field, part in value._asdict().items())  # fmt: skip
        return f"struct {name} {{ {parts} }};", ""
    if name.isupper():
        if isinstance(value, torch.dtype):
            return f"using {name} = {DTYPES[value]};", ""
        kind = {bool: "bool", int: "int", str: "Precision"}[type(value)]
        shown = {bool: str(value).lower(), int: str(value), str: f"Precision::{value}"}[type(value)]
        return f"static constexpr {kind} {name} = {shown};", ""
    if value is None:
        return f"decltype(nullptr) {name};", "nullptr"
    if hasattr(value, "_fields"):
        members, parts = zip(
            *(_declared(field, part, parameters) for field, part in value._asdict().items()), strict=True
        )
        kind = f"struct {{ {' '.join(members)} }}"
        if (template := type(value).__name__.removeprefix("_")) in ("Matrix", "Vector", "Views"):
            kind = f"{template}<{'void' if value.data is None else DTYPES[value.data.dtype]}>"
        return f"{kind} {name};", "{" + ", ".join(parts) + "}"
    kind = (
        f"{DTYPES[value.dtype]}*"
        if isinstance(value, Tensor)
        else {int: "long long", float: "double"}[type(value)]
    )
    parameters.append(kind)
    return f"{kind} {name};", f"p{len(parameters) - 1}"


def text_of(name: str, threads: int, programs: int, arguments: dict[str, Any]) -> str:
    """What is compiled for a kernel, by its name, such as "co2.merge", and arguments of such types."""
    parameters: list[str] = []
    members, parts = zip(*(_declared(*each, parameters) for each in arguments.items()), strict=True)
    return "\n".join(
        [
            f'#include "cuda/{name.partition(".")[0]}.h"',
            "using namespace contrastive_ops;",
            "struct Arguments {",
            *members,
            "};",
            f'extern "C" __global__ void __launch_bounds__({threads}, {programs})',
            f"{KERNEL}({', '.join(f'{kind} p{i}' for i, kind in enumerate(parameters))}) {{",
            f"  {name.replace('.', '_')}(Arguments{{{', '.join(filter(None, parts))}}});",
            "}",
        ]
    )


def _leaves(value: Any) -> Iterator[Any]:
    if hasattr(value, "_fields"):
        for part in value:
            yield from _leaves(part)
    elif value is not None:
        yield value


def shared_bytes(ptx: str) -> int:
    """How much dynamic shared memory a kernel says that it needs."""
    found = re.search(rf"{SHARED_BYTES}E? = (\d+);", ptx)
    return int(found[1]) if found else 0


@functools.cache
def _program(text: str, architecture: int) -> tuple[machine.Program, int]:
    ptx = compile_text(text, architecture).code.decode()
    return machine.Program(parse(ptx)), shared_bytes(ptx)


def launch(
    name: str, architecture: int, grid: Iterable[int], threads: int, programs: int, arguments: dict[str, Any]
) -> None:
    """Runs a kernel. Tensors among the arguments are on the CPU, and all memory that it may touch."""
    program, shared = _program(text_of(name, threads, programs, arguments), architecture)
    memory, words = GlobalMemory(), []
    for key, value in arguments.items():
        for leaf in () if key.isupper() else _leaves(value):
            if isinstance(leaf, Tensor):
                memory.add(leaf.untyped_storage().data_ptr(), leaf.untyped_storage().nbytes())
                words.append(np.array([leaf.data_ptr()], np.uint64))
            else:
                words.append(np.array([leaf], np.float64 if isinstance(leaf, float) else np.int64))
    parameters = {
        name: word.view(np.uint8) for name, word in zip(program.kernel.parameters, words, strict=True)
    }
    x, y, z = (*grid, 1, 1)[:3]
    program.run((x, y, z), memory, parameters, shared, threads)


_OPERANDS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_MATRICES = ("query", "key", "queue")  # which co2's kernels read as they are stored
# Arguments that only Triton's kernels have.
_OF_TRITON = ("LANES", "PARTS", "RANGES", "COLUMNS", "DEPTH", "WHOLE_KEYS", "WHOLE_COLUMNS", "STACKED")


def _reads_vectors(matrix: Any, dtype: torch.dtype, dim: int) -> bool:
    """Whether rows can be read 16 bytes at a time, as they are multiplied."""
    size = dtype.itemsize
    return bool(
        matrix.data.dtype == dtype
        and matrix.column == 1
        and all(number * size % 16 == 0 for number in (matrix.row, dim))
        and matrix.data.data_ptr() % 16 == 0
    )


class Launch(NamedTuple):
    """A launch of a kernel in CUDA C++."""

    name: str
    architecture: int
    grid: tuple[int, ...]
    threads: int
    programs: int  # that a multiprocessor is to hold
    arguments: dict[str, Any]

    @property
    def text(self) -> str:
        return text_of(self.name, self.threads, self.programs, self.arguments)

    def __call__(self) -> None:
        launch(*self)


def _launch_of(call: Any, architecture: int, tilings: dict[str, Any]) -> Launch:
    """From what the host recorded for Triton."""
    name = call.launch.name
    arguments = {key: call.arguments[key] for key in call.launch.kernel.arg_names if key not in _OF_TRITON}
    if name == "nt_xent.gradient" and not arguments["CONSISTENCY"]:
        name = "nt_xent.plain"
    threads, programs = 32 * call.launch.arguments.get("num_warps", 4), 1
    if name.endswith((".merge", ".join")):
        threads = 32 * arguments["ROWS"]
    if "TILE" in arguments:
        tile = arguments["TILE"]
        dtype, precision = _OPERANDS[str(tile.dtype)], tile.precision
        if dtype == torch.bfloat16 and architecture < 80:
            dtype, precision = torch.float32, "tf32x3"
        arguments["TILE"] = tile._replace(dtype=dtype, precision=precision)
        arguments["STAGES"] = call.launch.arguments["num_stages"]
        programs = tilings[name].programs
        if name.startswith("co2."):
            arguments["VECTORS"] = all(
                _reads_vectors(arguments[each], dtype, arguments["dim"]) for each in _MATRICES
            )
    return Launch(name, architecture, call.launch.grid, threads, programs, arguments)


def record(
    architecture: int, multiprocessors: int, function: Any, *arguments: Any
) -> tuple[Any, list[Launch]]:
    """What a function of the "triton" backend returns, not yet computed, and the launches that compute it."""
    tilings: dict[str, Any] = {}

    def select(name: str, capability: tuple[int, int], precision: str, dim: int) -> Any:
        tilings[name] = tiles.select(name, capability, precision, dim)
        return tilings[name]

    before, host.select = host.select, select
    host.forget_plans()
    torch.use_deterministic_algorithms(True)  # which also fills new tensors with NaN
    try:
        with host.recording(host.Chip(divmod(architecture, 10), multiprocessors)) as calls:
            results = function(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
        host.select = before
        host.forget_plans()
    return results, [_launch_of(call, architecture, tilings) for call in calls]


def serve(architecture: int, function: Any, *arguments: Any) -> Any:
    """What a function of the "triton" backend returns, computed by the CUDA kernels of the same names."""
    results, launches = record(architecture, MULTIPROCESSORS, function, *arguments)
    for each in launches:
        each()
    return results
