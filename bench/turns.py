"""Several things timed by turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


def seconds_by_turns(
    runs: Sequence[Callable[[], object]], turns: tuple[int, int], seconds: float
) -> list[list[float]]:
    """The seconds that each took in every turn, so that a machine that slows down slows all of them.

    Args:
        runs: what is timed. The first turn warms up and is not counted.
        turns: how many are counted, at least and at most.
        seconds: when they have taken so long, no further turn is begun.
    """
    least, most = turns
    taken: list[list[float]] = [[] for _ in runs]
    end = float("inf")
    for turn in range(1 + most):
        if turn == 1:
            taken = [[] for _ in runs]
            end = time.perf_counter() + seconds
        if turn > least and time.perf_counter() > end:
            break
        for run, times in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return taken
