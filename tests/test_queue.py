"""KeyQueue is an exact FIFO, and survives being saved, moved and imported."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contrastive_ops import KeyQueue
from tests.cases import rows


@given(size=st.integers(1, 20), batches=st.lists(st.integers(0, 45), max_size=12))
def test_equals_a_deque(size: int, batches: list[int]) -> None:
    queue = KeyQueue(size, 2)
    model = deque(queue.keys.tolist(), maxlen=size)
    for seed, batch in enumerate(batches):
        keys = rows(batch, 2, seed)
        queue.enqueue(keys)
        model.extend(keys.tolist())
        oldest_first = torch.roll(queue.keys, -int(queue.pointer), dims=0)
        assert oldest_first.tolist() == list(model)
        assert int(queue.pointer) == sum(batches[: seed + 1]) % size


def test_starts_with_unit_rows() -> None:
    queue = KeyQueue(100, 8)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(100))
    assert queue.pointer.dtype == torch.int64
    assert queue.pointer.shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_stores_keys_in_its_own_dtype(dtype: torch.dtype) -> None:
    queue = KeyQueue(4, 3, dtype=dtype)
    keys = rows(2, 3, 0)
    queue.enqueue(keys)
    assert queue.keys.dtype == dtype
    assert torch.equal(queue.keys[:2], keys.to(dtype))


def test_stores_no_graph() -> None:
    queue = KeyQueue(4, 3)
    queue.enqueue(rows(2, 3, 0).requires_grad_())
    assert not queue.keys.requires_grad


def test_enqueue_is_seen_by_autograd() -> None:
    """Overwriting keys that a graph has saved must be noticed, so the version counter has to move."""
    queue = KeyQueue(4, 3)
    weight = torch.ones(3, requires_grad=True)
    product = (queue.keys * weight).sum()
    queue.enqueue(rows(2, 3, 0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_state_dict_round_trip() -> None:
    queue, other = KeyQueue(5, 3), KeyQueue(5, 3)
    queue.enqueue(rows(7, 3, 0))
    other.load_state_dict(queue.state_dict())
    for following in (queue, other):
        following.enqueue(rows(4, 3, 1))
    assert torch.equal(queue.keys, other.keys)
    assert torch.equal(queue.pointer, other.pointer)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_from_moco(prefix: str, wrapped: bool) -> None:
    keys = rows(6, 4, 0)
    state = {f"{prefix}queue": keys.T.contiguous(), f"{prefix}queue_ptr": torch.tensor([4])}
    state[f"{prefix}encoder_q.fc.weight"] = torch.zeros(1)
    queue = KeyQueue.from_moco({"epoch": 3, "state_dict": state} if wrapped else state)
    assert torch.equal(queue.keys, keys)
    assert int(queue.pointer) == 4


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"one entry 'queue', found 0"),
        ({"queue": torch.zeros(4, 6)}, r"one entry 'queue_ptr', found 0"),
        ({"queue": torch.zeros(4), "queue_ptr": torch.tensor([0])}, r"must be \(D, K\), got \(4,\)"),
        ({"queue": torch.zeros(4, 6), "queue_ptr": torch.tensor([6])}, r"one row below 6, got \[6\]"),
    ],
)
def test_from_moco_refuses(state: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyQueue.from_moco(state)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0, "dim": 2}, ValueError, "size must be at least 1, got 0"),
        ({"size": 2, "dim": -1}, ValueError, "dim must be at least 1, got -1"),
        ({"size": 2.0, "dim": 2}, TypeError, "size must be an integer, got float"),
        (
            {"size": 2, "dim": 2, "dtype": torch.int32},
            TypeError,
            "dtype must be a floating-point torch.dtype",
        ),
    ],
)
def test_bad_construction(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KeyQueue(**arguments)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ([[1.0, 2.0]], TypeError, "keys must be a floating-point torch.Tensor, got list"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(2), ValueError, r"keys must be \(N, 2\), got \(2,\)"),
        (torch.zeros(3, 5), ValueError, r"keys must be \(N, 2\), got \(3, 5\)"),
        (torch.zeros(3, 2, device="meta"), ValueError, "keys must be on the queue's device, cpu, got meta"),
    ],
)
def test_bad_keys_change_nothing(keys: object, error: type[Exception], message: str) -> None:
    queue = KeyQueue(4, 2)
    before = queue.keys.clone()
    with pytest.raises(error, match=message):
        queue.enqueue(keys)  # type: ignore[arg-type]
    assert torch.equal(queue.keys, before)
    assert int(queue.pointer) == 0
