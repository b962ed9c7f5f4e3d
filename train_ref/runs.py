"""Where a run keeps its files, and how it reports its values."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


def run_directory(trainer: Trainer) -> Path:
    """The logger's directory or, without a logger, the trainer's default; it is made where it is missing."""
    directory = Path(trainer.log_dir or trainer.default_root_dir)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def log_values(module: LightningModule, **values: Tensor) -> None:
    """Log the values of a training step and, as ``epoch/<name>``, their means over the epoch."""
    for name, value in values.items():
        module.log(name, value, prog_bar=not name.endswith("_loss"))
        module.log(f"epoch/{name}", value, on_step=False, on_epoch=True)
