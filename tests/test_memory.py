"""Memory does not grow with the number of keys."""

from __future__ import annotations

import pytest

from bench.cases import Case
from bench.memory import peak_extra_mib


def extra_mib(keys: int, backend: str, dtype: str) -> float:
    return peak_extra_mib(Case("co2", backend, dtype, B=256, K=keys))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conic_needs_its_weights_gradient_and_little_else(dtype: str) -> None:
    """At most 64 MiB beside it, where the logits of 512 × 65536 alone take 128."""
    of_weight = 65536 * 128 * {"float32": 4, "bfloat16": 2}[dtype] / 2**20
    assert peak_extra_mib(Case("conic", "cpu", dtype, B=512, K=65536)) <= of_weight + 64


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["nt_xent", "nt_xent_co2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nt_xent_needs_a_few_copies_of_its_rows(loss: str, dtype: str) -> None:
    """At most 48 MiB: twelve of 8192 × 128 float32 numbers, where one matrix of similarities takes 256."""
    assert peak_extra_mib(Case(loss, "cpu", dtype, B=8192, K=8192)) <= 48


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keys", [65536, 1 << 20])
def test_a_fused_call_needs_no_logits(keys: int, dtype: str) -> None:
    """At most 32 MiB beyond the input, where the logits of 256 × 1,048,576 alone would take a GiB."""
    assert extra_mib(keys, "cpu", dtype) <= 32


@pytest.mark.slow
def test_the_measurement_sees_logits_where_there_are_some() -> None:
    assert extra_mib(65536, "reference", "float32") >= 64
