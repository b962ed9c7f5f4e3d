"""What can only be seen on a GPU: offsets past 2³¹, graphs, streams, loss scaling, memory, the sanitizer."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_ops import available_backends, co2_loss, conic_loss, info_nce_loss, nt_xent_loss, reference
from contrastive_ops._contract import PendingStep, SGDSettings
from tests.cases import Case, ConICCase, NTXentCase
from tests.classifiers import STORAGES, Training, classifier, saved
from tests.conftest import ON_GPU
from tests.oracles import (
    assert_near,
    assert_no_worse_than_eager,
    conic_loss_and_gradients,
    conic_oracle,
    distance,
    fused,
    nt_xent_loss_and_gradients,
    nt_xent_oracle,
    oracle,
)
from train_ref.eager import eager_conic, eager_nt_xent

SERVING = [name for name in ON_GPU if available_backends()[name]]

pytestmark = pytest.mark.skipif(not SERVING, reason="there is no GPU that a backend serves")


@pytest.fixture(params=SERVING or ["triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    return request.param


def on_gpu(case: Case | ConICCase) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (x.cuda() for x in case.tensors())
    return first, second, third


def hold_in_a_graph(
    step: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], cases: Iterable[Sequence[Tensor]]
) -> None:
    """Capture `step`: a replay computes anew from what its inputs hold then, here the tensors of each case.
    Capture would raise on any synchronisation."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for case in cases:
        with torch.no_grad():
            for x, y in zip(inputs, case, strict=True):
                x.copy_(y)
        graph.replay()
        for result, expected in zip(results, step(), strict=True):
            assert torch.equal(result, expected)


def share_nothing_on_two_streams(
    step: Callable[..., Sequence[Tensor]], cases: Sequence[Sequence[Tensor]], **settings: Any
) -> None:
    """Calls on two streams at once give what each gives alone."""
    expected = [step(*case, **settings) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(*case, **settings))
        torch.cuda.synchronize()
        for result, alone in zip(results, expected, strict=True):
            for a, b in zip(result, alone, strict=True):
                assert torch.equal(a, b)


@contextmanager
def nothing_may_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_serves_gpu_tensors_unasked() -> None:
    """By default, without a warning: the reference's bits would differ."""
    query, key, queue = on_gpu(Case())
    assert torch.equal(co2_loss(query, key, queue), co2_loss(query, key, queue, backend=SERVING[0]))


