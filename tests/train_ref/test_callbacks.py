from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from PIL import Image

from train_ref import callbacks, files, online
from train_ref.callbacks import Evaluation, Record
from train_ref.checkpoints import LastCheckpoint
from train_ref.errors import UsageError, named_file

from .conftest import values_of


class StepValues(Callback):
    def __init__(self):
        self.top5 = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.top5.append(trainer.callback_metrics["top5"].item())


@pytest.mark.parametrize("interval", [1, 3])
def test_curves_are_the_means_of_each_epoch(make_moco, make_views, make_trainer, interval):
    record, steps = Record(), StepValues()
    trainer = make_trainer(max_epochs=2, callbacks=[record, steps], log_every_n_steps=interval)
    trainer.fit(make_moco(), make_views())
    assert [epoch["epoch"] for epoch in record.epochs] == [1, 2]
    assert set(record.epochs[0]) == {"epoch", "loss", "instance_loss", "consistency_loss", "top1", "top5"}
    means = torch.tensor(steps.top5).reshape(2, 2).mean(dim=1)
    assert [epoch["top5"] for epoch in record.epochs] == pytest.approx(means.tolist())


@pytest.mark.parametrize("enabled", [True, False])
def test_the_picture_has_the_curves_with_or_without_an_evaluation(
    make_moco, make_views, make_trainer, monkeypatch, capsys, enabled
):
    drawn = []
    monkeypatch.setattr(callbacks, "overview", lambda *arguments: drawn.append(arguments))
    record, evaluation = Record(), Evaluation(k=3, seeds=1, enabled=enabled)
    trainer = make_trainer(max_epochs=2, callbacks=[record, evaluation])
    trainer.fit(make_moco(), make_views())
    ((epochs, shown, path),) = drawn
    assert epochs == record.epochs
    assert (shown is not None) == enabled
    assert path == Path(trainer.log_dir) / "overview.png"
    assert capsys.readouterr().out.splitlines()[-1].endswith(str(path))
    assert (Path(trainer.log_dir) / "evaluation.json").exists() == enabled


def test_values_keep_the_order_in_which_a_step_tells_them(make_moco, make_views, make_trainer):
    record = Record()
    trainer = make_trainer(callbacks=[record])
    trainer.fit(make_moco(), make_views())
    values = ["loss", "instance_loss", "consistency_loss", "top1", "top5"]
    assert list(record.epochs[0]) == ["epoch", *values]
    header = (Path(trainer.log_dir) / "steps.csv").read_text().splitlines()[0].split(",")
    assert header == ["batch", "epoch", "learning_rate", *values, "images_per_second", "loss_ms"]


@pytest.mark.parametrize("interval", [1, 3])
def test_the_values_of_every_batch_are_written(make_moco, make_views, make_trainer, interval):
    steps = StepValues()
    trainer = make_trainer(max_epochs=3, callbacks=[Record(), steps], log_every_n_steps=interval)
    trainer.fit(make_moco(learning_rate=0.5), make_views())
    rows = values_of(Path(trainer.log_dir))
    assert list(rows) == list(range(6))
    assert [int(row["epoch"]) for row in rows.values()] == [0, 0, 1, 1, 2, 2]
    assert [float(row["top5"]) for row in rows.values()] == pytest.approx(steps.top5)
    assert float(rows[0]["learning_rate"]) == 0.5
    assert float(rows[3]["learning_rate"]) == pytest.approx(0.25)


def test_the_time_in_the_loss_is_part_of_the_step(make_moco, make_views, make_trainer):
    trainer = make_trainer(callbacks=[Record()])
    moco = make_moco()
    slow = moco.criterion.forward
    moco.criterion.forward = lambda *tensors: time.sleep(0.05) or slow(*tensors)
    trainer.fit(moco, make_views())
    assert 50 <= trainer.callback_metrics["loss_ms"] <= 1000
    assert 0 < trainer.callback_metrics["images_per_second"] < 8 / 0.05


@pytest.mark.parametrize(("name", "settings"), [("conic", {"active": 32}), ("simclr", {})])
def test_the_clock_sees_the_loss_s_backward(make_method, make_trainer, make_views, name, settings):
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.05)
            return grad

    method = make_method(name, **settings)
    fast = method.criterion.forward

    def forward(*tensors, **options):
        loss, metrics = fast(*tensors, **options)
        return Slow.apply(loss), metrics

    method.criterion.forward = forward
    trainer = make_trainer(callbacks=[Record()], limit_train_batches=2)
    trainer.fit(method, make_views(dataset="digits", augmentation="digits_v2"))
    assert 50 <= trainer.callback_metrics["loss_ms"] <= 1000


def test_features_are_compared_with_those_before_any_training(make_moco, make_views, make_trainer):
    evaluation = Evaluation(k=3, seeds=2)
    trainer = make_trainer(callbacks=[LastCheckpoint(), evaluation], enable_checkpointing=True)
    trainer.fit(make_moco(), make_views())
    first = Path(trainer.log_dir)

    # A resumed run starts from trained weights, yet compares with the same untrained ones.
    trainer = make_trainer(
        max_epochs=2, callbacks=[LastCheckpoint(), Evaluation(k=3, seeds=2)], enable_checkpointing=True
    )
    trainer.fit(make_moco(), make_views(), ckpt_path=first / "last.ckpt")
    untrained = [
        [row["untrained"] for row in json.loads((run / "evaluation.json").read_text())]
        for run in (first, Path(trainer.log_dir))
    ]
    assert untrained[0] == untrained[1]
    for before, initial in zip(
        evaluation.untrained.parameters(), make_moco().backbone.parameters(), strict=True
    ):
        assert torch.equal(before, initial)


