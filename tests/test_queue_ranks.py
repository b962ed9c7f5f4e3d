"""A queue whose rows several ranks share is one process's queue."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from bench.ranks import counting
from contrastive_ops import KeyQueue, co2_loss
from contrastive_ops._ranks import Ranks
from tests import ranks
from tests.cases import rows

Group = dist.ProcessGroup
DIM = 3
# How many keys each rank has in each step; a rank may have none, and all together more than the queue.
STEPS = [(2, 2, 2, 2), (3, 0, 1, 4), (0, 0, 0, 0), (5, 5, 5, 5), (0, 9, 0, 1), (1, 0, 0, 0), (30, 2, 0, 7)]
SIZES = [1, 3, 8, 10, 40]


def own(queue: Tensor, size: int, group: Group) -> Tensor:
    """This rank's rows of a whole queue."""
    parts = [*queue.split(-(-size // group.size())), *[queue[:0]] * group.size()]
    return parts[group.rank()]


def keys_of(step: int, rank: int, count: int) -> Tensor:
    return rows(count, DIM, 100 * step + rank)


def advance(queue: KeyQueue, group: Group | None, steps: range, ranks: int) -> None:
    """Some steps of so many ranks; without a group of the one process that has the keys of all."""
    for step in steps:
        counts = STEPS[step][:ranks]
        if group is None:
            queue.enqueue(torch.cat([keys_of(step, rank, n) for rank, n in enumerate(counts)]))
        else:
            queue.enqueue(keys_of(step, group.rank(), counts[group.rank()]))


def check_fifo(group: Group) -> None:
    for size in SIZES:
        torch.manual_seed(size)
        one = KeyQueue(size, DIM, dtype=torch.float64)
        torch.manual_seed(size)
        shared = KeyQueue(size, DIM, dtype=torch.float64, group=group)
        assert torch.equal(shared.keys, own(one.keys, size, group))
        for step in range(len(STEPS)):
            counter: Counter[str] = Counter()
            with counting(counter):
                advance(shared, group, range(step, step + 1), group.size())
            advance(one, None, range(step, step + 1), group.size())
            assert torch.equal(shared.keys, own(one.keys, size, group)), (size, step)
            assert torch.equal(shared.pointer, one.pointer)
            # An agreement, and no key more than once.
            count = STEPS[step][group.rank()]
            assert counter["sent"] <= 80 * (group.size() - 1) + count * DIM * 8


def check_large(group: Group) -> None:
    """First rows are drawn in blocks; they, and batches that wrap, fall across several ranks."""
    torch.manual_seed(3)
    one = KeyQueue(5000, 4, dtype=torch.bfloat16)
    after = torch.rand(3)
    torch.manual_seed(3)
    shared = KeyQueue(5000, 4, dtype=torch.bfloat16, group=group)
    assert torch.equal(after, torch.rand(3))
    for step in range(4):
        batch = rows(group.size() * 900, 4, step)
        one.enqueue(batch)
        shared.enqueue(batch.chunk(group.size())[group.rank()])
    assert torch.equal(shared.keys, own(one.keys, 5000, group))


class Model(nn.Module):
    def __init__(self, group: Group | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(DIM, DIM)
        self.queue = KeyQueue(10, DIM, group=group)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def check_module(group: Group) -> None:
    """DistributedDataParallel leaves the rows alone; they move, are copied and loaded as a buffer is."""
    model = Model(group)
    advance(model.queue, group, range(2), group.size())
    before = model.queue.keys.clone()
    parallel = nn.parallel.DistributedDataParallel(model, process_group=group)
    query = parallel(rows(4, DIM, group.rank()))
    loss = co2_loss(query, query.detach(), model.queue.keys, group=group)
    loss.backward()
    parallel(rows(4, DIM, 1))
    assert torch.equal(model.queue.keys, before)

    twin = copy.deepcopy(model)
    assert twin.queue.group is group
    advance(twin.queue, group, range(2, 4), group.size())
    assert torch.equal(model.queue.keys, before)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model.queue)
    assert model.double().queue.keys.dtype == torch.float64
    assert model.to("meta").queue.keys.is_meta
    assert f"rows of this rank={len(before)}" in repr(twin.queue)

    # Of one process's state each takes its rows; of a group's, a queue without one takes the whole.
    alone = Model(None)
    advance(alone.queue, None, range(3), group.size())
    twin.load_state_dict(alone.state_dict())
    assert torch.equal(twin.queue.keys, own(alone.queue.keys, 10, group))
    advance(alone.queue, None, range(3, 5), group.size())
    advance(twin.queue, group, range(3, 5), group.size())
    assert torch.equal(twin.queue.keys, own(alone.queue.keys, 10, group))
    state = twin.state_dict()
    with pytest.raises(RuntimeError, match=r"queue\.keys is in shards, and this queue has no group"):
        alone.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*queue\.keys"):
        twin.load_state_dict({name: x for name, x in state.items() if name != "queue.keys"})
    with pytest.raises(RuntimeError, match=r"queue\.keys must be the whole queue's \(10, 3\), got \(9, 3\)"):
        twin.load_state_dict(state | {"queue.keys": torch.zeros(9, DIM)})
    whole = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in state.items()}
    fresh = Model(None)
    fresh.load_state_dict(whole)
    assert torch.equal(fresh.queue.keys, alone.queue.keys)
    unsaved = KeyQueue(10, DIM, persistent=False, group=group)
    assert list(unsaved.state_dict()) == []

    moco = {"queue": rows(DIM, 10, 5).T.contiguous().T, "queue_ptr": torch.tensor([7])}
    taken = KeyQueue.from_moco(moco, group=group)
    advance(taken, group, range(2), group.size())
    wanted = KeyQueue.from_moco(moco)
    advance(wanted, None, range(2), group.size())
    assert torch.equal(taken.keys, own(wanted.keys, 10, group))


def check_errors(group: Group) -> None:
    queue = KeyQueue(10, DIM, group=group)
    before = queue.keys.clone()
    odd = group.rank() == 1
    with pytest.raises(ValueError, match=r"\(N, 3\), got \(2, 4\)"):
        queue.enqueue(rows(2, 4 if odd else 3, 0))
    with pytest.raises(ValueError, match=r"size is 10 on .* 9 on rank 1"):
        KeyQueue(9 if odd else 10, DIM, group=group).enqueue(rows(2, 3, 0))
    with pytest.raises(ValueError, match="dtype is"):
        KeyQueue(10, DIM, torch.float64 if odd else torch.float32, group=group).enqueue(rows(2, 3, 0))
    assert torch.equal(queue.keys, before)
    assert int(queue.pointer) == 0
    with pytest.raises(TypeError, match="group must be"):
        KeyQueue(10, DIM, group="all")  # type: ignore[arg-type]
    Ranks(group, "the end").agree({})


def check_queue(group: Group) -> None:
    for check in (check_fifo, check_large, check_module, check_errors):
        check(group)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_queue(size: int) -> None:
    ranks.run(check_queue, size)


TRAINED = 4  # ranks whose keys all runs get, on however many


def half(group: Group | None, folder: str, begin: int, size: int) -> Any:
    """Loads the checkpoint of that moment, unless it is the first, takes steps, and saves."""
    queue = KeyQueue(size, DIM, group=group)
    if begin:
        state = {"model": queue.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/{begin}")
        queue.load_state_dict(state["model"])
    for step in range(begin, begin + 3):
        every = torch.cat([keys_of(step, rank, n) for rank, n in enumerate(STEPS[step][:TRAINED])])
        queue.enqueue(every if group is None else every.tensor_split(group.size())[group.rank()])
    dcp.save({"model": queue.state_dict()}, checkpoint_id=f"{folder}/{begin + 3}")
    return queue.keys, int(queue.pointer)


def alone(folder: str, begin: int, size: int) -> Any:
    return half(None, folder, begin, size)


@pytest.mark.parametrize(("first", "then"), [(2, 3), (4, 1), (1, 2), (3, 4)])
def test_checkpoints_load_on_another_number_of_ranks(tmp_path: Path, first: int, then: int) -> None:
    size = 10
    for count, begin in ((first, 0), (then, 3)):
        if count == 1:
            torch.manual_seed(0)
            found = [alone(str(tmp_path), begin, size)]
        else:
            found = ranks.run(half, count, str(tmp_path), begin, size)
    one = KeyQueue(size, DIM)
    for step in range(6):
        one.enqueue(torch.cat([keys_of(step, rank, n) for rank, n in enumerate(STEPS[step][:TRAINED])]))
    assert torch.equal(torch.cat([keys for keys, _ in found]), one.keys)
    assert all(pointer == int(one.pointer) for _, pointer in found)