@pytest.mark.parametrize("loss", ["co2", "info_nce", "conic", "nt_xent", "nt_xent_co2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_operator_once(gpu_backend: str, dtype: torch.dtype, loss: str) -> None:
    """At a size that users have: what a first run on a new GPU shows."""
    exact, settings = (1e-6, 1e-5) if dtype == torch.float32 else (1e-4, 1e-2), {"backend": gpu_backend}
    if loss == "conic":
        case = ConICCase(batch=128, rows=16384, dim=128, dtype=dtype)
        actual = conic_loss_and_gradients(conic_loss, *on_gpu(case), **case.settings(), **settings)
        assert_near(actual, conic_oracle(*on_gpu(case), **case.settings()), (*exact, exact[1]))
    elif loss.startswith("nt_xent"):
        own = NTXentCase(2048, 128, dtype, consistency_weight=1.0 if loss == "nt_xent_co2" else 0.0)
        views = [x.cuda() for x in own.tensors()]
        actual = nt_xent_loss_and_gradients(nt_xent_loss, *views, **own.settings(), **settings)
        assert_near(actual, nt_xent_oracle(*views, **own.settings()), (*exact, exact[1])[: len(actual)])
    else:
        queue = Case(256, 16384, 128, dtype, consistency_weight=10.0 if loss == "co2" else 0.0)
        actual = fused(*on_gpu(queue), **queue.settings(), **settings)
        assert_near(actual, oracle(*on_gpu(queue), **queue.settings()), exact)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offsets_beyond_32_bits(gpu_backend: str, dtype: torch.dtype, columns: bool) -> None:
    """K = 16,777,216 at D = 256 is 2³² elements. Only the last row resembles a query, and its gradient is
    the first query's: a wrong offset finds neither."""
    keys, dim = 1 << 24, 256
    query = F.normalize(torch.randn(4, dim, device="cuda"), dim=1).to(dtype)
    queue = torch.zeros(dim, keys, device="cuda", dtype=dtype).T if columns else torch.zeros(
        keys, dim, device="cuda", dtype=dtype
    )  # fmt: skip
    queue[-1] = query[0]
    query.requires_grad_()
    loss, metrics = info_nce_loss(
        query,
        -query.detach(),
        queue,
        temperature=0.07,
        reduction="none",
        return_metrics=True,
        backend=gpu_backend,
    )
    s = (query.detach().double() @ queue[-1].double()) / query.detach().double().norm(dim=1)
    expected = torch.log(math.exp(-1 / 0.07) + (keys - 1) + (s / 0.07).exp()) + 1 / 0.07
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert metrics.positive_rank.tolist() == [keys] * 4
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_graph_capture_and_replay(gpu_backend: str, dtype: torch.dtype) -> None:
    query, key, queue = on_gpu(Case(batch=40, keys=3000, dim=64, dtype=dtype))
    query.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = co2_loss(query, key, queue, backend=gpu_backend)
        return loss.detach(), torch.autograd.grad(loss, query)[0]

    cases = (on_gpu(Case(batch=40, keys=3000, dim=64, dtype=dtype, seed=seed)) for seed in (5, 6))
    hold_in_a_graph(step, (query, key, queue), cases)


def test_nothing_waits_for_the_gpu(gpu_backend: str) -> None:
    query, key, queue = on_gpu(Case())
    query.requires_grad_()
    co2_loss(query, key, queue, backend=gpu_backend).backward()
    with nothing_may_wait():
        loss, _ = co2_loss(query, key, queue, return_metrics=True, backend=gpu_backend)
        loss.backward()


def test_two_streams(gpu_backend: str) -> None:
    cases = [Case(batch=300, keys=20000, dim=128, dtype=torch.bfloat16, seed=seed) for seed in (1, 2)]
    share_nothing_on_two_streams(fused, [on_gpu(case) for case in cases], backend=gpu_backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU only")
def test_another_device_than_the_current_one(gpu_backend: str) -> None:
    tensors = on_gpu(Case())
    expected = fused(*tensors, backend=gpu_backend)
    actual = fused(*(x.to("cuda:1") for x in tensors), backend=gpu_backend)
    assert torch.cuda.current_device() == 0
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_under_autocast_with_a_gradient_scaler(gpu_backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder = torch.nn.Linear(32, 64).cuda()
    images, _, queue = on_gpu(Case(batch=128, keys=2048, dim=32))
    queue = F.normalize(torch.randn(2048, 64, device="cuda"), dim=1)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype=dtype):
            query = encoder(images)
            with torch.no_grad():
                key = encoder(images + 0.1 * torch.randn_like(images))
            loss = co2_loss(query, key, queue, temperature=0.2, backend=gpu_backend)
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_follows_the_matmul_precision(gpu_backend: str, precision: str) -> None:
    """TF32 where PyTorch may use it; exact otherwise."""
    tensors = on_gpu(Case(batch=64, keys=5000, dim=128))
    expected = oracle(*tensors, **Case().settings())
    torch.set_float32_matmul_precision(precision)
    try:
        actual = fused(*tensors, **Case().settings(), backend=gpu_backend)
    finally:
        torch.set_float32_matmul_precision("highest")
    allowed = 1e-6 if precision == "highest" else 5e-3
    assert_near(actual, expected, (allowed, 10 * allowed))


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_nan_made_on_the_gpu_stays_one(gpu_backend: str, precision: str) -> None:
    """Its bits are all ones, unlike those of float("nan")."""
    query, key, queue = on_gpu(Case(batch=40, keys=3000, dim=64))
    queue[1234, 5] = torch.zeros((), device="cuda") / torch.zeros((), device="cuda")
    torch.set_float32_matmul_precision(precision)
    try:
        loss, gradient = fused(query, key, queue, backend=gpu_backend)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert loss.isnan().all()
    assert gradient.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [128, 256, 512, 1000])
@pytest.mark.parametrize("batch", [1, 32, 256, 1000])
def test_every_tile_of_the_table(gpu_backend: str, dtype: torch.dtype, dim: int, batch: int) -> None:
    case = Case(batch=batch, keys=10007, dim=dim, dtype=dtype)
    tensors = on_gpu(case)
    actual = fused(*tensors, **case.settings(), backend=gpu_backend)
    relative = (1e-6, 1e-5) if dtype == torch.float32 else (1e-4, 1e-2)
    assert_near(actual, oracle(*tensors, **case.settings()), relative)


def test_memory_does_not_grow_with_the_queue(gpu_backend: str) -> None:
    def extra(keys: int) -> int:
        query, key, queue = on_gpu(Case(batch=256, keys=keys, dim=128, dtype=torch.bfloat16))
        query.requires_grad_()
        co2_loss(query, key, queue, backend=gpu_backend).backward()
        query.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        co2_loss(query, key, queue, backend=gpu_backend).backward()
        return torch.cuda.max_memory_allocated() - before

    small, large = extra(1 << 16), extra(1 << 20)
    assert large <= 1.1 * small + (1 << 20)
    assert large <= 64 << 20


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(gpu_backend: str, tool: str) -> None:
    program = (
        "import torch; from contrastive_ops import co2_loss, conic_loss, nt_xent_loss\n"
        "from contrastive_ops._contract import PendingStep, SGDSettings\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for batch, keys, dim in ((70, 333, 40), (5, 100, 300)):\n"
        "        q, k = (torch.randn(batch, dim, device='cuda', dtype=dtype) for _ in range(2))\n"
        "        n = torch.randn(keys, dim, device='cuda', dtype=dtype)\n"
        f"        co2_loss(q.requires_grad_(), k, n, backend={gpu_backend!r}).backward()\n"
        "        x = torch.randn(2, batch, dim, device='cuda', dtype=dtype, requires_grad=True)\n"
        "        w = torch.randn(keys, dim, device='cuda', requires_grad=True)\n"
        "        own = torch.randint(-9, keys + 9, (batch,), device='cuda')\n"
        f"        conic_loss(x, w, own, backend={gpu_backend!r}).backward()\n"
        "        step = PendingStep(torch.zeros_like(w), SGDSettings(0.1, 0.9, 1e-4, False))\n"
        f"        conic_loss(x, w, own, update=step, backend={gpu_backend!r}).backward()\n"
        "        for weight in (0.0, 1.0):\n"
        f"            nt_xent_loss(q, k, consistency_weight=weight, backend={gpu_backend!r}).backward()\n"
        "torch.cuda.synchronize()\n"
    )
    result = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", sys.executable, "-c", program],
        capture_output=True,
        text=True,
    )
    if "Device not supported" in result.stdout + result.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def test_reference_serves_what_triton_does_not() -> None:
    """float64 on a GPU falls back, and says so once."""
    query, key, queue = on_gpu(Case(dtype=torch.float64))
    settings = {**Case().settings(), "reduction": "none"}
    expected = co2_loss(query, key, queue, backend="reference", **settings)
    actual = co2_loss(query, key, queue, **settings)
    torch.testing.assert_close(actual, expected)


class TestConIC:
    @pytest.mark.parametrize("columns", [False, True])
    def test_offsets_beyond_32_bits(self, gpu_backend: str, columns: bool) -> None:
        """A = 16,777,216 at D = 256 is 2³² elements. Only the last row resembles a view, and is its own."""
        keys, dim = 1 << 24, 256
        views = F.normalize(torch.randn(1, 4, dim, device="cuda"), dim=2).bfloat16()
        shape = (dim, keys) if columns else (keys, dim)
        weight = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
        weight = weight.T if columns else weight
        weight[-1] = views[0, 0]
        before, buffer = weight[-1].double(), torch.zeros_like(weight)
        target = torch.full((4,), keys - 1, device="cuda")
        unit = F.normalize(views.double(), dim=2)[0]
        s = unit @ F.normalize(before, dim=0)
        expected = torch.log((s / 0.1).exp() + (keys - 1)) - s / 0.1

        views.requires_grad_(), weight.requires_grad_()
        step = PendingStep(buffer, SGDSettings(lr=1.0, momentum=0.0, weight_decay=0.0, nesterov=False))
        loss, metrics = conic_loss(
            views, weight, target, consistency_weight=0, reduction="none", return_metrics=True,
            update=step, backend=gpu_backend,
        )  # fmt: skip
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
        assert metrics.positive_rank[0].tolist() == [0 if x > 0 else keys - 1 for x in s.tolist()]
        loss.sum().backward()
        assert views.grad is not None
        assert torch.isfinite(views.grad).all()
        pull = (1 - (-expected).exp())[:, None] / 0.1
        of_own = -(pull * (unit - s[:, None] * F.normalize(before, dim=0))).sum(0) / before.norm()
        assert distance(buffer[-1].double(), of_own) <= 1e-2 * of_own.norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_graph_capture_and_replay(self, gpu_backend: str, dtype: torch.dtype) -> None:
        case = ConICCase(batch=40, rows=3000, dim=64, dtype=dtype, weight_dtype=torch.float32)
        views, weight, target = on_gpu(case)
        views.requires_grad_(), weight.requires_grad_()

        def step() -> tuple[Tensor, ...]:
            loss = conic_loss(views, weight, target, backend=gpu_backend)
            return loss.detach(), *torch.autograd.grad(loss, (views, weight))

        hold_in_a_graph(step, (views, weight, target), (on_gpu(case.replace(seed=seed)) for seed in (5, 6)))

    def test_nothing_waits_for_the_gpu(self, gpu_backend: str) -> None:
        views, weight, target = on_gpu(ConICCase())
        views.requires_grad_(), weight.requires_grad_()
        conic_loss(views, weight, target, backend=gpu_backend).backward()
        step = PendingStep(torch.zeros_like(weight), SGDSettings(0.1, 0.9, 1e-4, nesterov=False))
        with nothing_may_wait():
            loss, _ = conic_loss(views, weight, target, return_metrics=True, backend=gpu_backend)
            loss.backward()
            conic_loss(views, weight, target, update=step, backend=gpu_backend).backward()

    def test_two_streams(self, gpu_backend: str) -> None:
        cases = [
            ConICCase(batch=300, rows=20000, dim=128, dtype=torch.bfloat16, seed=seed) for seed in (1, 2)
        ]
        step = partial(conic_loss_and_gradients, conic_loss)
        share_nothing_on_two_streams(step, [on_gpu(case) for case in cases], backend=gpu_backend)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU only")
    def test_another_device_than_the_current_one(self, gpu_backend: str) -> None:
        tensors = on_gpu(ConICCase())
        expected = conic_loss_and_gradients(conic_loss, *tensors, backend=gpu_backend)
        there = (x.to("cuda:1") for x in tensors)
        actual = conic_loss_and_gradients(conic_loss, *there, backend=gpu_backend)
        assert torch.cuda.current_device() == 0
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b.cpu())

    @pytest.mark.parametrize("outside", [-1, 50, 1 << 40, -(1 << 62)])
    def test_a_target_outside_the_weight_makes_its_loss_nan(self, gpu_backend: str, outside: int) -> None:
        views, weight, target = on_gpu(ConICCase(views=3))
        expected = conic_loss(views, weight, target, reduction="none", backend=gpu_backend)
        target[2] = outside
        loss = conic_loss(views, weight, target, reduction="none", backend=gpu_backend)
        assert loss[2].isnan()
        others = torch.arange(len(loss), device="cuda") != 2
        assert torch.equal(loss[others], expected[others])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dim", [128, 256, 512, 1000])
    @pytest.mark.parametrize(("views", "batch"), [(1, 1), (2, 16), (3, 333)])
    def test_every_tile_of_the_table(
        self,
        gpu_backend: str,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        dim: int,
        views: int,
        batch: int,
    ) -> None:
        case = ConICCase(
            views=views, batch=batch, rows=10007, dim=dim, dtype=dtype, weight_dtype=weight_dtype
        )
        tensors = on_gpu(case)
        expected = conic_oracle(*tensors, **case.settings())
        actual = conic_loss_and_gradients(conic_loss, *tensors, **case.settings(), backend=gpu_backend)
        loss, views_gradient = (1e-6, 1e-5) if dtype == torch.float32 else (1e-3, 1e-2)
        weight_gradient = views_gradient if weight_dtype == torch.float32 else 1e-2  # it is stored so
        assert_near(actual, expected, (loss, views_gradient, weight_gradient))

    def test_bfloat16_is_no_worse_than_eager(self, gpu_backend: str) -> None:
        """At full size, where the interpreter cannot go."""
        case = ConICCase(
            batch=512, rows=65536, dim=128, dtype=torch.bfloat16, weight_dtype=torch.float32, sampled=20
        )
        views, weight, target = on_gpu(case)
        expected = conic_oracle(views, weight, target, **case.settings())
        eager = conic_loss_and_gradients(eager_conic, views, weight.bfloat16(), target, **case.settings())
        actual = conic_loss_and_gradients(
            conic_loss, views, weight, target, **case.settings(), backend=gpu_backend
        )
        assert_no_worse_than_eager(actual, eager, expected)

    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_float32_follows_the_matmul_precision(self, gpu_backend: str, precision: str) -> None:
        case = ConICCase(batch=64, rows=5000, dim=128)
        tensors = on_gpu(case)
        expected = conic_oracle(*tensors, **case.settings())
        torch.set_float32_matmul_precision(precision)
        try:
            actual = conic_loss_and_gradients(conic_loss, *tensors, **case.settings(), backend=gpu_backend)
        finally:
            torch.set_float32_matmul_precision("highest")
        allowed = 1e-6 if precision == "highest" else 1e-3
        assert_near(actual, expected, (allowed, 10 * allowed, 10 * allowed))

    @pytest.mark.parametrize("precision", ["highest", "high"])
    def test_a_nan_made_on_the_gpu_stays_one(self, gpu_backend: str, precision: str) -> None:
        views, weight, target = on_gpu(ConICCase(batch=40, rows=3000, dim=64))
        weight[1234, 5] = torch.zeros((), device="cuda") / torch.zeros((), device="cuda")
        torch.set_float32_matmul_precision(precision)
        try:
            results = conic_loss_and_gradients(conic_loss, views, weight, target, backend=gpu_backend)
        finally:
            torch.set_float32_matmul_precision("highest")
        for result in results:
            assert result.isnan().any(-1).all()

    def test_memory_does_not_grow_with_the_classifier(self, gpu_backend: str) -> None:
        """Where backward takes the step of SGD, but for the norms of its rows."""

        def extra(rows: int) -> int:
            views = torch.randn(2, 256, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            weight = torch.randn(rows, 128, device="cuda", requires_grad=True)
            buffer, target = torch.zeros_like(weight), torch.randint(rows, (256,), device="cuda")
            step = [PendingStep(buffer, SGDSettings(0.1, 0.9, 1e-4, nesterov=False)) for _ in range(2)]
            conic_loss(views, weight, target, update=step[0], backend=gpu_backend).backward()
            views.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            conic_loss(views, weight, target, update=step[1], backend=gpu_backend).backward()
            return torch.cuda.max_memory_allocated() - before

        small, large = extra(1 << 16), extra(1 << 20)
        assert large - 4 * (1 << 20) <= 1.1 * small + (1 << 20)
        assert large <= 64 << 20


class TestNTXent:
    @pytest.mark.slow
    def test_offsets_beyond_32_bits(self, gpu_backend: str) -> None:
        """2 B = 2²¹ + 128 rows of D = 1024 are more than 2³¹ elements. Only the first instance's and the last
        one's are not zero, and are equal."""
        batch, dim = (1 << 20) + 64, 1024
        view = torch.zeros(batch, dim, device="cuda", dtype=torch.bfloat16)
        view[0, 5] = view[-1, 5] = 1.0
        view1, view2 = view.clone().requires_grad_(), view.requires_grad_()
        loss, metrics = nt_xent_loss(
            view1, view2, temperature=0.1, normalize=False, reduction="none", return_metrics=True,
            backend=gpu_backend,
        )  # fmt: skip
        total = 3 * math.exp(10) + 2 * batch - 4
        loss = loss.view(2, batch)
        torch.testing.assert_close(loss[:, [0, -1]], torch.full_like(loss[:, :2], math.log(total) - 10))
        torch.testing.assert_close(loss[:, 1:-1], torch.full_like(loss[:, 1:-1], math.log(2 * batch - 1)))
        assert not metrics.positive_rank.any()
        loss.sum().backward()
        of_equal = (
            2 * (3 * math.exp(10) / total - 1) / 0.1
        )  # of an entry that is 1, by its own and others' loss
        for each in (view1, view2):
            assert each.grad is not None
            gradient = each.grad[[0, -1]].double()
            assert gradient[:, 5].tolist() == pytest.approx([of_equal] * 2, rel=1e-2)
            assert gradient.count_nonzero() == 2

    @pytest.mark.parametrize("strides", [(1 << 32, 64, 1), (64, 1 << 27, 1), (4096, 64, 1 << 27)])
    def test_strides_beyond_32_bits(self, gpu_backend: str, strides: tuple[int, int, int]) -> None:
        shape = (2, 33, 33)
        case = NTXentCase(batch=33, dim=33, dtype=torch.bfloat16)
        views = torch.stack(case.tensors()).cuda()
        length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        spread = torch.empty(length, device="cuda", dtype=torch.bfloat16).as_strided(shape, strides)
        spread.copy_(views)
        results = []
        for each in (views, spread):
            settings = (0.5, 0.05, 1.0, True, gpu_backend)
            loss, *_, statistics = torch.ops.contrastive_ops.nt_xent(each, *settings)
            grad = torch.ones_like(loss)
            gradient = torch.ops.contrastive_ops.nt_xent_backward(grad, each, statistics, *settings)
            results.append((loss, gradient))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("consistency_weight", [0.0, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_graph_capture_and_replay(
        self, gpu_backend: str, dtype: torch.dtype, consistency_weight: float
    ) -> None:
        case = NTXentCase(batch=300, dim=64, dtype=dtype, consistency_weight=consistency_weight)
        views = [view.cuda().requires_grad_() for view in case.tensors()]

        def step() -> tuple[Tensor, ...]:
            loss = nt_xent_loss(*views, **case.settings(), backend=gpu_backend)
            return loss.detach(), *torch.autograd.grad(loss, views)

        hold_in_a_graph(step, views, (case.replace(seed=seed).tensors() for seed in (5, 6)))

    def test_nothing_waits_for_the_gpu(self, gpu_backend: str) -> None:
        views = [view.cuda().requires_grad_() for view in NTXentCase().tensors()]
        for weight in (0.0, 1.0):
            nt_xent_loss(*views, consistency_weight=weight, backend=gpu_backend).backward()
        with nothing_may_wait():
            for weight in (0.0, 1.0):
                loss, _ = nt_xent_loss(
                    *views, consistency_weight=weight, return_metrics=True, backend=gpu_backend
                )
                loss.backward()

    def test_two_streams(self, gpu_backend: str) -> None:
        cases = [NTXentCase(batch=2000, dim=128, dtype=torch.bfloat16, seed=seed) for seed in (1, 2)]
        step = partial(nt_xent_loss_and_gradients, nt_xent_loss, **cases[0].settings())
        tensors = [[view.cuda() for view in case.tensors()] for case in cases]
        share_nothing_on_two_streams(step, tensors, backend=gpu_backend)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU only")
    def test_another_device_than_the_current_one(self, gpu_backend: str) -> None:
        views = NTXentCase().tensors()
        expected, actual = (
            nt_xent_loss_and_gradients(
                nt_xent_loss,
                *(view.to(device) for view in views),
                consistency_weight=1.0,
                backend=gpu_backend,
            )
            for device in ("cuda:0", "cuda:1")
        )
        assert torch.cuda.current_device() == 0
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b.cpu())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dim", [128, 256, 512, 1000])
    @pytest.mark.parametrize("batch", [16, 333, 1500])
    @pytest.mark.parametrize("consistency_weight", [0.0, 1.0])
    @pytest.mark.parametrize("normalize", [False, True])
    def test_every_tile_of_the_table(
        self, gpu_backend: str, dtype: torch.dtype, dim: int, batch: int, consistency_weight: float,
        normalize: bool,
    ) -> None:  # fmt: skip
        """And both kinds of exponentials, which follow `normalize`."""
        case = NTXentCase(
            batch=batch, dim=dim, dtype=dtype, consistency_weight=consistency_weight, normalize=normalize
        )
        views = [view.cuda() for view in case.tensors()]
        expected = nt_xent_oracle(*views, **case.settings())
        eager = nt_xent_loss_and_gradients(eager_nt_xent, *views, **case.settings())
        actual = nt_xent_loss_and_gradients(nt_xent_loss, *views, **case.settings(), backend=gpu_backend)
        rounding = (1e-6, 1e-5) if dtype == torch.float32 else torch.finfo(dtype).eps
        assert_no_worse_than_eager(actual, eager, expected, times=2, rounding=rounding)

    @pytest.mark.parametrize("consistency_weight", [0.0, 1.0])
    def test_bfloat16_is_no_worse_than_eager(self, gpu_backend: str, consistency_weight: float) -> None:
        """At full size, where the interpreter cannot go."""
        case = NTXentCase(
            batch=4096, dim=128, dtype=torch.bfloat16, temperature=0.1, consistency_weight=consistency_weight
        )
        views = [view.cuda() for view in case.tensors()]
        expected = nt_xent_oracle(*views, **case.settings())
        eager = nt_xent_loss_and_gradients(eager_nt_xent, *views, **case.settings())
        actual = nt_xent_loss_and_gradients(nt_xent_loss, *views, **case.settings(), backend=gpu_backend)
        assert_no_worse_than_eager(actual, eager, expected)

    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_float32_follows_the_matmul_precision(self, gpu_backend: str, precision: str) -> None:
        case = NTXentCase(batch=1000, dim=128)
        views = [view.cuda() for view in case.tensors()]
        expected = nt_xent_oracle(*views, **case.settings())
        torch.set_float32_matmul_precision(precision)
        try:
            actual = nt_xent_loss_and_gradients(nt_xent_loss, *views, **case.settings(), backend=gpu_backend)
        finally:
            torch.set_float32_matmul_precision("highest")
        allowed = 1e-6 if precision == "highest" else 5e-3
        assert_near(actual, expected, (allowed, 10 * allowed))

    @pytest.mark.parametrize("precision", ["highest", "high"])
    def test_a_nan_made_on_the_gpu_stays_one(self, gpu_backend: str, precision: str) -> None:
        views = [view.cuda() for view in NTXentCase(batch=300, dim=64).tensors()]
        views[1][123, 5] = torch.zeros((), device="cuda") / torch.zeros((), device="cuda")
        torch.set_float32_matmul_precision(precision)
        try:
            results = nt_xent_loss_and_gradients(
                nt_xent_loss, *views, consistency_weight=1.0, backend=gpu_backend
            )
        finally:
            torch.set_float32_matmul_precision("highest")
        for result in results:
            assert result.isnan().all()

    @pytest.mark.parametrize("consistency_weight", [0.0, 1.0])
    def test_memory_grows_with_the_batch_not_with_its_square(
        self, gpu_backend: str, consistency_weight: float
    ) -> None:
        """The similarities of 32768 rows would be 4 GiB in float32."""

        def extra(batch: int) -> int:
            case = NTXentCase(batch=batch, dim=128, dtype=torch.bfloat16)
            views = [view.cuda().requires_grad_() for view in case.tensors()]
            settings = {"consistency_weight": consistency_weight, "backend": gpu_backend}
            nt_xent_loss(*views, **settings).backward()
            for view in views:
                view.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            nt_xent_loss(*views, **settings).backward()
            return torch.cuda.max_memory_allocated() - before

        small, large = extra(2048), extra(16384)
        assert large <= 8.8 * small
        assert large <= 128 << 20


class TestRows:
    @pytest.mark.parametrize("host", ["", "incoming", "outgoing", "both"])
    def test_rows_come_from_and_go_to_pinned_memory(self, gpu_backend: str, host: str) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        weight, buffer = (torch.randn(50, 33, device="cuda", generator=generator) for _ in range(2))
        records = torch.randn(80, 2, 33, device="cuda", generator=generator)
        slots, incoming_rows, outgoing_rows = (
            torch.randperm(count, device="cuda", generator=generator)[:20] for count in (50, 40, 40)
        )
        coefficients = torch.randn(20, 2, 2, device="cuda", dtype=torch.float64, generator=generator)
        expected = (weight.clone(), buffer.clone(), records.clone())
        reference.exchange_rows_(
            *expected[:2], slots, expected[2], incoming_rows, coefficients, expected[2], 40 + outgoing_rows
        )
        incoming, outgoing = records, records
        if host:
            incoming = records.cpu().pin_memory() if host != "outgoing" else records
            outgoing = incoming if host == "both" else records
            if host == "outgoing":
                outgoing = records.cpu().pin_memory()
        torch.ops.contrastive_ops.exchange_rows_(
            weight, buffer, slots, incoming, incoming_rows, coefficients, outgoing, 40 + outgoing_rows,
            gpu_backend,
        )  # fmt: skip
        torch.cuda.synchronize()
        for actual, of_reference in zip((weight, buffer, outgoing), expected, strict=True):
            torch.testing.assert_close(actual.cuda(), of_reference)


@pytest.mark.parametrize("storage", STORAGES)
class TestClassifier:
    def make(self, storage: str, path: Path) -> Training:
        return Training(classifier(storage, path, device="cuda"))

    def test_trains_as_on_a_cpu(self, storage: str, tmp_path: Path) -> None:
        """With the next batch prefetched, on a stream of its own where rows are the host's."""
        there, here = self.make(storage, tmp_path), Training(classifier())
        batches = [here.batch() for _ in range(31)]
        for batch, following in itertools.pairwise(batches):
            there.generator.set_state(here.generator.get_state())
            expected = here.step(batch)
            assert there.step(batch) == pytest.approx(expected, rel=1e-3)
            there.classifier.prefetch(following)
        for actual, wanted in zip(
            there.classifier.read(torch.arange(50)), here.classifier.read(torch.arange(50)), strict=True
        ):
            torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-2, atol=1e-3)

    def test_resume_is_exact(self, storage: str, tmp_path: Path) -> None:
        training = self.make(storage, tmp_path)
        training.steps(25)
        state = saved(training.state_dict())
        expected = training.steps(25)
        training.classifier.close()
        resumed = self.make(storage, tmp_path)
        resumed.load_state_dict(state)
        assert resumed.steps(25) == expected

    def test_prefetch_changes_no_bit(self, storage: str, tmp_path: Path) -> None:
        plain, ahead = self.make("device", tmp_path), self.make(storage, tmp_path)
        for _ in range(30):
            batch = plain.batch()
            ahead.classifier.prefetch(batch)
            ahead.generator.set_state(plain.generator.get_state())
            assert ahead.step(batch) == plain.step(batch)
