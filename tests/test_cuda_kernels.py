"""The kernels of csrc/cuda as NVRTC compiles them, in the emulator, against the losses in float64; and what
the compilers make of them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import resources
from bench.compilers import CUDA
from contrastive_ops import reference
from contrastive_ops._contract import CO2Settings, ConICSettings, NTXentKeys, NTXentSettings, SGDSettings
from contrastive_ops.cuda import tiles
from contrastive_ops.cuda._launch import CudaLaunch
from tests import cuda_kernels
from tests.cases import Case, ConICCase, NTXentCase, mostly_thorough
from tests.cuda_kernels import nvrtc, serve
from tests.oracles import (
    LAST_DIGIT,
    ORACLE_ERROR,
    assert_near,
    assert_no_worse_than_eager,
    conic_loss_and_gradients,
    conic_oracle,
    loss_and_gradient,
    nt_xent_loss_and_gradients,
    nt_xent_oracle,
    oracle,
)
from train_ref.eager import eager_co2, eager_conic, eager_nt_xent

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
SMALLEST_KIB = {70: 96, 75: 64, 80: 99, 90: 227}  # of a program on all chips that a table serves
NEEDED = {
    70: "mma.sync.aligned.m8n8k4",
    75: "mma.sync.aligned.m16n8k8",
    80: "mma.sync.aligned.m16n8k16",
    90: "wgmma.mma_async",
}
# Of a thread, at most. On an H100 tiles that spill some were faster than those that spill nothing.
SPILLED_BYTES = {70: 0, 75: 0, 80: 0, 90: 112}


class On(NamedTuple):
    """Where kernels run, and what they multiply."""

    architecture: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"sm_{self.architecture}-{str(self.dtype).removeprefix('torch.')}"

    def require(self) -> None:
        if nvrtc(self.architecture) is None:
            pytest.skip(f"no NVRTC for compute capability {self.architecture / 10} is installed")


PLACES = [On(arch, dtype) for arch in (75, 80, 90, 70) for dtype in (HALF, BFLOAT, FLOAT)]
QUICK = [On(75, HALF), On(80, BFLOAT), On(80, FLOAT), On(90, BFLOAT)]


def on_all(*quick: On) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("on", mostly_thorough(PLACES, lambda on: on in (quick or QUICK)), ids=str)


# ---- Losses and their gradients, as tests.oracles has them ----


def co2_settings(case: Case) -> CO2Settings:
    return CO2Settings(
        case.temperature,
        case.consistency_temperature,
        1.0,
        case.consistency_weight,
        case.include_positive,
        case.normalize,
    )


def co2_on(on: On, case: Case) -> tuple[Tensor, Tensor]:
    loss, *_, gradient = serve(on.architecture, "co2", *case.tensors(), co2_settings(case), True)
    return loss.double(), gradient.double()


def conic_settings(case: ConICCase) -> ConICSettings:
    others = case.rows - 1
    compensation = (case.sampled * case.rows - 1) / others if others else 1.0
    return ConICSettings(case.temperature, case.consistency_weight, compensation)


def conic_on(on: On, case: ConICCase) -> tuple[Tensor, Tensor, Tensor]:
    views, weight, target = case.tensors()
    settings, incoming = conic_settings(case), torch.linspace(0.5, 1.5, case.batch)
    loss, *_, known = serve(on.architecture, "conic", views, weight, target, settings)
    gradients = serve(
        on.architecture, "conic_gradient", incoming, views, weight, target, known, settings, True, True
    )
    return loss.double(), gradients[0].double(), gradients[1].double()


def nt_xent_settings(case: NTXentCase) -> NTXentSettings:
    return NTXentSettings(
        case.temperature, case.consistency_temperature, case.consistency_weight, case.normalize
    )


def nt_xent_on(on: On, case: NTXentCase) -> tuple[Tensor, Tensor]:
    views, settings = torch.stack(case.tensors()), nt_xent_settings(case)
    incoming = torch.linspace(0.5, 1.5, 2 * case.batch)
    loss, *_, known = serve(on.architecture, "nt_xent", views, settings)
    gradient = serve(on.architecture, "nt_xent_gradient", incoming, views, known, settings)
    return loss.double(), gradient.double()


def assert_accurate(
    on: On, actual: Sequence[Tensor], exact: Sequence[Tensor], eager: Callable[[], Any], temperature: float
) -> None:
    """Float32 within 1e-6 and 1e-5, or twice eager's error; half precision no worse than eager in the same
    dtype, but for a rounding of the input and of the result."""
    gradients = len(exact) - 1
    if on.dtype == FLOAT:
        assert_no_worse_than_eager(
            actual, eager(), exact, times=2, accurate=(1e-6, *[1e-5] * gradients),
            cancelling=(ORACLE_ERROR, *[LAST_DIGIT / temperature] * gradients),
        )  # fmt: skip
    else:
        rounding = torch.finfo(on.dtype).eps
        assert_no_worse_than_eager(
            actual, eager(), exact, rounding=rounding, cancelling=1e-3 * rounding / temperature
        )


def check_co2(on: On, case: Case) -> None:
    on.require()
    case = case.replace(dtype=on.dtype)
    query, key, queue = case.tensors()
    queue_dtype = on.dtype
    assert_accurate(
        on,
        co2_on(on, case),
        oracle(query, key, queue, **case.settings()),
        lambda: loss_and_gradient(eager_co2, query, key, queue.to(queue_dtype), **case.settings()),
        min(case.temperature, case.consistency_temperature / max(1.0, case.consistency_weight)),
    )


def check_conic(on: On, case: ConICCase) -> None:
    on.require()
    case = case.replace(dtype=on.dtype)
    views, weight, target = case.tensors()
    assert_accurate(
        on,
        conic_on(on, case),
        conic_oracle(views, weight, target, **case.settings()),
        lambda: conic_loss_and_gradients(eager_conic, views, weight.to(on.dtype), target, **case.settings()),
        case.temperature,
    )


def check_nt_xent(on: On, case: NTXentCase) -> None:
    on.require()
    case = case.replace(dtype=on.dtype)
    assert_accurate(
        on,
        nt_xent_on(on, case),
        nt_xent_oracle(*case.tensors(), **case.settings()),
        lambda: nt_xent_loss_and_gradients(eager_nt_xent, *case.tensors(), **case.settings()),
        min(case.temperature, case.consistency_temperature),
    )


# ---- Sizes, strides and settings ----

# Rows that end within a warp's 16, and within a block's 64; keys within a tile, and within a range of tiles.
CO2_CASES = [
    Case(21, 130, 40, layout="strided", queue_layout="columns"),
    Case(70, 65, 64),
    Case(1, 1, 1),
    Case(17, 33, 17, include_positive=True, layout="offset"),
    Case(40, 97, 128, temperature=0.2, consistency_temperature=0.05, consistency_weight=0.3),
    Case(20, 96, 136, queue_layout="columns"),
    Case(20, 70, 257, normalize=False),
    Case(20, 33, 1024),
]
CONIC_CASES = [
    ConICCase(2, 21, 130, 40, weight_dtype=FLOAT, layout="strided", weight_layout="columns"),
    ConICCase(2, 70, 65, 64),
    ConICCase(1, 1, 1, 1),
    ConICCase(3, 30, 33, 17, sampled=20, layout="offset"),
    ConICCase(2, 20, 97, 128, weight_dtype=FLOAT),
    ConICCase(2, 20, 70, 257),
    ConICCase(2, 20, 33, 1024, weight_layout="columns"),
]
NT_XENT_CASES = [
    NTXentCase(21, 40, layout="strided"),
    NTXentCase(70, 64),
    NTXentCase(1, 1),
    NTXentCase(33, 17, layout="offset", consistency_weight=0.0),
    NTXentCase(40, 128, temperature=0.1, consistency_temperature=0.04),
    NTXentCase(20, 136, normalize=False),
    NTXentCase(20, 257),
    NTXentCase(17, 1024),
]


@on_all()
@pytest.mark.parametrize("case", mostly_thorough(CO2_CASES, lambda case: case == CO2_CASES[0]), ids=str)
def test_co2(on: On, case: Case) -> None:
    check_co2(on, case)


@on_all(On(75, HALF))
@pytest.mark.parametrize("case", mostly_thorough(CONIC_CASES, lambda case: case == CONIC_CASES[0]), ids=str)
def test_conic(on: On, case: ConICCase) -> None:
    check_conic(on, case)


@on_all(On(75, HALF), On(80, BFLOAT))
@pytest.mark.parametrize(
    "case", mostly_thorough(NT_XENT_CASES, lambda case: case == NT_XENT_CASES[0]), ids=str
)
def test_nt_xent(on: On, case: NTXentCase) -> None:
    check_nt_xent(on, case)


@pytest.mark.thorough
@on_all()
@pytest.mark.parametrize(
    "case",
    [
        Case(20, 70, 40, temperature=1e-3, consistency_temperature=10.0),
        Case(20, 70, 40, temperature=10.0, consistency_temperature=1e-3, consistency_weight=1.0),
        Case(20, 70, 40, consistency_weight=0.0),
        Case(20, 70, 40, temperature=1.0, consistency_weight=0.0, normalize=False, include_positive=True),
    ],
    ids=str,
)
def test_co2_at_any_temperature(on: On, case: Case) -> None:
    """Exponentials relative to 0, and to maxima; with the consistency term, and without."""
    check_co2(on, case)


@pytest.mark.thorough
@on_all()
def test_co2_walks_again_where_keys_are_long(on: On) -> None:
    """Sums relative to 0 overflow, which is found at the end of a range."""
    on.require()
    case = Case(20, 70, 40, on.dtype, temperature=0.2, consistency_temperature=0.1, queue_scale=30.0)
    exact = oracle(*case.tensors(), **case.settings())
    assert_near(co2_on(on, case), exact, (1e-5, 1e-4) if on.dtype == FLOAT else (1e-2, 2e-2))


@pytest.mark.parametrize(
    "queue_dtype", mostly_thorough([FLOAT, HALF, torch.float64], lambda each: each == FLOAT)
)
@on_all(On(75, HALF))
def test_a_queue_of_another_dtype(on: On, queue_dtype: torch.dtype) -> None:
    check_co2(on, Case(21, 70, 24, queue_dtype=queue_dtype, queue_layout="columns"))


@on_all(On(80, FLOAT))
def test_instance_loss_alone_of_rows_that_are_alike(on: On) -> None:
    """The key is the query: a loss near 0 keeps its digits."""
    check_co2(on, Case(20, 50, 32, resemblance=1e3, consistency_weight=0.0))


@pytest.mark.thorough
@pytest.mark.parametrize("loss", ["co2", "conic", "nt_xent"])
def test_tf32(loss: str) -> None:
    on, before = On(80, FLOAT), torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        if loss == "co2":
            case = Case(21, 130, 40)
            results, exact = co2_on(on, case), oracle(*case.tensors(), **case.settings())
        elif loss == "conic":
            conic = ConICCase(2, 21, 130, 40)
            results, exact = conic_on(on, conic), conic_oracle(*conic.tensors(), **conic.settings())
        else:
            views = NTXentCase(21, 40)
            results, exact = nt_xent_on(on, views), nt_xent_oracle(*views.tensors(), **views.settings())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert_near(results, exact, (1e-3,) * len(exact))


# ---- The three steps over parts of the keys, and what only one operator has ----


@on_all(On(75, HALF))
def test_co2_over_two_parts_of_the_queue(on: On) -> None:
    on.require()
    case = Case(21, 130, 40, on.dtype)
    query, key, queue = case.tensors()
    settings = co2_settings(case)
    halves = queue[:50], queue[50:]
    known = [serve(on.architecture, "co2_statistics", query, key, half, settings) for half in halves]
    partial, rows = torch.cat([each[0] for each in known]), known[0][1]
    losses = serve(on.architecture, "co2_merge", partial, rows, settings)
    first, second = losses.coefficients, losses.coefficients.clone()
    second[:, -1] = 0  # the positive counts once
    gradient = sum(
        serve(on.architecture, "co2_gradient", query, key, half, each, settings)
        for half, each in zip(halves, (first, second), strict=True)
    )
    assert_accurate(
        on,
        (losses.loss, gradient.double()),
        oracle(query, key, queue, **case.settings()),
        lambda: loss_and_gradient(eager_co2, query, key, queue, **case.settings()),
        case.consistency_temperature / case.consistency_weight,
    )


@on_all(On(80, FLOAT))
def test_conic_over_two_parts_of_the_weight(on: On) -> None:
    """Of which each owns the keys of some views."""
    on.require()
    case = ConICCase(2, 21, 130, 40, on.dtype)
    views, weight, target = case.tensors()
    settings, incoming = conic_settings(case), torch.linspace(0.5, 1.5, case.batch)
    parts = [
        (weight[begin:end], torch.where((target >= begin) & (target < end), target - begin, -1))
        for begin, end in ((0, 50), (50, 130))
    ]
    positives = [serve(on.architecture, "conic_positives", views, *part) for part in parts]
    positive = torch.where(positives[0].isnan(), positives[1], positives[0])
    partial = [serve(on.architecture, "conic_statistics", views, *part, positive, settings) for part in parts]
    loss, *_, known = serve(on.architecture, "conic_merge", torch.cat(partial), positive, views, settings)
    # The consistency of the views is no part's of the weight, and counts once.
    alone = settings._replace(consistency_weight=0.0)
    gradients = [
        serve(on.architecture, "conic_gradient", incoming, views, *part, known, each, True, True)
        for part, each in zip(parts, (settings, alone), strict=True)
    ]
    results = (
        loss,
        sum(each[0].double() for each in gradients),
        torch.cat([each[1] for each in gradients]).double(),
    )
    assert_accurate(
        on,
        results,
        conic_oracle(views, weight, target, **case.settings()),
        lambda: conic_loss_and_gradients(eager_conic, views, weight, target, **case.settings()),
        case.temperature,
    )


@on_all(On(80, BFLOAT))
def test_conic_takes_a_step_of_sgd(on: On) -> None:
    on.require()
    views, weight, target = ConICCase(2, 21, 70, 40, on.dtype, FLOAT, weight_layout="columns").tensors()
    settings, step = ConICSettings(0.1, 2.5, 3.0), SGDSettings(0.1, 0.9, 1e-2, True)
    incoming, buffer = torch.linspace(0.5, 1.5, 21), torch.ones_like(weight)
    *_, known = reference.conic(views.double(), weight.double(), target, settings)
    exact_weight, exact_buffer = weight.double(), buffer.double()
    reference.conic_gradient_sgd_(
        incoming.double(), views.double(), exact_weight, exact_buffer, target, known, settings, step
    )
    before = exact_weight - weight
    serve(
        on.architecture,
        "conic_gradient_sgd_",
        incoming,
        views,
        weight,
        buffer,
        target,
        known,
        settings,
        step,
    )
    near = 1e-5 if on.dtype == FLOAT else 1e-2
    assert_near([buffer.double()], [exact_buffer], [near])
    assert (weight - exact_weight).norm() <= near * before.norm()


@on_all(On(75, HALF))
def test_nt_xent_against_instances_that_are_given(on: On) -> None:
    """Some of which are rows as well, in another order."""
    on.require()
    case = NTXentCase(21, 40, on.dtype)
    views, settings = torch.stack(case.tensors()), nt_xent_settings(case)
    others = torch.stack(NTXentCase(37, 40, on.dtype, seed=5).tensors())
    others[:, 3:10] = views[:, 5:12]
    target = torch.full((21,), -1)
    target[5:12] = torch.arange(3, 10)
    exact_keys = NTXentKeys(others.double(), target)
    partial, positive = serve(
        on.architecture, "nt_xent_statistics", views, settings, NTXentKeys(others, target)
    )
    losses = serve(on.architecture, "nt_xent_merge", partial, positive, settings)
    expected = reference.nt_xent_merge(
        *reference.nt_xent_statistics(views.double(), settings, exact_keys), settings
    )
    rounding = 1e-5 if on.dtype == FLOAT else 4 * torch.finfo(on.dtype).eps
    assert_near(losses[:3], expected[:3], (rounding,) * 3)

    generator = torch.Generator().manual_seed(0)
    incoming = torch.linspace(0.5, 1.5, 42)
    of_keys = torch.rand(74, generator=generator), torch.rand(74, 5, generator=generator, dtype=torch.float64)
    of_keys[1][:, 1] *= 1e-2
    given = NTXentKeys(others, target, *of_keys)
    exact = NTXentKeys(others.double(), target, of_keys[0].double(), of_keys[1])
    known = expected.coefficients
    gradient = serve(on.architecture, "nt_xent_gradient", incoming, views, known, settings, given)
    assert_near(
        [gradient.double()],
        [reference.nt_xent_gradient(incoming.double(), views.double(), known, settings, exact)],
        [rounding],
    )


def test_equal_input_gives_equal_bits_however_a_grid_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are executed in their order, one, or many, at a time."""
    case = Case(70, 70, 16, HALF)
    first = co2_on(On(75, HALF), case)
    monkeypatch.setattr(cuda_kernels.machine, "THREADS_AT_ONCE", 128)
    for a, b in zip(first, co2_on(On(75, HALF), case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_ranges_of_keys(monkeypatch: pytest.MonkeyPatch, multiprocessors: int) -> None:
    """One for all keys, and one for every tile."""
    monkeypatch.setattr(cuda_kernels, "MULTIPROCESSORS", multiprocessors)
    check_co2(On(75, HALF), Case(21, 400, 24))


def test_not_a_number_comes_out_as_such() -> None:
    case = Case(21, 70, 40, HALF)
    query, key, queue = case.tensors()
    query[3, 7], settings = float("nan"), co2_settings(case)
    loss, *_, gradient = serve(75, "co2", query, key, queue, settings, True)
    assert loss[3].isnan()
    assert gradient[3].isnan().all()
    others = torch.arange(21) != 3
    assert loss[others].isfinite().all()
    assert gradient[others].isfinite().all()


# ---- What the compilers make of them ----


LINES = [
    (architecture, name, precision, dim)
    for architecture in (75, 80, 90, 70)
    for name, precision, dim in tiles.table_of(divmod(architecture, 10))
]
QUICK_LINES = [
    (75, "co2.gradient", "half", 128), (80, "conic.weight", "half", 128), (90, "nt_xent.plain", "half", 128)
]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "name", "precision", "dim"), mostly_thorough(LINES, lambda line: line in QUICK_LINES)
)
def test_the_table_of_tiles(architecture: int, name: str, precision: str, dim: int) -> None:
    """Every entry multiplies on tensor cores where there are such, spills no register or few, and lets a
    multiprocessor hold as many programs as the grid is made for."""
    On(architecture, HALF).require()
    capability = divmod(architecture, 10)
    made = resources.compile_kernel(name, capability, precision, dim, compiler=CUDA)
    assert made.spilled_bytes <= SPILLED_BYTES[architecture]
    assert "ld.local" not in made.ptx
    if precision == "half":
        assert NEEDED[architecture] in made.ptx
    else:
        assert ("mma.sync.aligned.m16n8k8.row.col.f32.tf32" in made.ptx) == (architecture >= 80)
    assert ("cp.async.cg" in made.ptx) == (architecture >= 80)
    if "wgmma" not in made.ptx:  # which may read all rows by itself
        assert ("ldmatrix" in made.ptx) == (
            architecture >= 80 or (architecture == 75 and precision == "half")
        )
    tiling = tiles.select(name, capability, precision, dim)
    assert made.programs(tiling, capability) >= tiling.programs
    assert made.shared_bytes <= SMALLEST_KIB[architecture] * 1024


