"""Instances in virtual shards: dealt out evenly, each shard with its own order of last sampling."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contrastive_ops import DelayedSGD, InstanceClassifier, conic_loss
from contrastive_ops.classifier.shards import Permutation, Shards
from tests.cases import rows

COUNT, DIM, ACTIVE = 101, 5, 48
EVERY = torch.arange(COUNT)


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_permutations_are_one_to_one(count: int, seed: int) -> None:
    shuffled, numbers = Permutation(count, seed), np.arange(count)
    moved = shuffled(numbers)
    assert np.array_equal(np.sort(moved), numbers)
    assert np.array_equal(shuffled.backwards(moved), numbers)


@pytest.mark.parametrize("count", [10**9, 2**40 + 7])
def test_permutations_of_many(count: int) -> None:
    some = np.random.default_rng(0).integers(0, count, 1000)
    shuffled = Permutation(count, 3)
    moved = shuffled(some)
    assert ((moved >= 0) & (moved < count)).all()
    assert np.array_equal(shuffled.backwards(moved), some)
    assert not np.array_equal(moved, Permutation(count, 4)(some))


def test_shards_are_even_and_neighbours_part() -> None:
    shards = Shards(1000, 800, 8, seed=1)
    of = shards.of(shards.local(np.arange(1000)))
    assert np.bincount(of).tolist() == [125] * 8
    # Of eight neighbours, about as many shards as of any eight: 8 (1 − (7/8)⁸) = 5.2.
    distinct = [len(set(of[i : i + 8])) for i in range(0, 1000, 8)]
    assert 4.7 < np.mean(distinct) < 5.8


@given(
    count=st.integers(1, 300),
    shards=st.sampled_from([1, 2, 6, 12]),
    parts=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 5),
)
def test_each_process_knows_its_own(count: int, shards: int, parts: int, seed: int) -> None:
    if shards > count or shards % parts:
        return
    every, found = np.arange(count), []
    for rank in range(parts):
        mine = Shards(count, count, shards, seed, rank, parts)
        local = mine.local(every)
        here = every[local >= 0]
        assert sorted(local[local >= 0]) == list(range(mine.starts[-1]))
        assert np.array_equal(mine.instances_of(local[local >= 0]), here)
        assert (mine.rank_of(here) == rank).all()
        found.append(here)
    assert np.array_equal(np.sort(np.concatenate(found)), every)


class Training:
    """A classifier in training: steps with losses of random views."""

    def __init__(self, shards: int, in_backward: bool = False, **settings: Any) -> None:
        self.classifier = InstanceClassifier(
            COUNT, DIM, ACTIVE, seed=7, dtype=torch.float64, shards=shards, **settings
        )
        self.optimizer = DelayedSGD(self.classifier, lr=0.3, momentum=0.9, weight_decay=0.01)
        self.in_backward = in_backward

    def step(self, number: int) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.3 / (1 + number / 10)
        indices = torch.from_numpy(np.random.default_rng(number).integers(0, COUNT, 1 + number % 9))
        views = rows(2 * len(indices), DIM, number, torch.float64).view(2, -1, DIM).requires_grad_()
        target = self.classifier.activate(indices)
        update = {"update": self.optimizer.in_backward()} if self.in_backward else {}
        loss = conic_loss(views, self.classifier.weight, target, num_instances=COUNT, **update)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self, begin: int, end: int) -> None:
        for number in range(begin, end):
            self.step(number)

    def rows(self) -> Tensor:
        return torch.stack(self.classifier.read(EVERY), 1)


def storages(tmp_path: Path) -> list[dict[str, Any]]:
    return [{}, {"storage": "host"}, {"storage": "disk", "path": tmp_path / "rows"}]


@pytest.mark.parametrize("in_backward", [False, True])
def test_rows_that_sit_out_move_as_dense_sgd_moves_them(in_backward: bool, tmp_path: Path) -> None:
    """All tiers, against a dense classifier whose gradients are those of the active rows."""
    trainings = [Training(8, in_backward, **storage) for storage in storages(tmp_path)]
    weight = torch.nn.Parameter(trainings[0].rows()[:, 0].clone())
    dense = torch.optim.SGD([weight], lr=0.3, momentum=0.9, weight_decay=0.01)
    for number in range(60):
        active = trainings[0].classifier
        before = active.read(EVERY)[0]
        losses = [training.step(number) for training in trainings]
        assert all(torch.equal(loss, losses[0]) for loss in losses)

        # The same step, dense: the loss over the rows that were active when it was taken.
        indices = torch.from_numpy(np.random.default_rng(number).integers(0, COUNT, 1 + number % 9))
        views = rows(2 * len(indices), DIM, number, torch.float64).view(2, -1, DIM)
        rows_of = active.active_instances
        where = {int(instance): row for row, instance in enumerate(rows_of)}
        target = torch.tensor([where[int(i)] for i in indices])
        torch.testing.assert_close(before, weight.detach(), rtol=1e-10, atol=1e-12)
        loss = conic_loss(views, weight[rows_of], target, num_instances=COUNT)
        torch.testing.assert_close(loss.detach(), losses[0], rtol=1e-11, atol=0)
        for group in dense.param_groups:
            group["lr"] = 0.3 / (1 + number / 10)
        dense.zero_grad()
        loss.backward()
        dense.step()
    for training in trainings:
        torch.testing.assert_close(training.rows()[:, 0], weight.detach(), rtol=1e-10, atol=1e-12)
        assert len(set(training.classifier.active_instances.tolist())) == ACTIVE
        training.classifier.close()


def test_one_shard_is_the_classifier_without_any() -> None:
    plain = InstanceClassifier(COUNT, DIM, ACTIVE, seed=7, dtype=torch.float64)
    one = Training(1).classifier
    assert torch.equal(plain.weight, one.weight)
    assert plain.activate(torch.tensor([3, 99])).tolist() == one.activate(torch.tensor([3, 99])).tolist()
    assert set(one.state_dict()) == {"weight", "momentum", "_extra_state"}


def test_full_softmax_in_shards_of_unequal_size() -> None:
    of = InstanceClassifier(COUNT, DIM, shards=8, seed=1)
    assert of.weight.shape == (COUNT, DIM)
    target = of.activate(EVERY)
    assert sorted(target.tolist()) == EVERY.tolist()
    assert torch.equal(of.active_instances[target], EVERY)
    assert torch.equal(of.weight.detach()[target], InstanceClassifier(COUNT, DIM, seed=1).weight.detach())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_checkpoints(which: int, tmp_path: Path) -> None:
    """state_dict, torch.save, torch.distributed.checkpoint and copies go on as if nothing had happened."""
    training = Training(4, **storages(tmp_path)[which])
    training.run(0, 20)
    state = training.classifier.state_dict()
    assert {name for name in state if name.startswith("shards.0003.")} == {
        "shards.0003.weight", "shards.0003.momentum", "shards.0003.state",
    }  # fmt: skip
    torch.save(state, tmp_path / "file")
    dcp.save({"of": state, "optimizer": training.optimizer.state_dict()}, checkpoint_id=tmp_path / "dcp")
    training.classifier.confirm(state)
    copied = copy.deepcopy(training.classifier) if which < 2 else None
    training.run(20, 30)
    wanted = training.rows()
    training.classifier.close()

    def resumed(load: Any) -> None:
        again = Training(4, **storages(tmp_path)[which])
        load(again.classifier)
        again.run(20, 30)
        assert torch.equal(again.rows(), wanted)
        again.classifier.close()

    resumed(lambda of: of.load_state_dict(torch.load(tmp_path / "file", weights_only=True)))

    def load_distributed(of: InstanceClassifier) -> None:
        given = {"of": of.state_dict()}
        dcp.load(given, checkpoint_id=tmp_path / "dcp")
        of.load_state_dict(given["of"])

    if which < 2:  # the state of a fresh folder is a generation of its own
        resumed(load_distributed)
        assert copied is not None
        again = Training(4)
        again.classifier = pickle.loads(pickle.dumps(copied))
        again.optimizer = DelayedSGD(again.classifier, lr=0.3, momentum=0.9, weight_decay=0.01)
        again.run(20, 30)
        assert torch.equal(again.rows(), wanted)


def test_torch_distributed_checkpoint_of_a_classifier_without_shards(tmp_path: Path) -> None:
    """Its history and stored rows have grown since the one that it is loaded into was made."""
    training = Training(1)
    training.run(0, 20)
    dcp.save({"of": training.classifier.state_dict()}, checkpoint_id=tmp_path)
    training.run(20, 30)
    again = Training(1)
    given = {"of": again.classifier.state_dict()}
    dcp.load(given, checkpoint_id=tmp_path)
    again.classifier.load_state_dict(given["of"])
    again.run(20, 30)
    assert torch.equal(again.rows(), training.rows())


def test_what_a_checkpoint_lacks_changes_nothing() -> None:
    training = Training(4)
    training.run(0, 5)
    state = training.classifier.state_dict()
    other = Training(4)
    other.run(0, 3)
    before = other.rows()
    part = state["shards.0002.state"][0]
    damaged: list[tuple[dict[str, Any], str]] = [
        ({"shards.0002.weight": state["shards.0002.weight"][:-1]}, r"shards\.0002\.weight must be a dense"),
        ({"shards.0002.state": ({**part, "active": {}},)}, "active set must hold"),
        ({"shards.0002.state": ({**part, "storage": {"generation": 3}},)}, "in its files"),
        ({"_extra_state": {**state["_extra_state"], "shards": 8}}, "shards is 8, the classifier's 4"),
    ]
    for change, message in damaged:
        with pytest.raises(ValueError, match=message):
            other.classifier.load_state_dict(state | change)
    with pytest.raises(ValueError, match=r"must hold the classifier's shards\.0001\.momentum"):
        other.classifier.load_state_dict({k: v for k, v in state.items() if k != "shards.0001.momentum"})
    assert torch.equal(other.rows(), before)


def test_folders_are_found_by_their_shard(tmp_path: Path) -> None:
    Training(4, storage="disk", path=tmp_path).classifier.close()
    assert {folder.name for folder in tmp_path.iterdir()} == {f"shard-{i:04d}-of-0004" for i in range(4)}
    (tmp_path / "shard-0001-of-0004").rename(tmp_path / "away")
    (tmp_path / "shard-0002-of-0004").rename(tmp_path / "shard-0001-of-0004")
    with pytest.raises(
        ValueError, match=r"shard-0001-of-0004 holds rows with shard=2, but shard=1 was asked"
    ):
        Training(4, storage="disk", path=tmp_path)
    # Nothing is left open.
    (tmp_path / "shard-0001-of-0004").rename(tmp_path / "shard-0002-of-0004")
    (tmp_path / "away").rename(tmp_path / "shard-0001-of-0004")
    Training(4, storage="disk", path=tmp_path).classifier.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active": 50, "shards": 8}, "active must be a multiple of shards, 8, .* got 50: 48 or 56 is one"),
        ({"active": 4, "shards": 8}, "got 4: 8 is one"),
        ({"shards": 102}, "shards must be at most the 101 instances, got 102"),
        ({"shards": 0}, "shards must be at least 1"),
    ],
)
def test_bad_shards(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstanceClassifier(COUNT, DIM, **settings)


def test_a_shard_that_overflows_is_named() -> None:
    of = Training(8).classifier
    before = of.active_instances
    shards = Shards(COUNT, ACTIVE, 8, seed=7)
    third = EVERY[shards.of(shards.local(EVERY.numpy())) == 3]
    with pytest.raises(ValueError, match=r"shard 3 of 8: 13 distinct rows would be in use .* only 6 fit"):
        of.activate(third)
    assert torch.equal(of.active_instances, before)


def test_draws_are_those_of_every_version() -> None:
    """Checkpoints and folders name shards and rows by these numbers, which therefore never change."""
    assert Permutation(10, seed=1)(np.arange(10)).tolist() == [0, 6, 7, 9, 1, 5, 2, 8, 4, 3]
    assert Shards(COUNT, ACTIVE, 4, seed=7).local(np.array([0, 1, 50, 100])).tolist() == [50, 87, 42, 54]
    of = InstanceClassifier(COUNT, DIM, 8, shards=4, seed=7)
    assert of.active_instances.tolist() == [72, 74, 48, 77, 40, 23, 59, 25]
    assert InstanceClassifier(COUNT, DIM, 8, seed=7).active_instances.tolist() == [
        41,
        61,
        1,
        52,
        55,
        85,
        58,
        29,
    ]


def test_folders_of_another_number_of_shards_are_refused(tmp_path: Path) -> None:
    Training(4, storage="disk", path=tmp_path / "four").classifier.close()
    Training(1, storage="disk", path=tmp_path / "one").classifier.close()
    with pytest.raises(ValueError, match="holds shard-0000-of-0004, but rows in 8 shards were asked for"):
        Training(8, storage="disk", path=tmp_path / "four")
    with pytest.raises(ValueError, match=r"holds rows\.json, but rows in 4 shards"):
        Training(4, storage="disk", path=tmp_path / "one")
    with pytest.raises(ValueError, match="shard-0000-of-0004"):
        Training(1, storage="disk", path=tmp_path / "four")
    assert len(list((tmp_path / "four").iterdir())) == 4


def test_folders_of_shards_are_verified(tmp_path: Path) -> None:
    training = Training(4, storage="disk", path=tmp_path)
    training.run(0, 20)
    training.classifier.state_dict()
    assert training.classifier.verify() == []
    training.classifier.close()
    assert InstanceClassifier.verify_folder(tmp_path) == []
    (manifest,) = (tmp_path / "shard-0002-of-0004/generations/1").glob("MANIFEST*")
    manifest.write_bytes(manifest.read_bytes()[:-1])
    shutil.rmtree(tmp_path / "shard-0003-of-0004")
    cut, missing = InstanceClassifier.verify_folder(tmp_path)
    assert "shard-0002-of-0004/generations/1/MANIFEST" in cut
    assert "shard-0003-of-0004 is missing" in missing


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    training = Training(4, storage="disk", path=tmp_path)
    training.run(0, 5)
    state = training.classifier.state_dict()
    training.classifier.close()
    shutil.rmtree(tmp_path / "shard-0001-of-0004")
    again = Training(4, storage="disk", path=tmp_path)
    with pytest.raises(ValueError, match=r"the checkpoint is of rows .*shard-0001-of-0004 holds"):
        again.classifier.load_state_dict(state)
    again.classifier.close()


@pytest.mark.parametrize("which", [1, 2])
def test_gradients_of_rows_evicted_from_a_shard_are_spent(which: int, tmp_path: Path) -> None:
    """Accumulated over batches, in every tier alike."""
    trainings = [Training(4), Training(4, **storages(tmp_path)[which])]
    for training in trainings:
        for number in range(12):
            indices = torch.from_numpy(np.random.default_rng(number).integers(0, COUNT, 5))
            views = rows(10, DIM, number, torch.float64).view(2, -1, DIM).requires_grad_()
            target = training.classifier.activate(indices)
            conic_loss(views, training.classifier.weight, target, num_instances=COUNT).backward()
            if number % 2:
                training.optimizer.step()
                training.optimizer.zero_grad()
    assert torch.equal(trainings[0].rows(), trainings[1].rows())
    trainings[1].classifier.close()
