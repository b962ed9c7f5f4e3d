"""What sampling the classifier's rows does to ConIC's loss: figure 5 of the paper, on digits.

``python -m train_ref sampling`` trains three variants a seed, each from the same network and classifier, on
the same views in the same order: the full softmax, and an active set with and without compensation. Training
losses have different rows in them. To compare like with like, every epoch ends with one more quantity: the
classification loss over all N rows, caught up, on views that were drawn once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contrastive_ops import conic_loss

from .augmentations import augmentation
from .conic import ConIC
from .data import Views
from .errors import UsageError
from .evaluation import Score, extract_features, format_table, knn_accuracy
from .networks import projection_head

FULL = "full softmax"
COMPENSATED, PLAIN = "sampled, compensated", "sampled, not compensated"
TITLES = {
    "training": "training loss, over the rows in the softmax",
    "full": "loss over all rows, on fixed views",
}
Curves = dict[
    str, list[dict[str, Any]]
]  # of each variant, a training a seed: its losses, and its kNN accuracy


class SmallConIC(ConIC):
    """ConIC with three convolutions of digits' size in place of a ResNet: an epoch in a second."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"arch": "resnet18", "stem": "small", **settings})
        widths, layers = (3, 32, 64, 128), []
        for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 2), strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.encoder = nn.Sequential(backbone, projection_head("mlp_bn", widths[-1], self.hparams.dim))


class RecordedViews(Views):
    """The views of some epochs, drawn once: whoever trains on them sees the same ones in the same order."""

    def record(self, epochs: int, batches: int | None = None) -> None:
        """Draw them, and the `fixed` view (N, 3, H, W) of every image; of each epoch, the first `batches`."""
        loader = super().train_dataloader()
        self.epochs = [list(itertools.islice(loader, batches)) for _ in range(epochs)]
        images = self._dataset(True, augmentation(self.hparams.augmentation, self.hparams.image_size))
        self.fixed = torch.stack([images[index][0] for index in range(len(images))])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.epochs[self.trainer.current_epoch], batch_size=None)  # they are batches


class LossCurves(Callback):
    """At each epoch's end, the classification loss: its mean over the epoch, and over all rows."""

    def __init__(self) -> None:
        self.training: list[float] = []
        self.full: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.training.append(float(trainer.callback_metrics["epoch/classification_loss"]))
        self.full.append(full_softmax_loss(module, trainer.datamodule.fixed))


@torch.no_grad()
def full_softmax_loss(module: ConIC, views: Tensor) -> float:
    """The mean classification loss of a view (N, 3, H, W) of every instance, over all N rows as of now.

    The network is in evaluation mode, so that nothing of the training is disturbed.
    """
    rows = torch.cat([weight for _, weight, _ in module.classifier.export()])  # (N, D), caught up
    module.encoder.eval()
    features = torch.cat([module.encoder(part) for part in views.to(rows.device).split(512)])  # (N, D)
    module.encoder.train()
    return conic_loss(
        features[None],
        rows,
        torch.arange(len(rows), device=rows.device),
        temperature=module.hparams.temperature,
        consistency_weight=0.0,
    ).item()


