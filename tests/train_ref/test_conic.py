from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule

from contrastive_ops import DelayedSGD
from train_ref import __main__ as command_line
from train_ref.callbacks import Evaluation, Record
from train_ref.checkpoints import AtomicCheckpointIO, LastCheckpoint
from train_ref.data import Views
from train_ref.errors import UsageError
from train_ref.methods import ConIC

N = 1437  # digits to train on


@pytest.fixture
def make_conic(make_method):
    return functools.partial(make_method, "conic")


@pytest.fixture
def fit(make_conic, make_trainer):
    """Train a fresh ConIC on digits, as the command line would."""

    def run(
        epochs: int = 1,
        ckpt_path: Path | None = None,
        callbacks=(),
        batch_size: int = 8,
        data=None,
        **settings,
    ):
        conic = make_conic(**settings)
        trainer = make_trainer(
            max_epochs=epochs,
            enable_checkpointing=True,
            plugins=[AtomicCheckpointIO()],
            callbacks=[Record(), LastCheckpoint(), *callbacks],
            limit_train_batches=3,
        )
        views = Views(**{"augmentation": "digits_v1", "batch_size": batch_size, **(data or {})})
        trainer.fit(conic, views, ckpt_path=ckpt_path)
        return conic

    return run


def checkpoint_of(conic: LightningModule) -> Path:
    return Path(conic.trainer.log_dir) / "last.ckpt"


def rows_of(conic: ConIC) -> list[torch.Tensor]:
    """Weight and momentum of every instance, caught up."""
    return [torch.cat(parts) for parts in list(zip(*conic.classifier.export(), strict=True))[1:]]


@pytest.mark.parametrize("active", [None, 64])
def test_the_loss_falls_on_digits(fit, active):
    conic = fit(epochs=6, batch_size=32, active=active, dim=32)
    (record,) = (callback for callback in conic.trainer.callbacks if isinstance(callback, Record))
    losses = [epoch["loss"] for epoch in record.epochs]
    assert losses[-1] < 0.9 * losses[0]


def test_with_all_rows_and_no_consistency_it_is_cross_entropy_over_instances(make_conic, make_views):
    conic = make_conic(consistency_weight=0.0)
    conic._make_classifier(N, torch.float32)
    conic.log = lambda *args, **kwargs: None
    features = []
    conic.encoder.register_forward_hook(lambda module, inputs, output: features.append(output))
    views = make_views(dataset="digits", augmentation="digits_v2")
    views.setup()
    batch = next(iter(views.train_dataloader()))
    loss = conic.training_step(batch, 0)

    where = {int(instance): row for row, instance in enumerate(conic.classifier.active_instances)}
    target = torch.tensor([where[int(instance)] for instance in batch[2]])
    logits = F.normalize(features[0]) @ F.normalize(conic.classifier.weight).T / 0.1  # (2 B, N)
    expected = F.cross_entropy(logits, target.repeat(2), reduction="sum") / len(target)
    torch.testing.assert_close(loss, expected)


def test_compensation_counts_the_rows_that_are_not_active(make_conic, make_views):
    losses = {}
    views = make_views(dataset="digits", augmentation="digits_v2")
    views.setup()
    torch.manual_seed(0)
    batch = next(iter(views.train_dataloader()))
    for compensation in (True, False):
        conic = make_conic(active=40, compensation=compensation, consistency_weight=0.0)
        conic._make_classifier(N, torch.float32)
        conic.log = lambda *args, **kwargs: None
        losses[compensation] = conic.training_step(batch, 0).item()
    # Exactly that, were a view's own row nothing beside the others. Untrained, it is little.
    assert losses[True] - losses[False] == pytest.approx(2 * math.log((N - 1) / 39), rel=0.1)


