"""The compilers of the kernels, for GPUs that may be absent: Triton's, and NVRTC of those in CUDA C++."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from contrastive_ops.kernels import _tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from contrastive_ops import cuda, kernels
from contrastive_ops.cuda import tiles as cuda_tiles
from contrastive_ops.gpu.launch import Call
from contrastive_ops.gpu.tiles import Tiling
from tests import cuda_kernels

Capability = tuple[int, int]

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Of an older Triton, whose disassembler still knows Volta; `make emulate` installs it.
OLDER_BINARIES = Path(__file__).parents[1] / "build" / "triton-3.6" / "triton" / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    """What the compiler makes of a kernel.

    Attributes:
        threads: of a program.
        shared_bytes: of a program.
        code: the machine code as text; empty where no disassembler knows it.
    """

    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str
    code: str


class Compiler(ABC):
    """Compiles the kernels of a backend.

    Attributes:
        name: the backend's.
        title: of its kernels, with the compiler.
        kernels: the module with its operators.
        capabilities: that are looked at by default.
    """

    name: str
    kernels: ModuleType
    capabilities: tuple[Capability, ...]

    @property
    @abstractmethod
    def title(self) -> str: ...

    @abstractmethod
    def entries(self, name: str, capability: Capability) -> list[tuple[str, int]]:
        """Precision and the largest D of each line of a kernel's table of tiles."""

    @abstractmethod
    def tiling(self, name: str, capability: Capability, precision: str, dim: int) -> Tiling:
        """The line of the table for rows of D dimensions."""

    def half(self, capability: Capability) -> torch.dtype:
        """The dtype of half precision that is looked at."""
        return torch.bfloat16

    def power(self, arguments: dict[str, Any]) -> int:
        """n where a kernel takes an exponential for the n-th power of another; see `gpu.co2`."""
        return arguments.get("POWER", 0)

    @abstractmethod
    def compile(self, call: Call, capability: Capability) -> Compiled:
        """A recorded call's kernel, specialised to its arguments as a launch would do it."""


class _Triton(Compiler):
    name = "triton"
    kernels = kernels
    capabilities = ((8, 0), (8, 9), (9, 0), (10, 0))

    @property
    def title(self) -> str:
        return f"The Triton kernels as Triton {triton.__version__} compiles them"

    def entries(self, name: str, capability: Capability) -> list[tuple[str, int]]:
        return list(_tiles.entries(name, capability))

    def tiling(self, name: str, capability: Capability, precision: str, dim: int) -> Tiling:
        return _tiles.select(name, capability, precision, dim)

    def compile(self, call: Call, capability: Capability) -> Compiled:
        compiled = self.compile_call(call, capability)
        ptx = compiled.asm["ptx"]
        registers, spilled, code = _assemble(ptx, capability[0])
        threads = 32 * call.arguments.get("num_warps", 4)
        return Compiled(threads, registers, spilled, compiled.metadata.shared, ptx, code)

    def compile_call(self, call: Call, capability: Capability) -> Any:
        """What Triton makes of a recorded call's kernel."""
        kernel = call.launch.kernel  # type: ignore[attr-defined]
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        backend = make_backend(target)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        options = {name: value for name, value in call.arguments.items() if name not in kernel.arg_names}
        bound, specialization, _ = bind(**call.arguments)
        parsed, signature, constants, attributes = kernel._pack_args(
            backend, options, bound, specialization, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=parsed.__dict__)


class _Cuda(Compiler):
    name = "cuda"
    kernels = cuda
    capabilities = ((7, 0), (7, 5), (8, 0), (9, 0))

    @property
    def title(self) -> str:
        return "The kernels in CUDA C++ as NVRTC compiles them"

    def entries(self, name: str, capability: Capability) -> list[tuple[str, int]]:
        return list(cuda_tiles.entries(name, capability))

    def tiling(self, name: str, capability: Capability, precision: str, dim: int) -> Tiling:
        return cuda_tiles.select(name, capability, precision, dim)

    def half(self, capability: Capability) -> torch.dtype:
        return torch.bfloat16 if capability >= (8, 0) else torch.float16

    def power(self, arguments: dict[str, Any]) -> int:
        return 0

    def compile(self, call: Call, capability: Capability) -> Compiled:
        launch, arguments = call
        assert isinstance(launch, cuda_kernels.CudaLaunch)
        text, architecture = launch.layout(arguments).text, 10 * capability[0] + capability[1]
        ptx = cuda_kernels.compile_text(text, architecture).code.decode()
        binary, log = cuda_kernels.compile_text(text, architecture, machine_code=True)
        static = re.search(r"(\d+) bytes smem", log)
        shared = cuda_kernels.shared_bytes(ptx) + (int(static[1]) if static else 0)
        return Compiled(launch.threads, *_said_of_registers(log), shared, ptx, _disassemble(binary))


TRITON, CUDA = _Triton(), _Cuda()
COMPILERS: dict[str, Compiler] = {each.name: each for each in (TRITON, CUDA)}


def _assemble(ptx: str, major: int) -> tuple[int, int, str]:
    """Registers, spilled bytes and machine code, from NVIDIA's assembler and disassembler beside Triton."""
    match = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert match
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        assembler = "ptxas-blackwell" if major >= 10 and (BINARIES / "ptxas-blackwell").exists() else "ptxas"
        command = [BINARIES / assembler, "-v", f"--gpu-name={match[1]}", source, "-o", binary]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return *_said_of_registers(said), _disassemble(binary.read_bytes())


def _said_of_registers(log: str) -> tuple[int, int]:
    """Registers and spilled bytes."""
    registers, spilled = (
        re.search(r"Used (\d+) registers", log),
        re.search(r"(\d+) bytes spill stores", log),
    )
    assert registers, log
    assert spilled, log
    return int(registers[1]), int(spilled[1])


@functools.cache
def _disassemble(binary: bytes) -> str:
    """Machine code as text; empty where no disassembler is installed that knows it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        for folder in (BINARIES, OLDER_BINARIES):
            if (disassembler := folder / "nvdisasm").exists():
                done = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True)
                if not done.returncode:
                    return done.stdout
    return ""
