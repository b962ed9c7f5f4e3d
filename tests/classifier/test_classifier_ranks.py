"""A classifier whose shards several ranks hold is the same run as one process's with these shards."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from contrastive_ops import DelayedSGD, InstanceClassifier, conic_loss
from contrastive_ops._ranks import Disagreement
from tests import ranks
from tests.cases import mostly_thorough, rows

Group = dist.ProcessGroup

COUNT, DIM, ACTIVE, SHARDS = 203, 6, 96, 8
EVERY = torch.arange(COUNT)
STEPS = 60


def batch(number: int) -> tuple[Tensor, Tensor]:
    """The instances and views of a step, those of all ranks one after the other."""
    generator = np.random.default_rng(number)
    indices = torch.from_numpy(generator.integers(0, COUNT, 1 + number % 13))
    return indices, rows(2 * len(indices), DIM, number, torch.float64).view(2, -1, DIM)


def share(count: int, number: int, size: int, rank: int) -> slice:
    """Which of a step's instances a rank has: the shares are uneven, and sometimes one has none."""
    ends = np.sort(np.random.default_rng(1000 + number).integers(0, count + 1, size - 1))
    begin, end = np.concatenate([[0], ends, [count]])[rank : rank + 2]
    return slice(int(begin), int(end))


class Training:
    """A classifier in training, on the ranks of a group or in one process."""

    def __init__(self, group: Group | None, in_backward: bool = False, shards: int = SHARDS, **settings: Any):
        self.group, self.in_backward = group, in_backward
        self.size, self.rank = (1, 0) if group is None else (group.size(), group.rank())
        self.classifier = InstanceClassifier(
            COUNT, DIM, ACTIVE, seed=7, dtype=torch.float64, shards=shards, group=group, **settings
        )
        self.optimizer = DelayedSGD(self.classifier, lr=0.3, momentum=0.9, weight_decay=0.01)

    def step(self, number: int) -> Tensor:
        """The loss of all ranks' instances."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.3 / (1 + number / 10)
        indices, views = batch(number)
        own = share(len(indices), number, self.size, self.rank)
        following = batch(number + 1)[0]
        target = self.classifier.activate(indices[own])
        self.classifier.prefetch(following[share(len(following), number + 1, self.size, self.rank)])
        update = {"update": self.optimizer.in_backward()} if self.in_backward else {}
        loss = conic_loss(
            views[:, own].clone().requires_grad_(), self.classifier.weight, target, num_instances=COUNT,
            group=self.group, **update,
        )  # fmt: skip
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        whole = loss.detach()
        if self.group is not None:
            dist.all_reduce(whole, group=self.group)
        return whole / self.size

    def run(self, begin: int, end: int) -> Tensor:
        return torch.stack([self.step(number) for number in range(begin, end)])

    def rows(self) -> Tensor:
        return torch.cat([torch.stack(parts, 1) for _, *parts in self.classifier.export(50)])


def settings_of(storage: str, folder: str) -> dict[str, Any]:
    return {"storage": storage, "path": folder} if storage == "disk" else {"storage": storage}


def train(group: Group | None, folder: str) -> list[tuple[Tensor, Tensor]]:
    """Losses and rows with every storage, and with the step in backward."""
    found = []
    shards = 12 if group is not None and group.size() == 3 else SHARDS
    for storage, in_backward in (("device", False), ("host", True), ("disk", False)):
        training = Training(group, in_backward, shards, **settings_of(storage, f"{folder}/{storage}"))
        assert len(training.classifier.weight) == ACTIVE // training.size
        losses = training.run(0, STEPS)
        found.append((losses, training.rows()))
        if group is not None:
            check_reading(training)
        training.classifier.close()
    return found


def check_reading(training: Training) -> None:
    """Any rank reads and writes any rows."""
    of, rank = training.classifier, training.rank
    every = torch.stack(of.read(EVERY), 1)
    own = torch.tensor([5 + rank, 200, 17 * rank, 5 + rank])
    assert torch.equal(torch.stack(of.read(own), 1), every[own])
    assert of.read(EVERY[: 0 if rank else 3])[0].shape == (0 if rank else 3, DIM)
    mine = torch.arange(10 * rank, 10 * rank + 4)
    of.write(mine, torch.full((4, DIM), float(rank)))
    after = torch.stack(of.read(EVERY), 1)
    for other in range(training.size):
        written = torch.arange(10 * other, 10 * other + 4)
        assert (after[written, 0] == other).all()
        assert (after[written, 1] == 0).all()
        every[written] = after[written]
    assert torch.equal(after, every)
    with pytest.raises(Disagreement, match="distinct over all ranks"):
        of.write(torch.tensor([3]), torch.zeros(1, DIM))
    assert torch.equal(torch.stack(of.read(EVERY), 1), every)


@pytest.mark.slow
@pytest.mark.parametrize("size", mostly_thorough([2, 3, 4], (2).__eq__))
def test_any_number_of_ranks_is_the_same_run(size: int, tmp_path: Path) -> None:
    shards = 12 if size == 3 else SHARDS
    one = Training(None, shards=shards)
    losses = one.run(0, STEPS)
    for found in ranks.run(train, size, str(tmp_path)):
        for found_losses, found_rows in found:
            torch.testing.assert_close(found_losses, losses, rtol=0, atol=1e-10)
            torch.testing.assert_close(found_rows, one.rows(), rtol=0, atol=1e-10)


def resume(group: Group | None, folder: str, storage: str, begin: int, end: int, save: bool) -> Any:
    """Goes on from a checkpoint of torch.distributed.checkpoint, and takes one."""
    training = Training(group, **settings_of(storage, f"{folder}/rows"))
    if begin:
        state = {"of": training.classifier.state_dict(), "optimizer": training.optimizer.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/{begin}")
        training.classifier.load_state_dict(state["of"])
        training.optimizer.load_state_dict(state["optimizer"])
    loaded = training.rows()
    training.run(begin, end)
    found = training.rows()
    if save:
        state = {"of": training.classifier.state_dict(), "optimizer": training.optimizer.state_dict()}
        dcp.save(state, checkpoint_id=f"{folder}/{end}")
        training.classifier.confirm(state["of"])
    training.classifier.close()
    return loaded, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "storage"),
    mostly_thorough(
        [(*ranks, storage) for ranks in ((2, 4), (4, 1), (1, 2)) for storage in ("device", "disk")],
        {(2, 4, "disk")}.__contains__,
    ),
)
def test_checkpoints_load_on_another_number_of_ranks(
    first: int, then: int, storage: str, tmp_path: Path
) -> None:
    """Bit for bit the same rows, and what follows is as if nothing had happened."""

    def part(size: int, *arguments: Any) -> Any:
        if size == 1:
            return resume(None, str(tmp_path), storage, *arguments)
        return ranks.run(resume, size, str(tmp_path), storage, *arguments)[0]

    _, saved = part(first, 0, 20, True)
    loaded, found = part(then, 20, 40, False)
    assert torch.equal(loaded, saved)
    one = Training(None)
    one.run(0, 40)
    torch.testing.assert_close(found, one.rows(), rtol=0, atol=1e-10)


KILLED = """
import datetime, os, sys
import torch.distributed as dist
from tests.classifier.test_classifier_ranks import Training, settings_of
import torch.distributed.checkpoint as dcp
rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
                        timeout=datetime.timedelta(seconds=60))
