"""What a run leaves behind at its end: curves, and the worth of its features."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .evaluation import evaluate, extract_features, format_table
from .runs import run_directory


class Curves(Callback):
    """Keeps each epoch's means, in checkpoints too, and draws them to ``curves.png`` when training ends."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        means = {
            name.removeprefix("epoch/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("epoch/")
        }
        self.history.append({"epoch": trainer.current_epoch + 1, **means})

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.history:
            return
        figure = Figure(figsize=(10, 4), layout="constrained")
        losses, accuracy = figure.subplots(1, 2)
        for axes, names in (
            (losses, [name for name in self.history[0] if name.endswith("loss")]),
            (accuracy, ("top1", "top5")),
        ):
            for name in names:
                values = [epoch[name] for epoch in self.history]
                axes.plot([epoch["epoch"] for epoch in self.history], values, label=name.replace("_", " "))
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.legend()
        losses.set(title="loss and its terms", ylim=(0, None))
        accuracy.set(title="contrast accuracy", ylim=(0, 1))
        figure.savefig(run_directory(trainer) / "curves.png", dpi=120)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]


class Evaluation(Callback):
    """When training ends, evaluates its frozen features beside those of the same network untrained.

    Prints a table, and writes its numbers to ``evaluation.json``.

    Args:
        k: votes of the nearest-neighbour classifier.
        temperature: of its weights.
        label_fractions: of the labels that linear probes learn from.
        seeds: draws of the labels, for each fraction below 1.
        max_images: take no more training and test images than this; by default all.
    """

    def __init__(
        self,
        k: PositiveInt = 200,
        temperature: PositiveFloat = 0.07,
        label_fractions: Sequence[ClosedUnitInterval] = (0.01, 0.1, 1.0),
        seeds: PositiveInt = 10,
        max_images: PositiveInt | None = None,
    ) -> None:
        self.k, self.temperature, self.seeds = k, temperature, seeds
        self.label_fractions, self.max_images = tuple(label_fractions), max_images

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.untrained = copy.deepcopy(module.backbone)  # before a checkpoint is read, if the run resumes one

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        print("\nEvaluating the features ...", flush=True)
        loaders = trainer.datamodule.evaluation_dataloaders(self.max_images)
        features = {
            name: tuple(extract_features(network, loader, module.device) for loader in loaders)
            for name, network in (("untrained", self.untrained), ("trained", module.backbone))
        }
        rows = evaluate(
            features,
            k=self.k,
            temperature=self.temperature,
            label_fractions=self.label_fractions,
            seeds=self.seeds,
        )
        directory = run_directory(trainer)
        (directory / "evaluation.json").write_text(json.dumps(rows, indent=2) + "\n")
        print(f"\nAccuracy on {len(features['trained'][1].labels)} test images, in percent:\n")
        print(format_table(rows))
        print(f"\nThis table and the curves are kept in {directory}", flush=True)
