"""The Triton kernels' own code, tile by tile on the CPU, held to the harness of all backends."""

from __future__ import annotations

import os

import numpy
import pytest

from tests.cases import mostly_thorough
from tests.elsewhere import pass_elsewhere

triton = pytest.importorskip("triton")

# Files of the harness and what of them is run.
FILES = {
    "conic": "", "co2": "", "nt_xent": "", "seam": "", "rows_ops": "", "triton": "ranges_of or outside",
    "ops": "", "ops_fuzz": "",
}  # fmt: skip


# A loss's whole harness takes minutes there. Its three steps are in "seam", and what is compiled of it runs
# in the emulator.
QUICK = ("rows_ops", "triton")


def version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


@pytest.mark.slow
@pytest.mark.skipif(
    version(triton.__version__) < (3, 8) and version(numpy.__version__) >= (2, 4),
    reason="this interpreter fails on this numpy",
)
@pytest.mark.parametrize("file", mostly_thorough(FILES, QUICK.__contains__))
def test_the_interpreter_passes_the_same_tests(file: str) -> None:
    profile = os.environ.get("INTERPRETED_PROFILE", "interpreted")
    environment = {"TRITON_INTERPRET": "1", "HYPOTHESIS_PROFILE": profile}
    pass_elsewhere([f"tests/test_{file}.py"], FILES[file] or "triton", environment)
