"""What steps of SGD do to a row that gets no gradient, any number of them at once.

Dense SGD moves every row at every step, also those whose gradient is zero, by weight decay and by what is
left of their momentum. In the convention of torch.optim.SGD, with a buffer v and a weight w,

    [v; w] ← A_t [v; w],   A_t = [[m, λ], [c, d]],   c = −η m,  d = 1 − η λ
                                       with nesterov  c = −η m²,  d = 1 − η λ (1 + m)

where learning rate η, momentum m and weight decay λ may change with every step t, and are known only when it
is taken. A row that sat out steps s … t − 1 needs their product. Products of inverses would lose all digits
(det A = m); instead A_t is triangular in the coordinates (w, δ = v − ρ w), for the right ρ:

    g_t = c ρ_t + d     h_t = det A_t / g_t     ρ_{t+1} = (m ρ_t + λ) / g_t     ρ_0 = 0
    w ← g_t w + c δ     δ ← h_t δ

so that over the steps from s to t, with G and H the products of their g and h,

    w' = G (w + Z_s δ)     v' = ρ_t w' + H δ     δ = v − ρ_s w     Z_s = Σ_k c_k/g_k Π_{s≤j<k} h_j/g_j

G and H come from running sums of logarithms. Z_s is still growing only for the last few steps s, because the
products in it die away like (h/g)^k: these sums are the live window. So a step costs the window's length, a
row O(1), and a step is remembered by four numbers.

Where g_t would come near zero (a learning rate times a weight decay so large that weights swing), where the
window grows long (momentum near 1), and before the running sums lose digits, a segment ends: ρ starts from 0
again, and a row from an older segment is taken to that segment's end, through those in between by the
product of their matrices, which is kept up to date, and from the last one's beginning to now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .._contract import SGDSettings
from .._state import tensor

Array = NDArray[np.float64]

_CONVERGED = 1e-30  # what a sum Z still lacks, relative to its terms, when it leaves the live window
_LONGEST_WINDOW = 1 << 14
_LARGEST_LOGARITHM = 4096.0  # of which float64 keeps 12 digits after the point
_MOST_STEPS = 2**32 - 2  # that storage can tell apart

_LOG_G, _LOG_H, _RHO, _Z = range(4)
# A segment has its first step, the step before which its φ are zero, and its running values at its end.
_START, _FORGETS, _END_LOG_G, _END_LOG_H, _END_RHO = range(5)


def check_step(settings: SGDSettings) -> None:
    """Raises ValueError for a step that cannot be taken late."""
    lr, momentum, weight_decay, nesterov = settings
    ahead = 1 + momentum if nesterov else 1.0
    if not lr * weight_decay * ahead < 1:
        raise ValueError(
            f"lr · weight_decay must be less than {1 / ahead:.3g}, got {lr} · {weight_decay}: "
            "a step would turn weights around"
        )


class _Moment(NamedTuple):
    """A history as it is between two steps.

    Attributes:
        length: how many steps were taken.
        table: (4, ≥ length): log G, log H, ρ and Z as of the beginning of each step taken. Z of the steps in
            the live window is in `open`.
        running: (3,) log G, log H and ρ as of the step to come.
        remaining: Π h/g of each step in the live window, whose last is the step to come.
        open: Z of each step in the live window, as far as it is known.
        start: first step of the current segment.
        forgets: rows of earlier steps have no momentum left: a step had none.
        segments: (S, 5) what is left of those before.
        between: (S, 2, 2) from each segment's end to the current one's beginning.
    """

    length: int
    table: Array
    running: Array
    remaining: Array
    open: Array
    start: int
    forgets: int
    segments: Array
    between: Array


class History:
    """The steps that an optimiser has taken, as far as rows that sat them out need to know.

    Example:
        >>> import numpy as np
        >>> from contrastive_ops._contract import SGDSettings
        >>> from contrastive_ops.classifier.history import History
        >>> history = History()
        >>> for lr in (0.1, 0.2):
        ...     history.append(SGDSettings(lr, momentum=0.9, weight_decay=0.01, nesterov=False))
        >>> w, v = (history.coefficients(np.array([0]))[0] @ [1.0, 0.0]).tolist()
        >>> round(w, 6), round(v, 6)  # 1 − 0.1·0.01 = 0.999, then 0.999 − 0.2·(0.9·0.01 + 0.01·0.999)
        (0.995202, 0.01899)

    Each step is one assignment: whoever interrupts `append`, the step was taken or it was not. Columns of the
    table that are visible never change.
    """

    def __init__(self) -> None:
        self._now = _Moment(
            0, np.zeros((4, 1024)), np.zeros(3), np.ones(1), np.zeros(1), 0, 0, np.empty((0, 5)),
            np.empty((0, 2, 2)),
        )  # fmt: skip

    def __len__(self) -> int:
        """How many steps were taken."""
        return self._now.length

    def append(self, settings: SGDSettings) -> None:
        """One more step; ValueError as from `check_step`."""
        check_step(settings)
        lr, momentum, weight_decay, nesterov = settings
        c = -lr * momentum * (momentum if nesterov else 1.0)
        decay = lr * weight_decay * (1 + momentum if nesterov else 1.0)  # d = 1 − decay
        determinant = momentum * (1 - lr * weight_decay if nesterov else 1.0)
        now = self._now
        log_g, log_h, rho = now.running
        if (
            c * rho + 1 - decay < 0.9 * (1 - decay)
            or len(now.remaining) > _LONGEST_WINDOW
            or max(abs(log_g), abs(log_h)) > _LARGEST_LOGARITHM
        ):
            now = _next_segment(now)
            log_g, log_h, rho = now.running

        g = c * rho + 1 - decay
        h = determinant / g
        remaining = np.append(now.remaining * (h / g), 1.0)
        open_ = np.append(now.open + c / g * now.remaining, 0.0)
        settled = 0  # steps that leave the live window
        if h == 0:
            settled = len(remaining) - 1
        elif len(remaining) % 64 == 0:
            settled = int(np.argmax(np.abs(remaining) > _CONVERGED))
        table = now.table
        if now.length == table.shape[1]:
            table = np.concatenate([table, np.zeros_like(table)], axis=1)
        table[:_Z, now.length] = now.running
        _settle(table, now.length + 1, open_, settled)
        running = log_g + np.log1p(c * rho - decay), log_h + (np.log(h) if h else 0.0), (
            momentum * rho + weight_decay
        ) / g  # fmt: skip
        self._now = now._replace(
            length=now.length + 1,
            table=table,
            running=np.array(running),
            remaining=remaining[settled:],
            open=open_[settled:],
            forgets=now.forgets if h else now.length + 1,
        )

    def coefficients(self, steps: NDArray[np.int64]) -> Array:
        """The matrices (n, 2, 2) that take [w; v] of a row as of `steps` (n,), each a number of steps that
        the row has taken, to now."""
        now = self._now
        if len(steps) and steps.max() > now.length:
            raise ValueError(f"a row as of step {steps.max()} cannot be brought to step {now.length}")
        matrices = np.empty((len(steps), 2, 2))
        old = steps < now.start
        matrices[~old] = _within(now, steps[~old], now.running, now.forgets)
        if old.any():
            steps = steps[old]
            segment = np.searchsorted(now.segments[:, _START], steps, side="right") - 1
            ends = now.segments[segment]
            to_end = _within(now, steps, ends[:, _END_LOG_G:].T, ends[:, _FORGETS])
            begun = _within(now, np.array([now.start]), now.running, now.forgets)
            matrices[old] = begun @ now.between[segment] @ to_end
        return matrices

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy; 32 MB for a million steps."""
        now = self._now
        arrays = {
            "table": _columns(now, np.arange(now.length + 1)),
            "remaining": now.remaining.copy(),
            "current": np.array([now.start, now.forgets]),
            "segments": now.segments.copy(),
            "between": now.between.copy(),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> History:
        """The history that a `state_dict` was taken of.

        Raises:
            ValueError: it is none, or not that of any steps.
        """

        def array(name: str, dtype: torch.dtype, *shape: int | None) -> np.ndarray:
            return tensor(state, name, "history", dtype, shape).cpu().numpy().copy()

        float64 = torch.float64
        table, remaining = array("table", float64, 4, None), array("remaining", float64, None)
        start, forgets = array("current", torch.int64, 2).tolist()
        segments, between = array("segments", float64, None, 5), array("between", float64, None, 2, 2)
        length = table.shape[1] - 1
        starts = segments[:, _START]
        if not (
            0 <= length <= _MOST_STEPS
            and 0 <= start <= length
            and 0 <= forgets <= length
            and 1 <= len(remaining) <= length + 1 - start
            and remaining[-1] == 1
            and len(segments) == len(between)
            and (len(segments) > 0) == (start > 0)
            and np.array_equal(starts, np.unique(starts))
            and (not len(starts) or (starts[0] == 0 and starts[-1] < start))
            and (starts == np.floor(starts)).all()
        ):
            raise ValueError("the checkpoint's history is not that of any steps")
        history = cls()
        history._now = _Moment(
            length, np.concatenate([table, np.zeros((4, 1024))], axis=1), table[:_Z, -1].copy(), remaining,
            table[_Z, length + 1 - len(remaining) :].copy(), start, forgets, segments, between,
        )  # fmt: skip
        return history

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become that of a `state_dict`; ValueError as from `from_state`, and then it is as it was."""
        self._now = History.from_state(state)._now


def _columns(now: _Moment, steps: NDArray[np.int64]) -> Array:
    """log G, log H, ρ and Z (4, n) as of the beginning of steps, up to the one to come."""
    columns = now.table[:, np.minimum(steps, now.table.shape[1] - 1)]
    columns[:_Z, steps == now.length] = now.running[:, None]
    live = now.length + 1 - len(now.open)
    recent = steps >= live
    columns[_Z, recent] = now.open[steps[recent] - live]
    return columns


def _within(now: _Moment, steps: NDArray[np.int64], end: Array, forgets: Any) -> Array:
    """The matrices (n, 2, 2) from steps of a segment to its `end`, which is its (log G, log H, ρ) there."""
    log_g, log_h, rho, z = _columns(now, steps)
    end_log_g, end_log_h, end_rho = end
    big_g = np.exp(end_log_g - log_g)
    big_h = np.where(steps < forgets, 0.0, np.exp(end_log_h - log_h))
    of_w = np.stack([big_g * (1 - z * rho), big_g * z], axis=1)  # w' of w and of v
    of_delta = np.stack([-big_h * rho, big_h], axis=1)
    return np.stack([of_w, np.asarray(end_rho)[..., None] * of_w + of_delta], axis=1)


def _next_segment(now: _Moment) -> _Moment:
    """The same moment, but that a new segment begins with the step to come."""
    whole = _within(now, np.array([now.start]), now.running, now.forgets)
    _settle(now.table, now.length, now.open, len(now.open) - 1)
    closed = np.array([[now.start, now.forgets, *now.running]])
    return now._replace(
        running=np.zeros(3),
        remaining=np.ones(1),
        open=np.zeros(1),
        start=now.length,
        segments=np.concatenate([now.segments, closed]),
        between=np.concatenate([whole @ now.between, np.eye(2)[None]]),
    )


def _settle(table: Array, length: int, open_: Array, count: int) -> None:
    """Z of the first steps in the live window, which ends with the step `length` to come, is final."""
    live = length + 1 - len(open_)
    table[_Z, live : live + count] = open_[:count]
