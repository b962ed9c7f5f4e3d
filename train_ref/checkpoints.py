"""Checkpoints that an interrupt, at whatever moment, leaves whole."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from . import distributed
from .files import replacing
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
        with replacing(path) as file:
            torch.save(checkpoint, file)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` in the run's directory: as training was after some step, or at the end of an epoch.

    A run that goes on from it computes what one that was never stopped would, bit for bit on a CPU. An
    interrupt or a request to terminate lets the step end, saves, and stops; a second one stops at once.

    Args:
        every_n_epochs: how often it is written at the end of an epoch; the end of training always is.
        every_n_steps: how often it is written besides, in steps of the optimizer; null: not within epochs.
    """

    def __init__(self, every_n_epochs: PositiveInt = 1, every_n_steps: PositiveInt | None = None) -> None:
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.saved_step = 0
        self.stop = False
        self.random_state: Tensor | None = None  # of the checkpoint that was read

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.path = run_directory(trainer) / "last.ckpt"

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.random_state is not None:
            torch.set_rng_state(self.random_state)
        self.handlers = {
            number: signal.signal(number, self._request_stop)
            for number in (signal.SIGINT, signal.SIGTERM)
            if threading.current_thread() is threading.main_thread()
        }

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accumulated = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not (accumulated or trainer.is_last_batch):
            return  # gradients of half a step are in no checkpoint
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        stop = bool(distributed.mean(torch.tensor(float(self.stop), device=module.device)))
        if (due or stop) and self.saved_step != trainer.global_step:
            self._save(trainer)
        if stop:
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self._save(trainer)
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        if trainer.is_global_zero and self.saved_step:
            self.tell_how_to_go_on()

    def tell_how_to_go_on(self) -> None:
        print(f"\nStopped. To go on from the last checkpoint: --ckpt_path {self.path}")

    def state_dict(self) -> dict[str, Any]:
        return {"random_state": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.random_state = state_dict["random_state"].cpu()

    def _request_stop(self, number: int, frame: Any) -> None:
        print("\nStopping after this step.", flush=True)
        self.stop = True
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in getattr(self, "handlers", {}).items():
            signal.signal(number, handler)
        self.handlers = {}

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        trainer.lightning_module.on_checkpoint_saved()
        self.saved_step = trainer.global_step
