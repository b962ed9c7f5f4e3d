"""Where runs keep their files, and how one goes on from its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train_ref import training
from train_ref.backbones import read_checkpoint

from .conftest import RECIPES, values_of

TINY = [
    "--config", str(RECIPES / "synthetic.yaml"), "--model.arch=convnet", "--data.image_size=8",
    "--data.batch_size=8", "--data.synthetic_size=16", "--trainer.accelerator=cpu",
    "--evaluation.enabled=false",
]  # fmt: skip
NO_LOGGER = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def refused(train_ref, *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        train_ref("fit", *args)
    line = str(stopped.value.code)
    assert line.startswith("error: ")
    assert len(line.splitlines()) == 1
    return line


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
@pytest.mark.parametrize(
    "mistake",
    [
        "--data.batch_size=99",  # told by the data
        "--model.norm_groups=3",  # by the model
        "--ckpt_path=dim16.ckpt",  # when it is restored
        "--trainer.callbacks+=tests.train_ref.test_runs.Fails",  # by what begins last
    ],
)
def test_a_start_that_fails_leaves_no_folder(train_ref, tmp_path, monkeypatch, logger, mistake):
    if "ckpt" in mistake:
        train_ref(
            "fit", *TINY, *NO_LOGGER, "--model.dim=16", f"--trainer.default_root_dir={tmp_path / 'other'}"
        )
        (tmp_path / "other" / "last.ckpt").rename(tmp_path / "dim16.ckpt")
    options = [
        f"--trainer.logger.class_path={logger}",
        "--trainer.logger.save_dir=runs",
        "--trainer.logger.name=it",
    ]
    with pytest.raises((SystemExit, ZeroDivisionError)):
        train_ref("fit", *TINY, *options, mistake)
    assert not list(tmp_path.glob("runs/it/*"))
    train_ref("fit", *TINY, *options)
    assert [path.name for path in tmp_path.glob("runs/it/*")] == ["version_0"]


class Fails(training.Record):
    def on_train_batch_start(self, *_):
        raise ZeroDivisionError


@pytest.mark.parametrize("place", ["no logger", "fixed version"])
def test_a_directory_holds_one_run_which_may_go_on_there(train_ref, tmp_path, place):
    if place == "no logger":
        directory, options = tmp_path, NO_LOGGER
    else:
        directory = tmp_path / "runs" / "it" / "mine"
        options = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs"]
        options += [
            "--trainer.logger.name=it",
            "--trainer.logger.version=mine",
            "--trainer.enable_progress_bar=false",
        ]
    train_ref(
        "fit",
        *TINY,
        *options,
        "--trainer.max_epochs=1",
        "--checkpoint.every_n_steps=1",
        "--checkpoint.keep=2",
    )
    before = {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert "holds a run already" in refused(train_ref, *TINY, *options)
    assert before == {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}

    # From a checkpoint that is a step old: the step after it is taken again, and told once.
    first = values_of(directory)
    train_ref(
        "fit", *TINY, *options, f"--ckpt_path={directory / 'step_00000001.ckpt'}", "--trainer.max_epochs=1"
    )
    assert values_of(directory) == first
    assert read_checkpoint(directory / "last.ckpt")["global_step"] == 2

    train_ref("fit", *TINY, *options, "--ckpt_path=last", "--trainer.max_epochs=2")
    assert list(values_of(directory)) == [0, 1, 2, 3]
    assert read_checkpoint(directory / "last.ckpt")["global_step"] == 4


def test_the_last_checkpoint_is_that_of_the_run_s_latest_version(train_ref, tmp_path):
    def fit(*options: str) -> str:
        return train_ref("fit", *TINY, "--ckpt_path=last", *options)

    assert "There is no checkpoint yet" in fit("--trainer.max_epochs=1")
    assert "Going on from runs/synthetic/version_0/last.ckpt" in fit("--trainer.max_epochs=2")
    (tmp_path / "runs" / "synthetic" / "version_2").mkdir()  # of a run that was killed before it saved
    assert "Going on from runs/synthetic/version_1/last.ckpt" in fit("--trainer.max_epochs=3")
    latest = tmp_path / "runs" / "synthetic" / "version_3" / "last.ckpt"
    assert read_checkpoint(latest)["global_step"] == 6

    # A run that is over has nothing left to do, as a scheduler may find that starts it again.
    assert "Going on from runs/synthetic/version_3/last.ckpt" in fit("--trainer.max_epochs=3")
    latest.write_bytes(latest.read_bytes()[:-1])
    assert "version_3/last.ckpt is damaged" in refused(train_ref, *TINY, "--ckpt_path=last")


def test_torchrun_says_how_many_processes_there_are(train_ref, monkeypatch):
    built = []
    monkeypatch.setattr(training.ReferenceCLI, "fit", lambda self, **settings: built.append(self.trainer))
    for name, value in {
        "TORCHELASTIC_RUN_ID": "it", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "3", "WORLD_SIZE": "6",
        "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    train_ref("fit", *TINY)
    assert (built[0].world_size, built[0].num_nodes, built[0].num_devices) == (6, 3, 2)
    line = refused(train_ref, *TINY, "--trainer.devices=1", "--trainer.num_nodes=1")
    assert "trainer.devices and trainer.num_nodes make 1 processes, but torchrun has started 6" in line


def test_a_run_that_is_over_is_only_evaluated(train_ref, tmp_path):
    train_ref("fit", *TINY)
    checkpoint = tmp_path / "runs" / "synthetic" / "version_0" / "last.ckpt"
    options = [option for option in TINY if "evaluation" not in option]
    train_ref("fit", *options, f"--ckpt_path={checkpoint}")
    again = tmp_path / "runs" / "synthetic" / "version_1"
    assert {"evaluation.json", "overview.png"} <= files_in(again)
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4


def test_a_run_that_goes_on_for_longer_has_its_own_schedule(train_ref, tmp_path):
    train_ref("fit", *TINY, "--trainer.max_epochs=1")
    checkpoint = tmp_path / "runs" / "synthetic" / "version_0" / "last.ckpt"
    train_ref("fit", *TINY, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}")
    train_ref("fit", *TINY, "--trainer.max_epochs=2")
    longer, whole = (values_of(tmp_path / "runs" / "synthetic" / f"version_{i}") for i in (1, 2))
    assert [row["learning_rate"] for row in longer.values()] == [whole[i]["learning_rate"] for i in (2, 3)]