training = Training(dist.group.WORLD, **settings_of("disk", f"{folder}/rows"))
training.run(0, 20)
state = {"of": training.classifier.state_dict(), "optimizer": training.optimizer.state_dict()}
dcp.save(state, checkpoint_id=f"{folder}/20")
training.classifier.confirm(state["of"])
print("saved", flush=True)
training.run(20, 100000)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), mostly_thorough([(2, 4), (4, 2)], ((2, 4)).__eq__))
def test_a_kill_of_all_ranks_and_another_number_of_them(first: int, then: int, tmp_path: Path) -> None:
    """They are killed in the middle of steps; others go on from what was saved as if nothing had happened."""
    command = [sys.executable, "-c", KILLED]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(first), str(tmp_path)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(first)
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "saved\n"
        time.sleep(0.7)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()
    found = ranks.run(resume, then, str(tmp_path), "disk", 20, 40, False)
    one = Training(None)
    one.run(0, 40)
    for _, of_rank in found:
        torch.testing.assert_close(of_rank, one.rows(), rtol=0, atol=1e-10)


def check_errors(group: Group) -> None:
    odd = group.rank() == 1
    training = Training(group)
    training.run(0, 3)
    of = training.classifier
    before = of.weight.detach().clone(), of.active_instances

    def refused(error: Any, message: str, call: Any) -> None:
        with pytest.raises(error, match=message):
            call()
        assert torch.equal(of.weight.detach(), before[0])
        assert torch.equal(of.active_instances, before[1])

    bad = torch.tensor([COUNT if odd else 0])
    missing: Any = None if odd else bad * 0
    other_seed = InstanceClassifier(COUNT, DIM, ACTIVE, shards=8, seed=8 if odd else 7, group=group)
    refused(ValueError, r"must be in \[0, 203\), got 203", lambda: of.activate(bad))
    refused((TypeError, Disagreement), r"indices must be a torch\.Tensor", lambda: of.activate(missing))
    refused(ValueError, r"shard [0-9] of 8: .* distinct rows", lambda: of.activate(EVERY))
    refused(Disagreement, r"seed is 7 on .* 8 on rank 1", lambda: other_seed.activate(EVERY[:2]))
    refused(TypeError, "cannot be copied or pickled", lambda: copy.deepcopy(of))
    with pytest.raises(ValueError, match=f"multiple of the number of ranks, {group.size()}"):
        InstanceClassifier(COUNT, DIM, 95, shards=5, group=group)
    training.run(3, 6)

    # What DistributedDataParallel does to a module's parameters when it is made.
    module = Training(group).classifier
    torch.nn.parallel.DistributedDataParallel(module, process_group=group)
    with pytest.raises(Disagreement, match="keep a classifier with a group out of its module"):
        module.activate(EVERY[:1])

    # A step that only one rank has taken.
    late = Training(group)
    late.run(0, 1)
    if odd:
        late.classifier.weight.grad = torch.zeros_like(late.classifier.weight)
        late.optimizer.step()
    with pytest.raises(Disagreement, match=r"steps taken is 1 on .* 2 on rank 1"):
        late.classifier.activate(EVERY[:1])


def test_errors() -> None:
    ranks.run(check_errors, 2)
