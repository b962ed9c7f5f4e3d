"""An evaluation that trains is a run: it has a folder of its own, and one that was stopped goes on."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import shlex
from argparse import ArgumentError
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from .backbones import load_tensors
from .callbacks import Record
from .checkpoints import LastCheckpoint
from .errors import UsageError
from .files import locked, write_text
from .parsing import parser_of
from .runs import CONFIG_FILE, LAST, LATEST, remove_unless_begun

DONE = "accuracies.json"  # of one training of several

# What does not change the figures, or is checked by other means: `root` and `unlabelled` are where the images
# have moved to.
MAY_CHANGE = {"accelerator", "every_n_steps", "num_workers", "output", "root", "unlabelled"}

say = rank_zero_only(functools.partial(print, flush=True))


class Run:
    """The folder of an evaluation, ``<directory>/version_N``.

    It is made when the work begins, by the first process alone; the others are told as Lightning tells them
    the logger's. One in which nothing was kept yet goes again when the work fails.

    Args:
        command: what is done.
        directory: where new runs have their folders.
        config: the settings, with the checkpoint and digests of what the figures depend on.
        folder: of a run that goes on.
        every_n_steps: of `LastCheckpoint`.

    Raises:
        UsageError: there can be no folder, another process has it, or the run began with another checkpoint
            or other images.
    """

    def __init__(
        self,
        command: str,
        directory: Path,
        config: dict[str, Any],
        folder: Path | None = None,
        every_n_steps: int | None = None,
    ) -> None:
        self.command, self.directory, self.config, self.folder = command, directory, config, folder
        self.every_n_steps = every_n_steps
        self.new, self.saved = folder is None, False
        self.lock: BinaryIO | None = None
        if folder is None:
            check_that_it_can_be_made(directory)
            return
        began = read_config(folder, command)
        what = {"sha256": f"another checkpoint than {config['checkpoint']} is now", "images": "other images"}
        for key, said in what.items():
            if began[key] != config[key]:
                digests = f"sha256 {str(began[key])[:12]}…, not {config[key][:12]}…"
                raise UsageError(f"resume: {folder} began with {said}: {digests}")
        self._lock()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.lock is not None:
            self.lock.close()
        if kind is None or self.folder is None or rank_zero_only.rank:
            return
        if self.new:
            remove_unless_begun(self.folder)
            with contextlib.suppress(OSError):
                self.directory.rmdir()  # unless there are others
        # A mistake of the user's at the start would come again; one that is found later saves first.
        if self.folder.exists() and (self.saved or not issubclass(kind, UsageError)):
            words = [self.command, self.config["checkpoint"], "--resume", str(self.folder)]
            say(f"\nStopped. To go on: {shlex.join(words)}")

    def begin(self) -> Path:
        """The folder: a new run's is made now. Other processes than the first get none."""
        if self.folder is None and rank_zero_only.rank == 0:
            self.folder = claim_version(self.directory)
            config = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            write_text(self.folder / CONFIG_FILE, config)
            self._lock()
        return self.folder or self.directory

    def training(self, name: str = "", every_n_epochs: int = 1) -> dict[str, Any]:
        """Arguments of `fit` that keep a training in the folder, or in one of that name in it, and go on from
        the checkpoint there, which is written every so many epochs."""
        checkpoint = self.folder / name / LAST if self.folder else None
        if checkpoint is not None and checkpoint.exists():
            load_tensors(checkpoint)  # or Lightning would complain in a page
        else:
            checkpoint = None
        return {
            "logger": FolderLogger(lambda: self.begin() / name),
            "callbacks": [Record(), RunCheckpoint(self, every_n_epochs)],
            "enable_checkpointing": True,
            "ckpt_path": checkpoint,
        }

    def accuracies(self, name: str) -> dict[str, float] | None:
        """What a training of this run came to; None where it is not done."""
        path = self.folder / name / DONE if self.folder else None
        if path is None or not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"resume: {path} is not what was written there: {error}") from error

    @rank_zero_only
    def finish(self, name: str, accuracies: Mapping[str, float]) -> None:
        """Record that a training is done. Its checkpoint, as large as the network, has no more use."""
        folder = self.begin() / name
        write_text(folder / DONE, json.dumps(accuracies) + "\n")
        for path in folder.glob(f"{LAST}*"):
            path.unlink()

    def _lock(self) -> None:
        """Keep other processes from going on with this run meanwhile; the lock ends with the process."""
        if rank_zero_only.rank:
            return
        try:
            self.lock = locked(self.folder / CONFIG_FILE)
        except BlockingIOError as error:
            raise UsageError(f"resume: {self.folder} is being run by another process") from error


class FolderLogger(TensorBoardLogger):
    """TensorBoard's events in a folder that is asked for when it is needed: with the first it may be made."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        super().__init__("", name="", version="")
        self.folder = folder

    @property
    def log_dir(self) -> str:
        return str(self.folder())

    @property
    def root_dir(self) -> str:
        return self.log_dir


class RunCheckpoint(LastCheckpoint):
    """The checkpoint of one training; how to go on is told by its run, which may consist of several."""

    def __init__(self, run: Run, every_n_epochs: int) -> None:
        super().__init__(every_n_epochs, run.every_n_steps)
        self.run = run

    def tell_how_to_go_on(self) -> None:
        self.run.saved = True


def check_that_it_can_be_made(directory: Path) -> None:
    """That there can be no folder is better known before the work than after."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"directory: {directory} cannot be made or written to, because of {existing}; choose another one"
        )


