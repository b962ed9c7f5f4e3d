"""What only the Triton kernels have: an interpreter where there is no GPU, and a compiler that needs none."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contrastive_ops import reference
from contrastive_ops._contract import (
    CO2Partial,
    ConICPartial,
    ConICSettings,
    NTXentPartial,
    SGDSettings,
)
from tests.cases import INTERPRETED, Case, ConICCase, NTXentCase, mostly_thorough, rows
from tests.oracles import (
    conic_loss_and_gradients,
    conic_oracle,
    distance,
    fused,
    nt_xent_loss_and_gradients,
    nt_xent_oracle,
    oracle,
)

triton = pytest.importorskip("triton")

# ruff: noqa: E402
from contrastive_ops.kernels import _launch, _tiles
from contrastive_ops.kernels._launch import TRITON, Chip, Products, steps_a_range

from bench import resources, tune
from contrastive_ops import conic_loss, kernels, nt_xent_loss
from contrastive_ops.gpu import co2 as _co2
from contrastive_ops.gpu import conic as _conic
from contrastive_ops.gpu import nt_xent as _nt_xent


def version(module: ModuleType) -> tuple[int, int]:
    major, minor = module.__version__.split(".")[:2]
    return int(major), int(minor)


# The table was made with Triton 3.8. With 3.6, ConIC's weight spills up to 212 bytes after its loop, once a
# tile, on Hopper, and four kernels in 190 up to 120; with 3.5, ConIC's merge spills four on A100.
TUNED_FOR_THIS_COMPILER = version(triton) >= (3, 8)
SPILLED_BYTES = 0 if TUNED_FOR_THIS_COMPILER else 256


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU, all tests have several ranges")
@pytest.mark.parametrize("slow_in_float64", [False, True])
def test_ranges_of_co2(slow_in_float64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in twelve ranges, as on a chip of many multiprocessors; the interpreter's own is of one. On some
    chips a kernel before them measures the rows."""
    monkeypatch.setattr(TRITON, "device_chip", lambda device: Chip((0, 0), 12))
    monkeypatch.setattr(Chip, "is_slow_in_float64", slow_in_float64)
    _launch.forget_plans()
    case = Case(batch=5, keys=1500)
    for actual, expected in zip(
        fused(*case.tensors(), backend="triton"), oracle(*case.tensors()), strict=True
    ):
        assert distance(actual, expected) <= 1e-5 * expected.norm()
    _launch.forget_plans()


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU, all tests have several ranges")
@pytest.mark.parametrize(("batch", "rows"), [(70, 1500), (200, 30)])
def test_ranges_of_conic(monkeypatch: pytest.MonkeyPatch, batch: int, rows: int) -> None:
    """Many rows of the weight in ranges of several tiles; few of them, and ranges of views."""
    monkeypatch.setattr(TRITON, "device_chip", lambda device: Chip((0, 0), 3))
    case = ConICCase(batch=batch, rows=rows)
    actual = conic_loss_and_gradients(conic_loss, *case.tensors(), **case.settings(), backend="triton")
    for a, e in zip(actual, conic_oracle(*case.tensors(), **case.settings()), strict=True):
        assert distance(a, e) <= 1e-5 * e.norm()


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU, all tests have several ranges")
@pytest.mark.parametrize("consistency_weight", [0.0, 1.0])
def test_ranges_of_nt_xent(monkeypatch: pytest.MonkeyPatch, consistency_weight: float) -> None:
    """Three blocks of instances, and their keys in four ranges of which the last is shorter."""
    chip = Chip((0, 0), 12)
    monkeypatch.setattr(TRITON, "device_chip", lambda device: chip)
    case = NTXentCase(batch=800, consistency_weight=consistency_weight)
    plan = _nt_xent._plan(
        800, 800, bool(consistency_weight), Products(TRITON, 16, torch.float32, "tf32x3", chip)
    )
    assert plan.statistics.grid[:2] == plan.gradient.grid[:2] == (4, 3)
    actual = nt_xent_loss_and_gradients(nt_xent_loss, *case.tensors(), **case.settings(), backend="triton")
    for a, e in zip(actual, nt_xent_oracle(*case.tensors(), **case.settings()), strict=True):
        assert distance(a, e) <= 1e-5 * e.norm()


