"""Catching a row up gives what its steps one by one give, in exact arithmetic."""

from __future__ import annotations

import functools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_ops._contract import SGDSettings
from contrastive_ops.classifier.history import History

Step = tuple[float, float, float, bool]  # lr, momentum, weight_decay, nesterov


def exact(row: tuple[float, float], steps: list[Step]) -> tuple[Fraction, Fraction]:
    """[w; v] after steps without a gradient, rounded to 60 digits, without which fractions would grow."""
    w, v = Fraction(row[0]), Fraction(row[1])
    for lr, momentum, weight_decay, nesterov in steps:
        m, eta = Fraction(momentum), Fraction(lr)
        grad = Fraction(weight_decay) * w
        v = m * v + grad
        w = w - eta * (grad + m * v if nesterov else v)
        w, v = (Fraction(round(x * 10**60), 10**60) for x in (w, v))
    return w, v


def caught_up(history: History, row: tuple[float, float], since: int) -> np.ndarray:
    return history.coefficients(np.array([since]))[0] @ np.array(row)


SCHEDULE = [
    0.06 * min(1, (t + 1) / 1000) * 0.5 * (1 + float(np.cos(np.pi * t / 100_000))) for t in range(100_000)
]


@functools.cache
def scheduled(momentum: float) -> History:
    history = History()
    for lr in SCHEDULE:
        history.append(SGDSettings(lr, momentum, 1e-4, False))
    return history


def distance(actual: np.ndarray, expected: tuple[Fraction, ...], scale: float) -> float:
    """A distance of [w; v], relative to the longer: what matters where one of them has died away."""
    return float(max(abs(Fraction(a) - e) for a, e in zip(actual.tolist(), expected, strict=True))) / scale


steps = st.tuples(
    st.sampled_from([0.0, 1e-3, 0.06, 0.3, 3.0]),
    st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    st.sampled_from([0.0, 1e-4, 1e-2, 0.1]),
    st.booleans(),
)


class TestAgainstExactArithmetic:
    @given(
        runs=st.lists(st.tuples(steps, st.sampled_from([1, 2, 7, 60])), min_size=1, max_size=12),
        since=st.floats(0, 1),
        row=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    )
    def test_any_schedule(self, runs: list[tuple[Step, int]], since: float, row: tuple[float, float]) -> None:
        """Momentum, decay and nesterov that come and go, learning rates that jump and vanish."""
        taken = [step for step, times in runs for _ in range(times)]
        history = History()
        for step in taken:
            history.append(SGDSettings(*step))
        start = int(since * len(taken))
        expected = exact(row, taken[start:])
        scale = max(float(max(map(abs, expected))), 1e-30)
        # Relative to the result; where weights swing, and all but cancel, to what they swung between.
        assert distance(caught_up(history, row, start), expected, scale) <= 1e-9 or (
            distance(caught_up(history, row, start), expected, max(map(abs, row))) <= 1e-13
        )

    @pytest.mark.parametrize("gap", [1, 2, 10, 1000, 10_000, 100_000])
    @pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
    def test_any_gap(self, gap: int, momentum: float) -> None:
        """A cosine schedule with warm-up, against steps in extended precision."""
        w, v = np.longdouble(0.8), np.longdouble(-0.3)
        for lr in SCHEDULE[-gap:]:
            v = momentum * v + np.longdouble(1e-4) * w
            w = w - np.longdouble(lr) * v
        actual = caught_up(scheduled(momentum), (0.8, -0.3), len(SCHEDULE) - gap)
        assert abs(actual[0] - w) <= 1e-11 * abs(w)
        assert abs(actual[1] - v) <= 1e-11 * abs(v) + 1e-15

    def test_a_row_of_the_present_stays_as_it_is(self) -> None:
        history = History()
        for _ in range(500):
            history.append(SGDSettings(0.06, 0.9, 1e-4, False))
        assert np.array_equal(history.coefficients(np.array([500]))[0], np.eye(2))

    def test_swinging_weights(self) -> None:
        """lr · weight_decay beyond (1 − √m)², where the triangular coordinates have poles."""
        history, taken = History(), [(0.5, 0.99, 1e-3, False)] * 2000
        for step in taken:
            history.append(SGDSettings(*step))
        for start in (0, 1, 1000, 1500, 1990, 1999):
            expected = exact((1.0, 0.5), taken[start:])
            assert distance(caught_up(history, (1.0, 0.5), start), expected, 1.0) <= 1e-13