def study(
    epochs: PositiveInt = 40,
    seeds: PositiveInt = 3,
    active: PositiveInt = 72,
    batch_size: PositiveInt = 16,
    learning_rate: PositiveFloat = 0.06,
    consistency_weight: NonNegativeFloat = 2.5,
    quick: bool = False,
    directory: str = "runs/sampling",
) -> dict[str, Any]:
    """Train every variant with every seed; leave ``sampling.png`` and ``sampling.json``, and print a table.

    Args:
        epochs: of each training.
        seeds: how many trainings of each variant.
        active: rows of 1437 in the sampled softmax. The paper has a twentieth: 65536 of 1.28 million.
        batch_size: images a step.
        learning_rate: at the start of the cosine.
        consistency_weight: α.
        quick: two seeds of two short epochs, to see that it works.
        directory: where the figure and its numbers go.

    Returns:
        What the JSON holds: the settings, the curves of every training, and the rows of the table.
    """
    if quick:
        epochs, seeds = 2, 2
    settings = {
        "epochs": epochs,
        "seeds": seeds,
        "active": active,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "consistency_weight": consistency_weight,
    }
    variants = {
        FULL: {"active": None},
        COMPENSATED: {"active": active},
        PLAIN: {"active": active, "compensation": False},
    }
    curves: Curves = {name: [] for name in variants}
    for seed in range(seeds):
        seed_everything(seed, verbose=False)
        views = RecordedViews(batch_size=batch_size)
        views.setup()
        if active >= views.num_instances:
            raise UsageError(
                f"active is {active}: all {views.num_instances} rows are, and nothing is sampled"
            )
        views.record(epochs, batches=5 if quick else None)
        for name, variant in variants.items():
            seed_everything(seed, verbose=False)
            module = SmallConIC(
                seed=seed, learning_rate=learning_rate, consistency_weight=consistency_weight, **variant
            )
            curves[name].append(_train(module, views, epochs))
            full, knn = curves[name][-1]["full"][-1], curves[name][-1]["knn"]
            print(
                f"seed {seed}, {name}: loss over all rows {full:.3f}, nearest neighbours {knn:.1f} %",
                flush=True,
            )

    rows = summary(curves)
    result = {"settings": settings, "torch": torch.__version__, "summary": rows, "curves": curves}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sampling.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(curves, settings, folder / "sampling.png")
    print(f"\nMean distance of the curves from the full softmax's, over {epochs} epochs and {seeds} seeds:\n")
    print(format_table([{name: _text(name, cell) for name, cell in row.items()} for row in rows]))
    print("\nThat of the full softmax itself is between its seeds.")
    print(f"\nThe curves and their numbers are kept in {folder}", flush=True)
    return result


def _train(module: ConIC, views: RecordedViews, epochs: int) -> dict[str, Any]:
    losses = LossCurves()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[losses],
        reload_dataloaders_every_n_epochs=1,  # each epoch's views
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, views)
    train, test = (
        extract_features(module.backbone, loader, "cpu") for loader in views.evaluation_dataloaders()
    )
    return {
        "training": losses.training,
        "full": losses.full,
        "knn": knn_accuracy(train, test, k=20),  # of 144 images a class
    }


def summary(curves: Curves) -> list[dict[str, Any]]:
    """A row a variant: how far its curves are from the full softmax's of the same seed, in the mean over the
    epochs; how the loss over all rows ends; what the features are worth. Mean and deviation over seeds."""
    rows = []
    for name, runs in curves.items():
        pairs = list(
            itertools.combinations(runs, 2) if name == FULL else zip(runs, curves[FULL], strict=True)
        )
        distances = {
            loss: _score(np.abs(np.subtract(one[loss], other[loss])).mean() for one, other in pairs)
            for loss in TITLES
        }
        rows.append(
            {
                "variant": name,
                "training loss": distances["training"],
                "loss over all rows": distances["full"],
                "ends at": _score(run["full"][-1] for run in runs),
                "20 nearest neighbours, %": _score(run["knn"] for run in runs),
            }
        )
    return rows


def draw(curves: Curves, settings: dict[str, Any], path: Path) -> None:
    """Both losses of every variant against the epoch: mean over the seeds, and a band of their deviation."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (loss, title) in zip(figure.subplots(1, 2), TITLES.items(), strict=True):
        for (name, runs), style in zip(curves.items(), ("-", "--", ":"), strict=True):
            values = np.array([run[loss] for run in runs])  # (seeds, epochs)
            epochs, mean, deviation = (
                np.arange(1, values.shape[1] + 1),
                values.mean(0),
                values.std(0, ddof=min(1, len(values) - 1)),
            )
            (line,) = axes.plot(epochs, mean, style, label=name)
            axes.fill_between(epochs, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2)
        axes.set(title=title, xlabel="epoch", ylabel="classification loss of a view")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        f"ConIC on digits, all 1437 rows in the softmax or {settings['active']}: "
        f"mean and standard deviation of {settings['seeds']} trainings"
    )
    figure.savefig(path, dpi=120)


def _score(values: Iterable[float]) -> dict[str, float | None] | None:
    values = [float(value) for value in values]
    if not values:
        return None
    return Score(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)._asdict()


def _text(column: str, cell: Any) -> Any:
    """A loss with three digits; what `format_table` knows how to print is left to it."""
    if cell is None:
        return "–"
    if isinstance(cell, str) or column.endswith("%"):
        return cell
    return f"{cell['mean']:.3f}" + ("" if cell["std"] is None else f" ± {cell['std']:.3f}")
