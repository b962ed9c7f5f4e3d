"""What a run leaves behind: the values of its steps, its curves, and the worth of its features."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, Trainer
from torch import nn

from .distributed import world_size
from .errors import UsageError, name_file, naming
from .evaluation import evaluate, extract_features, format_table
from .files import replacing, write_text
from .methods import Method
from .online import OnlineEvaluation, measured
from .parsing import Fraction, PositiveFinite
from .pictures import Gallery, gallery, overview
from .runs import run_directory
from .timing import LossClock

STEPS, EPOCHS = "steps.csv", "epochs.csv"
WHEN = ("batch", "epoch", "learning_rate")  # what is no value of a step, in a row of them


def values_in(row: dict[str, Any]) -> list[str]:
    """Names of a step's values, in their own order, which is that of files and pictures."""
    return [name for name in row if name not in WHEN]


def table_text(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> str:
    """Rows as CSV below a header, with nothing where a row lacks a value."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(names), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class Record(Callback):
    """Writes the values of every batch to ``steps.csv``, and how fast it went; keeps each epoch's means with
    what was measured at its end, in checkpoints and in ``epochs.csv``, which has all epochs of the training.

    The values come to the file as often as to the logger, and before a checkpoint is written. A run that is
    resumed in another directory has a file of its own, which begins where it goes on. In the same one it goes
    on with the same file, without the steps after the checkpoint, which are taken again.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.sums: dict[str, float] = {}  # of the epoch so far
        self.batches = 0
        self.pending: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, module: Method, stage: str) -> None:
        self.directory = run_directory(trainer)

    def on_train_start(self, trainer: Trainer, module: Method) -> None:
        self.clock = LossClock(module.criterion, module.device)
        self.since = time.perf_counter()
        if trainer.is_global_zero:
            self._forget_from(trainer.fit_loop.total_batch_idx + 1)

    def _forget_from(self, batch: int) -> None:
        """Leave the rows of earlier batches in the file, if there is one."""
        path = self.directory / STEPS
        if not path.is_file():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        rows = [row for row in lines[1:] if row.endswith(b"\n") and int(row.split(b",")[0]) < batch]
        if rows:
            with replacing(path) as file:
                file.writelines([lines[0], *rows])
        else:
            path.unlink()

    def on_train_batch_start(self, trainer: Trainer, module: Method, batch: Any, batch_idx: int) -> None:
        self.learning_rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, module: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        row = {
            "batch": trainer.fit_loop.total_batch_idx,
            "epoch": trainer.current_epoch,
            "learning_rate": self.learning_rate,
            **module.values,
        }
        self.pending.append(row)
        self.images = world_size() * len(batch[1])  # labels
        # An interval of 0 is the logger's "never": rows come to the file at the end of the epoch.
        if trainer.log_every_n_steps == 0 or len(self.pending) < trainer.log_every_n_steps:
            return
        seconds_in_loss = self.write(trainer, self.images) / trainer.log_every_n_steps
        module.log("images_per_second", self.images_per_second, prog_bar=True)
        module.log("loss_ms", 1000 * seconds_in_loss, prog_bar=True)

    def write(self, trainer: Trainer, images: int) -> float:
        """Bring the values since the last time to the file; returns the seconds in these batches' losses."""
        for row in self.pending:
            row.update({name: float(row[name]) for name in values_in(row)})  # waits for a GPU
        self._sum_up(self.sums)
        self.batches += len(self.pending)
        seconds_in_loss, now = self.clock.read(), time.perf_counter()
        self.images_per_second = images * len(self.pending) / (now - self.since)
        speed = {
            "images_per_second": self.images_per_second,
            "loss_ms": 1000 * seconds_in_loss / len(self.pending),
        }
        self.since = now
        if trainer.is_global_zero:
            path = self.directory / STEPS
            names = [*self.pending[0], *speed]
            self._fit_columns(path, names)
            with naming(path), path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names)
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerows({**row, **speed} for row in self.pending)
        self.pending = []
        return seconds_in_loss

    def _fit_columns(self, path: Path, names: list[str]) -> None:
        """Give the rows in the file, if there is one, these columns: a run that goes on may have other
        values, as with a probe or without."""
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if reader.fieldnames == names:
                    return
                known = list(reader)
            write_text(path, table_text(known, names))

    def _sum_up(self, sums: dict[str, float]) -> None:
        for row in self.pending:
            for name in values_in(row):
                sums[name] = sums.get(name, 0.0) + float(row[name])

    def on_train_epoch_end(self, trainer: Trainer, module: Method) -> None:
        self._write_pending(trainer)
        means = {name: total / self.batches for name, total in self.sums.items()}
        self.epochs.append({"epoch": trainer.current_epoch + 1, **means, **measured(trainer, module)})
        self.sums, self.batches = {}, 0
        if trainer.is_global_zero:
            self._write_epochs()
        if not math.isfinite(means["loss"]):
            raise UsageError(
                f"the training diverged in epoch {trainer.current_epoch + 1}: its loss is no longer finite. "
                "Lower model.learning_rate, or raise model.temperature or model.warmup"
            )
        for logger in trainer.loggers:
            logger.log_metrics({f"epoch/{name}": mean for name, mean in means.items()}, trainer.global_step)

    def _write_epochs(self) -> None:
        names = dict.fromkeys(name for epoch in self.epochs for name in epoch)
        write_text(self.directory / EPOCHS, table_text(self.epochs, names))

    def on_train_end(self, trainer: Trainer, module: Method) -> None:
        self.clock.remove()

    def on_save_checkpoint(self, trainer: Trainer, module: Method, checkpoint: dict[str, Any]) -> None:
        self._write_pending(trainer)

    def _write_pending(self, trainer: Trainer) -> None:
        if self.pending:
            self.write(trainer, self.images)

    def on_exception(self, trainer: Trainer, module: Method, exception: BaseException) -> None:
        with suppress(Exception):  # it may be what has failed already
            self._write_pending(trainer)
        # Loggers write in threads of their own, whose errors do not name the file.
        if isinstance(exception, OSError):
            name_file(exception, trainer.log_dir or trainer.default_root_dir)

    def state_dict(self) -> dict[str, Any]:
        sums = dict(self.sums)
        self._sum_up(sums)
        return {"epochs": self.epochs, "sums": sums, "batches": self.batches + len(self.pending)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs, self.sums, self.batches = (state_dict[name] for name in ("epochs", "sums", "batches"))


class Evaluation(OnlineEvaluation):
    """While training goes on, tells what its features are worth; when it ends, evaluates them frozen, beside
    those of the same network untrained.

    Images that cannot be evaluated end the run before the training.

    Prints a table, writes its numbers to ``evaluation.json``, and draws ``overview.png``: the curves, and
    test images with what they are nearest to, before and after the training.

    Args:
        k: votes of the nearest-neighbour classifier.
        temperature: of its weights.
        label_fractions: of the labels that linear probes learn from, at the end.
        seeds: draws of the labels, for each fraction below 1.
        max_images: take no more training and test images than this; by default all.
        pixels: measure the images themselves too, as features; for small ones.
        every_n_epochs: how often nearest neighbours vote while training goes on, and a linear probe is tested
            that learns alongside; null: never.
        probe: train that probe, on each step's features, which get no gradient from it.
        enabled: false leaves all of it out, and draws the curves alone.
    """

    def __init__(
        self,
        k: PositiveInt = 200,
        temperature: PositiveFinite = 0.07,
        label_fractions: Sequence[Fraction] = (0.01, 0.1, 1.0),
        seeds: PositiveInt = 10,
        max_images: PositiveInt | None = None,
        pixels: bool = False,
        every_n_epochs: PositiveInt | None = 10,
        probe: bool = True,
        enabled: bool = True,
    ) -> None:
        super().__init__(k, temperature, max_images, every_n_epochs, probe, enabled)
        self.label_fractions, self.seeds, self.pixels = tuple(label_fractions), seeds, pixels

    def setup(self, trainer: Trainer, module: Method, stage: str) -> None:
        self.directory = run_directory(trainer)
        super().setup(trainer, module, stage)
        self.untrained = copy.deepcopy(module.backbone)  # before a checkpoint is read, if the run resumes one

    def on_fit_end(self, trainer: Trainer, module: Method) -> None:
        if not trainer.is_global_zero:
            return
        shown = self._evaluate(trainer, module) if self.enabled else None
        epochs = [epoch for each in trainer.callbacks if isinstance(each, Record) for epoch in each.epochs]
        path = self.directory / "overview.png"
        overview(epochs, shown, path)
        table = f"Table: {self.directory / 'evaluation.json'}\n" if self.enabled else ""
        print(f"\n{table}Picture of the curves{' and of neighbours' if shown else ''}: {path}", flush=True)

    def _evaluate(self, trainer: Trainer, module: Method) -> Gallery:
        """Print and keep what the features are worth; returns what there is to see of it."""
        print("\nEvaluating the features ...", flush=True)
        loaders = trainer.datamodule.evaluation_dataloaders(self.max_images)
        networks = {"untrained": self.untrained, "trained": module.backbone}
        compared = {
            name: tuple(extract_features(network, loader, module.device) for loader in loaders)
            for name, network in networks.items()
        }
        features = compared
        if self.pixels:
            pixels = tuple(extract_features(nn.Flatten(), loader, module.device) for loader in loaders)
            features = {"pixels": pixels, **compared}
        _, test = compared["trained"]
        rows = evaluate(
            features,
            k=self.k,
            temperature=self.temperature,
            label_fractions=self.label_fractions,
            seeds=self.seeds,
        )
        write_text(self.directory / "evaluation.json", json.dumps(rows, indent=2) + "\n")
        print(f"\nAccuracy on {len(test.labels)} test images, in percent:\n")
        print(format_table(rows))
        train_images, test_images = (loader.dataset for loader in loaders)
        return gallery((train_images, test_images), compared, rows)
