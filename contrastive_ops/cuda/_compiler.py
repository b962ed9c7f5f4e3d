"""Compiles device code at run time by NVRTC, which torch's CUDA wheels bring.

A program is one kernel for arguments of one kind. NVRTC takes a tenth of a second for a small one; what it
makes is kept on disk (`_cache.py`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from .._installation import PACKAGE
from . import _cache

OPTIONS = ("-std=c++20",)
# The first driver of each major version of CUDA. It loads what the compilers of that version make.
DRIVERS = {12: "525", 13: "580"}
INSTALL_BINDINGS = "pip install 'contrastive_ops[cuda]'"
OLDEST_CAPABILITY = (7, 0)


class Unsupported(Exception):
    """Device code cannot be compiled for a GPU here; the message says why and what to do."""


class Program(NamedTuple):
    """What NVRTC is to compile.

    Attributes:
        name: of the loss and the kernel, "co2.statistics".
        text: includes the headers in csrc, and has the one kernel, named as `kernel_name` has it.
        target: "sm_75" for machine code, "compute_75" for PTX, which the driver or an emulator takes.
    """

    name: str
    text: str
    target: str


class Image(NamedTuple):
    """A compiled kernel, as the driver loads it."""

    code: bytes
    shared_bytes: int  # of dynamic shared memory, which its launch asks for


def kernel_name(name: str) -> str:
    """What profilers call a kernel: "co2_merge_kernel" is that of "co2.merge"."""
    return f"{name.replace('.', '_')}_kernel"


# A kernel that needs dynamic shared memory has a constant of this name, which tells how much.
SHARED_BYTES = "contrastive_ops_shared_bytes"


@functools.cache
def source_folder() -> Path:
    """Where csrc lies: within the installed package or, in a source tree, beside it.

    Raises:
        Unsupported: it is in neither place.
    """
    package = sys.modules[PACKAGE]
    places = [
        place
        for folder in package.__path__
        for place in (Path(folder) / "csrc", Path(folder).parent / "csrc")
    ]
    for place in places:
        if (place / "cuda").is_dir():
            return place
    looked = " or ".join(str(each.parent) for each in places)
    raise Unsupported(f"its device code is not installed: there is no csrc/cuda in {looked}")


def source_digest() -> str:
    """Of all device code as it is now, for a kernel may include any of it."""
    folder, digest = source_folder(), hashlib.sha256()
    for file in sorted([*folder.glob("*.h"), *folder.glob("cuda/*.h")]):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def constants_in(header: str) -> frozenset[str]:
    """The constants among a kernel's arguments that a header asks for."""
    text = (source_folder() / header).read_text(encoding="utf-8")
    return frozenset(re.findall(r"\bArguments::([A-Z_]+)\b", text))


