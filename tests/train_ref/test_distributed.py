"""Two processes train as one does on the joined batch, whose halves are different images."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.cases import mostly_thorough

from .conftest import RECIPES, values_of

SETTINGS = {
    "moco": ["--model.consistency_weight=10", "--model.queue_size=200"],
    "moco_in_groups": ["--model.norm_groups=4", "--model.queue_size=200"],
    "simclr": ["--model.consistency_weight=0.5"],
    "conic": ["--model.active=160", "--model.shards=2"],
    "conic_accumulated": ["--model.active=256", "--model.shards=2", "--trainer.accumulate_grad_batches=2"],
    "conic_clipped": ["--model.active=160", "--model.shards=2", "--trainer.gradient_clip_val=0.3"],
    "instdisc": [],
}


def train(which: str, devices: int, folder: Path, *options: str, name: str = "") -> Path:
    """The run's directory; in float64, where order of summation leaves 1e-15."""
    name = name or f"{which}{devices}"
    recipe = folder / f"empty{devices}.yaml"
    recipe.write_text("{}")
    command = [
        sys.executable, "-m", "train_ref", "fit", "--config", recipe.name, "--seed_everything=5",
        f"--method={which.partition('_')[0]}", "--model.arch=convnet", "--model.dim=16", "--model.warmup=0.3",
        *SETTINGS[which], "--data.batch_size=32", "--trainer.accelerator=cpu", "--trainer.precision=64-true",
        f"--trainer.devices={devices}", "--trainer.max_epochs=2", "--trainer.limit_train_batches=4",
        "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false", "--evaluation.enabled=false",
        "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.",
        f"--trainer.logger.name={name}", *options,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parents[1]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert [path.name for path in (folder / name).iterdir()] == ["version_0"]
    return folder / name / "version_0"


@pytest.mark.slow
@pytest.mark.parametrize("which", mostly_thorough(SETTINGS, "conic_accumulated".__eq__))
def test_two_processes_are_one(tmp_path, which):
    with ThreadPoolExecutor() as pool:
        check_same_training(which, *pool.map(lambda devices: train(which, devices, tmp_path), (1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "devices"),
    mostly_thorough(
        [(which, devices) for which in ("moco", "simclr", "conic") for devices in (3, 4)],
        ().__contains__,
    ),
)
def test_three_and_four_processes_are_one(tmp_path, which, devices):
    options = ["--data.batch_size=36"] + ["--model.shards=12", "--model.active=240"] * (which == "conic")
    one, several = (train(which, count, tmp_path, *options) for count in (1, devices))
    check_same_training(which, one, several)


@pytest.mark.slow
@pytest.mark.parametrize("which", mostly_thorough(["moco", "simclr", "conic"], ("moco",).__contains__))
def test_two_processes_evaluate_while_training_as_one_does(tmp_path, which):
    """The probe learns from the rows of both, and each makes the features of half of 97 images."""
    options = [
        "--evaluation.enabled=true", "--evaluation.every_n_epochs=1", "--evaluation.max_images=97",
        "--evaluation.k=5", "--evaluation.label_fractions=[]",
    ]  # fmt: skip
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(lambda devices: train(which, devices, tmp_path, *options), (1, 2))
    check_same_training(which, one, two)
    probes = [
        torch.load(run / "last.ckpt", weights_only=True)["callbacks"]["Evaluation"]["probe"]
        for run in (one, two)
    ]
    torch.testing.assert_close(probes[1]["layer"], probes[0]["layer"], rtol=1e-9, atol=1e-12)
    for name in ("mean", "square", "steps"):
        torch.testing.assert_close(probes[1][name], probes[0][name], rtol=1e-9, atol=1e-12)
    epochs = [(run / "epochs.csv").read_text().splitlines() for run in (one, two)]
    assert epochs[0][0].endswith("probe_loss,probe_top1,knn_accuracy,probe_accuracy")
    assert len(epochs[0]) == 3
    for row, expected in zip(*(lines[1:] for lines in epochs), strict=True):
        values = [float(value) for value in row.split(",")]
        assert values == pytest.approx([float(value) for value in expected.split(",")], rel=1e-9)


def check_same_training(which, one, two):
    states = [torch.load(run / "last.ckpt", weights_only=True)["state_dict"] for run in (one, two)]
    for name, expected in states[0].items():
        # Each process keeps the running statistics of its own groups.
        if not isinstance(expected, torch.Tensor) or ("running" in name and which == "moco_in_groups"):
            continue
        torch.testing.assert_close(states[1][name], expected, rtol=1e-10, atol=1e-12, msg=name)
    for row, expected in zip(values_of(two).values(), values_of(one).values(), strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx(
            {k: float(v) for k, v in expected.items()}, rel=1e-9, abs=1e-12
        )


@pytest.mark.slow
@pytest.mark.thorough
def test_rows_on_disk_are_resumed_by_two_processes(tmp_path):
    """Each shard has a folder of its own, with generations of its own, and goes on as with rows in memory."""

    def resumed(storage: str) -> dict:
        path = ["--model.path=rows"] if storage == "disk" else []
        options = [f"--model.storage={storage}", "--trainer.limit_train_batches=2", *path]
        first = train("conic", 2, tmp_path, *options, "--trainer.max_epochs=1", name=f"{storage}-first")
        run = train("conic", 2, tmp_path, *options, f"--ckpt_path={first / 'last.ckpt'}", name=storage)
        return torch.load(run / "last.ckpt", weights_only=True)["state_dict"]

    with ThreadPoolExecutor() as pool:
        disk, device = pool.map(resumed, ("disk", "device"))
    assert {folder.name for folder in tmp_path.glob("rows/*")} == {"shard-0000-of-0002", "shard-0001-of-0002"}
    for name, expected in device.items():
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(disk[name], expected, rtol=0, atol=0, msg=name)
