"""What sampling the classifier's rows does to ConIC's loss (figure 5).

Training losses of the variants have different rows in them. To compare like with like, every epoch ends with
one more quantity: the classification loss over all N rows, caught up, on views that were drawn once.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from torch import Tensor

from contrastive_ops import conic_loss

from ..data import Digits
from ..errors import UsageError
from ..figures import WIDTH
from ..methods import ConIC
from ..parsing import LossWeight, PositiveFinite
from .common import (
    MEASURES,
    MethodStudy,
    Row,
    Run,
    Runs,
    SharedViews,
    Study,
    Variant,
    command,
    differences,
    score,
)

FULL = "full softmax"
COMPENSATED, PLAIN = "sampled, compensated", "sampled, not compensated"
TRAINING, OVER_ALL, END = "training loss", "loss over all rows", "loss over all rows, at the end"
TITLES = {
    TRAINING: "training loss, over the rows in the softmax",
    OVER_ALL: "loss over all rows, on fixed views",
}


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


def over_all_rows(module: ConIC, views: SharedViews) -> Run:
    return {OVER_ALL: full_softmax_loss(module, views.fixed)}


def curves(epochs: list[Run]) -> Run:
    over_all = [epoch[OVER_ALL] for epoch in epochs]
    return {
        END: over_all[-1],
        TRAINING: [epoch["classification_loss"] for epoch in epochs],
        OVER_ALL: over_all,
    }


@command("sampling")
def study(
    epochs: PositiveInt = 40,
    seeds: PositiveInt = 3,
    active: PositiveInt = 72,
    batch_size: PositiveInt = 16,
    learning_rate: PositiveFinite = 0.06,
    consistency_weight: LossWeight = 2.5,
) -> Study:
    """ConIC with all rows in the softmax, and with an active set of them, with and without compensation.

    Leaves sampling.png and sampling.json.

    Args:
        epochs: of each training.
        seeds: how many trainings of each variant.
        active: rows of 1437 in the sampled softmax. The paper has a twentieth: 65536 of 1.28 million.
        batch_size: images a step.
        learning_rate: at the start of the cosine.
        consistency_weight: α.
    """
    count = len(Digits(train=True))
    if active >= count:
        raise UsageError(f"active is {active}: all {count} rows are, and nothing is sampled")
    settings = {"learning_rate": learning_rate, "consistency_weight": consistency_weight}
    return MethodStudy(
        variants={
            FULL: Variant(ConIC, settings, batch_size),
            COMPENSATED: Variant(ConIC, {**settings, "active": active}, batch_size),
            PLAIN: Variant(ConIC, {**settings, "active": active, "compensation": False}, batch_size),
        },
        title=f"ConIC on digits, all {count} rows in the softmax or {active}: "
        f"mean and standard deviation of {seeds} trainings",
        tables=tables,
        draw=draw,
        at_end=over_all_rows,
        after=curves,
    )


def tables(runs: Runs) -> dict[str, list[Row]]:
    pairs = [(COMPENSATED, FULL), (PLAIN, FULL)]
    return {
        "Distance from the full softmax's curves, and where they end": distances(runs),
        "Paired differences": differences(runs, pairs, (END, *MEASURES)),
    }


def distances(runs: Runs) -> list[Row]:
    """A row a variant: how far its curves are from the full softmax's of the same seed, in the mean over the
    epochs; how the loss over all rows ends; what the features are worth. The full softmax's own distance is
    that between its seeds."""
    rows = []
    for name in (FULL, COMPENSATED, PLAIN):
        pairs = list(
            itertools.combinations(runs[FULL], 2)
            if name == FULL
            else zip(runs[name], runs[FULL], strict=True)
        )
        row: Row = {"variant": "full softmax, another seed" if name == FULL else name}
        for loss in TITLES:
            apart = [float(np.abs(np.subtract(one[loss], other[loss])).mean()) for one, other in pairs]
            row[loss] = score(apart) if apart else None
        for value in (END, *MEASURES):
            row[value] = score([run[value] for run in runs[name]])
        rows.append(row)
    return rows


def draw(runs: Runs) -> Figure:
    """Both losses of every variant against the epoch: mean over the seeds, and a band of their deviation."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (loss, title) in zip(panels, TITLES.items(), strict=True):
        for name, style in ((FULL, "-"), (COMPENSATED, "--"), (PLAIN, ":")):
            values = np.array([run[loss] for run in runs[name]])  # (seeds, epochs)
            mean, deviation = values.mean(0), values.std(0, ddof=min(1, len(values) - 1))
            epochs = np.arange(1, len(mean) + 1)
            (line,) = axes.plot(epochs, mean, style, label=name)
            axes.fill_between(epochs, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("classification loss of a view")
    return figure
