"""Checkpoints that an interrupt, at whatever moment, leaves whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .runs import run_directory


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint, then renames: its name is the old file's or the new one's, never half's.

    Lightning's own goes through the system's temporary folder. Where that lies on another disk than the
    checkpoint, its last step is a copy, which a kill can leave unfinished.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes
        os.replace(partial, path)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` in the run's directory, as training was at the end of an epoch.

    An interrupt itself saves nothing: in the middle of a step, networks and their queue or classifier do not
    belong together.

    Args:
        every_n_epochs: how often it is written; the end of training always is.
    """

    def __init__(self, every_n_epochs: PositiveInt = 1) -> None:
        self.every_n_epochs = every_n_epochs
        self.saved_step = 0

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero and self.saved_step:
            print(f"\nStopped. To go on from the last checkpoint: --ckpt_path {self._path(trainer)}")

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self._path(trainer))
        self.saved_step = trainer.global_step

    @staticmethod
    def _path(trainer: Trainer) -> Path:
        return run_directory(trainer) / "last.ckpt"
