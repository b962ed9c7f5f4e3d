"""A classifier that trains some of its rows, against one that trains them all."""

from __future__ import annotations

import copy
import errno
import io
import itertools
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contrastive_ops import ConICLoss, DelayedSGD, InstanceClassifier, MemoryBank, conic_loss
from contrastive_ops._contract import SGDSettings
from contrastive_ops.classifier.disk import _Working
from tests.cases import mostly_thorough
from tests.classifiers import STORAGES, Training, classifier, saved

EVERY = torch.arange(50)


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest) -> str:
    return request.param


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest relative L2 distance of a row."""
    difference = (actual.double() - expected.double()).norm(dim=1)
    return (difference / expected.double().norm(dim=1).clamp_min(1e-300)).max().item()


class Dense:
    """All rows of a classifier under torch.optim.SGD, with the gradients that the active ones get."""

    def __init__(self, of: InstanceClassifier, dtype: torch.dtype, **settings: Any) -> None:
        self.weight = torch.nn.Parameter(of.read(torch.arange(of.num_instances))[0].to(dtype))
        self.optimizer = torch.optim.SGD([self.weight], **settings)

    def step(self, settings: dict[str, Any], active: Tensor, grad: Tensor) -> None:
        self.optimizer.param_groups[0].update(settings)
        self.weight.grad = torch.zeros_like(self.weight).index_copy(0, active, grad.to(self.weight.dtype))
        self.optimizer.step()

    @property
    def momentum(self) -> Tensor:
        buffer = self.optimizer.state[self.weight].get("momentum_buffer")
        return torch.zeros_like(self.weight) if buffer is None else buffer


def give_gradient(of: InstanceClassifier, generator: torch.Generator) -> Tensor:
    grad = 0.1 * torch.randn(of.weight.shape, generator=generator, dtype=torch.float64)
    of.weight.grad = grad.to(of.weight.dtype)
    return of.weight.grad


class TestDelayedEqualsDense:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "dtype", mostly_thorough([torch.float64, torch.float32], {torch.float32}.__contains__)
    )
    def test_over_20_000_steps(self, dtype: torch.dtype) -> None:
        """N = 2000, A = 64, a cosine with warm-up: in float64 every row is within 1e-10 of dense SGD in
        float64; in float32 it is no further from it than dense SGD in float32."""
        steps = 20_000 if dtype == torch.float64 or "LONG_STEPS" in os.environ else 4000
        count, start = 2000, {"lr": 0.06, "momentum": 0.9, "weight_decay": 1e-4}
        of = classifier(num_instances=count, dim=8, active=64, dtype=dtype)
        optimizer, generator = DelayedSGD(of, **start), torch.Generator().manual_seed(0)
        exact, single = Dense(of, torch.float64, **start), Dense(of, torch.float32, **start)
        for t in range(steps):
            lr = 0.06 * min(1, (t + 1) / 500) * 0.5 * (1 + math.cos(math.pi * t / steps))
            of.activate(torch.randint(count, (16,), generator=generator))
            grad = give_gradient(of, generator)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            for dense in (exact, single):
                dense.step({"lr": lr}, of.active_instances, grad)
        weight, momentum = of.read(torch.arange(count))
        if dtype == torch.float64:
            assert relative(weight, exact.weight) <= 1e-10
            assert relative(momentum, exact.momentum) <= 1e-10
        else:
            assert relative(weight, exact.weight) <= relative(single.weight, exact.weight)
            assert relative(momentum, exact.momentum) <= relative(single.momentum, exact.momentum)

    @settings(max_examples=30)
    @given(
        groups=st.lists(
            st.fixed_dictionaries(
                {
                    "lr": st.sampled_from([0.0, 1e-3, 0.06, 0.3, 3.0]),
                    "momentum": st.sampled_from([0.0, 0.5, 0.9, 0.99]),
                    "weight_decay": st.sampled_from([0.0, 1e-4, 1e-2]),
                }
            ),
            min_size=1,
            max_size=6,
        ),
        nesterov=st.booleans(),
        length=st.integers(1, 40),
        skipped=st.sets(st.integers(0, 200)),
        seed=st.integers(0, 100),
    )
    def test_whatever_the_groups_settings(
        self, groups: list[dict[str, float]], nesterov: bool, length: int, skipped: set[int], seed: int
    ) -> None:
        """Settings that change at any time, and steps that are skipped."""
        if nesterov or groups[0]["momentum"]:  # torch.optim.SGD forgets its buffer where momentum is 0
            groups = [group | {"momentum": group["momentum"] or 0.5} for group in groups]
        else:
            groups = [group | {"momentum": 0.0} for group in groups]
        start = groups[0] | {"nesterov": nesterov}
        of = classifier(dtype=torch.float64)
        optimizer, generator = DelayedSGD(of, **start), torch.Generator().manual_seed(seed)
        dense = Dense(of, torch.float64, **start)
        for t in range(length * len(groups)):
            of.activate(torch.randint(50, (8,), generator=generator))
            grad = give_gradient(of, generator)
            if t in skipped:  # as a loss scaler does
                optimizer.zero_grad()
                continue
            optimizer.param_groups[0].update(groups[t // length])
            optimizer.step()
            dense.step(groups[t // length], of.active_instances, grad)
            optimizer.zero_grad()
        weight, momentum = of.read(EVERY)
        assert relative(weight, dense.weight) <= 1e-10
        if groups[0]["momentum"]:
            size = dense.momentum.norm() + dense.weight.norm()
            assert (momentum - dense.momentum).norm() <= 1e-10 * size

    @pytest.mark.parametrize("gap", [1, 3, 100, 10_000, 100_000])
    def test_one_catch_up_of_float32_rows(self, gap: int) -> None:
        """Within 1e-7 of float64 steps, at any gap."""
        of = classifier(num_instances=40, active=4, dim=64)
        optimizer = DelayedSGD(of, lr=0.06, momentum=0.9, weight_decay=1e-4)
        generator, inactive = (
            torch.Generator().manual_seed(0),
            [i for i in range(40) if i not in of.active_instances],
        )
        of.activate(torch.tensor(inactive[:4]))
        give_gradient(of, generator)
        optimizer.step()
        of.activate(torch.tensor(inactive[4:8]))  # the former four sit out from now on
        weight, momentum = of.read(torch.tensor(inactive[:4]))
        w, v = weight.double(), momentum.double()
        for t in range(gap):
            lr = 0.06 * 0.5 * (1 + math.cos(math.pi * t / gap))
            of.history.append(SGDSettings(lr, 0.9, 1e-4, False))
            v.mul_(0.9).add_(w, alpha=1e-4)
            w.sub_(v, alpha=lr)
        weight, momentum = of.read(torch.tensor(inactive[:4]))
        assert relative(weight, w) <= 1e-7
        assert relative(momentum, v) <= 1e-7

    def test_under_a_loss_scaler(self) -> None:
        """Skipped steps append nothing, and any number of them leaves room for the next batch."""
        of = classifier()
        optimizer = DelayedSGD(of, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for t in range(30):
            indices = torch.arange(8 * t, 8 * t + 8) % 50
            views = torch.randn(2, 8, 6)
            if t < 10:
                views[0, 0, 0] = float("inf")
            loss = conic_loss(views, of.weight, of.activate(indices), num_instances=50)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert len(of.history) == 20

    def test_learning_rate_schedulers(self) -> None:
        of = classifier()
        optimizer = DelayedSGD(of, lr=1.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1.0, total_steps=20
        )  # cycles momentum too
        dense = Dense(of, torch.float32, lr=1.0, momentum=0.9, weight_decay=1e-4)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            of.activate(torch.randint(50, (8,), generator=generator))
            grad = give_gradient(of, generator)
            (group,) = optimizer.param_groups
            dense.step({"lr": group["lr"], "momentum": group["momentum"]}, of.active_instances, grad)
            optimizer.step()
            schedule.step()
        assert relative(of.read(EVERY)[0], dense.weight) <= 1e-6

    def test_the_step_in_backward_is_the_same(self) -> None:
        plain, fused = Training(classifier()), Training(classifier())
        for _ in range(30):
            plain.step()
            of, generator = fused.classifier, fused.generator
            target = of.activate(fused.batch())
            views = torch.randn(2, 8, of.dim, generator=generator)
            criterion = ConICLoss(num_instances=of.num_instances)
            criterion(views, of.weight, target, update=fused.optimizer.in_backward()).backward()
            assert of.weight.grad is None
            fused.optimizer.step()
            fused.schedule.step()
        assert len(fused.classifier.history) == 30
        torch.testing.assert_close(
            fused.classifier.read(EVERY), plain.classifier.read(EVERY), rtol=1e-5, atol=1e-6
        )

    def test_the_step_in_backward_is_on_that_weight_alone(self) -> None:
        """On another, a normalised copy for instance, the step would be recorded and not taken."""
        of, other = classifier(), classifier()
        update, views = DelayedSGD(of).in_backward(), torch.randn(2, 1, 6)
        for weight in (other.weight, F.normalize(of.weight, dim=1), of.weight.detach()):
            with pytest.raises(ValueError, match=r"update is a step on .* got another tensor"):
                conic_loss(views, weight, torch.tensor([0]), update=update)
        with pytest.raises(TypeError, match=r"update must come from DelayedSGD.in_backward\(\), got dict"):
            conic_loss(views, of.weight, torch.tensor([0]), update={})  # type: ignore[arg-type]


class TestActiveSet:
    def test_targets_are_the_instances_rows(self, storage: str, tmp_path: Path) -> None:
        of = classifier(storage, tmp_path)
        optimizer = DelayedSGD(of, lr=0.1, momentum=0.9, weight_decay=0.01)
        for batch in (torch.tensor([49, 0, 49, 7]), torch.arange(20), torch.tensor([5])):
            expected, _ = of.read(batch)
            target = of.activate(batch)
            assert torch.equal(of.active_instances[target], batch)
            assert torch.equal(of.weight[target], expected)
            of.weight.grad = torch.zeros_like(of.weight)
            optimizer.step()
            optimizer.zero_grad()
        assert len(set(of.active_instances.tolist())) == 20

    def test_gradients_may_be_accumulated(self) -> None:
        """Rows of one optimiser step stay where they are until it is taken."""
        of = classifier()
        optimizer = DelayedSGD(of, lr=0.1)
        first = of.activate(torch.arange(10))
        conic_loss(torch.randn(2, 10, 6), of.weight, first).backward()
        second = of.activate(torch.arange(10, 20))
        conic_loss(torch.randn(2, 10, 6), of.weight, second).backward()
        assert torch.equal(of.active_instances[first], torch.arange(10))
        with pytest.raises(ValueError, match=r"21 distinct .* 20"):
            of.activate(torch.tensor([20]))
        before = of.active_instances
        optimizer.step()
        of.activate(torch.tensor([20]))
        assert (of.active_instances != before).sum() == 1

    def test_full_softmax_has_every_row(self) -> None:
        of = classifier(num_instances=12, active=65536)
        assert of.weight.shape == (12, 6)
        assert torch.equal(of.activate(torch.tensor([11, 0])), torch.tensor([11, 0]))
        assert torch.equal(of.read(torch.tensor([3]))[0], of.weight[[3]])
        assert not of.state_dict()["_extra_state"]["storage"][0]["records"].numel()  # which are active all

    def test_weights_version_changes(self) -> None:
        of = classifier()
        loss = conic_loss(torch.randn(2, 2, 6), of.weight, of.activate(torch.tensor([0, 1])))
        of.activate(torch.tensor([i for i in range(50) if i not in of.active_instances][:2]))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_rows_of_a_seed_are_the_same_everywhere(self, storage: str, tmp_path: Path) -> None:
        weight, momentum = classifier(storage, tmp_path).read(EVERY)
        assert torch.equal(weight, classifier(active=50).weight)
        assert not torch.equal(weight, classifier(active=50, seed=4).weight)
        assert not momentum.any()
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(50))

    def test_prefetch_changes_nothing(self, storage: str, tmp_path: Path) -> None:
        plain, ahead = Training(classifier()), Training(classifier(storage, tmp_path))
        generator = torch.Generator().manual_seed(1)
        batches = [torch.randint(50, (8,), generator=generator) for _ in range(31)]
        for batch, following in itertools.pairwise(batches):
            expected = plain.step(batch)
            assert ahead.step(batch) == expected
            ahead.classifier.prefetch(following)
        ahead.classifier.prefetch(batches[0])  # and nobody fetches these
        assert torch.equal(ahead.classifier.read(EVERY)[0], plain.classifier.read(EVERY)[0])

    def test_export_streams_every_row(self, storage: str, tmp_path: Path) -> None:
        training = Training(classifier(storage, tmp_path))
        training.steps(20)
        instances, weight, momentum = zip(*training.classifier.export(rows=7), strict=True)
        assert torch.equal(torch.cat(instances), EVERY)
        assert torch.equal(torch.cat(weight), training.classifier.read(EVERY)[0])
        assert torch.equal(torch.cat(momentum), training.classifier.read(EVERY)[1])

    def test_reading_changes_nothing(self, storage: str, tmp_path: Path) -> None:
        plain, read = Training(classifier()), Training(classifier(storage, tmp_path))
        for _ in range(20):
            read.classifier.read(EVERY)
            assert read.step() == plain.step()


class TestStorage:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_every_tier_trains_alike(self, tmp_path: Path, dtype: torch.dtype) -> None:
        losses = [Training(classifier(storage, tmp_path, dtype=dtype)).steps(60) for storage in STORAGES]
        assert losses[0] == losses[1] == losses[2]

    @pytest.mark.slow
    def test_a_billion_rows(self, tmp_path: Path) -> None:
        """Opened in seconds, in less than a GiB of memory, on no more disk than its written rows need."""
        script = """
