"""Who serves a call, and what is said where nobody can."""

from __future__ import annotations

import warnings

import pytest
import torch

from contrastive_ops import (
    _backends,
    _cpu,
    available_backends,
    info_nce_loss,
    kernels,
    serving_backend,
    use_backend,
)
from contrastive_ops._backends import BACKENDS, ENVIRONMENT_VARIABLE, select
from tests.cases import Case


@pytest.fixture
def tensor() -> torch.Tensor:
    return torch.zeros(1, 1)


def test_every_backend_is_reported() -> None:
    statuses = available_backends()
    assert list(statuses) == list(BACKENDS) == ["reference", "cpu", "triton", "cuda"]
    for status in statuses.values():
        assert bool(status) == status.available
        assert status.available != bool(status.reason)


def test_the_choice_nearest_to_the_call_wins(tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from contrastive_ops import reference

    fused = select(None, "co2", tensor)
    assert fused is not reference
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert select(None, "co2", tensor) is reference
    with use_backend("cpu"):
        assert select(None, "co2", tensor) is fused
        with use_backend("reference"):
            assert select(None, "co2", tensor) is reference
        assert select("reference", "co2", tensor) is reference
        assert select(None, "co2", tensor) is fused


def test_the_name_of_the_backend_that_serves(tensor: torch.Tensor) -> None:
    assert serving_backend(tensor) == "cpu"
    assert serving_backend(tensor, "reference") == "reference"
    with use_backend("reference"):
        assert serving_backend(tensor) == "reference"
    with pytest.raises(RuntimeError, match="cannot serve here"):
        serving_backend(tensor, "cuda")


def test_a_block_that_raises_restores_the_choice(tensor: torch.Tensor) -> None:
    before = select(None, "co2", tensor)
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert select(None, "co2", tensor) is before


@pytest.mark.parametrize("name", ["", "CPU", "gpu", 3])
def test_unknown_names_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"expected one of reference, cpu, triton, cuda"), use_backend(name):  # type: ignore[arg-type]
        pass


def test_an_unknown_name_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(ValueError, match=rf"{ENVIRONMENT_VARIABLE}: unknown backend 'fastest'"):
        info_nce_loss(*Case().tensors())


def test_a_backend_that_cannot_serve_is_an_error_never_a_fallback() -> None:
    missing = [name for name, status in available_backends().items() if not status.available]
    for name in missing:
        with pytest.raises(RuntimeError, match=rf"backend=: the backend '{name}' cannot serve here: ."):
            info_nce_loss(*Case().tensors(), backend=name)
        with pytest.raises(RuntimeError, match=r"use_backend\(\)"), use_backend(name):
            pass


def test_a_backend_refuses_devices_it_does_not_serve() -> None:
    with pytest.raises(
        RuntimeError, match="the backend 'cpu' cannot serve this call: it does not serve meta"
    ):
        select("cpu", "co2", torch.zeros(1, device="meta"))


@pytest.mark.parametrize("capability", [(9, 0), (9, 4), (11, 0)])
def test_an_amd_gpu_is_refused_by_name(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gfx number is not taken for a compute capability."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert kernels.unavailable() is None
    monkeypatch.setattr(torch.version, "hip", "7.0.51831")
    assert "not been tested on AMD GPUs" in str(kernels.unavailable())
    assert "ROCm 7.0.51831" in str(kernels.unavailable())


def test_the_fallback_to_the_reference_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "unavailable", lambda: "no compiler")
    _backends._load.cache_clear()
    _backends._warn_once.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"slow reference on cpu tensors \(cpu: no compiler\)"):
            info_nce_loss(*Case().tensors())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            info_nce_loss(*Case().tensors())
    finally:
        _backends._load.cache_clear()
        _backends._warn_once.cache_clear()