PRECISIONS = {
    "set_high": lambda: torch.set_float32_matmul_precision("high"),
    "set_medium": lambda: torch.set_float32_matmul_precision("medium"),
    "set_highest": lambda: torch.set_float32_matmul_precision("highest"),
    "allow": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "disallow": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False),
    "matmul_tf32": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "matmul_ieee": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    "every_tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "every_ieee": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
}  # each of PyTorch's ways to choose how float32 is multiplied


@pytest.fixture
def untouched_precision() -> Iterator[None]:
    """Puts PyTorch's choice back."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("untouched_precision")
@pytest.mark.parametrize("last", PRECISIONS)
@pytest.mark.parametrize("first", PRECISIONS)
def test_float32_follows_the_last_choice_of_a_precision(first: str, last: str) -> None:
    """Set by PyTorch's older functions or its newer properties, or by both, of which getters then raise."""
    PRECISIONS[first]()
    PRECISIONS[last]()
    if last.startswith("every") and not first.startswith("every"):
        last = first  # is inherited only where nothing was said of matrix products
    may = last in ("set_high", "set_medium", "allow", "matmul_tf32", "every_tf32")
    assert _launch.precision_of(torch.float32) == ("tf32" if may else "tf32x3")
    assert _launch.precision_of(torch.bfloat16) == "half"


