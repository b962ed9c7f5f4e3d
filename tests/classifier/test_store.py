"""The extension of the store: random numbers and the active set."""

from __future__ import annotations

import importlib
import os
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

if os.environ.get("CONTRASTIVE_OPS_TEST_WITHOUT_EXTENSION") == "1":
    pytest.importorskip("contrastive_ops._store")
store = importlib.import_module("contrastive_ops._store")

# From Random123's kat_vectors: counter, key, output.
PHILOX = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def indices(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def initial(seed: int, instances: np.ndarray, dim: int, dtype: type = np.float64) -> np.ndarray:
    out = np.full((len(instances), dim), np.nan, dtype)
    store.initial_rows(seed, instances, out)
    return out


@pytest.mark.parametrize(("counter", "key", "output"), PHILOX)
def test_philox_equals_the_published_vectors(counter: str, key: str, output: str) -> None:
    words = [tuple(int(word, 16) for word in text.split()) for text in (counter, key, output)]
    assert store.philox(words[0], words[1]) == words[2]


@given(
    seed=st.integers(0, 2**64 - 1),
    instances=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=8),
    dim=st.integers(1, 13),
)
def test_an_initial_row_depends_on_nothing_but_seed_and_instance(
    seed: int, instances: list[int], dim: int
) -> None:
    together = initial(seed, indices(*instances), dim)
    alone = np.concatenate([initial(seed, indices(instance), dim) for instance in instances])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(
        initial(seed, indices(*instances), dim, np.float32), together.astype(np.float32)
    )
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-14)


def test_initial_rows_fill_one_half_of_records() -> None:
    records = np.full((5, 2, 7), np.nan, np.float32)
    store.initial_rows(3, np.arange(5), records[:, 0])
    np.testing.assert_array_equal(records[:, 0], initial(3, np.arange(5), 7, np.float32))
    assert np.isnan(records[:, 1]).all()


def test_initial_rows_point_everywhere_alike() -> None:
    """Mean 0 and covariance 1 / dim, each within five of its standard errors; no two rows are alike."""
    count, dim = 50_000, 6
    weight = initial(11, np.arange(count), dim) * np.sqrt(dim)
    assert np.abs(weight.mean(0)).max() < 5 / np.sqrt(count)
    assert np.abs(weight.T @ weight / count - np.eye(dim)).max() < 5 * np.sqrt(2 / count)
    assert len(np.unique(weight[:, 0])) > count - 5  # 32 random bits behind each
    assert not np.isin(weight[:, 0], initial(12, np.arange(count), dim)[:, 0] * np.sqrt(dim)).any()


@pytest.mark.parametrize(
    ("instances", "out", "error"),
    [
        (np.arange(2, dtype=np.int32), np.empty((2, 3)), TypeError),
        (np.arange(4)[::2], np.empty((2, 3)), ValueError),
        (np.arange(2), np.empty((3, 3)), ValueError),
        (np.arange(2), np.empty((2, 6))[:, ::2], ValueError),
        (np.arange(2), np.empty((2, 3), np.float16), TypeError),
        (indices(0, -1), np.empty((2, 3)), ValueError),
    ],
)
def test_initial_rows_refuse(instances: np.ndarray, out: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"instances|out"):
        store.initial_rows(0, instances, out)


class Model:
    """The active set in the plainest way: a list of its slots, earliest sampled first."""

    def __init__(self, active: store.ActiveSet) -> None:
        self.instances = active.instances.tolist()
        self.order = list(range(len(self.instances)))
        self.protected: set[int] = set()

    def activate(self, batch: list[int]) -> dict[str, list[int]] | None:
        distinct = list(dict.fromkeys(batch))
        held = {self.instances[slot] for slot in self.protected}
        if len(held.union(distinct)) > len(self.order):
            return None
        incoming = [i for i in distinct if i not in self.instances]
        free = [s for s in self.order if s not in self.protected and self.instances[s] not in distinct]
        slots = free[: len(incoming)]
        evicted = [self.instances[slot] for slot in slots]
        for slot, instance in zip(slots, incoming, strict=True):
            self.instances[slot] = instance
        target = [self.instances.index(i) for i in batch]
        for slot in target:
            self.order.remove(slot)
            self.order.append(slot)
        self.protected.update(target)
        return {"target": target, "slots": slots, "incoming": incoming, "evicted": evicted}


