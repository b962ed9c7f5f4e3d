"""Keeps a classifier whole when an exception, such as an interrupt from the keyboard, cuts a call off."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import Tensor

Versions = tuple[int, int]


class Guard:
    """Lets one call in at a time, and finishes what an exception has cut off before the next one starts.

    A call that writes says beforehand, as `unfinished`, how it is completed or undone. Whether the operator
    that writes weight and momentum had run by then is told by the tensors' versions.

    Attributes:
        unfinished: completes or undoes what was cut off; may be cut off itself, and is called again then.
        torn: why only a checkpoint helps; "" where all is well.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.unfinished: Callable[[], None] | None = None
        self.torn = ""
        self._launching = False  # whether an operator was called that has not returned

    @contextlib.contextmanager
    def exclusively(self, settle: Callable[[], None]) -> Iterator[None]:
        """Alone, from a settled state to a settled state, whatever comes between."""
        with self.lock:
            settle()
            try:
                yield
            except BaseException:
                with contextlib.suppress(Exception):  # it will be tried again, and say so then
                    settle()
                raise

    def finish(self) -> None:
        """Complete or undo what was cut off; RuntimeError where that cannot be done."""
        if self.torn:
            self._give_up()
        if self.unfinished is not None:
            self.unfinished()
            self.unfinished = None
        self._launching = False

    def launch(self, operator: Callable[..., None], *arguments: Any) -> None:
        """Call an operator that writes weight and momentum."""
        self._launching = True
        operator(*arguments)
        self._launching = False

    def was_written(
        self, weight: Tensor, momentum: Tensor, before: Versions, launched: bool | None = None
    ) -> bool:
        """Whether an operator has written both since they had these versions.

        Args:
            weight, momentum: (A, D), which an operator writes together, and moves on in this order: momentum,
                weight.
            before: their versions.
            launched: whether it was called; None for what `launch` noted.

        Raises:
            RuntimeError: one of them may be written in part. From now on only a checkpoint helps.
        """
        momentum_before, weight_before = before
        if weight._version != weight_before:
            return True
        launched = self._launching if launched is None else launched
        if momentum._version != momentum_before or (launched and _runs_ahead(weight)):
            self.torn = "an interrupt came while rows were being written, and some may be"
            self._give_up()
        return False

    def _give_up(self) -> NoReturn:
        raise RuntimeError(f"{self.torn}: load a checkpoint to go on")


def versions(weight: Tensor, momentum: Tensor) -> Versions:
    """How often momentum and weight, in this order, were written."""
    return momentum._version, weight._version


def _runs_ahead(tensor: Tensor) -> bool:
    """Whether a GPU has it, which is given its work and goes on by itself: an exception out of the call then
    leaves open whether it had come to that."""
    return tensor.is_cuda
