"""The host side of the CUDA C++ backend: who is served, what is compiled and kept, how kernels are launched.

A GPU is not needed: kernels are compiled by the real NVRTC, and launched on a driver that executes their PTX.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from contrastive_ops import compile as command
from contrastive_ops import cuda, reference
from contrastive_ops._contract import CO2Settings, SGDSettings
from contrastive_ops.cuda import _cache, _compiler, _driver, _launch
from contrastive_ops.cuda._compiler import Image, Program, Unsupported
from contrastive_ops.gpu.arguments import NO_VECTOR, Tile, matrix, vector
from contrastive_ops.gpu.co2 import co2
from contrastive_ops.gpu.exchange import exchange_rows_
from contrastive_ops.gpu.launch import Chip, forget_plans
from contrastive_ops.gpu.sgd import sgd_
from tests.cases import mostly_thorough
from tests.cuda_kernels import NVRTC_12
from tests.elsewhere import pass_elsewhere
from tests.gpu_emulator import driver as gpu_emulator

ROOT = Path(__file__).parents[1]


def _has_nvrtc() -> bool:
    try:
        _compiler.nvrtc()
    except Unsupported:
        return False
    return True


compiles = pytest.mark.skipif(not _has_nvrtc(), reason="there is no NVRTC")
emulated = pytest.mark.skipif(
    not gpu_emulator.REQUESTED or not _has_nvrtc(), reason="runs in a process with GPU_EMULATOR=sm_75"
)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What is remembered of this machine is asked anew, before the test and after it."""
    _forget()
    yield
    _forget()


REMEMBERED = (
    _compiler.nvrtc, _compiler.supported, _compiler.source_folder, _compiler.constants_in,
    cuda._not_compiled_for, _cache._warn_once,
)  # fmt: skip


def _forget() -> None:
    for each in REMEMBERED:
        each.cache_clear()


# Who is served


Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> Machine:
    """Makes this one have a GPU of some compute capability, a driver, and NVRTC of some version."""

    def make(
        capability: tuple[int, int] = (7, 5),
        driver_version: int | None = 13000,
        nvrtc: tuple[int, int] = (13, 0),
        is_available: bool = True,
    ) -> None:
        _forget()
        oldest = 75 if nvrtc[0] >= 13 else 50
        library = SimpleNamespace(
            nvrtcVersion=lambda: (0, *nvrtc),
            nvrtcGetSupportedArchs=lambda: (
                0,
                [each for each in (50, 60, 70, 72, 75, 80, 90) if each >= oldest],
            ),
        )
        monkeypatch.setattr(torch.version, "cuda", f"{nvrtc[0]}.{nvrtc[1]}")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(_driver, "driver_version", lambda: driver_version)
        monkeypatch.setattr(_compiler, "nvrtc", lambda: library)

    return make


def test_an_nvidia_gpu_is_served_from_volta_on(machine: Machine) -> None:
    for capability in ((7, 5), (8, 0), (8, 6), (9, 0)):
        machine(capability)
        assert cuda.unavailable() is None
    machine((7, 0), driver_version=12060, nvrtc=(12, 6))
    assert cuda.unavailable() is None


@pytest.mark.parametrize(
    ("having", "words"),
    [
        ({"capability": (6, 1)}, ("7.0 or newer", "this one has 6.1")),
        ({"capability": (7, 0)}, ("NVRTC 13.0", "7.5 and newer", "has 7.0", "PyTorch for CUDA 12.6")),
        ({"capability": (7, 2)}, ("NVRTC 13.0", "7.5 and newer", "has 7.2", "PyTorch for CUDA 12.6")),
        ({"driver_version": 12080}, ("driver is for CUDA 12.8", "NVRTC 13.0", "driver 580 or newer")),
        ({"driver_version": 11080, "nvrtc": (12, 6)}, ("driver is for CUDA 11.8", "driver 525 or newer")),
        ({"driver_version": 13000, "nvrtc": (14, 1)}, ("NVRTC 14.1", "driver for CUDA 14 is needed")),
        ({"is_available": False}, ("there is no CUDA device",)),
        ({"is_available": False, "driver_version": None}, ("there is no CUDA device",)),
        ({"is_available": False, "driver_version": 12080}, ("CUDA 12.8", "too old", "driver 580 or newer")),
    ],
)  # fmt: skip
def test_what_cannot_be_served_has_one_clear_reason(
    machine: Machine, having: dict[str, Any], words: tuple[str, ...]
) -> None:
    machine(**having)
    reason = cuda.unavailable()
    assert reason is not None
    assert all(word in reason for word in words), reason
    assert "\n" not in reason
    assert len(reason) < 250


