"""A kernel is launched as it was compiled, and only for arguments of the kind for which it was; a call of a
loss is replayed, and only for tensors like those with which it was recorded.

The tests run on a GPU, or in the emulator of one.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import INTERPRETED, Case, ConICCase, NTXentCase
from tests.elsewhere import pass_elsewhere
from tests.gpu_emulator.driver import REQUESTED
from tests.gpu_emulator.ptx import Fault

triton = pytest.importorskip("triton")

# ruff: noqa: E402
import triton.language as tl
from contrastive_ops.kernels import _launch
from contrastive_ops.kernels._launch import Launch, Replay, TritonLaunch, vector

from contrastive_ops import available_backends, reference
from contrastive_ops._backends import BACKENDS
from contrastive_ops._contract import CO2Settings, ConICSettings, NTXentKeys, NTXentSettings

launched = pytest.mark.skipif(
    INTERPRETED or not (REQUESTED or torch.cuda.is_available()),
    reason="runs on a GPU, or in a process with GPU_EMULATOR=sm_80 or sm_90",
)
emulated = pytest.mark.skipif(not REQUESTED, reason="runs in a process with GPU_EMULATOR=sm_80 or sm_90")
DEVICE = "cpu" if REQUESTED else "cuda"
by_triton = pytest.mark.skipif(REQUESTED == "sm_75", reason="Triton serves GPUs from sm_80 on")


def multiplies_tf32() -> bool:
    return REQUESTED != "sm_75" if REQUESTED else torch.cuda.get_device_capability() >= (8, 0)


@pytest.mark.slow
@pytest.mark.skipif(bool(REQUESTED) or INTERPRETED, reason="is what runs them in another process")
def test_launches_in_the_emulator() -> None:
    """The tests below, of Triton; tests/test_cuda.py runs those of CUDA C++."""
    pass_elsewhere(["tests/test_launch.py"], "launched and not cuda", {"GPU_EMULATOR": "sm_90"})


BLOCK = 1024  # several numbers for each thread, which loads them at once where they are aligned


@triton.jit
def _add_kernel(source, other, to, count, factor, NEGATED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, BLOCK)
    inside = index < count
    total = tl.load(source.data + index * source.stride, mask=inside).to(tl.float32) * factor
    if other is not None:
        total += tl.load(other + index, mask=inside).to(tl.float32)
    tl.store(to + index, -total if NEGATED else total, mask=inside)


def sources() -> dict[str, Tensor]:
    """Tensors of one size that differ in a single property which Triton compiles in."""
    numbers = torch.randn(3 * BLOCK, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return {
        "plain": numbers[:BLOCK],
        "unaligned": numbers[1 : 1 + BLOCK],
        "strided": numbers[: 3 * BLOCK : 3],
        "strided by 16": torch.as_strided(numbers.repeat(6), (BLOCK,), (16,)),
        "constant": numbers[:1].expand(BLOCK),
        "bfloat16": numbers[:BLOCK].bfloat16(),
        "float64": numbers[:BLOCK].double(),
        "parameter": torch.nn.Parameter(numbers[:BLOCK]),
    }


def calls() -> Iterator[dict[str, Any]]:
    for source in sources().values():
        yield {"source": source}
    plain = sources()["plain"]
    for other in (plain, plain[1:], None):
        yield {"source": plain, "other": other}
    for count in (1, 16, 17, 100, True):
        yield {"source": plain, "count": count}
    for factor in (1.0, 3.0, 1, 2, 16):
        yield {"source": plain, "factor": factor}
    yield {"source": plain, "NEGATED": True}


def add(
    launch: Launch,
    source: Tensor,
    other: Tensor | None = None,
    count: int = 112,
    factor: float = 2.0,
    NEGATED: bool = False,
) -> None:
    """Launches, and compares with PyTorch."""
    to = torch.full((BLOCK,), torch.nan, device=DEVICE)
    launch(source=vector(source), other=other, to=to, count=count, factor=factor, NEGATED=NEGATED)
    expected = source.detach()[:count].float() * factor + (0 if other is None else other[:count])
    torch.testing.assert_close(to[:count], -expected if NEGATED else expected, atol=1e-6, rtol=1e-6)
    assert to[count:].isnan().all()


@launched
@by_triton
def test_launched_for_arguments_of_every_kind_one_after_the_other() -> None:
    launch = TritonLaunch("add", _add_kernel, (1,), {"BLOCK": BLOCK})
    for _ in range(3):
        for arguments in calls():
            add(launch, **arguments)


def _without(part: Callable[[Any], bool]) -> Callable[..., None]:
    """The key of a launch, in which some parts are all alike."""
    whole = _launch._specialization

    def specialization(values: Any, key: list[Any]) -> None:
        parts: list[Any] = []
        whole(values, parts)
        key += ["left out" if part(each) else each for each in parts]

    return specialization


COARSER = {
    "dtypes": lambda part: isinstance(part, torch.dtype),
    "integers": lambda part: type(part) is int,
    "flags": lambda part: type(part) is bool,
}


@by_triton
@pytest.mark.skipif(not REQUESTED, reason="on a GPU, a wrong address would end the process")
@pytest.mark.parametrize("part", COARSER)
def test_launched_with_a_coarser_key_the_test_above_would_fail(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "_specialization", _without(COARSER[part]))
    with pytest.raises((AssertionError, Fault)):
        test_launched_for_arguments_of_every_kind_one_after_the_other()


@launched
@by_triton
def test_launched_under_a_hook_that_is_told_of_each_launch() -> None:
    launch = TritonLaunch("add", _add_kernel, (1,), {"BLOCK": BLOCK})
    source, told = sources()["plain"], []
    add(launch, source)
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(told.append)
    try:
        add(launch, source)
        add(launch, source)
    finally:
        hooks.remove(told.append)
    add(launch, source)
    assert [each.get()["name"] for each in told] == ["_add_kernel"] * 2


@launched
@by_triton
def test_launched_by_an_unknown_version_as_triton_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_KNOWN_TRITON", False)
    launch = TritonLaunch("add", _add_kernel, (1,), {"BLOCK": BLOCK})
    for _ in range(2):
        for arguments in calls():
            add(launch, **arguments)
    assert not launch._compiled


CO2 = CO2Settings(0.07, 0.04, 1.0, 10.0, False, True)
NT_XENT = NTXentSettings(0.1, 0.05, 1.0, True)
CONIC = ConICSettings(0.1, 2.5, 3.0)


def _co2_inputs(seed: int) -> tuple[Tensor, ...]:
    return tuple(x.detach().float().to(DEVICE) for x in Case(batch=5, keys=40, seed=seed).tensors())


def _nt_xent_inputs(seed: int) -> tuple[Tensor, ...]:
    return (torch.stack([x.detach() for x in NTXentCase(batch=6, seed=seed).tensors()]).float().to(DEVICE),)


def _conic_inputs(seed: int) -> tuple[Tensor, ...]:
    views, weight, target = ConICCase(batch=5, rows=40, seed=seed).tensors()
    return views.detach().float().to(DEVICE), weight.detach().float().to(DEVICE), target.to(DEVICE)


def _backward_of(name: str, settings: Any) -> Callable[..., Any]:
    """A gradient of losses whose own gradient is not 1, by a backend's module."""

    def gradient(module: Any, *tensors: Tensor) -> Any:
        *_, coefficients = getattr(reference, name)(*tensors, settings)
        rows = coefficients.shape[0] if name == "nt_xent" else coefficients.shape[1]
        grad_loss = torch.linspace(0.5, 2.0, rows, device=DEVICE)
        flags = () if name == "nt_xent" else (True, True)
        return getattr(module, f"{name}_gradient")(grad_loss, *tensors, coefficients, settings, *flags)

    return gradient