import sys, time, torch
from pathlib import Path
from train_ref.memory import resident_mib
from tests.classifiers import Training, classifier
start = time.perf_counter()
of = classifier("disk", Path(sys.argv[1]), num_instances=10**9, dim=128, active=65536)
opened = time.perf_counter() - start
training = Training(of)
for _ in range(20):
    training.step(torch.randint(10**9, (512,), generator=training.generator))
print(opened, resident_mib("VmHWM"))
"""
        run = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
        )
        opened, memory_mib = map(float, run.stdout.split())
        assert opened < 5
        assert memory_mib < 1024
        on_disk = sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*"))
        assert on_disk <= 20 * 512 * (8 + 8 * 128) * 2 + (1 << 20)

    def test_a_full_disk_loses_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plain, training = Training(classifier()), Training(classifier("disk", tmp_path))
        assert training.steps(10) == plain.steps(10)
        before = training.classifier.read(EVERY)
        active = training.classifier.active_instances
        missing = torch.tensor([i for i in range(50) if i not in active][:5])

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

        with monkeypatch.context() as patch:
            patch.setattr(_Working, "make_room", full)
            with pytest.raises(OSError, match="No space left on device"):
                training.classifier.activate(missing)
        for was, now in zip(before, training.classifier.read(EVERY), strict=True):
            assert torch.equal(was, now)
        assert torch.equal(training.classifier.active_instances, active)
        assert training.steps(10) == plain.steps(10)


class TestCheckpoints:
    def test_resume_is_exact(self, storage: str, tmp_path: Path) -> None:
        training = Training(classifier(storage, tmp_path))
        training.steps(25)
        state = saved(training.state_dict())
        expected = training.steps(25)
        training.classifier.close()
        resumed = Training(classifier(storage, tmp_path))
        resumed.load_state_dict(state)
        assert resumed.steps(25) == expected

    def test_going_back_in_the_same_process(self, storage: str, tmp_path: Path) -> None:
        training = Training(classifier(storage, tmp_path))
        training.steps(25)
        state = saved(training.state_dict())
        expected = training.steps(25)
        training.load_state_dict(state)
        assert training.steps(25) == expected

    def test_the_last_checkpoints_and_the_confirmed_one_are_there(self, tmp_path: Path) -> None:
        """The process may die between taking a state and saving it."""
        training = Training(classifier("disk", tmp_path, generations=2))
        states = []
        for _ in range(5):
            training.steps(10)
            states.append(saved(training.state_dict()))
            if len(states) == 2:
                training.classifier.confirm(states[-1]["classifier"])
        training.steps(10)
        training.classifier.close()
        uninterrupted = Training(classifier()).steps(60)
        for taken in (1, 3, 4):
            resumed = Training(classifier("disk", tmp_path, generations=2))
            for gone in (0, 2):
                with pytest.raises(ValueError, match=r"the last 2 are kept, and the one that was confirmed"):
                    resumed.load_state_dict(states[gone])
            resumed.load_state_dict(states[taken])
            assert resumed.steps(10) == uninterrupted[10 * taken + 10 : 10 * taken + 20]
            resumed.classifier.close()

    def test_confirming_what_is_no_state_is_refused(self, storage: str, tmp_path: Path) -> None:
        of = classifier(storage, tmp_path)
        of.confirm(of.state_dict())
        for wrong in ({}, {"_extra_state": 1}, {"_extra_state": {}}, None):
            with pytest.raises(ValueError, match=r"must (hold|be a mapping)"):
                of.confirm(wrong)
        if storage == "disk":
            with pytest.raises(ValueError, match="storage='device' or 'host'"):
                of.confirm(classifier().state_dict())

    def test_damage_is_told(self, storage: str, tmp_path: Path) -> None:
        training = Training(classifier(storage, tmp_path))
        training.steps(20)
        state = training.state_dict()
        assert training.classifier.verify() == []
        if storage == "disk":
            table = next((tmp_path / "generations" / "1").glob("*.sst"))
            data = bytearray(table.read_bytes())
            data[len(data) // 2] ^= 4
            table.write_bytes(data)
            assert any(str(table) in damage for damage in training.classifier.verify())
            training.classifier.close()
            assert any(str(table) in damage for damage in InstanceClassifier.verify_folder(tmp_path))
            del state

    def test_host_and_device_share_their_checkpoints(self) -> None:
        training = Training(classifier("host"))
        training.steps(25)
        state = saved(training.state_dict())
        resumed = Training(classifier("device"))
        resumed.load_state_dict(state)
        assert resumed.steps(10) == training.steps(10)

    def test_inside_a_model(self, storage: str, tmp_path: Path) -> None:
        of = classifier(storage, tmp_path)
        model = torch.nn.ModuleDict({"head": torch.nn.Linear(3, 3), "classifier": of})
        Training(of).steps(10)
        expected = of.read(EVERY)
        state = saved(model.state_dict())
        Training(of).steps(10)
        model.load_state_dict(state)
        for was, now in zip(expected, of.read(EVERY), strict=True):
            assert torch.equal(was, now)

    def test_momentum_is_in_it(self) -> None:
        training = Training(classifier())
        training.steps(10)
        other = classifier()
        other.load_state_dict(saved(training.classifier.state_dict()))
        assert other.momentum.any()
        assert torch.equal(other.momentum, training.classifier.momentum)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_instances": 51}, "num_instances is 50, the classifier's 51"),
            ({"dim": 7}, "dim is 6, the classifier's 7"),
            ({"active": 21}, "active_rows is 20, the classifier's 21"),
            ({"seed": 4}, "seed is 3, the classifier's 4"),
            ({"dtype": torch.float64}, "dtype is torch.float32, the classifier's torch.float64"),
        ],
    )
    def test_of_another_classifier_is_refused(self, changes: dict[str, Any], message: str) -> None:
        state = classifier().state_dict()
        other = classifier(**changes)
        before = other.weight.detach().clone()
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert torch.equal(other.weight, before)

    def test_of_another_tier_is_refused(self, tmp_path: Path) -> None:
        on_disk = classifier("disk", tmp_path)
        with pytest.raises(ValueError, match="storage='disk', whose rows are in its files"):
            classifier().load_state_dict(on_disk.state_dict())
        with pytest.raises(ValueError, match="which a classifier with storage='disk' cannot load"):
            on_disk.load_state_dict(classifier().state_dict())

    @pytest.mark.parametrize("known", ["confirmed", "loaded"])
    def test_a_folder_whose_checkpoint_was_saved_wants_it(self, tmp_path: Path, known: str) -> None:
        training = Training(classifier("disk", tmp_path))
        training.steps(10)
        state = saved(training.state_dict())
        if known == "confirmed":
            training.classifier.confirm(state["classifier"])
        else:
            training.load_state_dict(state)
        training.classifier.close()
        again = classifier("disk", tmp_path)
        with pytest.raises(RuntimeError, match="load its checkpoint first"):
            Training(again).steps(10)
        again.load_state_dict(state["classifier"])

    def test_a_kill_before_the_first_save_does_not_bar_a_restart(self, tmp_path: Path) -> None:
        expected = Training(classifier()).steps(20)
        for attempt in range(5):
            training = Training(classifier("disk", tmp_path))
            with pytest.warns(UserWarning, match="training starts over") if attempt else nullcontext():
                assert training.steps(20) == expected
            training.state_dict()  # and it is never saved
            training.classifier.close()

    def test_without_a_checkpoint_training_starts_over(self, tmp_path: Path) -> None:
        training = Training(classifier("disk", tmp_path))
        expected = training.steps(10)
        training.classifier.close()
        assert Training(classifier("disk", tmp_path)).steps(10) == expected

    @pytest.mark.slow
    @pytest.mark.parametrize("storage", mostly_thorough(["device", "disk"], "disk".__eq__))
    def test_kill_9_at_any_moment(self, storage: str, tmp_path: Path) -> None:
        """A process that saves a checkpoint now and then is killed and started again, over and over; the
        losses it comes to are those of one that was left in peace, bit for bit."""
        script = f"""