def test_other_builds_of_pytorch_are_refused_by_name(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setattr(torch.version, "hip", "7.0.51831")
    assert "ROCm 7.0.51831" in str(cuda.unavailable())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.unavailable() == "this PyTorch was built without CUDA"


def test_missing_bindings_are_told(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    real = _compiler.nvrtc
    machine()
    monkeypatch.setattr(_compiler, "nvrtc", real)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    reason = str(cuda.unavailable())
    assert "cuda-bindings is missing" in reason
    assert "pip install 'contrastive_ops[cuda]'" in reason


@compiles
def test_a_missing_nvrtc_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    def not_found() -> None:
        raise RuntimeError("Failure finding libnvrtc.so\nand where it was looked for")

    real = _compiler.nvrtc
    machine()
    monkeypatch.setattr(_compiler, "nvrtc", real)
    monkeypatch.setattr(nvrtc, "nvrtcVersion", not_found)
    reason = str(cuda.unavailable())
    assert "NVRTC" in reason
    assert "PyTorch's CUDA wheels" in reason
    assert "Failure finding libnvrtc.so" in reason
    assert "\n" not in reason


def test_missing_sources_are_told(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import contrastive_ops

    machine()
    monkeypatch.setattr(contrastive_ops, "__path__", [str(tmp_path)])
    assert "its device code is not installed" in str(cuda.unavailable())


@compiles
def test_a_gpu_gets_machine_code_of_its_generation_or_ptx() -> None:
    newest = _compiler.supported()[-1]
    assert _compiler.target_for((7, 5)) == "sm_75"
    assert _compiler.target_for((8, 1)) == "sm_80"
    assert _compiler.target_for((9, 0)) == "sm_90a"
    assert _compiler.target_for((newest[0] + 1, 0)) == f"compute_{newest[0]}{newest[1]}"
    if _compiler.supported()[0] > (7, 0):
        with pytest.raises(Unsupported, match=r"has 7\.0"):
            _compiler.target_for((7, 0))


def test_triton_is_tried_first() -> None:
    from contrastive_ops._backends import preferred_on

    names = preferred_on("cuda")
    assert names[-1] == "cuda"
    assert list(names[:-1]) in ([], ["triton"])


def test_operators_and_rows_that_are_not_served_are_refused(machine: Machine) -> None:
    machine()

    def rows(device: str = "cuda", dtype: torch.dtype = torch.float32) -> Any:
        return SimpleNamespace(device=torch.device(device, 0), dtype=dtype)

    monkeypatched = _launch.KERNELS.device_chip
    _launch.KERNELS.device_chip = lambda device: SimpleNamespace(capability=(7, 5))  # type: ignore[method-assign,assignment,return-value]
    try:
        assert cuda.refuses("sgd_", rows()) is None
        assert cuda.refuses("sgd_", rows(dtype=torch.float64)) is None
        assert "float8" in str(cuda.refuses("sgd_", rows(dtype=torch.float8_e5m2)))
        assert "does not serve cpu tensors" in str(cuda.refuses("sgd_", torch.empty(1, 1)))
        assert "no kernels for frobnicate" in str(cuda.refuses("frobnicate", rows()))
    finally:
        _launch.KERNELS.device_chip = monkeypatched  # type: ignore[method-assign]


# What is compiled


def text_of(**arguments: Any) -> str:
    return _launch.layout("sgd", 128, 1, arguments).text


def test_arguments_come_under_their_names() -> None:
    half = torch.empty(2, 3, dtype=torch.float16)
    tile = Tile(64, 32, 128, 0, False, True, True, False, torch.bfloat16, "half")
    layout = _launch.layout(
        "co2.merge",
        64,
        2,
        {
            "weight": matrix(half), "nothing": NO_VECTOR, "missing": None, "loss": torch.empty(3),
            "scale": 0.5, "count": 3, "is_key": True, "rows": _Rows(matrix(half), vector(half[0])),
            "TILE": tile, "BOUNDED": False, "ROWS": 8,
        },
    )  # fmt: skip
    for line in (
        '#include "cuda/co2.h"',
        "Matrix<Half> weight;",
        "Vector<void> nothing;",
        "decltype(nullptr) missing;",
        "float* loss;",
        "double scale;",
        "long long count;",
        "bool is_key;",
        "struct { Matrix<Half> unit; Vector<Half> pull; } rows;",
        "using dtype = BFloat16;",
        "static constexpr Precision precision = Precision::half;",
        "static constexpr int keys = 32;",
        "static constexpr bool BOUNDED = false;",
        "static constexpr int ROWS = 8;",
        "__launch_bounds__(64, 2)",
        "co2_merge(arguments);",
    ):
        assert line in layout.text, line
    assert layout.tensors == 4
    # Strides of three matrices and vectors, the null one's too, and three numbers.
    assert layout.numbers == tuple(
        {"q": ctypes.c_longlong, "d": ctypes.c_double, "b": ctypes.c_bool}[each] for each in "qqqdqbqqq"
    )


class _Rows(tuple):
    """Some matrices as one argument."""

    _fields = ("unit", "pull")

    def __new__(cls, unit: Any, pull: Any) -> Any:
        return super().__new__(cls, (unit, pull))

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))


def a_program(target: str = "sm_75", count: int = 1) -> Program:
    weight = torch.empty(4, 4)
    tensors = dict.fromkeys(("weight", "momentum_buffer", "grad"), matrix(weight))
    numbers = {"count": 16, "dim": 4, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    arguments = tensors | numbers | {"NESTEROV": False, "CONTIGUOUS": True, "BLOCK": 128 * count}
    return Program("sgd", _launch.layout("sgd", 128, 1, arguments).text, target)


@compiles
def test_what_does_not_compile_is_told_with_the_compilers_words() -> None:
    program = a_program()
    wrong = program._replace(text=program.text.replace("long long count", "float* count"))
    with pytest.raises(RuntimeError, match=r"(?s)NVRTC cannot compile sgd for sm_75:.*error:"):
        _compiler._compile(wrong)


@compiles
def test_machine_code_and_ptx() -> None:
    assert _compiler._compile(a_program("sm_75")).code.startswith(b"\x7fELF")
    assert b".target sm_80" in _compiler._compile(a_program("compute_80")).code


# What is kept


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgetful: None) -> Path:
    """An empty folder of compiled kernels."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(_cache.FOLDER_VARIABLE, str(folder))
    return folder


@pytest.fixture
def compiled(kept: Path, monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """What the compiler was asked for, which only pretends to work: the user's own cache gets none of it."""
    programs: list[Program] = []

    def pretend(program: Program) -> Image:
        programs.append(program)
        return Image(f"code of {program.target}".encode(), 1000 + len(program.text))

    monkeypatch.setattr(_compiler, "_compile", pretend)
    monkeypatch.setattr(_compiler, "nvrtc_version", lambda: (13, 0))
    return programs


def test_a_kernel_is_compiled_once(kept: Path, compiled: list[Program]) -> None:
    program = a_program()
    first, second = (_compiler.compile_program(program) for _ in range(2))
    assert first == second == Image(b"code of sm_75", 1000 + len(program.text))
    assert compiled == [program]
    assert [file.suffix for file in kept.iterdir()] == [".kernel"]


@pytest.mark.parametrize("change", ["architecture", "text", "source", "options", "compiler"])
def test_another_kernel_is_never_taken_for_it(
    change: str, kept: Path, compiled: list[Program], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = a_program()
    _compiler.compile_program(program)
    if change == "architecture":
        program = program._replace(target="sm_80")
    elif change == "text":
        program = a_program(count=2)
    elif change == "options":
        monkeypatch.setattr(_compiler, "OPTIONS", (*_compiler.OPTIONS, "--use_fast_math"))
    elif change == "compiler":
        monkeypatch.setattr(_compiler, "nvrtc_version", lambda: (13, 1))
    else:
        changed = tmp_path / "csrc"
        shutil.copytree(_compiler.source_folder(), changed)
        with (changed / "cuda" / "numbers.h").open("a") as file:
            file.write("\n")
        monkeypatch.setattr(_compiler, "source_folder", lambda: changed)
    _compiler.compile_program(program)
    assert len(compiled) == 2
    assert len(list(kept.iterdir())) == 2


def test_sources_that_change_meanwhile_leave_nothing(
    kept: Path, compiled: list[Program], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether the old or the new ones were compiled, nobody knows."""
    sources = tmp_path / "csrc"
    shutil.copytree(_compiler.source_folder(), sources)
    monkeypatch.setattr(_compiler, "source_folder", lambda: sources)
    pretend = _compiler._compile

    def edited(program: Program) -> Image:
        (sources / "cuda" / "numbers.h").write_text("// another\n")
        return pretend(program)

    monkeypatch.setattr(_compiler, "_compile", edited)
    program = a_program()
    _compiler.compile_program(program)
    assert not kept.exists()
    _compiler.compile_program(program)
    assert len(list(kept.iterdir())) == 1
    assert len(compiled) == 2


@pytest.mark.parametrize("damage", ["a byte", "the end", "all", "the head"])
def test_what_was_damaged_is_compiled_again(damage: str, kept: Path, compiled: list[Program]) -> None:
    program = a_program()
    image = _compiler.compile_program(program)
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    file.write_bytes(
        {
            "a byte": whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
            "the end": whole[:-1],
            "all": b"",
            "the head": whole[10:],
        }[damage]
    )
    assert _compiler.compile_program(program) == image
    assert len(compiled) == 2
    assert file.read_bytes() == whole


def _unwritable(kept: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "no folder":
        kept.write_text("a file is in its place")
    elif how == "full":
        kept.mkdir()
        real = os.fdopen

        def full(handle: int, mode: str) -> Any:
            file = real(handle, mode)
            file.close()
            return real(os.open("/dev/full", os.O_WRONLY), mode)

        monkeypatch.setattr(os, "fdopen", full)
    else:
        kept.mkdir()

        def read_only(*_: Any, **__: Any) -> Any:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(_cache.tempfile, "mkstemp", read_only)


@pytest.mark.parametrize("how", ["no folder", "read-only", "full"])
def test_a_folder_that_cannot_be_written_is_no_error(
    how: str, kept: Path, compiled: list[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    _unwritable(kept, monkeypatch, how)
    program = a_program()
    with pytest.warns(_cache.NotKept, match=_cache.FOLDER_VARIABLE) as told:
        image = _compiler.compile_program(program)
    assert len(told) == 1
    assert image.code == b"code of sm_75"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _compiler.compile_program(program) == image
    assert len(compiled) == 2
    assert not kept.is_dir() or not list(kept.iterdir())  # nothing half written is left


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in (_cache.FOLDER_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _cache.folder() == tmp_path / "home" / ".cache" / "contrastive_ops"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _cache.folder() == tmp_path / "xdg" / "contrastive_ops"
    monkeypatch.setenv(_cache.FOLDER_VARIABLE, str(tmp_path / "own"))
    assert _cache.folder() == tmp_path / "own"


RACE = """
import sys, time
from contrastive_ops.cuda import _compiler
from tests.test_cuda import a_program
_compiler.nvrtc()
print("ready", flush=True)
sys.stdin.readline()
image = _compiler.compile_program(a_program())
assert image.code.startswith(b"\\x7fELF")
"""


@compiles
def test_processes_that_compile_at_once_do_not_disturb_each_other(kept: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACE], cwd=ROOT, env=environment, text=True, stdin=-1, stdout=-1, stderr=-1
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "Warning" not in errors
    (file,) = kept.iterdir()
    image = _compiler.compile_program(a_program())
    assert image.code in file.read_bytes()


# The command


@compiles
def test_the_command_compiles_ahead(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arch", "sm_75", "sm_80", "--dtype", "float32", "--operator", "sgd_", "exchange_rows_"]
    assert command.main(arguments) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(kept.iterdir()))
    assert {line.split()[0] for line in lines} == {"sm_75", "sm_80"}
    assert {line.split("  ")[-1].split()[0] for line in lines} == {"sgd", "exchange"}
    assert f"{len(lines)} kernels in " in total
    assert str(kept) in total


@compiles
def test_the_command_compiles_what_is_served(
    kept: Path, compiled: list[Program], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--arch", "sm_75"]) == 0
    names = {program.name for program in compiled}
    assert {name.partition(".")[0] for name in names} == set(cuda.SERVED)
    assert {"co2.statistics", "co2.gradient", "conic.weight", "nt_xent.plain", "nt_xent.gradient"} <= names
    assert len(compiled) == len(set(compiled)) == len(list(kept.iterdir()))
    assert "float16" in capsys.readouterr().out


@compiles
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_what_the_command_compiles_is_what_a_gpu_asks_for(
    capability: tuple[int, int], compiled: list[Program]
) -> None:
    """By both names, where there are two."""
    target = _compiler.target_for(capability)
    for name in (target, target.rstrip("a")):
        arguments = ["--arch", name, "--dtype", "float32", "--operator", "sgd_"]
        assert command.main(arguments) == 0
    assert {program.target for program in compiled} == {target}


class Kernels(_launch.CudaKernels):
    """Launches that are noted: the program, the device, the stream, and the numbers."""

    def __init__(self, capability: tuple[int, int] = (7, 5)) -> None:
        self.chip, self.device = Chip(capability, 4), 0
        self.loaded: list[tuple[Program, int]] = []
        self.launched: list[tuple[int, tuple[Any, ...]]] = []

    def device_chip(self, device: torch.device) -> Chip:
        return self.chip

    def current_device(self) -> int:
        return self.device

    def current_stream(self) -> int:
        return 100 + self.device

    def target(self, device: int) -> str:
        return "sm_{}{}".format(*self.chip.capability)

    def run(self, program: Program, device: int, *_: Any) -> Any:
        self.loaded.append((program, device))
        return lambda stream, *arguments: self.launched.append((stream, arguments))


@compiles
def test_a_call_finds_what_the_command_compiled(kept: Path) -> None:
    """The texts of both are the same."""
    kernels = Kernels()
    for nesterov in (False, True):
        sgd_(kernels, *(torch.ones(3, 5) for _ in range(3)), SGDSettings(0.1, 0.9, 0.0, nesterov))  # type: ignore[misc]
    rows, records = torch.arange(2), torch.ones(4, 2, 128)
    weight, buffer = torch.ones(4, 128), torch.ones(4, 128)
    unit = torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    exchange_rows_(kernels, weight, buffer, rows, records, rows, unit, records.clone(), rows)
    keys = torch.empty(4096, 128)
    co2(
        kernels,
        torch.ones(64, 128),
        torch.ones(64, 128),
        keys,
        CO2Settings(0.2, 0.05, 1.0, 0.3, False, True),
        True,
    )
    ahead = {
        program
        for operator in ("co2", "sgd_", "exchange_rows_")
        for _, program in command.programs("sm_75", operator, command.Wanted(torch.float32, 128))
    }
    wanted = [program for program, _ in kernels.loaded]
    assert [program.name for program in wanted] == [
        "sgd", "sgd", "exchange", "co2.prepare", "co2.statistics", "co2.merge", "co2.gradient", "co2.finish",
    ]  # fmt: skip
    assert {
        program for program in wanted if program.name != "co2.merge"
    } <= ahead  # by how many parts there are


def test_a_device_loads_its_own_and_launches_on_its_stream() -> None:
    kernels = Kernels()
    tensors = [torch.ones(3, 5) for _ in range(3)]
    for device in (0, 1, 0, 1):
        kernels.device = device
        sgd_(kernels, *tensors, STEP)  # type: ignore[call-arg]
    assert [device for _, device in kernels.loaded] == [0, 1]
    assert [stream for stream, _ in kernels.launched] == [100, 101, 100, 101]
    strides = [5, 1, 5, 1, 5, 1]
    for _, (weight, buffer, grad, *numbers) in kernels.launched:
        assert all(x is y for x, y in zip((weight, buffer, grad), tensors, strict=True))
        assert numbers == [*strides, 15, 5, STEP.lr, STEP.momentum, STEP.weight_decay]


def test_another_kind_of_arguments_is_another_program() -> None:
    kernels = Kernels()

    def step(*dtypes: torch.dtype, transposed: bool = False) -> None:
        tensors = [torch.ones(3, 5, dtype=dtype) for dtype in dtypes]
        if transposed:
            tensors = [x.T.contiguous().T for x in tensors]
        sgd_(kernels, *tensors, STEP)  # type: ignore[call-arg]

    half, full = torch.float16, torch.float32
    for _ in range(2):
        step(full, full, full)
        step(half, half, half)
        step(half, half, full)
        step(full, full, full, transposed=True)
    assert len({program for program, _ in kernels.loaded}) == len(kernels.loaded) == 4


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_multiplied_in_what_a_chip_has(capability: tuple[int, int], dtype: torch.dtype) -> None:
    products = Kernels(capability).products(128, dtype, torch.device("cpu"))
    if dtype == torch.float16 or capability == (8, 0):
        assert products.dtype == dtype
    else:
        assert products.dtype == torch.float32  # Turing has no bfloat16 to multiply
    assert products.precision == ("half" if products.dtype != torch.float32 else "tf32x3")


def test_rows_are_read_16_bytes_at_a_time_where_they_may_be() -> None:
    kernels, rows = Kernels(), torch.zeros(4, 40, dtype=torch.float16)
    for matrix_, vectors in (
        (rows, True),
        (rows[:, :32], True),
        (rows[:, 1:33], False),  # begins elsewhere
        (rows[:, :36], False),  # ends elsewhere
        (rows[:, ::2], False),
        (rows.T.contiguous().T, False),
        (rows.float(), False),
        (torch.zeros(4, 36, dtype=torch.float16)[:, :32], False),  # the second row begins elsewhere
    ):
        assert kernels.reading(torch.float16, (rows, matrix_)) == {"VECTORS": vectors}


def test_threads_that_need_a_kernel_compile_it_once(
    kept: Path, compiled: list[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend = _compiler._compile

    def slowly(program: Program) -> Image:
        time.sleep(0.05)
        return pretend(program)

    monkeypatch.setattr(_compiler, "_compile", slowly)
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda _: _compiler.compile_program(a_program()), range(8)))
    assert len(compiled) == 1
    assert len(set(images)) == 1


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from contrastive_ops import compile, kernels
assert "triton cannot be imported" in kernels.unavailable()
for operator in ("co2", "conic", "nt_xent", "sgd_", "exchange_rows_"):
    assert list(compile.programs("sm_75", operator, compile.Wanted(torch.float16, 64)))
"""


def test_the_host_code_needs_no_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


VOLTA = """
import ctypes, sys
from pathlib import Path
import torch
from tests.cuda_kernels import NVRTC_12
for name in ("libnvrtc-builtins.so.12.*", "libnvrtc.so.12"):
    (library,) = NVRTC_12.rglob(name)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
from contrastive_ops import compile
from contrastive_ops.cuda import _compiler
assert _compiler.nvrtc_version()[0] == 12
assert _compiler.target_for((7, 0)) == "sm_70"
assert compile.main(["--arch", "sm_70", "--dtype", "float16", "--operator", "sgd_", "exchange_rows_"]) == 0
"""


@pytest.mark.skipif(not NVRTC_12.is_dir(), reason="NVRTC 12 is not in build/nvrtc-12")
def test_volta_is_compiled_for_by_nvrtc_12(kept: Path) -> None:
    done = subprocess.run([sys.executable, "-c", VOLTA], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sm_70" in done.stdout


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        command.main([*arguments])
    assert stopped.value.code
    return capsys.readouterr().err


@compiles
def test_the_command_says_what_it_cannot_do(
    kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--arch sm_75" in _refused(capsys)
    assert "invalid choice" in _refused(capsys, "--operator", "cross_entropy")
    for dim in ("0", "1025", "many"):
        assert f"must be from 1 to 1024, got {dim}" in _refused(capsys, "--dim", dim)
    assert "does not compile for sm_71, but for sm_" in _refused(capsys, "--arch", "sm_71")
    assert "does not compile for turing" in _refused(capsys, "--arch", "turing")
    assert "invalid choice" in _refused(capsys, "--dtype", "int8")
    kept.write_text("a file is in its place")
    assert _cache.FOLDER_VARIABLE in _refused(capsys, "--arch", "sm_75")


def test_the_command_has_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for words in ("examples:", "--arch sm_75 sm_80", _cache.FOLDER_VARIABLE, "a GPU is not needed"):
        assert words in said


# How kernels are launched, in the emulator


@compiles
@pytest.mark.skipif(bool(gpu_emulator.REQUESTED), reason="this is such a process")
@pytest.mark.parametrize(
    "architecture", mostly_thorough(["sm_75", "sm_80", "sm_90"], lambda each: each == "sm_75")
)
def test_kernels_as_compiled_are_right(architecture: str) -> None:
    """In every dtype and layout; `make emulate` runs the whole harness."""
    environment = {"GPU_EMULATOR": architecture, "HYPOTHESIS_PROFILE": "interpreted"}
    pass_elsewhere([__file__], "emulated", environment)
    pass_elsewhere(["tests/test_rows_ops.py"], "cuda and not opcheck", environment)


@compiles
@pytest.mark.slow
@pytest.mark.skipif(bool(gpu_emulator.REQUESTED), reason="this is such a process")
def test_launches_in_the_emulator() -> None:
    """Calls of losses, recorded and replayed."""
    pass_elsewhere(["tests/test_launch.py"], "launched and cuda", {"GPU_EMULATOR": "sm_75"})


def a_step(device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """Weight, buffer and gradient, and what the first two are after a step."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(5, 7, generator=generator) for _ in range(3)]
    exact = [x.double() for x in tensors]
    reference.sgd_(*exact, STEP)  # type: ignore[call-arg]
    return tensors, exact[:2]


STEP = SGDSettings(0.1, 0.9, 0.01, False)


def assert_stepped(tensors: list[Tensor], exact: list[Tensor]) -> None:
    for actual, expected in zip(tensors, exact, strict=False):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@emulated
def test_emulated_in_a_thread_that_has_no_context_yet() -> None:
    problems: list[Exception] = []

    def work(forget_before_loading: bool) -> None:
        _driver.load.cache_clear()
        forget_plans()
        try:
            tensors, exact = a_step()
            if not forget_before_loading:
                cuda.sgd_(*[x.clone() for x in tensors], STEP)
            libcuda().forget_context()
            cuda.sgd_(*tensors, STEP)
            assert_stepped(tensors, exact)
        except Exception as error:
            problems.append(error)

    for forget_before_loading in (True, False):
        thread = threading.Thread(target=work, args=(forget_before_loading,))
        thread.start()
        thread.join()
        if problems:
            raise problems.pop()


@emulated
def test_emulated_kernels_are_loaded_while_a_graph_is_captured() -> None:
    _driver.load.cache_clear()
    forget_plans()
    tensors, exact = a_step()
    libcuda().set_capturing(1)
    try:
        cuda.sgd_(*tensors, STEP)
    finally:
        libcuda().set_capturing(0)
    assert_stepped(tensors, exact)


SHARES = """
#pragma once
#include "numbers.h"
namespace contrastive_ops {
extern __shared__ float shared_numbers[];
template <int kBytes>
struct SharedMemory {
  static constexpr int contrastive_ops_shared_bytes = kBytes;
};
// Each thread gets its neighbour's number, through the end of the memory that is asked for.
template <typename Arguments>
__device__ void share(const Arguments& a) {
  static_assert(SharedMemory<Arguments::BYTES>::contrastive_ops_shared_bytes > 0);
  const int last = Arguments::BYTES / 4 - 1 - threadIdx.x;
  shared_numbers[last] = a.numbers[threadIdx.x];
  __syncthreads();
  a.numbers[threadIdx.x] = shared_numbers[last - (threadIdx.x ^ 1) + threadIdx.x];
}
}
"""


@emulated
@pytest.mark.parametrize("kib", [16, 64])
def test_emulated_shared_memory_is_what_a_kernel_asks_for(
    kib: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgetful: None
) -> None:
    changed = tmp_path / "csrc"
    shutil.copytree(_compiler.source_folder(), changed)
    (changed / "cuda" / "share.h").write_text(SHARES)
    monkeypatch.setattr(_compiler, "source_folder", lambda: changed)
    numbers = torch.arange(128.0)
    _launch.KERNELS.launch("share", (1,), {"BYTES": kib << 10})(numbers=numbers)
    assert torch.equal(numbers, (torch.arange(128) ^ 1).float())


@emulated
def test_emulated_rows_outside_are_read_as_nan_and_not_written() -> None:
    weight, buffer = torch.ones(4, 5), torch.ones(4, 5)
    incoming, outgoing = torch.ones(3, 2, 5), torch.full((3, 2, 5), 7.0)
    unit = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    slots, coming, going = torch.tensor([4, 1, 2]), torch.tensor([0, 3, 1]), torch.tensor([0, 1, -1])
    cuda.exchange_rows_(weight, buffer, slots, incoming, coming, unit, outgoing, going)
    assert outgoing[0].isnan().all()  # of the slot outside
    assert (outgoing[1] == 1).all()
    assert (outgoing[2] == 7).all()
    assert weight[1].isnan().all()  # of the row outside
    assert buffer[1].isnan().all()
    assert (weight[[0, 2, 3]] == 1).all()


@emulated
def test_emulated_offsets_have_64_bits() -> None:
    """The last rows begin behind 2³² numbers of a storage, of which next to nothing is touched."""
    stride = (1 << 31) + 3
    weight = torch.empty(2 * stride + 7, dtype=torch.float16).as_strided((3, 7), (stride, 1))
    exact = torch.randn(3, 7, dtype=torch.float64).half()
    weight.copy_(exact)
    tensors, wide = [weight, exact.clone(), exact.clone()], [exact.double() for _ in range(3)]
    reference.sgd_(*wide, STEP)  # type: ignore[call-arg]
    cuda.sgd_(*tensors, STEP)
    torch.testing.assert_close(weight.double(), wide[0], rtol=1e-3, atol=1e-3)


@emulated
def test_emulated_refusals_of_the_driver_are_told() -> None:
    program = a_program("compute_75")
    program = program._replace(name="another")
    run = _launch.KERNELS.run(program, 0, (1, 1, 1), 128, 0, ())
    run._shape = (*run._shape[:-1], 1 << 20)  # of shared memory
    with pytest.raises(RuntimeError, match=r"cannot launch another: CUDA_ERROR_INVALID_VALUE"):
        run(0)
