"""What only the C++ kernels have: instruction sets and threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from contrastive_ops import nt_xent_loss
from tests.cases import Case, NTXentCase, mostly_thorough
from tests.elsewhere import pass_elsewhere
from tests.oracles import distance, fused, nt_xent_loss_and_gradients, nt_xent_oracle, oracle

_LOSSES = [f"tests/test_{loss}.py" for loss in ("co2", "conic", "nt_xent")]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("batch", [1, 40, 300])
@pytest.mark.parametrize("threads", [1, 2, 3, 7, 16])
def test_any_number_of_threads(batch: int, threads: int) -> None:
    """Every way of sharing out rows and ranges of keys covers every pair once."""
    case = Case(batch=batch, keys=3001, dim=64)
    torch.set_num_threads(threads)
    loss, gradient = oracle(*case.tensors(), **case.settings())
    actual_loss, actual_gradient = fused(*case.tensors(), **case.settings(), backend="cpu")
    assert distance(actual_loss, loss) <= 1e-6 * loss.norm()
    assert distance(actual_gradient, gradient) <= 1e-5 * gradient.norm()


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("batch", [1, 40, 300])
@pytest.mark.parametrize("threads", [1, 2, 3, 7, 16])
def test_any_number_of_threads_for_nt_xent(batch: int, threads: int) -> None:
    """Every two groups of instances meet once, however many there are for each block."""
    case = NTXentCase(batch=batch, dim=512)  # so that work is no bound on threads
    torch.set_num_threads(threads)
    expected = nt_xent_oracle(*case.tensors(), **case.settings())
    actual = nt_xent_loss_and_gradients(nt_xent_loss, *case.tensors(), **case.settings(), backend="cpu")
    for a, e, relative in zip(actual, expected, (1e-6, 1e-5), strict=True):
        assert distance(a, e) <= relative * e.norm()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set on this processor")
@pytest.mark.parametrize("capability", mostly_thorough(["default", "avx2"], "avx2".__eq__))
def test_older_instruction_sets_pass_the_same_tests(capability: str) -> None:
    """The kernels that a lesser processor would load, held to the same harness."""
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor's own instruction set is no newer")
    environment = {"ATEN_CPU_CAPABILITY": capability, "HYPOTHESIS_PROFILE": "few"}
    which = "from contrastive_ops import _cpu; print(_cpu._extension())"
    loaded = subprocess.run(
        [sys.executable, "-c", which],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"contrastive_ops._cpu_{capability}" in loaded.stdout
    # Without fused multiply-adds each term rounds twice. Eager's library has them: it is no measure then.
    selection = "cpu and not compiles"  # torch.compile's own code does not always build for them
    if capability == "default":
        selection += " and not adversarial"
    pass_elsewhere(_LOSSES, selection, environment)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this processor has no AMX to do without")
def test_a_library_without_amx_passes_the_same_tests() -> None:
    """Held back to AVX-512, where a chip with AMX multiplies bfloat16 as others do."""
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "HYPOTHESIS_PROFILE": "few"}
    pass_elsewhere(_LOSSES, "cpu and not compiles and (half or bfloat16 or dtype)", environment)


def test_collapsed_views_tie() -> None:
    """A negative that equals the positive does not rank above it, whichever of the two is the query."""
    generator = torch.Generator().manual_seed(43)
    for first, second in torch.randn(60, 2, 128, generator=generator):
        _, metrics = nt_xent_loss(
            first.expand(200, 128), second.expand(200, 128), return_metrics=True, backend="cpu"
        )
        # Above it are the other rows of the same view, which are equal to the query.
        assert (metrics.positive_rank == 199).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_incoming_gradient_that_is_no_number_reaches_all_keys(dtype: torch.dtype) -> None:
    views, weight, target, _ = _conic_tensors(100, dtype)
    bits = torch.full((20,), -1, dtype=torch.int32)
    statistics = _conic(views, weight, target)
    of_views, of_weight = _conic_backward(statistics, views, weight, target, bits.view(torch.float32))
    assert of_views.isnan().all()
    assert of_weight.isnan().all()


def _step(case: Case) -> tuple[Tensor, Tensor]:
    return fused(*case.tensors(), **case.settings(), backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_similarities_that_are_kept_are_those_computed_again(dtype: torch.dtype) -> None:
    """Those of all rows together are too many to be kept for the gradient, those of some rows are not."""
    case = Case(batch=72, keys=65536 * 4 // dtype.itemsize, dim=8, dtype=dtype)
    query, key, queue = case.tensors()
    loss, gradient = fused(query, key, queue, **case.settings(), backend="cpu")
    for some in torch.arange(case.batch).split(24):
        of_some = fused(query[some], key[some], queue, **case.settings(), backend="cpu")
        torch.testing.assert_close(of_some[0], loss[some], rtol=1e-6, atol=0)
        torch.testing.assert_close(of_some[1], gradient[some], rtol=1e-5, atol=1e-6)


def _conic_tensors(rows: int, dtype: torch.dtype, dim: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, 20, dim, generator=generator, dtype=dtype)
    weight = torch.randn(rows, dim, generator=generator, dtype=dtype)
    target = torch.randint(rows, (20,), generator=generator)
    grad_loss = torch.rand(20, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    return views, weight, target, grad_loss


def _conic(views: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What its backward needs to know."""
    return torch.ops.contrastive_ops.conic(views, weight, target, 0.2, 3.0, 1.5, "cpu")[-1]


