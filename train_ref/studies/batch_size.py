"""How much ConIC and SimCLR care about the batch size (figure 4 of ConIC)."""

from __future__ import annotations

from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure

from ..figures import WIDTH
from ..methods import ConIC, SimCLR
from ..parsing import PositiveFinite, Temperature
from .common import MEASURES, MethodStudy, Runs, Study, Variant, accuracy, command, dots, over

SIZES = (16, 32, 64, 128)
METHODS = {"ConIC": ConIC, "SimCLR": SimCLR}


@command("batch_size")
def study(
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 5,
    conic_learning_rate: PositiveFinite = 0.03,
    simclr_learning_rate: PositiveFinite = 0.06,
    simclr_temperature: Temperature = 0.5,
) -> Study:
    """ConIC and SimCLR with batches of 16, 32, 64 and 128 images, learning rates in proportion.

    Leaves batch_size.png and batch_size.json. All have the same epochs, and so the fewer steps the larger the
    batch.

    Args:
        epochs: of each training.
        seeds: how many trainings of each variant.
        conic_learning_rate: ConIC's for 64 images, at the start of the cosine.
        simclr_learning_rate: SimCLR's for 64 images.
        simclr_temperature: SimCLR's τ; ConIC's is 0.1.
    """
    rates = {"ConIC": conic_learning_rate, "SimCLR": simclr_learning_rate}
    others = {"ConIC": {}, "SimCLR": {"temperature": simclr_temperature}}
    *smaller, largest = SIZES
    return MethodStudy(
        variants={
            f"{name}, {size}": Variant(
                METHODS[name], {"learning_rate": rates[name] * size / 64, **others[name]}, size
            )
            for name in METHODS
            for size in SIZES
        },
        title="ConIC and SimCLR on digits",
        tables=accuracy([(f"{name}, {size}", f"{name}, {largest}") for name in METHODS for size in smaller]),
        draw=draw,
    )


def draw(runs: Runs) -> Figure:
    """A panel a measure, with a line a method against the size."""
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(MEASURES), sharex=True), MEASURES, strict=True):
        for name in METHODS:
            labels = {f"{name}, {size}": str(size) for size in SIZES}
            dots(axes, runs, labels, measure, label=f"{name}, {over(len(runs[f'{name}, {SIZES[0]}']))}")
        axes.set_xlabel("images a batch")
    return figure