def test_both_optimizers_follow_one_cosine(fit):
    class Rates(Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_start(self, trainer, module, *args):
            self.rates.append(module.optimizers().optimizer.optimizers[1].param_groups[0]["lr"])

    rates = Rates()
    conic = fit(epochs=2, callbacks=[rates], active=16, learning_rate=0.5)
    assert rates.rates == pytest.approx([0.25 * (1 + math.cos(math.pi * t / 6)) for t in range(6)])
    assert len(conic.classifier.history) == conic.trainer.global_step == 6
    (together,) = conic.trainer.optimizers
    assert [type(optimizer) for optimizer in together.optimizers] == [torch.optim.SGD, DelayedSGD]
    assert all(optimizer.defaults["momentum"] == 0.9 for optimizer in together.optimizers)


def test_gradients_of_several_batches_make_one_step_of_both(make_conic, make_trainer):
    conic = make_conic(active=24)
    trainer = make_trainer(accumulate_grad_batches=3, limit_train_batches=3)
    trainer.fit(conic, Views(augmentation="digits_v1", batch_size=8))
    assert len(conic.classifier.history) == trainer.global_step == 1


class Stop(Callback):
    """As a kill in the middle of the second epoch would."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            self.module = module
            raise KeyboardInterrupt


SMALL_VIEWS = {"augmentation": "digits_v2", "small_views": 3, "small_size": 6}


@pytest.mark.parametrize(
    ("storage", "data"), [("device", {}), ("disk", {}), ("device", SMALL_VIEWS)], ids=str
)
def test_a_stopped_run_resumes_bit_by_bit(fit, tmp_path, storage, data):
    def on(folder: str) -> dict:
        return {
            "active": 16,
            "data": data,
            "storage": storage,
            "path": str(tmp_path / folder) if storage == "disk" else None,
        }

    expected = fit(epochs=3, **on("whole"))
    stop = Stop()
    with pytest.raises(SystemExit):
        fit(epochs=3, callbacks=[stop], **on("stopped"))
    stop.module.classifier.close()
    resumed = fit(epochs=3, ckpt_path=checkpoint_of(stop.module), **on("stopped"))

    assert resumed.trainer.global_step == len(resumed.classifier.history) == 9
    torch.testing.assert_close(
        dict(resumed.encoder.state_dict()), dict(expected.encoder.state_dict()), rtol=0, atol=0
    )
    torch.testing.assert_close(rows_of(resumed), rows_of(expected), rtol=0, atol=0)
    assert torch.equal(resumed.classifier.active_instances, expected.classifier.active_instances)


def test_the_saved_checkpoint_can_be_loaded_whatever_came_after(fit, tmp_path):
    """Rows on disk are those of the file that was saved, after any number of states that were not."""
    settings = {"active": 16, "storage": "disk", "path": str(tmp_path / "rows")}
    conic = fit(epochs=1, **settings)
    expected, classifier = rows_of(conic), conic.classifier
    for _ in range(5):
        classifier.write(torch.arange(N), torch.randn(N, classifier.dim))
        classifier.state_dict()
    classifier.close()
    loaded = ConIC.load_from_checkpoint(checkpoint_of(conic))
    torch.testing.assert_close(rows_of(loaded), expected, rtol=0, atol=0)


@pytest.mark.parametrize("storage", ["device", "disk"])
def test_a_checkpoint_can_be_loaded_without_images(fit, tmp_path, storage):
    conic = fit(active=16, storage=storage, path=str(tmp_path / "rows") if storage == "disk" else None)
    conic.classifier.close()
    loaded = ConIC.load_from_checkpoint(checkpoint_of(conic))
    assert loaded.classifier.num_instances == N
    torch.testing.assert_close(
        dict(loaded.backbone.state_dict()), dict(conic.backbone.state_dict()), rtol=0, atol=0
    )
    if storage == "device":
        torch.testing.assert_close(rows_of(loaded), rows_of(conic), rtol=0, atol=0)


def test_its_features_are_evaluated_at_the_end(fit):
    conic = fit(callbacks=[Evaluation(k=3, seeds=2, label_fractions=(0.1,), max_images=100)], active=16)
    rows = json.loads((Path(conic.trainer.log_dir) / "evaluation.json").read_text())
    assert [row["labels"] for row in rows] == [100, 10]
    assert (Path(conic.trainer.log_dir) / "overview.png").exists()


DIGITS = [
    "fit",
    "--config",
    str(Path(command_line.__file__).parent / "recipes" / "digits_conic_sampled.yaml"),
]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*DIGITS, "--model.active=63"], "model.active is 63, fewer than the 64 images of a step"),
        ([*DIGITS, "--model.active=0"], "active"),
        ([*DIGITS, "--model.queue_size=20"], "queue_size"),
        ([*DIGITS, "--model.storage=tape"], "tape"),
        ([*DIGITS, "--model.storage=disk"], "path is wanted with storage='disk'"),
        ([*DIGITS, "--model.storage=disk", "--model.path=."], "model.path: "),
        ([*DIGITS, "--trainer.precision=16-true"], "trainer.precision is 16-true"),
        ([*DIGITS, "--data.dataset=synthetic"], "data.dataset is synthetic, which is endless"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_ref"])
    (tmp_path / "foreign").write_text("no rows")
    with pytest.raises(SystemExit) as stopped:
        command_line.main([*args, "--trainer.accelerator=cpu"] if args[0] == "fit" else args)
    line = str(stopped.value.code)
    assert line.startswith("error: ")
    assert message in line
    assert len(line.splitlines()) == 1


def test_a_folder_with_another_trainings_rows_is_not_begun_anew(fit, tmp_path):
    settings = {"active": 16, "storage": "disk", "path": str(tmp_path / "rows")}
    fit(**settings).classifier.close()
    with pytest.raises(UsageError, match=r"model.path: .*earlier training"):
        fit(**settings)


def test_a_checkpoint_of_other_images_is_told_so(fit, monkeypatch):
    path = checkpoint_of(fit(active=16))
    monkeypatch.setattr(Views, "num_instances", 1000)
    with pytest.raises(UsageError, match="ckpt_path: the checkpoint's num_instances is 1437"):
        fit(epochs=2, ckpt_path=path, active=16)


def test_small_views_are_classified_and_consistent_like_the_others(make_conic, make_views):
    torch.manual_seed(0)
    views = make_views(dataset="digits", **SMALL_VIEWS)
    views.setup()
    batch = next(iter(views.train_dataloader()))
    images, _, instances = batch
    assert [tuple(each.shape) for each in images] == [(8, 3, 8, 8)] * 2 + [(8, 3, 6, 6)] * 3
    assert len({float(each.sum()) for each in images}) == 5
    conic = make_conic()
    conic._make_classifier(N, torch.float32)
    conic.log = lambda *args, **kwargs: None
    loss = conic.training_step(batch, 0)

    conic.classifier.activate(instances)
    x = F.normalize(torch.cat([conic.encoder(torch.cat(some)) for some in (images[:2], images[2:])]), dim=1)
    rows = F.normalize(conic.classifier.weight, dim=1)
    classification = F.cross_entropy(x @ rows.T / 0.1, instances.repeat(5), reduction="none")
    of_views = x.unflatten(0, (5, -1)).transpose(0, 1)  # (B, V, D)
    # The diagonal is of views with themselves, whose difference is 0.
    consistency = (1 - of_views @ of_views.transpose(1, 2)).square().sum(dim=(1, 2))
    expected = (classification.unflatten(0, (5, -1)).sum(0) + 2.5 * consistency).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["simclr", "moco", "instdisc"])
def test_a_loss_of_two_views_refuses_small_ones(make_method, make_trainer, kind):
    with pytest.raises(UsageError, match=f"data.small_views is 3, but the loss of {kind} is of two views"):
        make_trainer().fit(make_method(kind), Views(batch_size=8, **SMALL_VIEWS))


def test_small_views_have_a_smallest_size_too(make_views):
    with pytest.raises(UsageError, match=r"data.small_size is 6, but data.augmentation moco_v2 needs 7"):
        make_views(image_size=8, small_views=1, small_size=6).setup()
