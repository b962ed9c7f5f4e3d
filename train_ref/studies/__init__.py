"""What the papers claim, at small scale: ``python -m train_ref study <name> [options]``.

Each study trains its variants on scikit-learn's digits with several seeds, of each seed on the same views and
from the same network, and leaves a figure and its numbers; ``python -m train_ref.report`` puts them
into docs/results.md, which says what came of them.
"""

from __future__ import annotations

from collections.abc import Callable

from . import batch_size, co2, consistency, sampling, simclr, toy

STUDIES: dict[str, Callable] = {
    "co2": co2.study,
    "simclr": simclr.study,
    "consistency": consistency.study,
    "batch_size": batch_size.study,
    "sampling": sampling.study,
    "toy": toy.study,
}
