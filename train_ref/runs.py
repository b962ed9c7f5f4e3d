"""Where a run keeps its files: a folder of its own, which is there only if the run is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from .errors import UsageError

LAST = "last.ckpt"
LATEST = "last"  # what asks for the latest run, in place of a path
CONFIG_FILE = "config.yaml"
# What is there before the first step, and worth nothing without one.
PREPARED = (CONFIG_FILE, "hparams.yaml", "events.out.tfevents.*", "metrics.csv")


def run_directory(trainer: Trainer) -> Path:
    """The logger's directory or, without a logger, the trainer's default; it is made where it is missing.

    Where there are several processes, all must ask: the first one's answer is sent to the others.
    """
    directory = Path(trainer.log_dir or trainer.default_root_dir)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def latest_checkpoint(trainer: Trainer) -> Path | None:
    """The checkpoint that was written last by runs of the trainer's name: in this version's folder or in
    another's. None if there is none yet."""
    folder = _first_process_directory(trainer)
    folders = [folder, *folder.parent.glob("*/")] if _has_versions(trainer) else [folder]
    found = {each / LAST for each in folders if (each / LAST).is_file()}
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


@contextmanager
def own_directory(trainer: Trainer, goes_on_from: Path | None = None) -> Iterator[None]:
    """A run within: its directory holds no other run, and is gone again where it ended before its first step
    was recorded or saved.

    Args:
        trainer: of the run.
        goes_on_from: a checkpoint; in its own directory a run may go on.

    Raises:
        UsageError: the directory holds another run.
    """
    if rank_zero_only.rank:
        yield
        return
    directory = _first_process_directory(trainer)
    new = not directory.exists()
    own = goes_on_from is not None and goes_on_from.resolve().parent == directory.resolve()
    if (directory / CONFIG_FILE).exists() and not own:
        option = "trainer.logger" if trainer.loggers else "trainer.default_root_dir"
        raise UsageError(
            f"{option}: {directory} holds a run already; choose another folder, or go on with that run: "
            f"--ckpt_path {directory / LAST}"
        )
    try:
        yield
    except BaseException:
        if new:
            remove_unless_begun(directory)
        raise


def _first_process_directory(trainer: Trainer) -> Path:
    """`run_directory`, as the first process knows it without asking the others."""
    place = getattr(trainer.logger, "log_dir", None) or getattr(trainer.logger, "save_dir", None)
    return Path(place or trainer.default_root_dir)


def _has_versions(trainer: Trainer) -> bool:
    """Whether runs of a name lie side by side, each in its own folder."""
    return isinstance(trainer.logger, TensorBoardLogger | CSVLogger)


def remove_unless_begun(directory: Path) -> None:
    """Remove a run's directory where no step was recorded or saved, of no training that it consists of."""
    if all(_was_prepared(file) for file in directory.rglob("*") if not file.is_dir()):
        shutil.rmtree(directory, ignore_errors=True)


def _was_prepared(file: Path) -> bool:
    return any(file.match(pattern) for pattern in PREPARED)
