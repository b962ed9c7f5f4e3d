"""Where a run keeps its files."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_directory(trainer: Trainer) -> Path:
    """The logger's directory or, without a logger, the trainer's default; it is made where it is missing.

    Where there are several processes, all must ask: the first one's answer is sent to the others.
    """
    directory = Path(trainer.log_dir or trainer.default_root_dir)
    directory.mkdir(parents=True, exist_ok=True)
    return directory
