"""Runs the kernels of csrc/cuda on CPU tensors: the host code of the "cuda" backend, with launches that are
executed in the emulator from the PTX which NVRTC makes."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contrastive_ops.cuda._compiler import SHARED_BYTES
from contrastive_ops.cuda._compiler import architecture as architecture_name
from contrastive_ops.cuda._launch import CudaKernels, CudaLaunch, take
from contrastive_ops.gpu import served_by
from contrastive_ops.gpu.launch import Chip, Launch
from contrastive_ops.gpu.tiles import Tiling
from tests.gpu_emulator import machine
from tests.gpu_emulator.memory import GlobalMemory
from tests.gpu_emulator.ptx import parse

SOURCES = Path(__file__).parents[1] / "csrc"
# The last NVRTC that knows compute capabilities below 7.5: pip install --target build/nvrtc-12
# nvidia-cuda-nvrtc-cu12.
NVRTC_12 = Path(__file__).parents[1] / "build" / "nvrtc-12"
MULTIPROCESSORS = 4  # few, so that small problems have few programs, and yet several


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
        ctypes.CDLL(str(builtins))  # else it is looked for where the system's libraries are
    return ctypes.CDLL(str(libraries[-1]))


class Compiled(NamedTuple):
    """What NVRTC makes of a kernel.

    Attributes:
        code: PTX as text in ASCII, or an ELF file.
        log: what the assembler says of registers and spilled bytes, where it made machine code.
    """

    code: bytes
    log: str


@functools.cache
def compile_text(text: str, architecture: int, machine_code: bool = False) -> Compiled:
    """PTX of a text, or machine code with a report on it."""
    compiler = nvrtc(architecture)
    assert compiler is not None, f"no NVRTC for {architecture}"
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    name = architecture_name(divmod(architecture, 10))
    target = f"--gpu-architecture={'sm' if machine_code else 'compute'}_{name}"
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
    code = output("CUBIN") if machine_code else output("PTX").rstrip(b"\0")
    compiler.nvrtcDestroyProgram(ctypes.byref(program))
    return Compiled(code, log)


def shared_bytes(ptx: str) -> int:
    """How much dynamic shared memory a kernel says that it needs."""
    found = re.search(rf"{SHARED_BYTES}\w* = (\d+);", ptx)
    return int(found[1]) if found else 0


@functools.cache
def _program(text: str, architecture: int) -> tuple[machine.Program, int]:
    ptx = compile_text(text, architecture).code.decode()
    return machine.Program(parse(ptx)), shared_bytes(ptx)


class EmulatedLaunch(CudaLaunch):
    """A kernel whose tensors are on the CPU. They are all the memory that it may touch."""

    def run(self, arguments: dict[str, Any]) -> None:
        major, minor = self._kernels.device_chip(torch.device("cpu")).capability
        layout = self.layout(arguments)
        program, shared = _program(layout.text, 10 * major + minor)
        tensors: list[Tensor] = []
        numbers: list[Any] = []
        for some in (arguments, self.arguments):
            take((value for name, value in some.items() if not name.isupper()), [], tensors, numbers)
        memory = GlobalMemory()
        for tensor in tensors:
            memory.add(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        words = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        words += [kind(number) for kind, number in zip(layout.numbers, numbers, strict=True)]
        parameters = {
            name: np.frombuffer(bytes(word), np.uint8)
            for name, word in zip(program.kernel.parameters, words, strict=True)
        }
        program.run(self.whole_grid, memory, parameters, shared, self.threads)


class EmulatedKernels(CudaKernels):
    """The kernels as they are compiled and launched for a GPU, on CPU tensors."""

    device_type = "cpu"

    def __init__(self, architecture: int, multiprocessors: int) -> None:
        self.chip = Chip(divmod(architecture, 10), multiprocessors)

    def device_chip(self, device: torch.device) -> Chip:
        return self.chip

    def may_replay(self) -> bool:
        return False

    def launch(
        self, name: str, grid: tuple[int, ...], arguments: dict[str, Any], tiling: Tiling | None = None
    ) -> Launch:
        launch = super().launch(name, grid, arguments, tiling)
        assert type(launch) is CudaLaunch
        launch.__class__ = EmulatedLaunch
        return launch


@functools.cache
def kernels_of(architecture: int, multiprocessors: int) -> EmulatedKernels:
    return EmulatedKernels(architecture, multiprocessors)


def serve(architecture: int, operator: str, *arguments: Any) -> Any:
    """What an operator, or a step of a loss, returns on such a GPU."""
    torch.use_deterministic_algorithms(True)  # which also fills new tensors with NaN
    try:
        return served_by(kernels_of(architecture, MULTIPROCESSORS), operator)(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