import os, sys, torch
from pathlib import Path
from tests.classifiers import Training, classifier
folder = Path(sys.argv[1])
training, losses, file = Training(classifier({storage!r}, folder / "rows")), [], folder / "checkpoint.pt"
if file.exists():
    state = torch.load(file, weights_only=True)
    training.load_state_dict(state)
    losses = state["losses"]
print("training", flush=True)
while len(losses) < 600:
    losses += training.steps(1)
    if len(losses) % 20 == 0:
        torch.save(training.state_dict() | {{"losses": losses}}, folder / "new.pt")
        os.replace(folder / "new.pt", file)
"""
        rng, kills = random.Random(0), 0
        while kills < int(os.environ.get("KILLS", 3)):
            process = subprocess.Popen(
                [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            assert process.stdout.readline() == "training\n"
            time.sleep(rng.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
            if process.wait() == 0:
                break
            kills += 1
        else:
            subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
        losses = torch.load(tmp_path / "checkpoint.pt")["losses"]
        assert kills > 0
        assert losses == Training(classifier()).steps(600)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"num_instances": 0}, ValueError, "num_instances must be at least 1, got 0"),
            ({"num_instances": 1e6}, TypeError, "num_instances must be an integer, got float"),
            ({"dim": 0}, ValueError, "dim must be at least 1"),
            ({"active": -1}, ValueError, "active must be at least 1"),
            ({"seed": -1}, ValueError, "seed must be at least 0"),
            ({"generations": 0}, ValueError, "generations must be at least 1"),
            ({"generations": True}, TypeError, "generations must be an integer, got bool"),
            ({"dtype": torch.bfloat16}, TypeError, "dtype must be torch.float32 or torch.float64"),
            ({"storage": "ram"}, ValueError, "storage must be 'device', 'host' or 'disk', got 'ram'"),
            ({"storage": "disk"}, ValueError, "path is wanted with storage='disk' alone, got None"),
        ],
    )
    def test_of_the_classifier(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            classifier(**arguments)

    @pytest.mark.parametrize(
        ("indices", "error", "message"),
        [
            ([0, 1], TypeError, r"indices must be a torch.Tensor, got list"),
            (torch.zeros(2), TypeError, r"indices must be of dtype int64, got torch.float32"),
            (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"indices must be \(B,\), got shape \(2, 2\)"),
            (torch.tensor([0, 50]), ValueError, r"indices must be in \[0, 50\), got 50 at position 1"),
            (torch.tensor([-1]), ValueError, r"indices must be in \[0, 50\), got -1 at position 0"),
            (torch.arange(21), ValueError, r"21 distinct"),
        ],
    )
    def test_of_activate(self, indices: Any, error: type[Exception], message: str) -> None:
        of = classifier()
        before = of.active_instances
        with pytest.raises(error, match=message):
            of.activate(indices)
        assert torch.equal(of.active_instances, before)

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"lr": -0.1}, ValueError, "lr must be finite and >= 0, got -0.1"),
            ({"momentum": 1.0}, ValueError, "momentum must be less than 1, got 1.0"),
            ({"weight_decay": float("nan")}, ValueError, "weight_decay must be finite and >= 0"),
            ({"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
            ({"lr": 1e4, "weight_decay": 1.0}, ValueError, "lr · weight_decay must be less than"),
        ],
    )
    def test_of_the_optimizer(self, settings: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            DelayedSGD(classifier(), **settings)
        optimizer = DelayedSGD(classifier())
        optimizer.param_groups[0].update(settings)
        weight = optimizer.classifier.weight
        weight.grad = torch.ones_like(weight)
        before = weight.detach().clone()
        with pytest.raises(error, match=message):
            optimizer.step()
        assert torch.equal(weight, before)
        assert len(optimizer.classifier.history) == 0

    @pytest.mark.parametrize("way", ["overwrite", "swap"])
    def test_a_weight_that_takes_the_place_of_another_is_refused_too(self, way: str) -> None:
        of = classifier()
        replace = getattr(torch.__future__, f"set_{way}_module_params_on_conversion")
        replace(True)
        try:
            of.to("cpu")
        finally:
            replace(False)
        of.weight.grad = torch.ones_like(of.weight)
        with pytest.raises(TypeError, match=r"SGD holds the weight .* Leave that parameter to DelayedSGD"):
            torch.optim.SGD([of.weight], lr=0.1).step()

    def test_other_optimizers_are_refused_by_name(self) -> None:
        of, other = classifier(), torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.Adam([other, of.weight])
        of.weight.grad, other.grad = torch.ones_like(of.weight), torch.ones(2)
        with pytest.raises(TypeError, match=r"Adam holds the weight of an InstanceClassifier"):
            optimizer.step()
        assert torch.equal(other, torch.ones(2))
        every = classifier(active=50)  # nothing is delayed here
        every.weight.grad = torch.ones_like(every.weight)
        torch.optim.Adam([every.weight]).step()

    def test_a_step_without_a_gradient_is_none(self) -> None:
        optimizer = DelayedSGD(classifier())
        optimizer.step()
        assert len(optimizer.classifier.history) == 0

    def test_a_second_group_is_refused(self) -> None:
        with pytest.raises(ValueError, match="holds one weight"):
            DelayedSGD(classifier()).add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})

    def test_rows_keep_their_dtype(self) -> None:
        with pytest.raises(TypeError, match=r"rows stay in torch\.float32"):
            classifier().half()

    def test_two_steps_in_backward(self) -> None:
        of = classifier()
        optimizer = DelayedSGD(of)
        target = of.activate(torch.tensor([1, 2]))
        conic_loss(torch.randn(2, 2, 6), of.weight, target, update=optimizer.in_backward()).backward()
        with pytest.raises(RuntimeError, match=r"call step\(\) before"):
            optimizer.in_backward()

    def test_two_processes_do_not_share_a_folder(self, tmp_path: Path) -> None:
        first = classifier("disk", tmp_path)
        with pytest.raises(OSError, match="open elsewhere"):
            classifier("disk", tmp_path)
        first.close()
        classifier("disk", tmp_path).close()


def copied(way: str, both: tuple[InstanceClassifier, DelayedSGD]) -> tuple[InstanceClassifier, DelayedSGD]:
    if way == "deepcopy":
        return copy.deepcopy(both)
    file = io.BytesIO()
    if way == "pickle":
        return pickle.loads(pickle.dumps(both))
    torch.save(both, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class TestCopies:
    """A copy goes on as its original does, bit for bit, and neither moves the other."""

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
    @pytest.mark.parametrize("storage", ["device", "host"])
    @pytest.mark.parametrize("when", ["between steps", "before backward", "in backward"])
    def test_go_on(self, storage: str, way: str, when: str) -> None:
        original = classifier(storage)
        both = original, DelayedSGD(original, lr=0.3, momentum=0.9, weight_decay=0.01)

        def step(to: tuple[InstanceClassifier, DelayedSGD], first: int, copy_within: bool = False) -> Any:
            of, optimizer = to
            indices = torch.arange(first, first + 4) % of.num_instances
            update = optimizer.in_backward() if when == "in backward" else None
            target = of.activate(indices)
            twin = copied(way, to) if copy_within else None
            for each in filter(None, (to, twin)):
                views = torch.randn(2, 4, of.dim, generator=torch.Generator().manual_seed(first))
                taken = each[0]._pending if update is not None else None
                conic_loss(views, each[0].weight, target, update=taken).backward()
                each[1].step()
                each[1].zero_grad()
            return twin

        for first in (0, 17, 31, 5):
            step(both, first)
        twin = step(both, 40, copy_within=True) if when != "between steps" else copied(way, both)
        before = twin[0].read(torch.arange(50))
        step(both, 9)
        assert all(map(torch.equal, before, twin[0].read(torch.arange(50))))
        step(twin, 9)
        for first in (23, 44, 0):
            step(both, first), step(twin, first)
        for one, other in zip(both[0].read(torch.arange(50)), twin[0].read(torch.arange(50)), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(both[0].active_instances, twin[0].active_instances)
        assert twin[1].classifier is twin[0]
        assert twin[1].param_groups[0]["params"][0] is twin[0].weight

    def test_are_guarded_like_their_originals(self) -> None:
        average = torch.optim.swa_utils.AveragedModel(classifier())
        for twin in (copy.deepcopy(classifier()), average.module):
            twin.weight.grad = torch.ones_like(twin.weight)
            with pytest.raises(TypeError, match="Adam holds the weight of an InstanceClassifier"):
                torch.optim.Adam([twin.weight]).step()

    def test_keep_what_may_not_be_evicted(self) -> None:
        of = classifier()
        of.activate(torch.arange(len(of.weight)))
        with pytest.raises(ValueError, match="in use since the last optimiser step"):
            copy.deepcopy(of).activate(torch.tensor([49]))

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
    def test_rows_on_disk_have_none(self, way: str, tmp_path: Path) -> None:
        of = classifier("disk", tmp_path)
        with pytest.raises(TypeError, match=r"storage='disk' cannot be copied or pickled.*state_dict\(\)"):
            copied(way, (of, DelayedSGD(of)))
        of.close()


class TestMemoryBank:
    def test_rows_are_averages_of_unit_features(self) -> None:
        bank = MemoryBank(10, 4, momentum=0.7)
        before, features = bank.rows.clone(), torch.randn(3, 4)
        bank.update(torch.tensor([2, 9, 4]), features)
        expected = F.normalize(0.7 * before[[2, 9, 4]] + 0.3 * F.normalize(features, dim=1), dim=1)
        torch.testing.assert_close(bank.rows[[2, 9, 4]], expected)
        untouched = [i for i in range(10) if i not in (2, 9, 4)]
        assert torch.equal(bank.rows[untouched], before[untouched])

    def test_an_instance_that_repeats_counts_once(self) -> None:
        once, twice = MemoryBank(10, 4), MemoryBank(10, 4)
        features = F.normalize(torch.randn(2, 4), dim=1)
        twice.update(torch.tensor([3, 3]), features)
        once.update(torch.tensor([3]), F.normalize(features.mean(0, keepdim=True), dim=1))
        views = MemoryBank(10, 4)
        views.update(torch.tensor([3]), features[:, None])
        mean = F.normalize(0.5 * MemoryBank(10, 4).rows[3] + 0.5 * features.mean(0), dim=0)
        for bank in (twice, views):
            torch.testing.assert_close(bank.rows[3], mean)

    def test_trains_as_inst_disc(self) -> None:
        bank, features = MemoryBank(10, 4), torch.randn(1, 3, 4, requires_grad=True)
        indices = torch.tensor([1, 5, 9])
        loss = conic_loss(features, bank.rows, indices, temperature=0.07)
        expected = F.cross_entropy(F.normalize(features[0], dim=1) @ bank.rows.T / 0.07, indices)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert features.grad is not None

    def test_refuses_other_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"features must be \(2, 4\) or \(V, 2, 4\), got \(3, 4\)"):
            MemoryBank(10, 4).update(torch.tensor([0, 1]), torch.ones(3, 4))

    @pytest.mark.parametrize(
        ("indices", "features", "error", "message"),
        [
            ([0, 1], torch.ones(2, 4), TypeError, "indices must be a torch.Tensor, got list"),
            (torch.tensor([0.0, 1.0]), torch.ones(2, 4), TypeError, "indices must be of dtype int64"),
            (
                torch.tensor([[0, 1]]),
                torch.ones(2, 4),
                ValueError,
                r"indices must be \(B,\), got shape \(1, 2\)",
            ),
            (torch.tensor([0, -1]), torch.ones(2, 4), ValueError, r"in \[0, 10\), got -1 at position 1"),
            (torch.tensor([10, 0]), torch.ones(2, 4), ValueError, r"in \[0, 10\), got 10 at position 0"),
            (torch.tensor([0, 1], device="meta"), torch.ones(2, 4), ValueError, "indices must have values"),
            (
                torch.tensor([0, 1]),
                [[1.0] * 4] * 2,
                TypeError,
                "features must be a floating-point torch.Tensor",
            ),
            (
                torch.tensor([0, 1]),
                torch.ones(2, 4).int(),
                TypeError,
                r"features must be .*, got torch.int32",
            ),
            (torch.tensor([0, 1]), torch.ones(2, 4, dtype=torch.complex64), TypeError, "features must be"),
            (
                torch.tensor([0, 1]),
                torch.ones(2, 4, device="meta"),
                ValueError,
                "features must be on the device",
            ),
            (torch.tensor([0, 1]), torch.ones(0, 2, 4), ValueError, r"features must be .*, got \(0, 2, 4\)"),
            (torch.tensor([0, 1]), torch.ones(1, 1, 2, 4), ValueError, "features must be"),
            (torch.tensor([], dtype=torch.int64), torch.ones(2, 4), ValueError, r"features must be \(0, 4\)"),
        ],
    )
    def test_refuses_what_is_wrong_and_changes_nothing(
        self, indices: Any, features: Any, error: type[Exception], message: str
    ) -> None:
        bank = MemoryBank(10, 4)
        before = bank.rows.clone()
        with pytest.raises(error, match=message):
            bank.update(indices, features)
        assert torch.equal(bank.rows, before)

    @pytest.mark.parametrize(
        "settings", [{"seed": -1}, {"dtype": torch.int64}, {"momentum": 1.5}, {"dim": 0}]
    )
    def test_refuses_wrong_settings(self, settings: dict[str, Any]) -> None:
        with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
            MemoryBank(**{"num_instances": 10, "dim": 4, **settings})

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
    @pytest.mark.parametrize("views", [1, 2])
    def test_what_is_not_finite_stays_with_its_instance(self, wrong: float, views: int) -> None:
        bank, indices = MemoryBank(10, 4), torch.tensor([3, 7, 3, 5])
        expected = copy.deepcopy(bank)
        features = torch.randn(views, 4, 4)
        features[-1, 0, 2] = wrong
        bank.update(indices, features)
        expected.update(torch.tensor([7, 5]), features[:, [1, 3]])
        assert bank.rows[3].isnan().any()
        others = [i for i in range(10) if i != 3]
        torch.testing.assert_close(bank.rows[others], expected.rows[others])

    def test_an_empty_batch_changes_nothing(self) -> None:
        bank = MemoryBank(10, 4)
        before = bank.rows.clone()
        bank.update(torch.tensor([], dtype=torch.int64), torch.ones(0, 4))
        bank.update(torch.tensor([], dtype=torch.int64), torch.ones(2, 0, 4))
        assert torch.equal(bank.rows, before)

    @pytest.mark.parametrize("features_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_is_computed_in_the_wider_dtype(self, dtype: torch.dtype, features_dtype: torch.dtype) -> None:
        bank, indices = MemoryBank(10, 4, momentum=0.7, dtype=dtype), torch.tensor([2, 9, 2])
        before, features = (
            bank.rows.double().clone(),
            torch.randn(3, 4, dtype=torch.float64).to(features_dtype),
        )
        bank.update(indices, features)
        unit = F.normalize(features.double(), dim=1)
        mean = torch.stack([(unit[0] + unit[2]) / 2, unit[1]])
        expected = F.normalize(0.7 * before[[2, 9]] + 0.3 * mean, dim=1)
        wider = torch.promote_types(torch.promote_types(dtype, features_dtype), torch.float32)
        tolerance = 4 * torch.finfo(wider).eps + torch.finfo(dtype).eps  # of computing and of storing
        assert (bank.rows[[2, 9]].double() - expected).abs().max() <= tolerance
