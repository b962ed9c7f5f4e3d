"""What one rank of a classifier's group refuses, or cannot read, is an error on all and changes nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from contrastive_ops import DelayedSGD, InstanceClassifier
from contrastive_ops._ranks import Disagreement
from tests import ranks

Group = dist.ProcessGroup

COUNT, DIM = 101, 4
EVERY = torch.arange(COUNT)


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "no space left", "rows")


class Trained:
    """A classifier that has taken a few steps."""

    def __init__(self, group: Group, **settings: Any) -> None:
        self.classifier = InstanceClassifier(
            COUNT, DIM, 48, seed=3, dtype=torch.float64, shards=4, group=group, **settings
        )
        self.optimizer = DelayedSGD(self.classifier, lr=0.1)
        for number in range(3):
            self.classifier.activate(EVERY[number + 5 * group.rank() :: 40])
            self.classifier.weight.grad = torch.full_like(self.classifier.weight, 0.01 * number)
            self.optimizer.step()
            self.optimizer.zero_grad()


def check_refusals(group: Group, folder: str) -> None:
    odd = group.rank() == 1
    training = Trained(group, storage="disk", path=folder)
    of = training.classifier
    rows, active = torch.stack(of.read(EVERY), 1), of.active_instances

    def refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
        """By this error on the odd rank, of which the other is told."""
        with pytest.raises(error if odd else Disagreement, match=message):
            call()
        assert torch.equal(torch.stack(of.read(EVERY), 1), rows)
        assert torch.equal(of.active_instances, active)

    four = torch.zeros(4, DIM)
    own = EVERY[4 * group.rank() :][:4]
    refused(lambda: of.write(own, four[:3] if odd else four), ValueError, r"weight must be \(4, 4\)")
    refused(lambda: of.write(EVERY[[1, 1, 2, 3]] if odd else own, four), ValueError, "must be distinct")
    refused(lambda: of.write(EVERY[[0, 1, 2, COUNT - 1]] + odd, four), ValueError, "got 101 at position 3")
    refused(lambda: of.read(EVERY[:2].float() if odd else own), TypeError, "indices must be")
    refused(lambda: of.prefetch(EVERY[:2].float() if odd else own), TypeError, "next_indices must be")

    failing = pytest.MonkeyPatch()
    for method, call in (
        ("fetch", lambda: of.activate(EVERY[::7])),
        ("reserve", lambda: of.activate(EVERY[::7])),
        ("peek", lambda: of.read(EVERY)),
    ):
        if odd:
            failing.setattr(of._storage, method, full)
        with pytest.raises(OSError if odd else Disagreement, match="no space left"):
            call()
        failing.undo()
        assert torch.equal(of.active_instances, active)
        assert torch.equal(torch.stack(of.read(EVERY), 1), rows)
    of.activate(EVERY[::7])  # and it goes on
    assert torch.equal(torch.stack(of.read(EVERY), 1), rows)
    of.close()

    # A resumed run: loaded, and then wrapped. What was saved is each rank's own; DDP gives all the first's.
    other = Trained(group).classifier
    other.load_state_dict(other.state_dict())
    DistributedDataParallel(other, process_group=group)
    with pytest.raises(Disagreement, match="keep a classifier with a group out of its module"):
        other.activate(EVERY[:1])

    ignoring: Any = torch.nn.ModuleDict(
        {"net": torch.nn.Linear(2, 2), "classifier": Trained(group).classifier}
    )
    kept: Tensor = ignoring["classifier"].weight.detach().clone()
    ignoring._ddp_params_and_buffers_to_ignore = ["classifier.weight", "classifier.momentum"]
    DistributedDataParallel(ignoring, process_group=group)
    ignoring["classifier"].activate(EVERY[:0])
    assert torch.equal(ignoring["classifier"].weight.detach(), kept)


def test_refusals(tmp_path: Any) -> None:
    ranks.run(check_refusals, 2, str(tmp_path))