@functools.cache
def nvrtc() -> ModuleType:
    """NVIDIA's Python package for NVRTC, with the library loaded.

    Raises:
        Unsupported: one of them is missing.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise Unsupported(
            f"NVIDIA's Python package cuda-bindings is missing ({error}): {INSTALL_BINDINGS}"
        ) from error
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # of a class of cuda.pathfinder's that older versions lack
        reason = str(error).partition("\n")[0]
        raise Unsupported(
            f"NVRTC, the compiler that comes with PyTorch's CUDA wheels, cannot be loaded ({reason})"
        ) from error
    return nvrtc


def nvrtc_version() -> tuple[int, int]:
    _, major, minor = nvrtc().nvrtcVersion()
    return int(major), int(minor)


@functools.cache
def supported() -> tuple[tuple[int, int], ...]:
    """The compute capabilities that NVRTC compiles for, in ascending order."""
    _, numbers = nvrtc().nvrtcGetSupportedArchs()
    return tuple(divmod(int(number), 10) for number in numbers)


def target_for(capability: tuple[int, int]) -> str:
    """What to compile for a GPU: machine code of its major version, or else PTX, which its driver compiles.

    Raises:
        Unsupported: NVRTC no longer knows so old a GPU.
    """
    fitting = [each for each in supported() if each <= capability]
    if not fitting:
        found, oldest = ".".join(map(str, nvrtc_version())), ".".join(map(str, supported()[0]))
        raise Unsupported(
            f"NVRTC {found} compiles for GPUs of compute capability {oldest} and newer, this one has "
            f"{capability[0]}.{capability[1]}: install a PyTorch for CUDA 12.6, which brings NVRTC 12"
        )
    best = fitting[-1]
    if best == capability:
        return f"sm_{architecture(best)}"
    kind = "sm" if best[0] == capability[0] else "compute"
    return f"{kind}_{best[0]}{best[1]}"


def architecture(capability: tuple[int, int]) -> str:
    """As NVRTC names it, with instructions that later GPUs have not (csrc/cuda/warpgroups.h)."""
    return "".join(map(str, capability)) + ("a" if capability == (9, 0) else "")


def driver_too_old(driver_version: int) -> str | None:
    """Why a driver does not load what NVRTC makes.

    Args:
        driver_version: the CUDA version that it tells, 13000 for 13.0.
    """
    major, minor = nvrtc_version()
    if driver_version // 1000 >= major:
        return None
    return driver_reason(driver_version, f"does not load machine code of NVRTC {major}.{minor}", major)


def driver_reason(driver_version: int, trouble: str, major: int) -> str:
    """That a driver has some trouble, and which one of CUDA's major version has not."""
    has, part = divmod(driver_version, 1000)
    needed = f"{DRIVERS[major]} or newer" if major in DRIVERS else f"for CUDA {major}"
    return (
        f"the NVIDIA driver is for CUDA {has}.{part // 10}, and {trouble}: driver {needed} is needed, or a "
        f"PyTorch for CUDA {has}"
    )


def _key(program: Program) -> str:
    """The name of a program's entry in the cache: of all that the machine code depends on."""
    found = ".".join(map(str, nvrtc_version()))
    # CUDA 12's package has another name, and NVRTC may come with none.
    with contextlib.suppress(PackageNotFoundError):
        found += f" {version('nvidia-cuda-nvrtc')}"
    parts = (source_digest(), program.text, program.target, *OPTIONS, found)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


_lock = threading.Lock()


def compile_program(program: Program) -> Image:
    """The kernel from the cache, or else from the compiler."""
    with _lock:  # two threads that need the same kernel compile it once
        key = _key(program)
        entry = _cache.load(key)
        if entry is None:
            image = _compile(program)
            if _key(program) != key:
                return image  # somebody has changed the sources meanwhile: of which ones this is, is unknown
            _cache.store(key, {"kernel": program.name, "shared_bytes": image.shared_bytes}, image.code)
            return image
        about, code = entry
        return Image(code, about["shared_bytes"])


def _succeed(result: Any, what: str) -> None:
    if int(result) != 0:
        raise RuntimeError(f"NVRTC: {what} failed: {result.name}")


def _compile(program: Program) -> Image:
    compiler = nvrtc()
    result, handle = compiler.nvrtcCreateProgram(
        program.text.encode(), f"{program.name}.cu".encode(), 0, [], []
    )
    _succeed(result, "nvrtcCreateProgram")
    try:
        options = [f"--gpu-architecture={program.target}", f"-I{source_folder()}", *OPTIONS]
        (result,) = compiler.nvrtcCompileProgram(handle, len(options), [each.encode() for each in options])
        if int(result) != 0:
            log = _output(compiler.nvrtcGetProgramLogSize, compiler.nvrtcGetProgramLog, handle)
            raise RuntimeError(
                f"NVRTC cannot compile {program.name} for {program.target}:\n{log.decode(errors='replace')}"
            )
        ptx = _output(compiler.nvrtcGetPTXSize, compiler.nvrtcGetPTX, handle)
        code = ptx
        if program.target.startswith("sm_"):
            code = _output(compiler.nvrtcGetCUBINSize, compiler.nvrtcGetCUBIN, handle)
    finally:
        compiler.nvrtcDestroyProgram(handle)
    shared = re.search(rf"{SHARED_BYTES}E? = (\d+);", ptx.decode())
    return Image(code, int(shared[1]) if shared else 0)


def _output(size: Any, get: Any, handle: Any) -> bytes:
    result, count = size(handle)
    _succeed(result, size.__name__)
    output = bytearray(count)
    (result,) = get(handle, output)
    _succeed(result, get.__name__)
    return bytes(output)
