"""Memory does not grow with the number of keys."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Peak resident memory above what is there before the call, after one small call has loaded all libraries.
MEASURE = """
import resource, sys, torch
from contrastive_ops import co2_loss
keys, backend, dtype = int(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
query = torch.randn(256, 128).to(dtype).requires_grad_()
key = torch.randn(256, 128).to(dtype)
queue = torch.empty(keys, 128, dtype=dtype)
for part in queue.split(4096):
    part.copy_(torch.nn.functional.normalize(torch.randn(part.shape), dim=1))
co2_loss(query, key, queue[:200], backend=backend).backward()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
co2_loss(query, key, queue, backend=backend).backward()
print(peak() - before)
"""


def extra_mib(keys: int, backend: str, dtype: str) -> float:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(keys), backend, dtype], capture_output=True, text=True, check=True
    )
    return int(result.stdout) / 1024


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keys", [65536, 1 << 20])
def test_a_fused_call_needs_no_logits(keys: int, dtype: str) -> None:
    """At most 32 MiB beyond the input, where the logits of 256 × 1,048,576 alone would take a GiB."""
    assert extra_mib(keys, "cpu", dtype) <= 32


@pytest.mark.slow
def test_the_measurement_sees_logits_where_there_are_some() -> None:
    assert extra_mib(65536, "reference", "float32") >= 64
