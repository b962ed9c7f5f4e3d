"""A run that is stopped or killed, and resumed, computes what one that was not would have: bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.cases import mostly_thorough

from .conftest import RECIPES, values_of

RECIPE = """
seed_everything: 3
method: {method}
trainer: {{max_epochs: 3, limit_train_batches: 15, log_every_n_steps: 1, accelerator: cpu,
  enable_progress_bar: false,
  logger: {{class_path: CSVLogger, init_args: {{save_dir: ".", name: {name}}}}}}}
model: {{arch: convnet, dim: 16, {model}}}
data: {{batch_size: 32, augmentation: digits_v1}}
evaluation: {{enabled: false}}
checkpoint: {{every_n_steps: 4}}
"""
METHODS = {
    "moco": "queue_size: 300, consistency_weight: 0.3",
    "conic": "active: 128",
    "conic_on_disk": "active: 128, storage: disk, path: {name}_rows",
}


def recipe_of(which: str, name: str, folder: Path) -> str:
    path = folder / f"{name}.yaml"
    model = METHODS[which].format(name=name)
    path.write_text(RECIPE.format(method=which.partition("_")[0], name=name, model=model))
    return str(path)


def state_of(directory: Path) -> dict:
    state = torch.load(directory / "last.ckpt", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def start(*args: str, cwd: Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(RECIPES.parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def wait_for_batches(process: subprocess.Popen, directory: Path, count: int) -> None:
    steps, deadline = directory / "steps.csv", time.monotonic() + 600  # of one that hangs
    while process.poll() is None and time.monotonic() < deadline:
        if steps.exists() and len(steps.read_text().splitlines()) > count:
            return
        time.sleep(0.005)
    raise AssertionError(f"no {count} batches: {process.stdout.read()[-2000:]}")


def check_that_it_goes_on(train_ref, tmp_path: Path, which: str, expected: Path, stopped: str) -> None:
    """From the last checkpoint of `stopped` to the end, as `expected` did."""
    checkpoint = tmp_path / stopped / "version_0" / "last.ckpt"
    train_ref("fit", "--config", recipe_of(which, stopped, tmp_path), f"--ckpt_path={checkpoint}")
    resumed = tmp_path / stopped / "version_1"
    whole, rest = values_of(expected), values_of(resumed)
    assert min(rest) > 0
    assert max(rest) == max(whole) == 44
    assert rest == {batch: whole[batch] for batch in rest}
    torch.testing.assert_close(state_of(resumed), state_of(expected), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("which", mostly_thorough(["moco", "conic_on_disk"], "conic_on_disk".__eq__))
def test_killed_at_a_random_step(train_ref, tmp_path, which):
    train_ref("fit", "--config", recipe_of(which, "whole", tmp_path))
    process = start("-m", "train_ref", "fit", "--config", recipe_of(which, "killed", tmp_path), cwd=tmp_path)
    moment = random.Random()  # another one every time
    wait_for_batches(process, tmp_path / "killed" / "version_0", moment.randint(5, 38))
    time.sleep(moment.uniform(0, 0.03))  # somewhere in a step or in a save
    process.kill()
    assert process.wait() == -signal.SIGKILL
    check_that_it_goes_on(train_ref, tmp_path, which, tmp_path / "whole" / "version_0", "killed")


MAIN = """
import multiprocessing, sys
from train_ref.__main__ import main

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1))
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "number"),
    [
        pytest.param("fork", signal.SIGTERM, marks=pytest.mark.thorough),
        ("spawn", signal.SIGINT),
        pytest.param("forkserver", signal.SIGTERM, marks=pytest.mark.thorough),
    ],
)
def test_a_signal_to_all_processes_saves_after_the_step_and_stops(train_ref, tmp_path, method, number):
    """A terminal sends its interrupts to a group of processes, and schedulers ask it to terminate."""
    train_ref("fit", "--config", recipe_of("conic", "whole", tmp_path))
    (tmp_path / "main.py").write_text(MAIN)
    process = start(
        "main.py", method, "fit", "--config", recipe_of("conic", "stopped", tmp_path),
        "--checkpoint.every_n_steps=null", "--data.num_workers=2",
        cwd=tmp_path, start_new_session=True,
    )  # fmt: skip
    wait_for_batches(process, tmp_path / "stopped" / "version_0", 19)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1, output
    assert output.count("Stopping") == 1
    assert "--ckpt_path stopped/version_0/last.ckpt" in output
    assert "Traceback" not in output
    done = len(values_of(tmp_path / "stopped" / "version_0"))
    saved = torch.load(tmp_path / "stopped" / "version_0" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == done
    check_that_it_goes_on(train_ref, tmp_path, "conic", tmp_path / "whole" / "version_0", "stopped")