@pytest.mark.parametrize(
    "error",
    [
        triton.runtime.errors.PTXASError("no register is left"),
        triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory"),
        triton.CompilationError("", None, None),
        RuntimeError("CUDA error"),
    ],
)
def test_the_search_for_tiles_goes_on_where_one_fails(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not try the same tile for another number of programs."""
    case = tune.Case("co2", "triton", "bfloat16", 256, 65536, 128)
    table, tried = dict(_tiles.OTHER), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tune, "inputs", lambda case, device: ())
    monkeypatch.setattr(tune, "sets_beyond_cache", lambda first: 2)
    monkeypatch.setattr(tune, "copied", lambda first: first)
    monkeypatch.setattr(tune, "implementation", lambda case: None)
    monkeypatch.setattr(tune, "graph_times_ms", lambda loss, sets, seconds: [1.0])

    def step(loss: None) -> None:
        (tiling,) = (each for key, each in table.items() if each is not _tiles.OTHER[key])
        tried.append(tiling)
        if tiling.held == 128:
            raise error

    monkeypatch.setattr(tune, "step", step)
    times = tune.best("co2.statistics", table, case, "half")
    assert {tiling.held for _, tiling in times} == {64}
    failed = [tiling._replace(programs=1) for tiling in tried if tiling.held == 128]
    assert len(failed) == len(set(failed)) > 1


OUTSIDE = (-1, 6, 2**40, -(2**63))


@pytest.mark.skipif(not INTERPRETED, reason="on a host, the operators look at the rows first")
@pytest.mark.parametrize("row", OUTSIDE)
@pytest.mark.parametrize("wrong", ["slots", "incoming_rows", "outgoing_rows"])
def test_the_exchange_leaves_out_rows_outside(wrong: str, row: int) -> None:
    """They are read as NaN and not written, and all others exchanged."""
    actual = torch.arange(400.0).view(4, 10, 2, 5)
    expected, nan = actual.clone(), torch.full((2, 5), math.nan)
    numbers = {"slots": [0, 5, 3], "incoming_rows": [1, 2, 0], "outgoing_rows": [4, 0, 2]}
    numbers[wrong][1] = row

    def six(x: torch.Tensor) -> list[torch.Tensor]:  # of ten rows, for what is outside to be seen
        return [x[0, 2:8, 0], x[1, 2:8, 0], x[2, 2:8], x[3, 2:8]]

    weight, buffer, incoming, outgoing = six(expected)
    for slot, come, go in zip(*numbers.values(), strict=True):
        leaving = torch.stack([weight[slot], buffer[slot]]) if 0 <= slot < 6 else nan
        if 0 <= slot < 6:
            weight[slot], buffer[slot] = incoming[come] if 0 <= come < 6 else nan
        if 0 <= go < 6:
            outgoing[go] = leaving
    weight, buffer, incoming, outgoing = six(actual)
    slots, come, go = map(torch.tensor, numbers.values())
    unit = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    kernels.exchange_rows_(weight, buffer, slots, incoming, come, unit, outgoing, go)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not INTERPRETED, reason="on a host, the operators look at the rows first")
@pytest.mark.parametrize("row", OUTSIDE)
def test_a_target_outside_makes_its_loss_nan(row: int) -> None:
    around = rows(10, 5, 0)
    weight, views = around[2:8], rows(8, 5, 1).view(2, 4, 5)
    target = torch.tensor([3, row, 0, 5])
    others, settings = torch.tensor([0, 2, 3]), ConICSettings(0.5, 2.5, 3.0)
    loss, *_, statistics = kernels.conic(views, weight, target, settings)
    expected, *_ = reference.conic(views[:, others], weight, target[others], settings)
    assert loss[1].isnan()
    torch.testing.assert_close(loss[others], expected)
    before, buffer = around.clone(), torch.zeros_like(weight)
    known = target, statistics, settings
    of_views, of_weight = kernels.conic_gradient(torch.ones(4), views, weight, *known, True, True)
    assert of_views[:, 1].isnan().all()
    assert of_views[:, others].isfinite().all()
    assert of_weight.isnan().any()
    step = SGDSettings(0.1, 0.9, 0.0, False)
    kernels.conic_gradient_sgd_(torch.ones(4), views, weight, buffer, *known, step)
    assert torch.equal(around[:2], before[:2])
    assert torch.equal(around[8:], before[8:])


# What each architecture multiplies matrices with.
TENSOR_CORES = {(8, 0): "mma.sync", (8, 9): "mma.sync", (9, 0): "wgmma.mma_async", (10, 0): "tcgen05.mma"}
HALF: dict[str, Any] = {"dtype": torch.float16}


class Call(NamedTuple):
    """A call of `resources.compile_kernel`, with its keyword arguments by name."""

    capability: tuple[int, int]
    name: str
    precision: str
    dim: int
    others: tuple[tuple[str, Any], ...] = ()

    def made(self) -> resources.Resources:
        return resources.compile_kernel(
            self.name, self.capability, self.precision, self.dim, **dict(self.others)
        )

    def __str__(self) -> str:
        others = (f"{name}={value}" for name, value in self.others)
        return "-".join(["{}.{}".format(*self.capability), self.name, self.precision, str(self.dim), *others])


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest) -> Iterator[Callable[[Call], resources.Resources]]:
    """What the compiler makes of a call. It is given all tests' calls at once, in a process a core: a kernel
    takes it a second or two, and there are hundreds."""
    params = (
        getattr(item, "callspec", None) for item in request.session.items if item.module is request.module
    )
    calls = dict.fromkeys(param.params["call"] for param in params if param and "call" in param.params)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        futures = {call: pool.submit(call.made) for call in calls}
        yield lambda call: futures[call].result()
        pool.shutdown(cancel_futures=True)


TILES = [
    Call(capability, name, precision, dim)
    for capability in TENSOR_CORES
    for name in resources.WALKING
    for precision, dim in resources.entries(name, capability)
]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled where kernels are interpreted")
@pytest.mark.parametrize("call", TILES, ids=str)
def test_the_table_of_tiles(made: Callable[[Call], resources.Resources], call: Call) -> None:
    """Every entry multiplies on tensor cores, spills no register, fits in shared memory, and lets a
    multiprocessor hold as many programs as the grid is made for."""
    kernel = made(call)
    tiles = _tiles.select(call.name, call.capability, call.precision, call.dim)
    assert TENSOR_CORES[call.capability] in kernel.ptx
    assert kernel.spilled_bytes <= SPILLED_BYTES
    assert kernel.shared_bytes <= resources.SHARED_KIB[call.capability] * 1024
    assert kernel.programs(tiles, call.capability) >= tiles.programs


VARIANTS: list[dict[str, Any]] = [{"columns": True, **HALF}, {"keys": 65535}]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    *((name, variant) for name in resources.WALKING if "nt_xent" not in name for variant in VARIANTS),
    *((f"co2.{name}", {"consistency": False}) for name in ("statistics", "gradient")),
    *((f"co2.{name}", {"temperature": 0.07}) for name in ("statistics", "gradient")),
    *((f"conic.{name}", {"weight_dtype": torch.bfloat16}) for name in ("statistics", "weight", "views")),
    ("conic.weight", {"step": False}),
    ("nt_xent.statistics", {"consistency": False}),
    *((f"nt_xent.{name}", HALF) for name in ("statistics", "gradient", "plain")),
    *((f"nt_xent.{name}", {"relative": True, **HALF}) for name in ("gradient", "plain")),
]
OTHER_CALLS = [
    Call(
        capability,
        name,
        variant.get("precision", "half"),
        128,
        tuple((k, v) for k, v in variant.items() if k != "precision"),
    )
    for name, variant in OTHERS
    for capability in TENSOR_CORES
]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled where kernels are interpreted")
@pytest.mark.parametrize(
    "call", mostly_thorough(OTHER_CALLS, lambda call: call.capability in ((8, 0), (9, 0))), ids=str
)
def test_other_calls_spill_nothing_in_the_loop(
    made: Callable[[Call], resources.Resources], call: Call
) -> None:
    """The (D, K) order of keys, a ragged number of them, InfoNCE alone, temperatures that are no multiple of
    each other, a classifier in half precision, a backward that only stores its gradient, float16, and views
    that are not normalised, on the same matrix instructions."""
    kernel = made(call)
    assert TENSOR_CORES[call.capability] in kernel.ptx
    if TUNED_FOR_THIS_COMPILER:
        assert not {"LDL", "STL"} & kernel.loop.keys()


COMPILED = [call for call in TILES if call.capability == (9, 0) and call.dim in (128, 1024)]


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled where kernels are interpreted")
@pytest.mark.parametrize("call", COMPILED, ids=str)
def test_every_promised_compiler_takes_each_kernel(
    made: Callable[[Call], resources.Resources], call: Call
) -> None:
    """Whole rows and chunks of them, with the oldest Triton too, whose limits the newest says nothing of."""
    assert TENSOR_CORES[call.capability] in made(call).ptx


SMALL_CALLS = [
    Call(capability, name, "half", dim, others)
    for dim in (128, 1024)
    for name in resources.SMALL
    for others in ((), (("step", False),))[: 1 + name.endswith("prepare")]  # of both passes
    for capability in TENSOR_CORES
    if name != "co2.prepare" or Chip(capability, 1).is_slow_in_float64
]


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled where kernels are interpreted")
@pytest.mark.parametrize("call", SMALL_CALLS, ids=str)
def test_the_small_kernels_spill_nothing(made: Callable[[Call], resources.Resources], call: Call) -> None:
    assert made(call).spilled_bytes <= SPILLED_BYTES


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled where kernels are interpreted")
def test_statistics_need_no_exchange_between_threads() -> None:
    """A row's sums stay in the threads that made them: no shuffle in the loop over the keys, on Hopper."""
    loop = resources.compile_kernel("co2.statistics", (9, 0), "half", 128).loop
    if not loop:
        pytest.skip("there is no disassembler")
    assert "MUFU" in loop
    assert "SHFL" not in loop


@given(steps=st.integers(1, 5000), blocks=st.integers(1, 2000), slots=st.integers(1, 600))
def test_ranges_fill_the_chip(steps: int, blocks: int, slots: int) -> None:
    """Every key is in a range, none is empty, and the chip is done no later than with a single range."""
    size = steps_a_range(steps, blocks, slots)
    ranges = math.ceil(steps / size)
    assert (ranges - 1) * size < steps <= ranges * size
    assert math.ceil(blocks * ranges / slots) * (size + 2) <= math.ceil(blocks / slots) * (steps + 2)


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_no_range_has_more_keys_than_float32_counts(
    capability: tuple[int, int], multiprocessors: int
) -> None:
    """Ranks are counted in it, and exact up to 2²⁴."""
    keys = (1 << 30) + 1
    products = Products(TRITON, 128, torch.bfloat16, "half", Chip(capability, multiprocessors))
    for launch in (
        _co2._plan(256, keys, products).statistics,
        _conic._plan(2, 512, keys, products).statistics,
    ):
        assert launch.arguments["keys_a_range"] <= 1 << 24


def test_calls_are_recorded_and_not_launched() -> None:
    """By their names, with the arguments of a launch; the plan is that of the chip in question."""
    calls = resources.record("co2", (9, 0), "half", 128)
    assert list(calls) == ["co2.statistics", "co2.merge", "co2.gradient", "co2.finish"]
    assert all(set(call.launch.kernel.arg_names) <= set(call.arguments) for (call,) in calls.values())
    assert TRITON.chip_of(torch.device("cpu")) == Chip((0, 0), 1)


def test_reports_why_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no CUDA device" in kernels.unavailable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 0), (7, 5)][device])
    assert "compute capability 8.0 or newer, this one has 7.5" in kernels.unavailable()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton cannot be imported" in kernels.unavailable()


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "it does not serve torch.float64"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), "interpreter multiplies bfloat16 wrongly"),
        (torch.zeros(2, 1025), "it serves rows of up to 1024 dimensions, got 1025"),
        (torch.zeros(2, 3, device="meta"), "it does not serve meta tensors"),
        (torch.zeros(2, 1024), None),
    ],
)
def test_refuses_what_it_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, query: torch.Tensor, reason: str | None
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    said = kernels.refuses("co2", query)
    assert said == reason or (reason and reason in (said or ""))


