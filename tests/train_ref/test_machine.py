from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from train_ref import machine


def test_a_description_tells_versions_of_what_is_asked_for():
    told = machine.describe("cpu", ["numpy", "a-package-that-there-is-not"])
    assert told["numpy"] == np.__version__
    assert told["a-package-that-there-is-not"] is None
    assert told["torch"]
    assert told["device"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_a_checkout_that_knows_the_code(tmp_path, monkeypatch):
    package = tmp_path / "train_ref"
    package.mkdir()
    code = Path(shutil.copy(machine.__file__, package))
    binaries = str(Path(shutil.which("git")).parent)

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    monkeypatch.setattr(machine, "__file__", str(code))

    def told(path: str = binaries) -> str | None:
        with monkeypatch.context() as there:
            there.setenv("PATH", path)
            return machine._commit()

    assert told() is None  # in no checkout
    git("init")
    git("commit", "--allow-empty", "-m", "of something else")
    assert told() is None
    git("add", ".")
    git("commit", "-m", "of the code")
    commit = git("rev-parse", "--short=12", "HEAD").strip()
    assert told() == commit
    code.write_text(code.read_text() + "\n")
    assert told() == commit + "-dirty"
    assert told(path="/nowhere") is None  # git is not installed
