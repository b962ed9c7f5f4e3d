"""What the weight of ConIC's consistency loss does to both losses (figure 3), and to features (figure 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure

from ..methods import ConIC
from ..parsing import PositiveFinite
from .common import MEASURES, Run, Variant, compare, differences, dots, keep, over, result_file, table

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


def study(
    epochs: PositiveInt = 30,
    seeds: PositiveInt = 5,
    batch_size: PositiveInt = 64,
    learning_rate: PositiveFinite = 0.03,
    quick: bool = False,
    directory: str = "runs/studies",
) -> dict[str, Any]:
    """ConIC with consistency weights α of 0, 0.5, 1, 2.5 and 5: its losses as they end, and its features.

    Leaves consistency.png and consistency.json.

    Args:
        epochs: of each training.
        seeds: how many trainings of each variant.
        batch_size: images a step.
        learning_rate: at the start of the cosine.
        quick: two seeds of two short epochs, to see that it works.
        directory: where the figure and its numbers go.

    Returns:
        What the JSON holds.
    """
    if quick:
        epochs, seeds = 2, 2
    result_file("consistency", directory)
    variants = {
        name: Variant(ConIC, {"learning_rate": learning_rate, "consistency_weight": weight}, batch_size)
        for name, weight in zip(LABELS, WEIGHTS, strict=True)
    }
    runs = compare(variants, epochs, seeds, quick, after=losses)

    drawn = (CLASSIFICATION, CONSISTENCY, *MEASURES)
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, column in zip(panels, drawn, strict=False):
        dots(axes, runs, LABELS, column)
        axes.set_xlabel("consistency weight α")
    (axes,) = panels[len(drawn) :]
    for name in LABELS:
        axes.plot(range(1, epochs + 1), np.mean([run[CURVE] for run in runs[name]], axis=0), label=name)
    axes.set_title(CURVE, fontsize=10)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(f"ConIC on digits: {over(seeds)}")
    none, *others = LABELS
    pairs = [(name, none) for name in others]
    terms = (EARLY, CLASSIFICATION, CONSISTENCY)
    return keep(
        "consistency",
        {"epochs": epochs, "seeds": seeds, "batch_size": batch_size, "learning_rate": learning_rate},
        {
            "Losses of the last epoch, and of an early one": table(runs, terms),
            "Paired differences of losses": differences(runs, pairs, terms),
            "Accuracy": table(runs, MEASURES),
            "Paired differences of accuracy": differences(runs, pairs, MEASURES),
        },
        runs,
        figure,
        directory,
    )