def bfloat16(dim: int, multiprocessors: int) -> Products:
    return Products(TRITON, dim, torch.bfloat16, "half", Chip((9, 0), multiprocessors))


@pytest.mark.parametrize("multiprocessors", [4, 108, 132])
@pytest.mark.parametrize("keys", [1, 65536, 1 << 20, 1 << 24])
@pytest.mark.parametrize("dim", [16, 128, 256, 1024])
def test_memory_is_bounded_whatever_the_queue(multiprocessors: int, keys: int, dim: int) -> None:
    """The ranges' numbers and parts: a few times B·D, or 160 MiB; less than 16 MiB at MoCo's size."""
    for batch in (1, 256, 4096, 100_000):
        plan = _co2._plan(batch, keys, bfloat16(dim, multiprocessors))
        statistics = plan.statistics.grid[1] * batch * len(CO2Partial._fields) * 4
        parts = plan.gradient.grid[1] * batch * dim * 4
        assert statistics + parts <= max(160 << 20, 4 * batch * (dim + 8) * 4)
        if (batch, dim) == (256, 128):
            assert statistics + parts <= 16 << 20


@pytest.mark.parametrize("multiprocessors", [4, 108, 132])
@pytest.mark.parametrize("keys", [1, 65536, 1 << 20, 1 << 24])
@pytest.mark.parametrize("dim", [16, 128, 256, 1024])
def test_memory_of_conic_is_bounded_whatever_the_classifier(
    multiprocessors: int, keys: int, dim: int
) -> None:
    """The same, of its views. Of the classifier there is a copy in their dtype, and 1/‖w‖ of each row."""
    for batch in (1, 512, 8192, 100_000):
        plan = _conic._plan(2, batch, keys, bfloat16(dim, multiprocessors))
        partial = plan.statistics.grid[1] * plan.padded_rows * len(ConICPartial._fields) * 4
        parts = plan.views.grid[1] * plan.padded_rows * plan.padded_dim * 4
        assert max(partial, parts) <= max(160 << 20, 4 * plan.padded_rows * (plan.padded_dim + 3) * 4)
        if (batch, dim) == (512, 128):
            assert max(partial, parts) <= 25 << 20


@pytest.mark.parametrize("multiprocessors", [4, 108, 132])
@pytest.mark.parametrize("consistency", [False, True])
@pytest.mark.parametrize("dim", [16, 128, 256, 1024])
def test_memory_of_nt_xent_is_bounded_whatever_the_batch(
    multiprocessors: int, consistency: bool, dim: int
) -> None:
    for batch in (1, 256, 4096, 100_000):
        plan = _nt_xent._plan(batch, batch, consistency, bfloat16(dim, multiprocessors))
        partial = plan.statistics.grid[1] * plan.padded_rows * len(NTXentPartial._fields) * 4
        parts = plan.gradient.grid[1] * plan.padded_rows * plan.padded_dim * 4
        assert max(partial, parts) <= max(160 << 20, 4 * plan.padded_rows * (plan.padded_dim + 5) * 4)
        if (batch, dim) == (4096, 128):
            assert max(partial, parts) <= 48 << 20
