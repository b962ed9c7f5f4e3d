"""Fixtures of all tests: the backends under test, and hypothesis's settings."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import contrastive_ops
from contrastive_ops import available_backends
from contrastive_ops._backends import preferred_on
from tests.cases import INTERPRETED
from tests.gpu_emulator import driver as gpu_emulator


def another_package(tree: Path, package: Path) -> str:
    """Why tests of a source tree would say nothing about it: they import the package of another folder.

    Args:
        tree: the folder that the tests lie in. An installed package is tested in one without the source.
        package: the folder that the package's modules come from.
    """
    own = tree / "contrastive_ops"
    if not own.is_dir() or package.resolve() == own.resolve():
        return ""
    return (
        f"the tests in {tree / 'tests'} would not test {own}, which was not built, but {package}: build it "
        "with make, or pip install --no-build-isolation --editable"
    )


if wrong := another_package(Path(__file__).resolve().parents[1], Path(contrastive_ops.__path__[0])):
    pytest.exit(wrong, returncode=4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first: where each core takes a file at a time, those with quick
    tests alone fill what is left at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


# Timings mean nothing here, and a failure must come back: no deadline, examples from a fixed seed.
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.register_profile("few", settings.get_profile("default"), max_examples=10)  # where each takes long
settings.register_profile("interpreted", settings.get_profile("default"), max_examples=4)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

gpu_emulator.start_if_requested()
SERVING = [name for name, status in available_backends().items() if status.available]


ON_GPU = () if INTERPRETED or gpu_emulator.REQUESTED else preferred_on("cuda")


@pytest.fixture(params=SERVING)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that can serve here. A test that takes it holds for all of them, and makes its tensors on
    the device that it serves."""
    with torch.device("cuda") if request.param in ON_GPU else nullcontext():
        yield request.param


@pytest.fixture(scope="session", autouse=True)
def _cpu_kernels_are_under_test() -> None:
    """A build that silently failed would leave only the reference to test."""
    if os.environ.get("CONTRASTIVE_OPS_TEST_WITHOUT_EXTENSION") != "1":
        status = available_backends()["cpu"]
        assert status.available, status.reason
