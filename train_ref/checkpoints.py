"""Checkpoints that an interrupt, at whatever moment, leaves whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint, then renames: the file of that name is the old one or the new, never half.

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


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt`` of the run, as the last finished epoch left it.

    An interrupt saves nothing: in the middle of a step, the weights, the momentum encoder and the queue would
    not belong together.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False, save_on_train_epoch_end=True)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        last = Path(self.dirpath or "", "last.ckpt")
        if trainer.is_global_zero and last.is_file():
            print(f"\nStopped. To go on from the last finished epoch: --ckpt_path {last}", flush=True)
