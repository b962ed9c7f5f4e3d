"""Memory does not grow with the number of keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contrastive_ops import co2_loss, conic_loss, nt_xent_loss
from train_ref.memory import PeakMemory, in_fresh_process

DIM = 128
WARM_UP = 200  # keys of a step that loads libraries and starts threads


def extra_mib(loss: str, keys: int, dtype: str, backend: str = "cpu") -> float:
    """Peak memory in MiB that forward and backward take beyond their input, in a process of its own."""
    return in_fresh_process(measure, loss, keys, getattr(torch, dtype), backend)


def measure(loss: str, keys: int, dtype: torch.dtype, backend: str) -> float:
    step(loss, inputs(loss, WARM_UP, dtype), backend)
    tensors = inputs(loss, keys, dtype)
    peak = PeakMemory(torch.device("cpu"))
    step(loss, tensors, backend)
    return peak.read_mib()


def inputs(loss: str, keys: int, dtype: torch.dtype) -> list[Tensor]:
    def rows(count: int) -> Tensor:
        return torch.randn(count, DIM).to(dtype)

    if loss == "co2":
        return [rows(256).requires_grad_(), rows(256), rows(keys)]
    if loss == "conic":
        views, weight = rows(512).view(2, 256, DIM), rows(keys)
        return [views.requires_grad_(), weight.requires_grad_(), torch.randint(keys, (256,))]
    return [rows(keys // 2).requires_grad_() for _ in range(2)]


def step(loss: str, tensors: list[Tensor], backend: str) -> None:
    if loss == "co2":
        value = co2_loss(*tensors, backend=backend)
    elif loss == "conic":
        value = conic_loss(*tensors, num_instances=1_281_167, backend=backend)
    else:
        weight = {"nt_xent": 0.0, "nt_xent_co2": 1.0}[loss]
        value = nt_xent_loss(*tensors, consistency_weight=weight, backend=backend)
    value.backward()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conic_needs_its_weights_gradient_and_little_else(dtype: str) -> None:
    """At most 64 MiB beside it, where the logits of 512 × 65536 alone take 128."""
    gradient = 65536 * DIM * getattr(torch, dtype).itemsize / 2**20
    assert extra_mib("conic", 65536, dtype) <= gradient + 64


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["nt_xent", "nt_xent_co2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nt_xent_needs_a_few_copies_of_its_rows(loss: str, dtype: str) -> None:
    """At most 48 MiB: twelve of 8192 × 128 float32 numbers, where one matrix of similarities takes 256."""
    assert extra_mib(loss, 8192, dtype) <= 48


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keys", [65536, 1 << 20])
def test_a_fused_call_needs_no_logits(keys: int, dtype: str) -> None:
    """At most 32 MiB beyond the input, where the logits of 256 × 1,048,576 alone would take a GiB."""
    assert extra_mib("co2", keys, dtype) <= 32


@pytest.mark.slow
def test_the_measurement_sees_logits_where_there_are_some() -> None:
    assert extra_mib("co2", 65536, "float32", backend="reference") >= 64
