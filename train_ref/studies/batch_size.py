"""How much ConIC and SimCLR care about the batch size (figure 4 of ConIC)."""

from __future__ import annotations

from typing import Any

from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure

from ..methods import ConIC, SimCLR
from ..parsing import PositiveFinite, Temperature
from .common import MEASURES, Variant, compare, differences, dots, keep, over, result_file, table

SIZES = (16, 32, 64, 128)
METHODS = {"ConIC": ConIC, "SimCLR": SimCLR}


def study(
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 5,
    conic_learning_rate: PositiveFinite = 0.03,
    simclr_learning_rate: PositiveFinite = 0.06,
    simclr_temperature: Temperature = 0.5,
    quick: bool = False,
    directory: str = "runs/studies",
) -> dict[str, Any]:
    """ConIC and SimCLR with batches of 16, 32, 64 and 128 images, learning rates in proportion.

    Leaves batch_size.png and batch_size.json. All have the same epochs, and so the fewer steps the larger the
    batch.

    Args:
        epochs: of each training.
        seeds: how many trainings of each variant.
        conic_learning_rate: ConIC's for 64 images, at the start of the cosine.
        simclr_learning_rate: SimCLR's for 64 images.
        simclr_temperature: SimCLR's τ; ConIC's is 0.1.
        quick: two seeds of two short epochs, to see that it works.
        directory: where the figure and its numbers go.

    Returns:
        What the JSON holds.
    """
    if quick:
        epochs, seeds = 2, 2
    result_file("batch_size", directory)
    settings = {
        "ConIC": {"learning_rate": conic_learning_rate},
        "SimCLR": {"learning_rate": simclr_learning_rate, "temperature": simclr_temperature},
    }
    variants = {
        f"{name}, {size}": Variant(
            METHODS[name], {**given, "learning_rate": given["learning_rate"] * size / 64}, size
        )
        for name, given in settings.items()
        for size in SIZES
    }
    runs = compare(variants, epochs, seeds, quick)

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        for name in METHODS:
            labels = {f"{name}, {size}": str(size) for size in SIZES}
            dots(axes, runs, labels, measure, label=name)
        axes.set_xlabel("images a batch")
    axes.legend()
    figure.suptitle(f"ConIC and SimCLR on digits: {over(seeds)}")
    smaller, largest = SIZES[:-1], SIZES[-1]
    return keep(
        "batch_size",
        {
            "epochs": epochs,
            "seeds": seeds,
            "conic_learning_rate": conic_learning_rate,
            "simclr_learning_rate": simclr_learning_rate,
            "simclr_temperature": simclr_temperature,
        },
        {
            "Accuracy": table(runs, MEASURES),
            "Paired differences": differences(
                runs,
                [(f"{name}, {size}", f"{name}, {largest}") for name in METHODS for size in smaller],
                MEASURES,
            ),
        },
        runs,
        figure,
        directory,
    )
