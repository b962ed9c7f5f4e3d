"""What CO2 adds to SimCLR (Wei et al., ICLR 2021)."""

from __future__ import annotations

from typing import Any

from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure

from ..methods import SimCLR
from ..parsing import PositiveFinite, Temperature
from .common import MEASURES, Variant, compare, differences, dots, keep, over, result_file, table

TEMPERATURES = (0.5, 0.1)  # SimCLR's for small images, and for ImageNet
# The paper's text gives no α for SimCLR. 0.3 is its α for MoCo v2, 1 is there to see a larger one.
WEIGHTS = (0.0, 0.3, 1.0)


def name_of(temperature: float, weight: float) -> str:
    co2 = f" + CO2, α = {weight:g}" if weight else ""
    return f"SimCLR, τ = {temperature:g}{co2}"


def study(
    epochs: PositiveInt = 30,
    seeds: PositiveInt = 5,
    batch_size: PositiveInt = 64,
    learning_rate: PositiveFinite = 0.06,
    consistency_temperature: Temperature = 0.05,
    quick: bool = False,
    directory: str = "runs/studies",
) -> dict[str, Any]:
    """SimCLR against SimCLR + CO2, at temperatures of 0.5 and 0.1.

    Leaves simclr.png and simclr.json.

    Args:
        epochs: of each training.
        seeds: how many trainings of each variant.
        batch_size: images a step.
        learning_rate: at the start of the cosine.
        consistency_temperature: τc.
        quick: two seeds of two short epochs, to see that it works.
        directory: where the figure and its numbers go.

    Returns:
        What the JSON holds.
    """
    if quick:
        epochs, seeds = 2, 2
    result_file("simclr", directory)
    settings = {"learning_rate": learning_rate, "consistency_temperature": consistency_temperature}
    variants = {
        name_of(temperature, weight): Variant(
            SimCLR, {**settings, "temperature": temperature, "consistency_weight": weight}, batch_size
        )
        for temperature in TEMPERATURES
        for weight in WEIGHTS
    }
    runs = compare(variants, epochs, seeds, quick)

    figure = Figure(figsize=(10, 7), layout="constrained")
    for row, temperature in zip(figure.subplots(2, len(MEASURES), sharey="col"), TEMPERATURES, strict=True):
        labels = {
            name_of(temperature, weight): f"+ CO2\nα = {weight:g}"
            if weight
            else f"SimCLR\nτ = {temperature:g}"
            for weight in WEIGHTS
        }
        for axes, measure in zip(row, MEASURES, strict=True):
            dots(axes, runs, labels, measure)
    figure.suptitle(f"SimCLR on digits: {over(seeds)}")
    pairs = [
        (name_of(temperature, weight), name_of(temperature, 0.0))
        for temperature in TEMPERATURES
        for weight in WEIGHTS
        if weight
    ]
    return keep(
        "simclr",
        {"epochs": epochs, "seeds": seeds, "batch_size": batch_size, **settings},
        {"Accuracy": table(runs, MEASURES), "Paired differences": differences(runs, pairs, MEASURES)},
        runs,
        figure,
        directory,
    )