CALLS: dict[str, tuple[str, Callable[..., Any], Callable[[int], tuple[Tensor, ...]]]] = {
    "co2": ("co2", lambda module, *x: module.co2(*x, CO2, True), _co2_inputs),
    "co2 without gradient": ("co2", lambda module, *x: module.co2(*x, CO2, False), _co2_inputs),
    "nt_xent": ("nt_xent", lambda module, *x: module.nt_xent(*x, NT_XENT), _nt_xent_inputs),
    "nt_xent's gradient": ("nt_xent_gradient", _backward_of("nt_xent", NT_XENT), _nt_xent_inputs),
    "conic": ("conic", lambda module, *x: module.conic(*x, CONIC), _conic_inputs),
    "conic's gradient": ("conic_gradient", _backward_of("conic", CONIC), _conic_inputs),
}


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.fixture(params=["triton", "cuda"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    """A backend for GPUs, in a process where it serves."""
    if not available_backends()[request.param]:
        pytest.skip(f"{request.param} does not serve here")
    return import_module(BACKENDS[request.param])


def assert_right(module: ModuleType, call: Callable[..., Any], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    actual = outputs(call(module, *tensors))
    for a, e in zip(actual, outputs(call(reference, *tensors)), strict=True):
        torch.testing.assert_close(a, e.to(a.dtype), atol=2e-4, rtol=2e-4)
    return actual


def _replays(module: ModuleType, function: str) -> list[Replay]:
    known = getattr(module, function).func.replays
    return [each for each in known.values() if isinstance(each, Replay)]


def _variants(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """The same numbers, each tensor in turn at another alignment and with other strides."""

    def unaligned(x: Tensor) -> Tensor:
        return x.new_empty(x.numel() + 1)[1:].copy_(x.flatten()).view(x.shape)

    def transposed(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT if x.ndim > 1 else x.repeat_interleave(2)[::2]

    for other in (unaligned, transposed):
        for i, tensor in enumerate(tensors):
            yield *tensors[:i], other(tensor), *tensors[i + 1 :]


@launched
@pytest.mark.parametrize("name", CALLS)
def test_launched_again_a_call_is_replayed_on_its_own_tensors(module: ModuleType, name: str) -> None:
    function, call, inputs = CALLS[name]
    _launch.forget_plans()
    kept = []
    for seed in range(4):
        results = assert_right(module, call, inputs(seed))
        kept.append((results, [x.clone() for x in results]))
    assert len(_replays(module, function)) == 1
    for results, copies in kept:  # a replay writes to tensors of its own
        assert all(
            torch.equal(
                x,
                y,
            )
            for x, y in zip(results, copies, strict=True)
        )
    for _ in range(3):
        for tensors in _variants(inputs(5)):
            assert_right(module, call, tensors)
    assert_right(module, call, inputs(6))


@launched
def test_launched_again_with_one_tensor_in_two_places(module: ModuleType) -> None:
    """What is recorded with it would be replayed on the first place alone."""
    _launch.forget_plans()
    call = CALLS["co2"][1]
    for seed in range(3):
        query, _, queue = _co2_inputs(seed)
        assert_right(module, call, (query, query, queue))
    assert not _replays(module, "co2")
    for seed in range(3):
        assert_right(module, call, _co2_inputs(seed))


def libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _recorded(module: ModuleType) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """A call that is replayed from now on, and its tensors."""
    _launch.forget_plans()
    call, inputs = CALLS["co2"][1], _co2_inputs(0)
    for _ in range(2):
        call(module, *inputs)
    assert _replays(module, "co2")
    return call, inputs


@emulated
def test_launched_again_on_the_current_stream(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    call, inputs = _recorded(module)
    monkeypatch.setattr(module.co2.args[0], "current_stream", lambda: 64)
    assert_right(module, call, inputs)
    assert libcuda().last_stream() == 64


@emulated
def test_launched_again_in_a_thread_that_has_no_context_yet(module: ModuleType) -> None:
    call, inputs = _recorded(module)
    done = []

    def work() -> None:
        libcuda().forget_context()
        done.append(assert_right(module, call, inputs))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


@launched
@by_triton
def test_launched_again_under_a_hook_that_is_told_of_each_launch() -> None:
    if not available_backends()["triton"]:
        pytest.skip("Triton does not serve here")
    module = import_module(BACKENDS["triton"])
    call, inputs = _recorded(module)
    told: list[Any] = []
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(told.append)
    try:
        assert_right(module, call, inputs)
    finally:
        hooks.remove(told.append)
    assert len(told) > 1
    assert_right(module, call, inputs)


@launched
@by_triton
@pytest.mark.parametrize("part", ["launch_pdl", "launch_cooperative_grid", "global_scratch_size"])
def test_launched_in_another_way_than_a_replay_would_a_call_is_not_recorded(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not available_backends()["triton"]:
        pytest.skip("Triton does not serve here")
    module = import_module(BACKENDS["triton"])
    is_plain = _launch._is_launched_plainly
    monkeypatch.setattr(_launch, "_is_launched_plainly", lambda x: is_plain(x._replace(**{part: 1})))
    _launch.forget_plans()
    for seed in range(4):
        assert_right(module, CALLS["co2"][1], _co2_inputs(seed))
    assert not _replays(module, "co2")


@launched
def test_launched_with_tensors_in_a_tuple_a_call_is_not_replayed(module: ModuleType) -> None:
    """Which one of them it was would be forgotten."""
    _launch.forget_plans()
    (views,) = _nt_xent_inputs(0)
    *_, coefficients = reference.nt_xent(views, NT_XENT)
    count, device = views.shape[1], views.device
    grad_loss = torch.linspace(0.5, 2.0, 2 * count, device=device)
    for seed in range(4):
        others = views if seed == 0 else _nt_xent_inputs(seed)[0]
        keys = NTXentKeys(others, torch.full((count,), -1, device=device), grad_loss, coefficients)
        results = [
            backend.nt_xent_gradient(grad_loss, views, coefficients, NT_XENT, keys)
            for backend in (module, reference)
        ]
        torch.testing.assert_close(*results, atol=2e-4, rtol=2e-4)
    assert not module.nt_xent_gradient.func.replays


@launched
def test_launched_again_in_another_precision(module: ModuleType) -> None:
    """Which PyTorch's global setting says."""
    if not multiplies_tf32():
        pytest.skip("this GPU has no TF32")
    _launch.forget_plans()
    call, inputs, matmul = CALLS["co2"][1], _co2_inputs(0), torch.backends.cuda.matmul
    exact = [assert_right(module, call, inputs) for _ in range(3)]
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        rounded = [outputs(call(module, *inputs)) for _ in range(3)]
    finally:
        matmul.fp32_precision = before
    assert all(torch.equal(each[-1], rounded[0][-1]) for each in rounded)
    assert not torch.equal(exact[-1][-1], rounded[-1][-1])
    assert torch.equal(assert_right(module, call, inputs)[-1], exact[0][-1])