@pytest.fixture
def small_folder(tmp_path):
    """Two images of each of two classes to train on, and as many to test."""
    for part in ("train", "val"):
        for index in range(4):
            path = tmp_path / part / ("dark", "light")[index // 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (9, 9), 60 * index).save(path)
    return tmp_path


def damage(folder: Path, how: str) -> None:
    if how == "test image":
        (folder / "val" / "light" / "2.png").write_bytes(b"\x89PNG")
    elif how == "single class":
        for part in ("train", "val"):
            shutil.rmtree(folder / part / "light")


@pytest.mark.parametrize(
    ("how", "most", "message"),
    [
        (
            "test image",
            None,
            r"data.root: .*/val/light/2.png cannot be read as an image: .*; --evaluation.enabled f",
        ),
        (
            "single class",
            None,
            "data.dataset is folder, whose training images are all of one class: .*enabled false",
        ),
        ("none", 1, "images, of which evaluation.max_images leaves 1, are all of one class: .*enabled false"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_the_training(
    make_moco, make_views, make_trainer, small_folder, how, most, message
):
    damage(small_folder, how)
    views = {"dataset": "folder", "root": str(small_folder), "augmentation": "small", "batch_size": 2}
    trainer = make_trainer(callbacks=[Evaluation(max_images=most)])
    with pytest.raises(UsageError, match=message):
        trainer.fit(make_moco(), make_views(**views))
    assert trainer.global_step == 0
    trainer = make_trainer(callbacks=[Evaluation(max_images=most, enabled=False)])
    trainer.fit(make_moco(), make_views(**views))
    assert trainer.global_step > 0


def test_one_process_reads_the_test_images_and_all_stop(make_views, small_folder, monkeypatch):
    damage(small_folder, "test image")
    views = make_views(dataset="folder", root=str(small_folder), batch_size=2)
    views.setup()
    read = []
    monkeypatch.setattr(views, "read_test_images", read.append)
    monkeypatch.setattr(online, "rank", lambda: 1)
    monkeypatch.setattr(online, "gather_objects", lambda mine: ["what the first has found", mine])
    with pytest.raises(UsageError, match="what the first has found"):
        Evaluation()._check(views)
    assert not read


def test_pixels_are_features_of_their_own(make_moco, make_views, make_trainer):
    views = make_views(dataset="digits", augmentation="digits_v2", image_size=8)
    trainer = make_trainer(
        limit_train_batches=1, callbacks=[Evaluation(k=20, label_fractions=[], pixels=True)]
    )
    trainer.fit(make_moco(), views)
    (row,) = json.loads((Path(trainer.log_dir) / "evaluation.json").read_text())
    assert list(row) == ["measure", "labels", "pixels", "untrained", "trained"]
    images = (torch.cat([images for images, _ in loader]) for loader in views.evaluation_dataloaders(None))
    train, test = (F.normalize(flat.flatten(1), dim=1) for flat in images)
    labels, truth = (torch.cat([y for _, y in loader]) for loader in views.evaluation_dataloaders(None))
    weights, nearest = (test @ train.T / 0.07).exp().topk(20)
    votes = (F.one_hot(labels[nearest], 10) * weights[..., None]).sum(dim=1)
    assert row["pixels"]["mean"] == 100 * (votes.argmax(dim=1) == truth).double().mean()


def test_without_an_interval_values_are_written_at_the_end_of_an_epoch(make_moco, make_views, make_trainer):
    """An interval of 0 keeps them from the logger."""
    trainer = make_trainer(max_epochs=2, callbacks=[Record()], log_every_n_steps=0)
    trainer.fit(make_moco(), make_views())
    assert list(values_of(Path(trainer.log_dir))) == list(range(4))
    assert "loss_ms" not in trainer.callback_metrics


def test_a_training_that_diverges_stops(make_moco, make_views, make_trainer):
    trainer = make_trainer(max_epochs=3, callbacks=[Record()])
    with pytest.raises(UsageError, match="diverged in epoch 1: its loss is no longer finite"):
        trainer.fit(make_moco(learning_rate=1e30), make_views())


@pytest.mark.parametrize("name", ["steps.csv", "evaluation.json", "overview.png"])
def test_an_error_of_the_disk_names_the_file(make_moco, make_views, make_trainer, monkeypatch, name):
    monkeypatch.setattr(files, "_nameless", lambda folder: None)
    trainer = make_trainer(callbacks=[Record(), Evaluation(seeds=1, label_fractions=[])], max_steps=1)
    run = Path(trainer.log_dir)
    run.mkdir(parents=True)
    file = run / (name if name == "steps.csv" else f"{name}.partial")  # the others are renamed when whole
    file.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as failed:
        trainer.fit(make_moco(), make_views())
    assert named_file(failed.value) == str(run / name)
    assert not (run / name).exists() or name == "steps.csv"


def test_an_error_of_a_logger_names_the_folder(make_moco, make_views, make_trainer, monkeypatch):
    """Its threads do not tell the file."""
    trainer = make_trainer(callbacks=[Record()])

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer.logger, "log_metrics", full)
    with pytest.raises(OSError, match="No space left on device") as failed:
        trainer.fit(make_moco(), make_views())
    assert named_file(failed.value) == trainer.log_dir