@pytest.mark.thorough
@pytest.mark.parametrize("queue_dtype", [HALF, FLOAT], ids=str)
@pytest.mark.parametrize("architecture", [75, 80, 70])
def test_mocos_order_of_keys_spills_nothing(architecture: int, queue_dtype: torch.dtype) -> None:
    """Their numbers are loaded one by one, beside the same sums and gradients."""
    On(architecture, HALF).require()
    problem = {"columns": True, "dtype": queue_dtype, "compiler": CUDA}
    precision = "half" if queue_dtype == HALF else "tf32x3"
    for name in ("co2.statistics", "co2.gradient"):
        made = resources.compile_kernel(name, divmod(architecture, 10), precision, 128, **problem)
        assert not made.spilled_bytes
        assert "ld.local" not in made.ptx


def test_warps_of_the_tables() -> None:
    """A warp has 16 rows of each block."""
    for capability in ((7, 0), (7, 5), (8, 0), (9, 0)):
        for (name, _, _), tiling in tiles.table_of(capability).items():
            assert tiling.warps == tiling.held // (32 if name.startswith("conic") else 16)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="the other compiler is not installed")
@pytest.mark.parametrize(
    ("architecture", "name"),
    mostly_thorough(
        [(a, name) for a in (75, 80, 90, 100) for name in resources.WALKING],
        lambda each: each == (75, "conic.weight"),
    ),
)
def test_nvcc_takes_them_too(architecture: int, name: str, tmp_path: Path) -> None:
    """With warnings as errors."""
    source = tmp_path / f"{name}.cu"
    consistency = name != "nt_xent.plain"
    calls = resources.record(
        name.partition(".")[0], divmod(architecture, 10), "half", 128, compiler=CUDA, consistency=consistency
    )
    launch, arguments = calls[name][-1]
    assert isinstance(launch, CudaLaunch)
    source.write_text(launch.layout(arguments).text)
    subprocess.run(
        [
            "nvcc", f"-arch=sm_{architecture}", "-std=c++20", "-Werror=all-warnings",
            f"-I{cuda_kernels.SOURCES}", "-cubin", "-o", source.with_suffix(".cubin"), source,
        ],
        check=True,
    )  # fmt: skip
