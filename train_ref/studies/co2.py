"""What CO2 adds to MoCo (Wei et al., ICLR 2021): features that a few labels say more about."""

from __future__ import annotations

from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from ..methods import MOCO_V1, MOCO_V2, MoCo
from ..parsing import PositiveFinite
from .common import MethodStudy, Study, Variant, accuracy, command, panels

# Name: label in the figure, version, α. The paper's α are 10 for v1 and 0.3 for v2; the recipe's for digits
# is 1 for v1.
VARIANTS = {
    "MoCo": ("MoCo", MOCO_V1, 0.0),
    "MoCo + CO2, α = 1": ("+ CO2\nα = 1", MOCO_V1, 1.0),
    "MoCo + CO2, α = 10": ("+ CO2\nα = 10", MOCO_V1, 10.0),
    "MoCo v2": ("MoCo v2", MOCO_V2, 0.0),
    "MoCo v2 + CO2, α = 0.3": ("+ CO2\nα = 0.3", MOCO_V2, 0.3),
}
PAIRS = [
    ("MoCo + CO2, α = 1", "MoCo"),
    ("MoCo + CO2, α = 10", "MoCo"),
    ("MoCo v2 + CO2, α = 0.3", "MoCo v2"),
]


@command("co2")
def study(
    epochs: PositiveInt = 30,
    seeds: PositiveInt = 5,
    batch_size: PositiveInt = 64,
    learning_rate: PositiveFinite = 0.03,
    queue_size: PositiveInt = 1024,
    momentum: ClosedUnitInterval = 0.99,
) -> Study:
    """MoCo against MoCo + CO2, with the settings of MoCo v1 and of v2.

    Leaves co2.png and co2.json. All variants have the same views, MoCo v2's like for digits.

    Args:
        epochs: of each training.
        seeds: how many trainings of each variant.
        batch_size: images a step.
        learning_rate: at the start of the schedule.
        queue_size: negative keys of 1437 images, so that none is older than an epoch.
        momentum: of the key encoder, which is to follow within few epochs.
    """
    settings = {"learning_rate": learning_rate, "queue_size": queue_size, "momentum": momentum}
    rows = [
        {name: label for name, (label, which, _) in VARIANTS.items() if which is version}
        for version in (MOCO_V1, MOCO_V2)
    ]
    return MethodStudy(
        variants={
            name: Variant(MoCo, {**version, **settings, "consistency_weight": weight}, batch_size)
            for name, (_, version, weight) in VARIANTS.items()
        },
        title="MoCo on digits",
        tables=accuracy(PAIRS),
        draw=lambda runs: panels(runs, rows),
    )
