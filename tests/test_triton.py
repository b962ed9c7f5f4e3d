"""What only the Triton kernels have: an interpreter for machines without a GPU, and a compiler that needs none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_interpreter_passes_the_same_tests() -> None:
    """The kernels' own code, tile by tile on the CPU, held to the harness of all backends."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "HYPOTHESIS_PROFILE": "interpreter"}
    tests = ["tests/test_co2.py", "tests/test_ops.py", "tests/test_backends.py"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests, "-k", "triton"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
