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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_CONVERGED = 1e-30  # what a sum Z still lacks, relative to its terms, when it leaves the live window
_LONGEST_WINDOW = 1 << 14
_LARGEST_LOGARITHM = 4096.0  # of which float64 keeps 12 digits after the point

_LOG_G, _LOG_H, _RHO, _Z = range(4)
# Of a segment: its first step, the step before which its φ are zero, and its three running values at its end.
_START, _FORGETS, _END_LOG_G, _END_LOG_H, _END_RHO = range(5)


def check_step(lr: float, momentum: float, weight_decay: float, nesterov: bool) -> None:
    """Raises ValueError for a step that cannot be taken late."""
    ahead = 1 + momentum if nesterov else 1.0
    if not lr * weight_decay * ahead < 1:
        raise ValueError(
            f"lr · weight_decay must be less than {1 / ahead:.3g}, got {lr} · {weight_decay}: "
            "a step would turn weights around"
        )


class History:
    """The steps that an optimiser has taken, as far as rows that sat them out need to know.

    Example:
        >>> import numpy as np
        >>> from contrastive_ops._history import History
        >>> history = History()
        >>> for lr in (0.1, 0.2):
        ...     history.append(lr, momentum=0.9, weight_decay=0.01, nesterov=False)
        >>> w, v = (history.coefficients(np.array([0]))[0] @ [1.0, 0.0]).tolist()
        >>> round(w, 6), round(v, 6)  # 1 − 0.1·0.01 = 0.999, then 0.999 − 0.2·(0.9·0.01 + 0.01·0.999)
        (0.995202, 0.01899)
    """

    def __init__(self) -> None:
        self._length = 0
        self._table = np.zeros((4, 1024))  # log G, log H, ρ and Z as of the beginning of each step
        self._remaining = np.ones(1)  # Π h/g of each step in the live window, whose last is the one to come
        self._forgets = 0  # rows of earlier steps have no momentum left: a step had none
        self._start = 0  # of the current segment
        self._segments = np.empty((0, 5))
        self._between = np.empty((0, 2, 2))  # from each segment's end to the current one's beginning

    def __len__(self) -> int:
        """How many steps were taken."""
        return self._length

    def append(self, lr: float, momentum: float, weight_decay: float, nesterov: bool) -> None:
        """One more step; ValueError as from `check_step`."""
        check_step(lr, momentum, weight_decay, nesterov)
        c = -lr * momentum * (momentum if nesterov else 1.0)
        decay = lr * weight_decay * (1 + momentum if nesterov else 1.0)  # d = 1 − decay
        determinant = momentum * (1 - lr * weight_decay if nesterov else 1.0)
        log_g, log_h, rho, _ = self._table[:, self._length]
        if (
            c * rho + 1 - decay < 0.9 * (1 - decay)
            or len(self._remaining) > _LONGEST_WINDOW
            or max(abs(log_g), abs(log_h)) > _LARGEST_LOGARITHM
        ):
            self._end_segment()
            log_g, log_h, rho, _ = self._table[:, self._length]

        g = c * rho + 1 - decay
        h = determinant / g
        live = self._length + 1 - len(self._remaining)
        self._table[_Z, live : self._length + 1] += c / g * self._remaining
        self._remaining = np.append(self._remaining * (h / g), 1.0)
        if h == 0:
            self._remaining, self._forgets = np.ones(1), self._length + 1
        elif len(self._remaining) % 64 == 0:
            self._remaining = self._remaining[np.argmax(np.abs(self._remaining) > _CONVERGED) :]

        self._length += 1
        if self._length == self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
        self._table[:, self._length] = (
            log_g + np.log1p(c * rho - decay),
            log_h + (np.log(h) if h else 0.0),
            (momentum * rho + weight_decay) / g,
            0.0,
        )

    def coefficients(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """The matrices (n, 2, 2) that take [w; v] of a row as of `steps` (n,), each a number of steps that
        the row has taken, to now."""
        matrices = np.empty((len(steps), 2, 2))
        old = steps < self._start
        current = steps[~old]
        matrices[~old] = self._within(current, self._table[:3, self._length], self._forgets)
        if old.any():
            steps = steps[old]
            segment = np.searchsorted(self._segments[:, _START], steps, side="right") - 1
            ends = self._segments[segment]
            to_end = self._within(steps, ends[:, _END_LOG_G:].T, ends[:, _FORGETS])
            begun = self._within(np.array([self._start]), self._table[:3, self._length], self._forgets)
            matrices[old] = begun @ self._between[segment] @ to_end
        return matrices

    def _within(
        self, steps: NDArray[np.int64], end: NDArray[np.float64], forgets: Any
    ) -> NDArray[np.float64]:
        """From steps of a segment to its `end`, which is its (log G, log H, ρ) there."""
        log_g, log_h, rho, z = self._table[:, steps]
        end_log_g, end_log_h, end_rho = end
        big_g = np.exp(end_log_g - log_g)
        big_h = np.where(steps < forgets, 0.0, np.exp(end_log_h - log_h))
        of_w = np.stack([big_g * (1 - z * rho), big_g * z], axis=1)  # w' of w and of v
        of_delta = np.stack([-big_h * rho, big_h], axis=1)
        return np.stack([of_w, np.asarray(end_rho)[..., None] * of_w + of_delta], axis=1)

    def _end_segment(self) -> None:
        """A new segment begins with the step to come."""
        start, end = np.array([self._start]), self._table[:3, self._length].copy()
        whole = self._within(start, end, self._forgets)
        self._between = np.concatenate([whole @ self._between, np.eye(2)[None]])
        closed = np.array([[self._start, self._forgets, *end]])
        self._segments = np.concatenate([self._segments, closed])
        self._table[:, self._length] = 0.0
        self._start, self._remaining = self._length, np.ones(1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy; 32 MB for a million steps."""
        arrays = {
            "table": self._table[:, : self._length + 1],
            "remaining": self._remaining,
            "current": np.array([self._start, self._forgets]),
            "segments": self._segments,
            "between": self._between,
        }
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        arrays = {name: value.cpu().numpy().copy() for name, value in state.items()}
        self._length = arrays["table"].shape[1] - 1
        self._table = np.zeros((4, max(1024, 2 * (self._length + 1))))
        self._table[:, : self._length + 1] = arrays["table"]
        self._remaining = arrays["remaining"]
        self._start, self._forgets = (int(value) for value in arrays["current"])
        self._segments, self._between = arrays["segments"], arrays["between"]
