"""A KeyQueue over several ranks is, row by row, the queue of one process."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from contrastive_ops import KeyQueue, co2_loss
from contrastive_ops._ranks import Disagreement
from contrastive_ops.queue import _Batch, _shard
from tests import ranks
from tests.cases import mostly_thorough, rows

Group = dist.ProcessGroup
DIM = 3


def queues(group: Group, size: int, **settings: Any) -> tuple[KeyQueue, KeyQueue]:
    """One over the ranks and one of this process alone, which start alike."""
    torch.manual_seed(size)
    ours = KeyQueue(size, DIM, group=group, **settings)
    torch.manual_seed(size)
    return ours, KeyQueue(size, DIM, **settings)


def own(whole: Tensor, group: Group) -> Tensor:
    shards = whole.chunk(group.size())
    return shards[group.rank()] if group.rank() < len(shards) else whole[:0]


def assert_same(ours: KeyQueue, alone: KeyQueue) -> None:
    assert ours.group is not None
    assert torch.equal(ours.keys, own(alone.keys, ours.group))
    assert torch.equal(ours.pointer, alone.pointer)


def enqueue(ours: KeyQueue, alone: KeyQueue, counts: list[int], seed: int) -> None:
    """Keys of all ranks; `counts` are those of the first ranks, and what is not given is 0."""
    assert ours.group is not None
    keys = rows(sum(counts), DIM, seed)
    counts = counts + [0] * (ours.group.size() - len(counts))
    ours.enqueue(keys.split(counts)[ours.group.rank()])
    alone.enqueue(keys)


BATCHES = {
    "equal": [[2, 2], [2, 2], [2, 2], [2, 2], [2, 2]],
    "ragged": [[3, 1], [0, 4], [5, 2], [1, 0], [2, 7], [1, 1]],
    "none": [[0, 0], [0, 1], [0, 0], [2, 0]],
    "larger than the queue": [[4, 1], [30, 17], [1, 60], [70, 0], [13, 13]],
}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 13, 26])
def test_moves_are_those_of_a_ring(size: int) -> None:
    """For any pointer and numbers of keys: the row of a shard that a key takes, or none."""
    for number in (1, 2, 3, 5):
        for counts in itertools.product((0, 1, 4, 9), repeat=min(number, 3)):
            every = [*counts, *[2] * (number - len(counts))]
            pointer = sum(counts) % size
            expected = [(-1, -1)] * size
            row = pointer
            for rank, count in enumerate(every):
                for key in range(count):
                    expected[row % size] = (rank, key)
                    row += 1
            got = [(-1, -1)] * size
            batch = _Batch(every, pointer, size)
            for sender, owner in itertools.product(range(number), repeat=2):
                moves = batch.moves(sender, owner)
                assert len(moves) <= 2
                for move in moves:
                    for i in range(move.length):
                        place = _shard(size, owner, number)[move.row + i]
                        assert got[place] == (-1, -1)
                        got[place] = (sender, move.key + i)
            assert got == expected
            assert batch.next_pointer == row % size


def check_equals_one_process(group: Group) -> None:
    for size, dtype in [(1, torch.float32), (3, torch.float64), (8, torch.bfloat16), (13, torch.float32)]:
        ours, alone = queues(group, size, dtype=dtype)
        assert_same(ours, alone)
        for seed, counts in enumerate(itertools.chain(*BATCHES.values())):
            enqueue(ours, alone, [*counts, seed % 3, 0][: group.size()], seed)
            assert_same(ours, alone)


def check_large_queue_starts_alike(group: Group) -> None:
    """Drawn in several blocks, of which the last is smaller and shards begin anywhere."""
    torch.manual_seed(9001)
    ours = KeyQueue(9001, DIM, group=group)
    after = torch.rand(3)
    torch.manual_seed(9001)
    alone = KeyQueue(9001, DIM)
    assert torch.equal(torch.rand(3), after)
    assert_same(ours, alone)
    torch.testing.assert_close(ours.keys.norm(dim=1), torch.ones(len(ours.keys)))


def check_sends_each_key_once(group: Group) -> None:
    """A rank sends what others hold of its keys in the queue's dtype, and nothing if none has any."""
    ours, alone = queues(group, 12, dtype=torch.bfloat16)
    sent: list[int] = []
    send = dist.all_to_all_single

    def counted(output: Tensor, leaving: Tensor, *arguments: Any, **settings: Any) -> Any:
        sent.append(leaving.nbytes)
        return send(output, leaving, *arguments, **settings)

    forbidden = mock.Mock(side_effect=AssertionError("keys are sent to all ranks"))
    with (
        mock.patch.object(dist, "all_to_all_single", counted),
        mock.patch.object(dist, "broadcast", forbidden),
    ):
        for seed, counts in enumerate([[4, 1], [2, 7], [30, 3]]):
            before = int(alone.pointer)
            enqueue(ours, alone, counts, seed)
            every = counts + [0] * (group.size() - len(counts))
            first, total = sum(every[: group.rank()]), sum(every)
            kept = range(max(first, total - 12), first + every[group.rank()])
            mine = _shard(12, group.rank(), group.size())
            leaving = [i for i in kept if (before + i) % 12 not in mine]
            assert sent.pop() == len(leaving) * DIM * 2
            assert not sent
        enqueue(ours, alone, [0], 0)
        assert not sent
    assert_same(ours, alone)


