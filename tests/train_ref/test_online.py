"""The evaluation while training goes on agrees with that of the commands, and changes nothing."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train_ref import online as module
from train_ref.callbacks import Record
from train_ref.checkpoints import LastCheckpoint
from train_ref.data import Views
from train_ref.errors import UsageError
from train_ref.evaluate import knn, linear
from train_ref.evaluation import Features
from train_ref.online import RATE, LinearProbe, OnlineEvaluation, Seen
from train_ref.progress import EpochLines

from .conftest import values_of


def online(**settings) -> OnlineEvaluation:
    return OnlineEvaluation(**{"k": 5, "every_n_epochs": 1, **settings})


def epochs_of(run: Path) -> list[dict[str, str]]:
    with (run / "epochs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features of two views of eight images each, of very different scales, and the images' labels."""
    random = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 3, 6, dtype=torch.float64)
    rows = torch.randn(count, 16, 6, generator=random, dtype=torch.float64) * scale + 5 * scale
    return list(zip(rows, torch.randint(4, (count, 8), generator=random), strict=True))


def test_the_probe_is_batch_norm_and_a_linear_layer_with_sgd():
    probe = LinearProbe(6, 4, torch.device("cpu"), torch.float64)
    norm, layer = nn.BatchNorm1d(6, affine=False, dtype=torch.float64), nn.Linear(6, 4, dtype=torch.float64)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), RATE / 2, momentum=0.9)
    for features, labels in batches(20):
        values = probe.step(features, labels, factor=0.5)
        logits = layer(norm(features) / math.sqrt(6))
        loss = F.cross_entropy(logits, torch.cat([labels, labels]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(values["probe_loss"], loss.detach())
        assert values["probe_top1"] == (logits.argmax(1) == torch.cat([labels, labels])).double().mean()
    torch.testing.assert_close(probe.layer.weight, layer.weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(probe.layer.bias, layer.bias, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(probe.mean / (1 - 0.9**20), norm.running_mean / (1 - 0.9**20))


def test_the_probe_s_test_takes_running_statistics():
    """Test images are classified one by one, whatever the others are."""
    probe = LinearProbe(6, 4, torch.device("cpu"), torch.float64)
    for features, labels in batches(20):
        probe.step(features, labels, factor=1.0)
    features = torch.cat([features for features, _ in batches(20)])
    known = 1 - 0.9**20
    deviation = (probe.square / known - (probe.mean / known) ** 2 + 1e-5).sqrt()
    labels = probe.layer((features - probe.mean / known) / deviation / math.sqrt(6)).argmax(1)
    assert len(labels.unique()) > 1
    assert probe.accuracy(Features(features, labels)) == 100
    assert probe.accuracy(Features(features[:1], labels[:1])) == 100
    assert probe.accuracy(Features(features, (labels + 1) % 4)) == 0


@pytest.mark.parametrize("name", ["moco", "simclr", "conic", "instdisc"])
def test_an_evaluation_changes_nothing_of_the_training(make_method, make_trainer, name):
    settings = {"moco": {"queue_size": 64}, "conic": {"active": 128}}.get(name, {})
    runs = []
    for callbacks in ([Record()], [online(), Record()]):
        method = make_method(name, **settings)
        trainer = make_trainer(max_epochs=2, limit_train_batches=3, callbacks=callbacks)
        trainer.fit(method, Views(augmentation="digits_v1", batch_size=32))
        rows = values_of(Path(trainer.log_dir)).values()
        runs.append((method.state_dict(), [{k: v for k, v in r.items() if "probe" not in k} for r in rows]))
        assert not method.backbone._forward_hooks
    (plain, rows), (evaluated, same_rows) = runs
    assert rows == same_rows
    for key, value in plain.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, evaluated[key]), key


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Some epochs of SimCLR on digits, evaluated after the second, the fourth and the fifth."""
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.loggers import TensorBoardLogger

    from train_ref.methods import SimCLR

    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu", max_epochs=5, limit_train_batches=18, log_every_n_steps=4,
        enable_progress_bar=False, enable_model_summary=False,
        logger=TensorBoardLogger(str(tmp_path_factory.mktemp("online")), name="run"),
        callbacks=[Record(), online(k=20, every_n_epochs=2), LastCheckpoint()],
    )  # fmt: skip
    trainer.fit(
        SimCLR(arch="convnet", dim=16, temperature=0.5), Views(augmentation="digits_v1", batch_size=64)
    )
    return Path(trainer.log_dir)


@pytest.mark.slow
def test_what_is_measured_is_in_the_epochs(run):
    rows = epochs_of(run)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [bool(row["knn_accuracy"]) for row in rows] == [False, True, False, True, True]
    assert [bool(row["probe_accuracy"]) for row in rows] == [False, True, False, True, True]
    steps = list(values_of(run).values())
    assert {"probe_loss", "probe_top1"} <= set(steps[0])
    last = [float(row["probe_loss"]) for row in steps[-18:]]
    assert float(rows[-1]["probe_loss"]) == pytest.approx(sum(last) / 18)
    assert float(steps[0]["probe_loss"]) == pytest.approx(math.log(10))  # it knows nothing yet
    assert float(rows[-1]["probe_loss"]) < 0.6 < float(rows[0]["probe_loss"])


@pytest.mark.slow
def test_neighbours_and_probe_agree_with_the_commands(run):
    last = epochs_of(run)[-1]
    (row,) = knn(str(run / "last.ckpt"), k=[20], temperature=[0.07])
    assert float(last["knn_accuracy"]) == row["accuracy"]["mean"]
    top1, _ = linear(str(run / "last.ckpt"), augment=False, epochs=60)
    # A layer that learned in ninety steps from views whose features changed, beside one of sixty epochs on
    # images: at most as far apart as docs/running.md says.
    assert abs(float(last["probe_accuracy"]) - top1["accuracy"]["mean"]) < 2


@pytest.mark.slow
def test_tensorboard_has_all_of_it(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    assert set(OnlineEvaluation.values) <= set(events.Tags()["scalars"])
    assert len(events.Scalars("knn_accuracy")) == 3


@pytest.mark.parametrize("order", [1, -1])
def test_whatever_the_order_of_callbacks(make_moco, make_views, make_trainer, capsys, order):
    record = Record()
    callbacks = [online(every_n_epochs=2), record, EpochLines()][::order]
    trainer = make_trainer(max_epochs=3, callbacks=callbacks, enable_progress_bar=True)
    trainer.fit(make_moco(), make_views())
    assert ["knn_accuracy" in epoch for epoch in record.epochs] == [False, True, True]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["nearest neighbours" in line for line in told] == [False, True, True]
    assert f"linear probe {record.epochs[-1]['probe_accuracy']:.1f} %" in told[-1]
    assert trainer.callback_metrics["knn_accuracy"] == pytest.approx(record.epochs[-1]["knn_accuracy"])
    assert "probe_top1" in trainer.progress_bar_metrics


def test_a_run_that_goes_on_has_the_same_probe(make_moco, make_views, make_trainer):
    """In the middle of an epoch, too."""

    def fit(ckpt_path=None):
        evaluation = online()
        callbacks = [evaluation, Record(), LastCheckpoint(every_n_steps=1, keep=9)]
        trainer = make_trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(make_moco(), make_views(synthetic_size=24), ckpt_path=ckpt_path)
        return dict(evaluation.probe.layer.state_dict()), Path(trainer.log_dir)

    whole, run = fit()
    saved = torch.load(run / "last.ckpt", weights_only=True)["callbacks"]["OnlineEvaluation"]["probe"]
    torch.testing.assert_close(dict(saved["layer"]), whole, rtol=0, atol=0)
    for step in (4, 6):
        resumed, other = fit(run / f"step_{step:08}.ckpt")
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
        assert epochs_of(other) == epochs_of(run)
        rest = values_of(other)
        assert rest == {batch: values_of(run)[batch] for batch in rest}


def test_neighbours_that_find_no_room_beside_the_training_are_looked_for_on_the_cpu(
    make_moco, make_views, make_trainer, monkeypatch
):
    """The accuracy is the same, and the training goes on. That the training has a CPU, too, does not matter:
    its own device is the one that it names."""

    def run() -> list[float]:
        record = Record()
        trainer = make_trainer(max_epochs=2, callbacks=[online(), record])
        trainer.fit(make_moco(), make_views())
        assert trainer.global_step == 4
        return [epoch["knn_accuracy"] for epoch in record.epochs]

    expected = run()
    asked, knn_accuracy = [], module.knn_accuracy

    def without_room(*features: Features, **settings) -> float:
        asked.append(settings.get("device"))
        if asked[-1] is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return knn_accuracy(*features, **settings)

    monkeypatch.setattr(module, "knn_accuracy", without_room)
    assert run() == expected
    assert asked == [torch.device("cpu"), None] * 2


def test_images_that_cannot_be_evaluated_are_told_before_the_training(
    make_moco, make_views, make_trainer, monkeypatch
):
    """As those without labels."""

    def labels(self, most=None):
        raise UsageError("there are no labels")

    monkeypatch.setattr(Views, "evaluation_labels", labels)
    trainer = make_trainer(callbacks=[online()])
    with pytest.raises(UsageError, match="there are no labels"):
        trainer.fit(make_moco(), make_views())
    assert trainer.global_step == 0
    make_trainer(callbacks=[online(enabled=False)]).fit(make_moco(), make_views())


def test_a_part_of_it_can_be_had(make_moco, make_views, make_trainer):
    record = Record()
    make_trainer(callbacks=[record, online(probe=False)]).fit(make_moco(), make_views())
    assert set(OnlineEvaluation.values) & set(record.epochs[-1]) == {"knn_accuracy"}
    record = Record()
    make_trainer(callbacks=[record, online(every_n_epochs=None)]).fit(make_moco(), make_views())
    assert set(OnlineEvaluation.values) & set(record.epochs[-1]) == {"probe_loss", "probe_top1"}


def test_a_run_that_goes_on_with_a_probe_gives_its_steps_other_columns(
    make_moco, make_views, make_trainer, tmp_path
):
    trainer = make_trainer(callbacks=[Record(), LastCheckpoint()], enable_checkpointing=True)
    trainer.fit(make_moco(), make_views())
    first = Path(trainer.log_dir)
    settings = {"logger": False, "default_root_dir": str(first), "max_epochs": 2}
    trainer = make_trainer(
        callbacks=[Record(), online(), LastCheckpoint()], enable_checkpointing=True, **settings
    )
    trainer.fit(make_moco(), make_views(), ckpt_path=first / "last.ckpt")
    rows = values_of(first)
    assert list(rows) == [0, 1, 2, 3]
    assert [bool(row["probe_loss"]) for row in rows.values()] == [False, False, True, True]
    assert all(float(row["loss"]) > 0 for row in rows.values())


def test_the_first_of_several_batches_of_views_is_seen():
    """Crops of other sizes come after the whole views."""
    backbone = nn.Sequential(nn.Flatten())
    seen = Seen(backbone)
    first = torch.randn(4, 3, requires_grad=True)
    backbone(first), backbone(torch.randn(8, 3))
    features = seen.take()
    assert torch.equal(features, first)
    assert not features.requires_grad
    backbone.eval()(torch.randn(2, 3))
    assert seen.features is None