@given(data=st.data())
def test_active_set_equals_its_model(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 25))
    active = store.ActiveSet(count, data.draw(st.integers(1, count)), seed=data.draw(st.integers(0, 9)))
    model = Model(active)
    batches = st.lists(st.integers(0, count - 1), max_size=10)
    for action in data.draw(st.lists(st.one_of(batches, st.sampled_from(["release", "reload"])))):
        if action == "release":
            active.release()
            model.protected.clear()
        elif action == "reload":
            state = active.state()
            active = store.ActiveSet(count, active.active, seed=10)
            active.load(state)
        else:
            expected = model.activate(action)
            if expected is None:
                with pytest.raises(ValueError, match="optimiser step frees"):
                    active.plan(indices(*action))
            else:
                before = active.state()
                plan = active.plan(indices(*action))
                assert {name: getattr(plan, name).tolist() for name in expected} == expected
                for name, value in active.state().items():
                    np.testing.assert_array_equal(value, before[name])
                active.commit(plan)
        state = active.state()
        assert state["instances"].tolist() == active.instances.tolist() == model.instances
        assert state["order"].tolist() == model.order
        assert state["protected"] == len(model.protected)
        slots = [model.instances.index(i) if i in model.instances else -1 for i in range(count)]
        assert active.find(np.arange(count)).tolist() == slots


def test_active_set_starts_full_and_at_random() -> None:
    started = time.perf_counter()
    first, again, other = (store.ActiveSet(10**9, 65536, seed).instances for seed in (0, 0, 1))
    assert time.perf_counter() - started < 1
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first)) == 65536
    assert len(np.intersect1d(first, other)) < 50  # 4.3 expected
    assert abs(first.mean() / 10**9 - 0.5) < 5 / np.sqrt(12 * 65536)


def test_active_set_of_all_instances_is_in_their_order() -> None:
    np.testing.assert_array_equal(store.ActiveSet(1000, 1000, 5).instances, np.arange(1000))


@pytest.mark.parametrize("active", [0, 11])
def test_active_set_refuses_a_size(active: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and num_instances .10., got {active}"):
        store.ActiveSet(10, active, 0)


def test_too_many_rows_between_two_steps_are_counted() -> None:
    active = store.ActiveSet(100, 3, 0)
    active.commit(active.plan(indices(7, 8)))
    with pytest.raises(ValueError, match=r"^4 distinct rows .* only 3 fit .* optimiser step frees"):
        active.plan(indices(9, 10, 7))
    active.release()
    active.commit(active.plan(indices(9, 10, 7)))
    assert (active.find(indices(9, 10, 7, 8)) >= 0).tolist() == [True, True, True, False]


def test_a_plan_holds_for_the_state_it_was_made_for() -> None:
    active = store.ActiveSet(10, 4, 0)
    stale = active.plan(indices(1))
    active.commit(active.plan(indices(2)))
    with pytest.raises(RuntimeError, match="changed since this plan"):
        active.commit(stale)
    stale = active.plan(indices(1))
    active.load(active.state())
    with pytest.raises(RuntimeError, match="changed since this plan"):
        active.commit(stale)
    with pytest.raises(RuntimeError, match="another's"):
        store.ActiveSet(10, 4, 0).commit(active.plan(indices(1)))


@pytest.mark.parametrize("call", ["find", "plan"])
@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (indices(0, 10), ValueError, r"\[0, 10\), got 10 at position 1"),
        (indices(-1), ValueError, r"\[0, 10\), got -1 at position 0"),
        (np.zeros(2, np.int32), TypeError, "indices must be int64, got int32"),
        (np.zeros((2, 1), np.int64), ValueError, "one dimension"),
        (np.arange(8)[::2], ValueError, "contiguous"),
    ],
)
def test_active_set_refuses_indices(
    call: str, batch: np.ndarray, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(store.ActiveSet(10, 4, 0), call)(batch)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instances", indices(0, 1, 1)),
        ("instances", indices(0, 1, 10)),
        ("instances", indices(0, 1)),
        ("order", indices(0, 1, 3)),
        ("order", indices(0, 2, 2)),
        ("protected", indices(4)),
        ("protected", None),
    ],
)
def test_a_wrong_state_changes_nothing(name: str, value: np.ndarray | None) -> None:
    active = store.ActiveSet(10, 3, 0)
    active.commit(active.plan(indices(5, 6)))
    before = active.state()
    with pytest.raises(ValueError, match=f"state.*{name}"):
        active.load(before | {name: value})
    for key, array in active.state().items():
        np.testing.assert_array_equal(array, before[key])
