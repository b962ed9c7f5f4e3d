"""Puts the emulator in the place of a GPU: a driver library, an assembler, and the answers of a GPU."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .machine import Program
from .memory import GlobalMemory
from .ptx import parse

REQUESTED = os.environ.get("GPU_EMULATOR")
CAPABILITIES = {"sm_75": (7, 5), "sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0)}
MULTIPROCESSORS = 4  # few, so that small problems have few programs, and yet several
# "Assembles" by a copy, so that what the driver is told to load is PTX. Its version is in the key of Triton's
# cache.
_ASSEMBLER = """#!/bin/sh
if [ "$1" = --version ]; then "{real}" --version; echo for the emulator; exit; fi
for argument; do case "$argument" in *.ptx) source="$argument";; esac; done
cp "$source" "$argument"
"""
_PROTOTYPE = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, *[ctypes.c_uint] * 5, ctypes.POINTER(ctypes.c_void_p)
)  # fmt: skip
_kept: list[Any] = []  # what C refers to
_storages: list[torch.UntypedStorage] = []  # that a kernel may touch
_failure: list[Exception] = []


@functools.cache
def _program(ptx: bytes) -> Program:
    return Program(parse(ptx.decode()))


def _launch(ptx: bytes, x: int, y: int, z: int, threads: int, shared: int, pointers: Any) -> None:
    """No exception passes through C: it is kept for the launcher."""
    try:
        program = _program(ptx)
        parameters = {
            name: np.frombuffer(ctypes.string_at(pointers[i], size), np.uint8)
            for i, (name, size) in enumerate(program.kernel.parameters.items())
        }
        memory = GlobalMemory()
        for storage in _storages:
            memory.add(storage.data_ptr(), storage.nbytes())
        program.run((x, y, z), memory, parameters, shared, threads)
    except Exception as error:
        _failure.append(error)


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, tuple | list):
        return [tensor for part in argument for tensor in _tensors(part)]
    return [argument] if isinstance(argument, Tensor) else []


def start(architecture: str) -> None:
    """From now on the backends for GPUs serve CPU tensors through the emulator, as of "sm_75"."""
    _serve_cpu_tensors(architecture, MULTIPROCESSORS, _PROTOTYPE(_launch))


def start_without_launches(architecture: str, multiprocessors: int) -> Callable[[], int]:
    """The same for a driver whose launches do nothing, to measure what the host does for them. Kernels are
    compiled as for a GPU. Returns a function that tells how many launches there were."""
    return _serve_cpu_tensors(architecture, multiprocessors, None).launch_count


def load_driver(capability: tuple[int, int], multiprocessors: int, callback: Any) -> tuple[ctypes.CDLL, Path]:
    """The driver library, in place of any other of this process, and the folder that it lies in. Launches are
    handed to the callback, if there is one."""
    _kept.append(tempfile.TemporaryDirectory(prefix="gpu-emulator-"))
    folder = Path(_kept[-1].name)
    library = folder / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    source = Path(__file__).with_name("libcuda.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True
    )
    (folder / "libcuda.so").symlink_to(library)
    libcuda = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    libcuda.launch_count.restype = ctypes.c_long
    _kept.extend([libcuda, callback])
    libcuda.emulate(callback, *capability, multiprocessors)
    return libcuda, folder


def _serve_cpu_tensors(architecture: str, multiprocessors: int, callback: Any) -> ctypes.CDLL:
    capability = CAPABILITIES[architecture]
    libcuda, folder = load_driver(capability, multiprocessors, callback)
    if capability >= (8, 0):
        _serve_by_triton(folder, capability, multiprocessors, callback is not None)
    _serve_by_cuda(capability, multiprocessors, callback is not None)
    return libcuda


def _begin_launch(tensors: Iterable[Tensor]) -> None:
    """Tells the emulator which tensors a kernel may touch."""
    _storages[:] = [tensor.untyped_storage() for tensor in tensors]


def _end_launch() -> None:
    _storages.clear()
    if _failure:
        first, *_ = _failure
        _failure.clear()
        raise first


def _replay(kernels: Any, recorded: Any, arguments: tuple[Any, ...]) -> Any:
    """What `Replay` does, told to the emulator: each launch may touch all tensors of the call."""
    tensors = recorded.allocate(arguments)
    _begin_launch(tensors)
    recorded.launch(tensors, kernels.current_stream())
    _end_launch()
    return recorded.results(tensors)


def _serve_by_triton(folder: Path, capability: tuple[int, int], multiprocessors: int, emulates: bool) -> None:
    import triton
    from contrastive_ops.kernels import _launch as host
    from triton.backends.nvidia import driver as nvidia

    from contrastive_ops import kernels

    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    if emulates:
        assembler = folder / "ptxas"
        assembler.write_text(_ASSEMBLER.format(real=Path(nvidia.__file__).parent / "bin" / "ptxas"))
        assembler.chmod(0o755)
        os.environ["TRITON_PTXAS_PATH"] = str(assembler)

    class Launcher(nvidia.CudaLauncher):  # type: ignore[misc]
        def __call__(self, *arguments: Any) -> None:
            _begin_launch(_tensors(arguments))
            super().__call__(*arguments)
            _end_launch()

    class Driver(nvidia.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = Launcher if emulates else nvidia.CudaLauncher
            self.get_device_capability = lambda device=None: capability
            self.get_current_stream = lambda device=None: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

    triton.runtime.driver.set_active(Driver())

    # Where the package asks whether CPU tensors are served, the answers are those of the interpreter, except
    # that this multiplies bfloat16 rightly; a plan is that of the chip.
    refuses = kernels.refuses
    setattr(kernels, "_is_interpreted", lambda: True)  # noqa: B010

    def refuses_as_gpu(operator: str, rows: Tensor) -> str | None:
        if rows.dtype != torch.bfloat16:
            return refuses(operator, rows)
        return refuses(operator, SimpleNamespace(device=rows.device, dtype=torch.float16, shape=rows.shape))

    kernels.refuses = refuses_as_gpu
    chip = host.Chip(capability, multiprocessors)
    setattr(host.TRITON, "device_chip", lambda device: chip)  # noqa: B010
    if emulates:
        setattr(host.TRITON, "replay", functools.partial(_replay, host.TRITON))  # noqa: B010


def _serve_by_cuda(capability: tuple[int, int], multiprocessors: int, emulates: bool) -> None:
    """What is compiled is PTX where it is to be emulated, and machine code as for a GPU where it is not."""
    from contrastive_ops import cuda
    from contrastive_ops.cuda import _launch as host
    from contrastive_ops.cuda._compiler import architecture
    from contrastive_ops.cuda._driver import Run
    from contrastive_ops.gpu.launch import Chip

    class EmulatedRun(Run):
        def __call__(self, stream: int, *arguments: Any) -> None:
            _begin_launch(_tensors(arguments))
            super().__call__(stream, *arguments)
            _end_launch()

    class EmulatedKernels(host.CudaKernels):
        device_type = "cpu"

        def device_chip(self, device: torch.device) -> Chip:
            return Chip(capability, multiprocessors)

        def current_device(self) -> int:
            return 0

        def current_stream(self) -> int:
            return 0

        def target(self, device: int) -> str:
            return f"{'compute' if emulates else 'sm'}_{architecture(capability)}"

        def run(self, *arguments: Any) -> Run:
            return EmulatedRun(*arguments) if emulates else Run(*arguments)

        def replay(self, recorded: Any, arguments: tuple[Any, ...]) -> Any:
            if emulates:
                return _replay(self, recorded, arguments)
            return super().replay(recorded, arguments)

    host.KERNELS = EmulatedKernels()
    setattr(cuda, "unavailable", lambda: None)  # noqa: B010


def start_if_requested() -> None:
    """Before the backends are first asked whether they serve."""
    if REQUESTED:
        start(REQUESTED)
