"""What the Trainer offers and these trainings cannot take is refused by its name, before they start."""

from __future__ import annotations

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from train_ref.errors import UsageError
from train_ref.limits import check_settings, check_trainer
from train_ref.methods import KINDS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches is 0: it must be 1 or more"),
        ({"accumulate_grad_batches": -1}, "accumulate_grad_batches is -1"),
        ({"log_every_n_steps": -1}, "log_every_n_steps is -1: it must be 0 or more"),
        ({"num_nodes": 0}, "num_nodes is 0"),
        ({"gradient_clip_val": -1}, "gradient_clip_val is -1"),
        ({"gradient_clip_val": float("nan")}, "gradient_clip_val is nan"),
        ({"limit_train_batches": 0}, "limit_train_batches is 0: nothing would be trained"),
        ({"limit_train_batches": 0.0}, "limit_train_batches is 0: nothing would be trained"),
        ({"barebones": True}, "barebones cannot be had"),
        ({"sync_batchnorm": True}, "sync_batchnorm cannot be had: model.norm_groups"),
        ({"plugins": TorchCheckpointIO()}, "plugins: TorchCheckpointIO cannot be had"),
        ({"plugins": [TorchCheckpointIO()]}, "plugins: TorchCheckpointIO cannot be had"),
    ],
)
def test_settings_that_would_train_wrongly_are_refused(settings, message):
    with pytest.raises(UsageError, match=r"^trainer\.") as refused:
        check_settings(settings)
    assert message in str(refused.value)


def test_settings_that_the_trainer_has_by_default_are_not():
    check_settings({"log_every_n_steps": 0, "num_nodes": 1, "accumulate_grad_batches": 1})
    check_settings({"log_every_n_steps": None, "gradient_clip_val": 0, "plugins": None})


@pytest.mark.parametrize(
    "callback",
    [
        BackboneFinetuning(),
        BatchSizeFinder(),
        EMAWeightAveraging(),
        GradientAccumulationScheduler({1: 2}),
        LearningRateFinder(),
        ModelPruning("l1_unstructured"),
        StochasticWeightAveraging(0.1),
        WeightAveraging(),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_train_something_else_are_refused(make_trainer, callback):
    trainer = make_trainer()
    trainer.callbacks.append(callback)
    with pytest.raises(UsageError, match=rf"^trainer\.callbacks: {type(callback).__name__} cannot be had: "):
        check_trainer(trainer, [])


def test_other_callbacks_are_not(make_trainer):
    callbacks = [Timer(), LambdaCallback(), LearningRateMonitor(), EarlyStopping("loss"), ModelCheckpoint()]
    check_trainer(make_trainer(callbacks=callbacks, enable_checkpointing=True), ["loss"])


def test_a_value_that_is_never_logged_cannot_be_monitored(make_trainer):
    trainer = make_trainer(callbacks=[EarlyStopping("val_loss")])
    with pytest.raises(UsageError, match="EarlyStopping monitors val_loss, which is not logged; there are "):
        check_trainer(trainer, ["loss", "top1"])

    class LogsSomethingElse(Callback):
        pass

    check_trainer(make_trainer(callbacks=[EarlyStopping("val_loss"), LogsSomethingElse()]), ["loss"])


@pytest.mark.parametrize("name", list(KINDS))
def test_what_a_method_logs_can_be_monitored(make_method, step, name):
    if name in ("moco", "simclr"):
        method = make_method(name)
        step(method)
        assert list(method.values) == method.value_names()
    assert {"loss", "top1", "top5"} <= set(KINDS[name].value_names())


@pytest.mark.parametrize(
    "settings",
    [{"max_epochs": -1}, {"max_epochs": -1, "max_time": "00:01:00:00"}, {"max_time": "00:01:00:00"}],
)
def test_a_training_has_an_end(make_trainer, settings):
    with pytest.raises(UsageError, match=r"trainer\.max_epochs and trainer\.max_steps leave"):
        check_trainer(make_trainer(**{"max_epochs": None, **settings}), [])
    check_trainer(make_trainer(**{"max_epochs": None, **settings}, max_steps=3), [])
    check_trainer(make_trainer(max_epochs=None), [])  # Lightning trains for 1000 epochs then


def test_every_process_has_the_whole_network(make_trainer, monkeypatch):
    trainer = make_trainer()
    assert isinstance(trainer.strategy, SingleDeviceStrategy)

    monkeypatch.setattr(trainer._accelerator_connector, "strategy", type("Sharded", (), {})())
    with pytest.raises(UsageError, match=r"trainer\.strategy: Sharded cannot be had"):
        check_trainer(trainer, [])
