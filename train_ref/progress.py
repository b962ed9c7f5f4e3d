"""What a training tells while it runs: what comes and, where no terminal shows a bar, a line an epoch."""

from __future__ import annotations

import math
import sys
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

from contrastive_ops import serving_backend

from .distributed import world_size
from .errors import UsageError
from .methods import Method
from .online import measured
from .runs import run_directory

TOLD = {"knn_accuracy": "nearest neighbours", "probe_accuracy": "linear probe"}


class Plan(Callback):
    """Tells in a line what is to be trained, on what, and by which backend; in another, where it is kept.

    Args:
        method: its name.
    """

    def __init__(self, method: str) -> None:
        self.method = method

    def on_train_start(self, trainer: Trainer, module: Method) -> None:
        directory = run_directory(trainer)  # which all processes ask for
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        epochs, steps = epochs_of(trainer)
        device = "the CPU" if module.device.type == "cpu" else torch.cuda.get_device_name(module.device)
        processes = f"{trainer.world_size} × " if trainer.world_size > 1 else ""
        print(
            f"{self.method} with a {module.hparams.arch} on {len(data.train_images):,} images "
            f"({data.hparams.dataset}): {epochs or 'endless'} epochs of {steps} steps of "
            f"{data.hparams.batch_size} images, on {processes}{device}; {serving(module)}; nothing is "
            f"downloaded.\nEverything is kept in {directory}",
            flush=True,
        )


def serving(module: Method) -> str:
    """Which backend computes a method's loss and, if that is the reference, why."""
    dtype = torch.float64 if module.trainer.precision == "64-true" else torch.float32
    query = torch.empty(1, module.hparams.dim, dtype=dtype, device=module.device)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            name = serving_backend(query, getattr(module.criterion, "backend", None))
        except (RuntimeError, ValueError) as error:  # an environment variable asks for one that cannot serve
            raise UsageError(str(error)) from error
    reasons = "".join(f" ({warning.message})" for warning in told)
    return f"the loss is served by the backend {name}{reasons}"


def epochs_of(trainer: Trainer) -> tuple[int | None, int]:
    """How many epochs a training has, None if there is no end, and steps of the optimizer in each."""
    steps = max(1, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
    total = trainer.estimated_stepping_batches
    return (None if math.isinf(total) else math.ceil(total / steps)), steps


class EpochLines(ProgressBar):
    """A line an epoch, with the means of the values that its modules keep of a step, as `values`."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.start, self.first_step = time.perf_counter(), trainer.global_step
        self._begin()  # a run that goes on in the middle of an epoch starts none

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._begin()

    def _begin(self) -> None:
        self.epoch_start = time.perf_counter()
        self.steps: list[dict[str, Tensor]] = []
        self.images = 0

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append({name: x for name, x in module.values.items() if name in ("loss", "top1")})
        self.images += world_size() * len(batch[1])  # labels

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not (self.enabled and self.steps):
            return
        means = {name: float(torch.stack([s[name] for s in self.steps]).mean()) for name in self.steps[0]}
        now = time.perf_counter()
        epochs, _ = epochs_of(trainer)
        told = [f"loss {means['loss']:.3f}"]
        if "top1" in means:
            told.append(f"top-1 {100 * means['top1']:.1f} %")
        told.append(f"{self.images / (now - self.epoch_start):,.0f} images/s")
        told += [f"{TOLD[name]} {value:.1f} %" for name, value in measured(trainer, module).items()]
        done, total = trainer.global_step, trainer.estimated_stepping_batches
        if done < total < math.inf:
            left = (now - self.start) * (total - done) / (done - self.first_step)
            told.append(f"{duration(left)} left")
        epoch = (
            f"{trainer.current_epoch + 1:{len(str(epochs))}} of {epochs}"
            if epochs
            else trainer.current_epoch + 1
        )
        print(f"epoch {epoch}: {', '.join(told)}", flush=True)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.enabled:
            print(f"done in {duration(time.perf_counter() - self.start)}", flush=True)


def duration(seconds: float) -> str:
    """As a person says it: two units at most."""
    whole = round(seconds)
    units = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    parts = []
    for unit, length in units.items():
        if count := whole // length:
            parts.append(f"{count} {unit}")
        whole %= length
        if len(parts) == 2 or (parts and not count):
            break
    return " ".join(parts) or "0 s"


def lines_in_place_of_a_bar(trainer: Trainer) -> None:
    """Where standard output is no terminal, which alone can redraw a bar. Without a bar it stays silent."""
    if not sys.stdout.isatty():
        trainer.callbacks = [
            EpochLines() if isinstance(each, ProgressBar) else each for each in trainer.callbacks
        ]
