"""Checkpoints that an interrupt, at whatever moment, leaves whole, and that training goes on from exactly."""

from __future__ import annotations

import os
import shutil
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
from .files import Hashed, checksums_of, record, recorded, replacing
from .runs import LAST, run_directory
from .workers import STOPS


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint, then renames: its name is the old file's or the new one's, never half's.
    Its SHA-256 lies beside it.

    Lightning's own goes through the system's temporary folder. Where that lies on another disk than the
    checkpoint, its last step is a copy, which a kill can leave unfinished.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        with replacing(path) as file:
            hashed = Hashed(file)
            try:
                torch.save(checkpoint, hashed)
            except RuntimeError:
                if hashed.error is None:
                    raise
                raise hashed.error from None
            # A kill may come before the file has its name: until then the sum may be the old file's, too.
            record(path, [hashed.sha256.hexdigest(), *recorded(path)])
        record(path, [hashed.sha256.hexdigest()])

    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        checksums_of(Path(path)).unlink(missing_ok=True)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` in the run's directory: as training was after some step, or at the end of an epoch.

    A run that goes on from it computes what one that was never stopped would, bit for bit on a CPU. An
    interrupt or a request to terminate lets the step end, saves, and stops; a second one stops at once. A
    batch that cannot be loaded saves too, as an image that cannot be read or a loader's process that died.

    Args:
        every_n_epochs: how often it is written at the end of an epoch; the end of training always is.
        every_n_steps: how often it is written besides, in steps of the optimizer; null: not within epochs.
        keep: how many checkpoints can be gone back to; with 2 and more, each is ``step_<number>.ckpt`` too.
    """

    def __init__(
        self, every_n_epochs: PositiveInt = 1, every_n_steps: PositiveInt | None = None, keep: PositiveInt = 1
    ) -> None:
        self.every_n_epochs, self.every_n_steps, self.keep = every_n_epochs, every_n_steps, keep
        self.path: Path | None = None
        self.saved_step: int | None = None  # of which there is a checkpoint, or no need of one
        self.fetching = False  # a batch: the last step is whole, and the next one has not begun
        self.stop = self.told = False
        self.random_state: Tensor | None = None  # of the checkpoint that was read

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.path = run_directory(trainer) / LAST

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.random_state is not None:
            torch.set_rng_state(self.random_state)
        self.tells = trainer.is_global_zero
        self.saved_step = trainer.global_step
        self.handlers = {
            number: signal.signal(number, self._request_stop)
            for number in STOPS
            if threading.current_thread() is threading.main_thread()
        }

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.fetching = True

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.fetching = False

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Gradients of half a step are in no checkpoint. An epoch's last batch waits for what is still to be
        # done at the epoch's end.
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch:
            self._save_or_stop(trainer, due=False)
            self.fetching = True

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save_or_stop(trainer, due=(trainer.current_epoch + 1) % self.every_n_epochs == 0)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self._save(trainer)
        self._restore_handlers()
        if threading.current_thread() is threading.main_thread():
            # Lightning's handler waits for a step, and there is none: an evaluation may take hours.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        failed = self.fetching and isinstance(exception, Exception)
        # Other processes, if there are any, may not have failed, and would not take part in saving.
        if failed and trainer.world_size == 1 and self.saved_step != trainer.global_step:
            self._save(trainer)
        if trainer.is_global_zero and self.path is not None and self.path.exists():
            self.tell_how_to_go_on()

    def tell_how_to_go_on(self) -> None:
        print(f"\nStopped. To go on from the last checkpoint: --ckpt_path {self.path}", flush=True)

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        settle(checkpoint["loops"]["fit_loop"], trainer.num_training_batches)

    def state_dict(self) -> dict[str, Any]:
        return {"random_state": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.random_state = state_dict["random_state"].cpu()

    def _request_stop(self, number: int, frame: Any) -> None:
        self.stop = True
        self._tell()
        self._restore_handlers()

    def _tell(self) -> None:
        if self.tells and not self.told:
            self.told = True
            print("\nStopping after this step.", flush=True)

    def _restore_handlers(self) -> None:
        for number, handler in getattr(self, "handlers", {}).items():
            signal.signal(number, handler)
        self.handlers = {}

    def _save_or_stop(self, trainer: Trainer, due: bool) -> None:
        if self.every_n_steps is not None:
            due = due or trainer.global_step % self.every_n_steps == 0
        device = trainer.strategy.root_device
        asked = self.stop or trainer.received_sigterm  # of Lightning, before this had its own handlers
        stop = bool(distributed.mean(torch.tensor(float(asked), device=device)))
        if (due or stop) and self.saved_step != trainer.global_step:
            self._save(trainer)
        if stop:
            self._tell()  # it may be another process that was asked
            raise KeyboardInterrupt

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        trainer.lightning_module.on_checkpoint_saved()
        self.saved_step = trainer.global_step
        if self.keep > 1 and trainer.is_global_zero:
            self._keep(trainer.global_step)

    def _keep(self, step: int) -> None:
        """Give the checkpoint a name of its own, and remove the oldest."""
        named = self.path.with_name(f"step_{step:08}.ckpt")
        named.unlink(missing_ok=True)
        try:
            os.link(self.path, named)
        except OSError:  # the file system has no hard links
            with replacing(named) as file, self.path.open("rb") as original:
                shutil.copyfileobj(original, file)
        record(named, recorded(self.path))
        for old in sorted(self.path.parent.glob("step_*.ckpt"))[: -self.keep]:
            old.unlink()
            checksums_of(old).unlink(missing_ok=True)


def settle(fit_loop: dict[str, Any], batches_an_epoch: float) -> None:
    """Make the state of Lightning's training loop that of a moment between two batches, or two epochs.

    Checkpoints are saved by hooks, while counters are on their way. On loading, Lightning infers from them
    which hook it was, and goes wrong at an epoch's last batch: the epoch after it is counted one short in the
    next checkpoint, and one too many is trained. In the state that is left here there is nothing to infer.

    Args:
        fit_loop: what its `state_dict` returned; it is changed.
        batches_an_epoch: how many there are.
    """
    epoch, batch = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    optimization = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    epochs, done = epoch["current"]["completed"], batch["current"]["processed"]
    if (
        epochs == epoch["current"]["ready"] and done > 0
    ):  # the end of a training, which may be within an epoch
        epochs -= 1
    whole = done >= batches_an_epoch
    if whole:
        epochs, done = epochs + 1, 0
        for progress in (fit_loop["epoch_loop.scheduler_progress"], *optimization.values()):
            progress["current"] = dict.fromkeys(progress["current"], 0)
    begun = epochs + (done > 0)
    state = {"ready": begun, "started": begun, "processed": epochs, "completed": epochs}
    epoch["total"], epoch["current"] = dict(state), dict(state)
    batch["total"] = dict.fromkeys(batch["total"], batch["total"]["processed"])
    batch["current"] = dict.fromkeys(batch["current"], done)
    batch["is_last_batch"] = False
    # The loggers' step, which Lightning counts after the hooks.
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = optimization["step"]["total"]["completed"]
