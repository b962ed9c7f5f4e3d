"""What the weight of ConIC's consistency loss does to both losses (figure 3), and to features (figure 6)."""

from __future__ import annotations

import numpy as np
from jsonargparse.typing import PositiveInt
from matplotlib import colormaps
from matplotlib.figure import Figure

from ..figures import WIDTH
from ..methods import ConIC
from ..parsing import PositiveFinite
from .common import (
    MEASURES,
    MethodStudy,
    Row,
    Run,
    Runs,
    Study,
    Variant,
    command,
    differences,
    dots,
    table,
)

WEIGHTS = (0.0, 0.5, 1.0, 2.5, 5.0)  # the paper chooses 2.5
LABELS = {f"α = {weight:g}": f"{weight:g}" for weight in WEIGHTS}
CLASSIFICATION, CONSISTENCY, EARLY = "classification loss", "consistency loss", "classification loss, early"
CURVE = "classification loss of each epoch"


def losses(means: list[Run]) -> Run:
    """Both losses as they end, and the first after a sixth of the training: means over an epoch."""
    return {
        CLASSIFICATION: means[-1]["classification_loss"],
        CONSISTENCY: means[-1]["consistency_loss"],
        EARLY: means[(len(means) - 1) // 6]["classification_loss"],
        CURVE: [epoch["classification_loss"] for epoch in means],
    }


@command("consistency")
def study(
    epochs: PositiveInt = 30,
    seeds: PositiveInt = 5,
    batch_size: PositiveInt = 64,
    learning_rate: PositiveFinite = 0.03,
) -> Study:
    """ConIC with consistency weights α of 0, 0.5, 1, 2.5 and 5: its losses as they end, and its features.

    Leaves consistency.png and consistency.json.

    Args:
        epochs: of each training.
        seeds: how many trainings of each variant.
        batch_size: images a step.
        learning_rate: at the start of the cosine.
    """
    return MethodStudy(
        variants={
            name: Variant(ConIC, {"learning_rate": learning_rate, "consistency_weight": weight}, batch_size)
            for name, weight in zip(LABELS, WEIGHTS, strict=True)
        },
        title="ConIC on digits",
        tables=tables,
        draw=draw,
        after=losses,
    )


def tables(runs: Runs) -> dict[str, list[Row]]:
    terms = (EARLY, CLASSIFICATION, CONSISTENCY)
    none, *others = LABELS
    pairs = [(name, none) for name in others]
    return {
        "Losses of the last epoch, and of an early one": table(runs, terms),
        "Paired differences of losses": differences(runs, pairs, terms),
        "Accuracy": table(runs, MEASURES),
        "Paired differences of accuracy": differences(runs, pairs, MEASURES),
    }


def draw(runs: Runs) -> Figure:
    """The classification loss against the epoch; losses and, below them, measures against α."""
    figure = Figure(figsize=(WIDTH, 6.4), layout="constrained")
    (curves, *losses), measures = figure.subplots(2, 3)
    for axes, column in zip((*losses, *measures), (CLASSIFICATION, CONSISTENCY, *MEASURES), strict=True):
        dots(axes, runs, LABELS, column)
        axes.sharex(losses[0])
        axes.set_xlabel("consistency weight α")
    for name, color in zip(LABELS, colormaps["viridis"](np.linspace(0, 0.9, len(LABELS))), strict=True):
        mean = np.mean([run[CURVE] for run in runs[name]], axis=0)
        curves.plot(range(1, len(mean) + 1), mean, label=name, color=color)
    curves.set_title(CURVE, fontsize=10)
    curves.set_xlabel("epoch")
    curves.grid(alpha=0.3)
    return figure