def check_errors(group: Group) -> None:
    """What one rank refuses changes nothing on any, and the queue goes on."""
    ours, alone = queues(group, 8)
    enqueue(ours, alone, [3, 2], 0)
    message = r"keys must be \(N, 3\), got \(2, 4\)"
    error, told = (ValueError, "") if group.rank() == 1 else (Disagreement, "refused on rank 1: ValueError: ")
    with pytest.raises(error, match=told + message):
        ours.enqueue(torch.ones(2, 4 if group.rank() == 1 else 3))
    assert_same(ours, alone)
    error = ValueError if group.rank() == 0 else Disagreement
    with pytest.raises(error, match="keys must not be rows of the queue that they overwrite"):
        ours.enqueue(ours.keys[:1] if group.rank() == 0 else torch.ones(2, DIM))
    assert_same(ours, alone)
    other = KeyQueue(8, DIM, dtype=torch.float64 if group.rank() else torch.float32, group=group)
    with pytest.raises(Disagreement, match=r"dtype is torch.float32 on rank 0, torch.float64 on rank"):
        other.enqueue(torch.ones(2, DIM))
    enqueue(ours, alone, [1, 2], 1)
    assert_same(ours, alone)
    if group.rank() == 0:  # a pointer that one rank has moved
        ours.pointer.add_(1)
    with pytest.raises(Disagreement, match=r"pointer is 1 on rank 0, 0 on rank"):
        ours.enqueue(torch.ones(2, DIM))
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup or None, got str"):
        KeyQueue(8, DIM, group="all")  # type: ignore[arg-type]


def check_module(group: Group) -> None:
    """It moves, is copied and is shown like a module with buffers, but has none."""
    ours, alone = queues(group, 7)
    rank, size = group.rank(), group.size()
    mine = _shard(7, rank, size)
    shown = f"size=7, dim=3, dtype=torch.float32, rows {mine.start}:{mine.stop} on rank {rank} of {size}"
    assert shown in repr(ours)
    assert not list(ours.buffers())
    copied = copy.deepcopy(nn.ModuleList([ours]))[0]
    enqueue(copied, alone, [2, 1], 0)
    assert_same(copied, alone)
    assert int(ours.pointer) == 0
    with pytest.raises(TypeError, match="KeyQueue with a group cannot be pickled"):
        pickle.dumps(nn.ModuleList([ours]))
    model, whole = nn.ModuleList([copied]).double(), alone.double()
    enqueue(copied, whole, [1, 4], 1)
    assert copied.keys.dtype == torch.float64
    assert copied.pointer.dtype == torch.int64
    assert_same(copied, whole)
    assert model.to("meta")[0].keys.is_meta
    assert KeyQueue(7, DIM, persistent=False, group=group).state_dict() == {}