def claim_version(directory: Path) -> Path:
    """A new folder, ``version_N``, above all that there are. Of processes that ask at once, each gets one."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        number = 1 + max((number for number, _ in versions(directory)), default=-1)
        while True:
            folder = directory / f"version_{number}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UsageError(f"directory: there can be no new folder in {directory}: {error}") from error


def versions(directory: Path) -> list[tuple[int, Path]]:
    """The runs' folders, by number."""
    folders = directory.glob("version_*")
    numbers = ((folder.name.removeprefix("version_"), folder) for folder in folders)
    return sorted((int(number), folder) for number, folder in numbers if number.isdecimal())


def read_config(folder: Path, command: str) -> dict[str, Any]:
    """What `Run.begin` has written into a run's folder."""
    path = folder / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"resume: {path} cannot be read: {error}") from error
    keys = {"command", "checkpoint", "sha256", "images", "options"}
    if not isinstance(config, dict) or not keys <= config.keys() or config["command"] != command:
        raise UsageError(f"resume: {path} is not the configuration of a run of {command}")
    return config


def folder_to_resume(command: str, checkpoint: str, resume: str, directory: Path) -> Path:
    """Where a run of the command goes on: the newest that is not finished, or the one that is named.

    Args:
        command: what is done.
        checkpoint: what is evaluated.
        resume: "last", the folder of a run, or a checkpoint in it.
        directory: where "last" looks.
    """
    if resume == LATEST:
        for _, folder in reversed(versions(directory)):
            if not (folder / CONFIG_FILE).exists() or (folder / f"{command}.json").exists():
                continue
            if Path(read_config(folder, command)["checkpoint"]).name == Path(checkpoint).name:
                return folder
        raise UsageError(f"resume: there is no unfinished run of {command} for {checkpoint} in {directory}")
    path = Path(resume)
    if not path.exists():
        raise UsageError(f"resume: there is no {path}; it takes last, or the folder of a run of {command}")
    depth = 4  # of a checkpoint of one of several trainings
    folders = [path, *path.parents][: depth + 1]
    folder = next((each for each in folders if (each / CONFIG_FILE).is_file()), path)
    read_config(folder, command)
    if (folder / f"{command}.json").exists():
        raise UsageError(f"resume: {folder} is finished, with its figures in {command}.json")
    return folder


def resumable(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command's option `resume` bring the settings with which that run began.

    Of other settings, those that would change the figures are refused, unless they are the same.
    """

    @functools.wraps(command)
    def call(*args: Any, **given: Any) -> Any:
        said = inspect.signature(command).bind(*args, **given).arguments
        said |= said.pop("options", {})
        # Types of the command line's would come into checkpoints, which then could not be read safely.
        said = {name: configured(value) for name, value in said.items()}
        if said.get("resume") is None:
            return command(**said)
        name, checkpoint = command.__name__, str(said["checkpoint"])
        directory = said.pop("directory", None)
        if directory is not None and said["resume"] != LATEST:
            raise UsageError(f"directory is for new runs and --resume last; {said['resume']} is where it is")
        directory = directory_of(name, checkpoint, directory)
        folder = folder_to_resume(name, checkpoint, str(said["resume"]), directory)
        began = known_options(command, checkpoint, folder)
        for option, value in said.items():
            if option in began and option not in MAY_CHANGE and value != began[option]:
                raise UsageError(
                    f"{option}: {folder} began with {began[option]}, not {value}: leave {option} out to "
                    "resume it, or resume out to begin anew"
                )
        return command(**{**began, **said, "resume": str(folder)})

    return call


def known_options(command: Callable[..., Any], checkpoint: str, folder: Path) -> dict[str, Any]:
    """The options with which a run of a command began, if they are such as the command takes."""
    options = read_config(folder, command.__name__)["options"]
    try:
        parser_of(command, command.__name__).parse_object({"checkpoint": checkpoint, **options})
    except (ArgumentError, TypeError) as error:
        raise UsageError(f"resume: {folder / CONFIG_FILE} is not as it was written: {error}") from error
    return options


def options_of(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a command, for its `config.yaml`, from the values of its arguments."""
    options = {**settings, **defaults, **settings["options"]}
    elsewhere = ("checkpoint", "options", "resume", "directory")
    return {name: configured(value) for name, value in options.items() if name not in elsewhere}


def configured(value: Any) -> Any:
    """As a configuration has it: no tuples, paths or types of the command line's."""
    return json.loads(json.dumps(value, default=str))


def directory_of(command: str, checkpoint: str, directory: str | None) -> Path:
    """Where the runs of a command have their folders: by default beside the checkpoint."""
    return Path(directory) if directory is not None else Path(checkpoint).parent / command
