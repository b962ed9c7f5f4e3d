"""What CO2 adds to SimCLR (Wei et al., ICLR 2021)."""

from __future__ import annotations

from jsonargparse.typing import PositiveInt

from ..methods import SimCLR
from ..parsing import PositiveFinite, Temperature
from .common import MethodStudy, Study, Variant, accuracy, command, panels

TEMPERATURES = (0.5, 0.1)  # SimCLR's for small images, and for ImageNet
# The paper's text gives no α for SimCLR. 0.3 is its α for MoCo v2, 1 is there to see a larger one.
PLAIN, *WITH_CO2 = WEIGHTS = (0.0, 0.3, 1.0)


def name_of(temperature: float, weight: float) -> str:
    co2 = f" + CO2, α = {weight:g}" if weight else ""
    return f"SimCLR, τ = {temperature:g}{co2}"


def label(temperature: float, weight: float) -> str:
    """A variant's in the figure."""
    return f"+ CO2\nα = {weight:g}" if weight else f"SimCLR\nτ = {temperature:g}"


@command("simclr")
def study(
    epochs: PositiveInt = 30,
    seeds: PositiveInt = 5,
    batch_size: PositiveInt = 64,
    learning_rate: PositiveFinite = 0.06,
    consistency_temperature: Temperature = 0.05,
) -> Study:
    """SimCLR against SimCLR + CO2, at temperatures of 0.5 and 0.1.

    Leaves simclr.png and simclr.json.

    Args:
        epochs: of each training.
        seeds: how many trainings of each variant.
        batch_size: images a step.
        learning_rate: at the start of the cosine.
        consistency_temperature: τc.
    """
    settings = {"learning_rate": learning_rate, "consistency_temperature": consistency_temperature}
    rows = [{name_of(τ, α): label(τ, α) for α in WEIGHTS} for τ in TEMPERATURES]
    return MethodStudy(
        variants={
            name_of(τ, α): Variant(
                SimCLR, {**settings, "temperature": τ, "consistency_weight": α}, batch_size
            )
            for τ in TEMPERATURES
            for α in WEIGHTS
        },
        title="SimCLR on digits",
        tables=accuracy([(name_of(τ, α), name_of(τ, PLAIN)) for τ in TEMPERATURES for α in WITH_CO2]),
        draw=lambda runs: panels(runs, rows),
    )
