"""What CO2 adds to SimCLR (Wei et al., ICLR 2021)."""

from __future__ import annotations

from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt
from matplotlib.figure import Figure

from ..methods import SimCLR
from .common import MEASURES, Variant, compare, differences, dots, keep, over, table

SIMCLR = "SimCLR"
# The paper's text gives no α for SimCLR. 0.3 is its α for MoCo v2, 1 is there to see a larger one.
WEIGHTS = {SIMCLR: 0.0, "SimCLR + CO2, α = 0.3": 0.3, "SimCLR + CO2, α = 1": 1.0}
LABELS = {name: f"+ CO2\nα = {weight:g}" if weight else name for name, weight in WEIGHTS.items()}


def study(
    epochs: PositiveInt = 30,
    seeds: PositiveInt = 5,
    batch_size: PositiveInt = 64,
    learning_rate: PositiveFloat = 0.06,
    temperature: PositiveFloat = 0.5,
    consistency_temperature: PositiveFloat = 0.05,
    quick: bool = False,
    directory: str = "runs/studies",
) -> dict[str, Any]:
    """SimCLR against SimCLR + CO2.

    Leaves simclr.png and simclr.json.

    Args:
        epochs: of each training.
        seeds: how many trainings of each variant.
        batch_size: images a step.
        learning_rate: at the start of the cosine.
        temperature: τ; 0.5 is SimCLR's for small images.
        consistency_temperature: τc.
        quick: two seeds of two short epochs, to see that it works.
        directory: where the figure and its numbers go.

    Returns:
        What the JSON holds.
    """
    if quick:
        epochs, seeds = 2, 2
    settings = {
        "learning_rate": learning_rate,
        "temperature": temperature,
        "consistency_temperature": consistency_temperature,
    }
    variants = {
        name: Variant(SimCLR, {**settings, "consistency_weight": weight}, batch_size)
        for name, weight in WEIGHTS.items()
    }
    runs = compare(variants, epochs, seeds, quick)

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        dots(axes, runs, LABELS, measure)
    figure.suptitle(f"SimCLR on digits: {over(seeds)}")
    return keep(
        "simclr",
        {"epochs": epochs, "seeds": seeds, "batch_size": batch_size, **settings},
        {
            "Accuracy": table(runs, MEASURES),
            "Paired differences": differences(
                runs, [(name, SIMCLR) for name, weight in WEIGHTS.items() if weight], MEASURES
            ),
        },
        runs,
        figure,
        directory,
    )
