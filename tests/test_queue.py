"""KeyQueue is an exact FIFO, and survives being saved, moved and imported."""

from __future__ import annotations

import copy
import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

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


def two_queues() -> dict[str, torch.Tensor]:
    return {
        "module.rgb.queue": rows(6, 4, 0).T.contiguous(),
        "module.rgb.queue_ptr": torch.tensor([4]),
        "module.flow.queue": rows(7, 4, 1).T.contiguous(),
        "module.flow.queue_ptr": torch.tensor([5]),
        "queue": rows(8, 4, 2).T.contiguous(),
        "queue_ptr": torch.tensor([6]),
        "queue_label": torch.zeros(8),
    }


@pytest.mark.parametrize(
    ("prefix", "size"),
    [("module.rgb.", 6), ("module.rgb", 6), ("module.flow.", 7), ("", 8)],
)
def test_from_moco_of_several_queues(prefix: str, size: int) -> None:
    queue = KeyQueue.from_moco({"state_dict": two_queues()}, prefix=prefix)
    assert torch.equal(queue.keys, rows(size, 4, size - 6))
    assert int(queue.pointer) == size - 2


@pytest.mark.parametrize("prefix", [None, "module", "flow", "module.rgb.queue"])
def test_from_moco_lists_the_queues_that_there_are(prefix: str | None) -> None:
    listed = r"prefix='module\.rgb\.' or prefix='module\.flow\.' or prefix=''$"
    found = "found 3; choose by" if prefix is None else f"no queue with prefix {prefix!r}, but"
    with pytest.raises(ValueError, match=f"{found} {listed}"):
        KeyQueue.from_moco(two_queues(), prefix=prefix)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([], TypeError, "state_dict must be a mapping, got list"),
        ({"m.queue_ptr": torch.tensor([0])}, ValueError, "'queue', found 0, though there is m.queue_ptr"),
        ({"m.queue": torch.zeros(4, 6), "queue_ptr": 0}, ValueError, "found 0: m.queue has no m.queue_ptr"),
        ({"queue": [[1.0]], "queue_ptr": torch.tensor([0])}, TypeError, "queue must be a floating.*got list"),
        (
            {"queue": torch.zeros(4, 6, dtype=torch.int64), "queue_ptr": torch.tensor([0])},
            TypeError,
            "queue must be a floating.*got torch.int64",
        ),
        ({"queue": torch.zeros(4, 6), "queue_ptr": 3}, TypeError, "queue_ptr must be.*integers, got int"),
        (
            {"queue": torch.zeros(4, 6), "queue_ptr": torch.tensor([0.5])},
            TypeError,
            "queue_ptr must be.*integers, got torch.float32",
        ),
        (
            {"queue": torch.zeros(4, 6), "queue_ptr": torch.tensor([0, 1])},
            ValueError,
            r"one row below 6, got \[0, 1\]",
        ),
        ({"queue": torch.zeros(4, 6), "queue_ptr": torch.tensor(-1)}, ValueError, "one row below 6, got -1"),
    ],
)
@pytest.mark.parametrize("take", [KeyQueue.from_moco, KeyQueue.rename_moco])
def test_what_is_no_queue_is_refused(
    take: Callable[[Any], Any], state: Any, error: type[Exception], message: str
) -> None:
    if take is KeyQueue.rename_moco and "though there is" in message:
        pytest.skip("what has no queue is left as it is")
    with pytest.raises(error, match=message):
        take(state)


def test_a_prefix_is_a_string() -> None:
    with pytest.raises(TypeError, match="prefix must be a string or None, got 3"):
        KeyQueue.from_moco(two_queues(), prefix=3)  # type: ignore[arg-type]


class Model(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.encoder_q = nn.Linear(3, 4)
        self.queue = KeyQueue(6, 4, **settings)


def moco_state(with_queue: bool) -> dict[str, torch.Tensor]:
    state = {f"encoder_q.{name}": value for name, value in nn.Linear(3, 4).state_dict().items()}
    if with_queue:
        state |= {"queue": rows(6, 4, 0).T.contiguous(), "queue_ptr": torch.tensor([4])}
    return state


class TestStrictLoading:
    @pytest.mark.parametrize("module", ["", "module."])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("assign", [False, True])
    def test_of_mocos_checkpoint(self, module: str, dtype: torch.dtype, assign: bool) -> None:
        model, state = Model(dtype=dtype), moco_state(with_queue=True)
        prefixed = {f"{module}{name}": value for name, value in state.items()}
        before = dict(prefixed)
        wrapped = nn.ModuleDict({"module": model}) if module else model
        wrapped.load_state_dict(KeyQueue.rename_moco({"state_dict": prefixed}), assign=assign)
        assert prefixed == before
        assert torch.equal(model.encoder_q.weight, state["encoder_q.weight"])
        assert torch.equal(model.queue.keys, rows(6, 4, 0) if assign else rows(6, 4, 0).to(dtype))
        assert int(model.queue.pointer) == 4
        model.queue.enqueue(rows(3, 4, 1))
        assert int(model.queue.pointer) == 1

    def test_of_several_queues(self) -> None:
        renamed = KeyQueue.rename_moco(two_queues())
        assert sorted(renamed) == sorted(
            ["queue_label"] + [
                f"{prefix}queue.{name}"
                for prefix in ("module.rgb.", "module.flow.", "")
                for name in ("keys", "pointer")
            ]
        )  # fmt: skip

    def test_of_a_checkpoint_without_a_queue(self) -> None:
        """A queue that is missing is an error, unless the model's is none of its state."""
        state = KeyQueue.rename_moco(moco_state(with_queue=False))
        with pytest.raises(RuntimeError, match=r'Missing key.*"queue\.keys", "queue\.pointer"'):
            Model().load_state_dict(state)
        model = Model(persistent=False)
        before = model.queue.keys.clone()
        model.load_state_dict(state)
        assert torch.equal(model.encoder_q.weight, state["encoder_q.weight"])
        assert torch.equal(model.queue.keys, before)
        assert list(model.state_dict()) == ["encoder_q.weight", "encoder_q.bias"]
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            copied.queue.enqueue(rows(2, 4, 0))
            assert list(copied.state_dict()) == list(model.state_dict())
        assert model.double().queue.keys.dtype == torch.float64

    def test_of_another_size_names_the_queue(self) -> None:
        state = KeyQueue.rename_moco({**moco_state(with_queue=False), "queue": torch.zeros(4, 9),
                                      "queue_ptr": torch.tensor([8])})  # fmt: skip
        with pytest.raises(RuntimeError, match=r"size mismatch for queue\.keys.*\[9, 4\].*\[6, 4\]"):
            Model().load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0, "dim": 2}, ValueError, "size must be at least 1, got 0"),
        ({"size": 2, "dim": -1}, ValueError, "dim must be at least 1, got -1"),
        ({"size": 2, "dim": 2, "persistent": 1}, TypeError, "persistent must be True or False, got 1"),
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
