"""Tests run once more in processes of their own, whose environment is another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor


def pass_elsewhere(tests: Sequence[str], selection: str, environment: Mapping[str, str]) -> None:
    """Run the tests of each file that `selection` (pytest's -k) names, a process a file, one on each core."""

    def run(file: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", file, "-k", selection],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            text=True,
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(run, tests):
            assert result.returncode == 0, result.stdout[-3000:]
            assert " passed" in result.stdout