class TestHistory:
    def test_knows_nothing_of_the_future(self) -> None:
        """What it says of past steps does not depend on those to come: it is asked as it grows."""
        rng = np.random.default_rng(0)
        history, row = History(), (0.7, 0.2)
        w = np.array([row] * 300)  # row t sat out since step t
        for t in range(300):
            step = (float(rng.uniform(0, 0.2)), 0.9, float(rng.uniform(0, 1e-2)), bool(t % 2))
            history.append(SGDSettings(*step))
            for s in range(t + 1):
                w[s] = [float(x) for x in exact(tuple(w[s]), [step])]  # type: ignore[arg-type]
            since = np.arange(t + 1)
            actual = history.coefficients(since) @ np.array(row)
            assert np.abs(actual - w[: t + 1]).max() <= 1e-13

    def test_the_state_goes_on_bit_by_bit(self) -> None:
        rng = np.random.default_rng(0)
        taken = [
            (float(rng.uniform(0, 3)), float(rng.choice([0, 0.9, 0.99])), 1e-2, False) for _ in range(3000)
        ]
        history, resumed = History(), History()
        for t, step in enumerate(taken):
            history.append(SGDSettings(*step))
            if t == 1500:
                resumed.load_state_dict(history.state_dict())
            if t > 1500:
                resumed.append(SGDSettings(*step))
        since = np.arange(3001)
        assert len(resumed) == len(history) == 3000
        assert np.array_equal(resumed.coefficients(since), history.coefficients(since))

    def test_a_million_steps_take_tens_of_megabytes(self) -> None:
        history = History()
        for _ in range(20_000):
            history.append(SGDSettings(0.06, 0.9, 1e-4, False))
        size = sum(tensor.nbytes for tensor in history.state_dict().values())
        assert size / 20_000 * 1e6 <= 40e6

    def test_its_state_is_a_copy(self) -> None:
        history = History()
        history.append(SGDSettings(0.06, 0.9, 1e-4, False))
        state = history.state_dict()
        before = {name: value.clone() for name, value in state.items()}
        history.append(SGDSettings(0.06, 0.9, 1e-4, False))
        assert all(torch.equal(state[name], before[name]) for name in state)

    @pytest.mark.parametrize("step", [(1e4, 0.9, 1e-4, False), (0.6, 0.9, 1.0, True)])
    def test_an_absurd_decay_is_refused(self, step: Step) -> None:
        history = History()
        with pytest.raises(ValueError, match=r"lr · weight_decay must be less than"):
            history.append(SGDSettings(*step))
        assert len(history) == 0


@pytest.mark.slow
@settings(max_examples=5)
@given(momentum=st.sampled_from([0.9, 0.99]), seed=st.integers(0, 100))
def test_many_segments_do_not_cost_digits(momentum: float, seed: int) -> None:
    """Learning rates over five orders of magnitude, 5,000 steps, rows from all over."""
    rng = np.random.default_rng(seed)
    taken = [(float(10 ** rng.uniform(-5, 0)), momentum, 1e-3, False) for _ in range(5000)]
    history = History()
    state = np.zeros((5001, 2), np.longdouble)
    state[:] = (1.0, 0.0)
    for t, step in enumerate(taken):
        history.append(SGDSettings(*step))
        w, v = state[: t + 1].T
        v = np.longdouble(momentum) * v + np.longdouble(1e-3) * w
        state[: t + 1] = np.stack([w - np.longdouble(step[0]) * v, v], 1)
    actual = history.coefficients(np.arange(5001)) @ np.array([1.0, 0.0])
    size = np.linalg.norm(state.astype(np.float64), axis=1)
    assert (np.linalg.norm((actual - state).astype(np.float64), axis=1) / size).max() <= 1e-10
