"""What of Lightning's Trainer these trainings cannot take: it is told before one starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from .errors import UsageError

# Why a kind of callback would train something else than the method, silently or until it fails.
UNFIT: dict[type[Callback], str] = {
    BaseFinetuning: "it freezes parts of the network, and the methods train all of it",
    BatchSizeFinder: "it trains before the training; data.batch_size says the size",
    GradientAccumulationScheduler: (
        "it changes the number of steps, by which the learning rate goes; trainer.accumulate_grad_batches "
        "says how many batches a step has, in all epochs"
    ),
    LearningRateFinder: "it trains before the training; model.learning_rate says the rate",
    ModelPruning: "it puts other parameters in the place of those that optimizer and key encoder have",
    StochasticWeightAveraging: (
        "its own schedule takes the place of the method's, and its last epoch changes queue and classifier"
    ),
    WeightAveraging: "it averages queue and classifier with the weights, and keeps the averages for them",
}
UNFIT_FLAGS = {
    "barebones": "it leaves out logger and checkpoints, which every run keeps here",
    "sync_batchnorm": "model.norm_groups says which images share their statistics, over all processes",
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse arguments of the Trainer that it takes itself, or refuses in the middle of the training.

    Raises:
        UsageError: names the argument.
    """
    for name, least in (("accumulate_grad_batches", 1), ("log_every_n_steps", 0), ("num_nodes", 1)):
        value = settings.get(name)
        if value is not None and value < least:
            raise UsageError(f"trainer.{name} is {value}: it must be {least} or more")
    clip = settings.get("gradient_clip_val")
    if clip is not None and not clip >= 0:
        raise UsageError(f"trainer.gradient_clip_val is {clip}: it must be 0, which clips nothing, or more")
    if settings.get("limit_train_batches") == 0:
        raise UsageError("trainer.limit_train_batches is 0: nothing would be trained")
    for name, reason in UNFIT_FLAGS.items():
        if settings.get(name):
            raise UsageError(f"trainer.{name} cannot be had: {reason}")
    plugins = settings.get("plugins") or []
    for plugin in plugins if isinstance(plugins, list) else [plugins]:
        if isinstance(plugin, CheckpointIO):
            raise UsageError(
                f"trainer.plugins: {type(plugin).__name__} cannot be had: checkpoints are written so that a "
                "kill leaves them whole"
            )


def check_trainer(trainer: Trainer, values: Iterable[str]) -> None:
    """Refuse what only shows when a Trainer is built.

    Args:
        trainer: before it trains.
        values: names of what the method logs.

    Raises:
        UsageError: names the argument.
    """
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # Lightning's max_time is one
    endless = trainer.max_epochs == -1 or (trainer.max_epochs is None and timed)
    if endless and trainer.max_steps == -1:
        raise UsageError(
            "trainer.max_epochs and trainer.max_steps leave the training without an end: the learning rate's "
            "schedule needs one. trainer.max_time may stop a training earlier"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise UsageError(
            f"trainer.strategy: {type(trainer.strategy).__name__} cannot be had: every process needs the "
            "whole network, as with auto and ddp"
        )
    modules = [type(callback).__module__.partition(".")[0] for callback in trainer.callbacks]
    others_log = not {"lightning", __package__}.issuperset(modules)  # and what, nobody knows
    for callback in trainer.callbacks:
        name = type(callback).__name__
        for kind, reason in UNFIT.items():
            if isinstance(callback, kind):
                raise UsageError(f"trainer.callbacks: {name} cannot be had: {reason}")
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor not in values and not others_log:
            raise UsageError(
                f"trainer.callbacks: {name} monitors {monitor}, which is not logged; there are "
                f"{', '.join(values)}"
            )