def _conic_backward(statistics: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    *inputs, grad_loss = tensors
    operator = torch.ops.contrastive_ops.conic_backward
    return operator(grad_loss, *inputs, statistics, 0.2, 1.5, True, True, "cpu")


def _kept(statistics: Tensor) -> int:
    """How many bytes forward has left to backward: 8 for each row of the weight, and similarities."""
    return statistics.untyped_storage().nbytes() - statistics.nbytes


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_conic_keeps_norms_and_few_similarities_for_its_backward(dtype: torch.dtype, threads: int) -> None:
    """A copy of what backward gets has none of them. Either way gradients are the same bits, every time."""
    torch.set_num_threads(threads)
    views, weight, target, grad_loss = _conic_tensors(1000, dtype)
    statistics = _conic(views, weight, target)
    assert _kept(statistics) >= 8 * 1000 + (0 if dtype.itemsize == 2 else 1000 * 40 * dtype.itemsize)
    assert _kept(statistics.clone()) == 0
    again = _conic_backward(statistics.clone(), views, weight, target, grad_loss)
    for _ in range(2):
        kept = _conic_backward(statistics, views, weight, target, grad_loss)
        assert all(map(torch.equal, kept, again))


def test_conic_keeps_no_more_similarities_than_it_may() -> None:
    rows = 1 << 17
    views, weight, target, _ = _conic_tensors(rows, torch.float32)
    assert 8 * rows <= _kept(_conic(views, weight, target)) < 8 * rows + 4096
    with torch.inference_mode():  # where nothing tells whether a tensor was written to
        few = (x.clone() for x in _conic_tensors(1000, torch.float32)[:3])
        assert _kept(_conic(*few)) == 0


@pytest.mark.parametrize("written", ["views", "weight"])
def test_similarities_of_tensors_that_were_written_to_are_computed_again(written: str) -> None:
    views, weight, target, grad_loss = _conic_tensors(1000, torch.float32)
    statistics = _conic(views, weight, target)
    before = _conic_backward(statistics, views, weight, target, grad_loss)
    {"views": views, "weight": weight}[written].add_(0.25)
    after = _conic_backward(statistics, views, weight, target, grad_loss)
    again = _conic_backward(statistics.clone(), views, weight, target, grad_loss)
    assert all(map(torch.equal, after, again))
    assert not torch.equal(after[0], before[0])
    # Nor are those of others of the same sizes taken for theirs.
    others = _conic_tensors(1000, torch.float32)[:2]
    of_others = _conic_backward(statistics, *others, target, grad_loss)
    assert all(map(torch.equal, of_others, before))


def test_what_lies_behind_statistics_is_read_only_if_conic_put_it_there() -> None:
    tensors = _conic_tensors(1000, torch.float32)
    statistics = _conic(*tensors[:3])
    expected = _conic_backward(statistics, *tensors)
    memory = torch.zeros(statistics.untyped_storage().nbytes() // 8, dtype=torch.float64)
    for taken in (memory, torch.cat([memory, memory]), memory[: statistics.numel() + 8]):
        elsewhere = taken[: statistics.numel()].view(statistics.shape).copy_(statistics)
        assert all(map(torch.equal, _conic_backward(elsewhere, *tensors), expected))


def test_calls_at_once_keep_similarities_apart() -> None:
    """What a call leaves to the next is never had by two, and fits whatever the next one is."""
    sizes, dtypes = (17, 300, 2000), (torch.float32, torch.float64)
    cases = [Case(batch=40, keys=keys, dim=8, dtype=dtype) for keys in sizes for dtype in dtypes]
    expected = [_step(case) for case in cases]

    def work(first: int) -> None:
        for turn in range(60):
            at = (first + turn) % len(cases)
            for actual, alone in zip(_step(cases[at]), expected[at], strict=True):
                assert torch.equal(actual, alone)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))


def test_gradients_of_a_weight_are_each_their_own() -> None:
    """Of 1 MiB, whose memory another call has when they are gone: while they are there it is theirs alone."""
    tensors = _conic_tensors(2000, torch.float32, dim=128)

    def gradient() -> Tensor:
        return _conic_backward(_conic(*tensors[:3]), *tensors)[1]

    kept = [gradient() for _ in range(5)]
    expected = kept[0].clone()
    assert len({each.data_ptr() for each in kept}) == len(kept)
    for _ in range(8):
        gradient().fill_(float("nan"))
    assert all(torch.equal(each, expected) for each in kept)
    kept[0].resize_(5000, 128)
    assert torch.equal(kept[0][:2000], expected)
    kept.clear()
    assert torch.equal(gradient(), expected)
