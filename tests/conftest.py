"""Fixtures of all tests: the backends under test, and hypothesis's settings."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from contrastive_ops import available_backends

# Timings mean nothing here, and a failure must come back: no deadline, examples from a fixed seed.
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

SERVING = [name for name, status in available_backends().items() if status.available]


@pytest.fixture(params=SERVING)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can serve here. A test that takes it holds for all of them."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def _cpu_kernels_are_under_test() -> None:
    """A build that silently failed would leave only the reference to test."""
    if os.environ.get("CONTRASTIVE_OPS_TEST_WITHOUT_EXTENSION") != "1":
        status = available_backends()["cpu"]
        assert status.available, status.reason