class Model(nn.Module):
    def __init__(self, group: Group | None, **settings: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(DIM, DIM)
        self.queue = KeyQueue(7, DIM, group=group, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def check_state_dict(group: Group) -> None:
    ours, alone = queues(group, 7)
    enqueue(ours, alone, [2, 2], 0)
    state = ours.state_dict()
    assert list(state) == ["keys", "pointer"]
    assert state["keys"].shape == (7, DIM)
    assert torch.equal(state["keys"].full_tensor(), alone.keys)

    for assign, sharded in itertools.product((False, True), repeat=2):
        ours, alone = queues(group, 7)
        enqueue(ours, alone, [2, 2], 0)
        other, both = KeyQueue(7, DIM, group=group), copy.deepcopy(alone)
        other.load_state_dict((ours if sharded else alone).state_dict(), assign=assign)
        assert_same(other, both)
        assert other.keys.untyped_storage().nbytes() == other.keys.nbytes  # and not the whole queue's
        enqueue(other, both, [1, 3], 1)
        assert_same(other, both)

    model = Model(group)
    whole = {"queue": rows(7, DIM, 5).T.contiguous(), "queue_ptr": torch.tensor([4])}
    moco = {f"encoder.{name}": x for name, x in model.encoder.state_dict().items()} | whole
    model.load_state_dict(KeyQueue.rename_moco(moco))
    imported = KeyQueue.from_moco(whole, group=group)
    for queue in (model.queue, imported):
        both = KeyQueue.from_moco(whole)
        assert_same(queue, both)
        enqueue(queue, both, [3, 3], 6)
        assert_same(queue, both)

    names = ["encoder.weight", "encoder.bias"]
    without = {name: moco[name] for name in names}
    with pytest.raises(RuntimeError, match=r'Missing key.*"queue\.keys", "queue\.pointer"'):
        model.load_state_dict(without)
    assert Model(group, persistent=False).load_state_dict(without).missing_keys == []
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"queue\.keys", "queue\.pointer"'):
        Model(group, persistent=False).load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"queue\.more"'):
        model.load_state_dict({**model.state_dict(), "queue.more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"queue\.keys: size mismatch.*\[9, 3\].*\[7, 3\]"):
        model.load_state_dict({**model.state_dict(), "queue.keys": torch.zeros(9, DIM)})
    with pytest.raises(RuntimeError, match=r"keys: a DTensor, the state of a queue with a group"):
        KeyQueue(7, DIM).load_state_dict(state)
    from torch.distributed.tensor import Replicate

    replicated = state["keys"].redistribute(placements=[Replicate()])
    other = KeyQueue(7, DIM, group=group)
    other.load_state_dict({**state, "keys": replicated})
    assert torch.equal(other.keys, state["keys"].to_local())


def check_ddp(group: Group) -> None:
    """DistributedDataParallel overwrites buffers by rank 0's, at the start and before every forward."""
    torch.manual_seed(7)
    model = Model(group)
    alone = KeyQueue(7, DIM)
    alone.load_state_dict(
        {"keys": model.queue.state_dict()["keys"].full_tensor(), "pointer": torch.tensor(0)}
    )
    parallel = DistributedDataParallel(model)
    for step in range(3):
        query = parallel(rows(2, DIM, group.rank()))
        co2_loss(query, query.detach(), model.queue.keys, group=group).backward()
        enqueue(model.queue, alone, [2, 3], step)
        assert_same(model.queue, alone)
    state = get_model_state_dict(parallel)
    assert torch.equal(state["queue.keys"].full_tensor(), alone.keys)
    other = Model(group)
    set_model_state_dict(DistributedDataParallel(other).module, state)
    assert_same(other.queue, alone)


def check_group_of_some_ranks(group: Group) -> None:
    """Ranks are those of the group, which are not the processes' own numbers."""
    last = group.size() - 1
    some = dist.new_group([last - 1, last])
    if group.rank() >= last - 1:
        assert isinstance(some, Group)
        ours, alone = queues(some, 7)
        enqueue(ours, alone, [3, 2], 0)
        assert_same(ours, alone)
        state = ours.state_dict()
        assert torch.equal(state["keys"].full_tensor(), alone.keys)
        other = KeyQueue(7, DIM, group=some)
        other.load_state_dict(state)
        assert_same(other, alone)
    else:
        with pytest.raises(ValueError, match="group that this process belongs to"):
            KeyQueue(7, DIM, group=some)  # type: ignore[arg-type]


def check_everything(group: Group) -> None:
    check_equals_one_process(group)
    check_large_queue_starts_alike(group)
    check_sends_each_key_once(group)
    check_errors(group)
    check_module(group)
    check_state_dict(group)
    check_ddp(group)
    check_group_of_some_ranks(group)


@pytest.mark.slow
@pytest.mark.parametrize("size", mostly_thorough([2, 3, 4], (3).__eq__))
def test_among_ranks(size: int) -> None:
    ranks.run(check_everything, size)


SIZES = {"queue": 13, "short": 5}  # of five rows, the last of four ranks holds none


def fresh(group: Group | None) -> nn.ModuleDict:
    torch.manual_seed(13)
    return nn.ModuleDict({
        name: KeyQueue(size, DIM, dtype=torch.bfloat16, group=group) for name, size in SIZES.items()
    })  # fmt: skip


def step(alone: nn.ModuleDict, ours: nn.ModuleDict | None, steps: range) -> None:
    """The same batches to both; they stay the same."""
    for seed in steps:
        for name, queue in alone.items():
            if ours is None:
                queue.enqueue(rows(5, DIM, seed))
            elif ours[name].group is not None:
                enqueue(ours[name], queue, [1, 4], seed)
                assert_same(ours[name], queue)
            else:
                for following in (queue, ours[name]):
                    following.enqueue(rows(5, DIM, seed))
                assert torch.equal(ours[name].keys, queue.keys)
                assert torch.equal(ours[name].pointer, queue.pointer)


def save(group: Group | None, folder: str) -> None:
    ours = fresh(group)
    step(fresh(None), ours, range(4))
    dcp.save({"model": ours.state_dict()}, checkpoint_id=folder, no_dist=group is None)


def load(group: Group | None, folder: str) -> None:
    alone, ours = fresh(None), fresh(group)
    step(alone, None, range(4))
    step(fresh(None), ours, range(7, 8))  # keys and a pointer that loading has to replace
    state = {"model": ours.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=group is None)
    ours.load_state_dict(state["model"])
    for name, queue in ours.items():
        if group is not None:
            assert_same(queue, alone[name])
        assert torch.equal(queue.pointer, alone[name].pointer)
    step(alone, ours, range(4, 8))


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "loaded"), mostly_thorough([(2, 3), (4, 1), (1, 4)], ((2, 3)).__eq__))
def test_checkpoint_on_other_ranks(saved: int, loaded: int, tmp_path: Path) -> None:
    """One rank is a process without a group."""
    folder = str(tmp_path / "checkpoint")
    for worker, size in ((save, saved), (load, loaded)):
        if size == 1:
            worker(None, folder)
        else:
            ranks.run(worker, size, folder)
