"""An exception at any place leaves a classifier as if the call had not been made, or had run to its end."""

from __future__ import annotations

import itertools
import linecache
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import contrastive_ops
from contrastive_ops import DelayedSGD, InstanceClassifier, _eager, conic_loss, reference
from contrastive_ops._contract import SGDSettings
from contrastive_ops.classifier import classifier, guard

PACKAGE = str(Path(contrastive_ops.__file__).parent)
COUNT, DIM, ACTIVE, BATCH = 40, 5, 12, 4
Call = Callable[[], Any]


class Interrupt(KeyboardInterrupt):
    """Not to be taken for a real one."""


@contextmanager
def interrupted_at(line: int) -> Iterator[list[str]]:
    """Raises when so many lines of the package have been run, as a signal may; the list tells where.

    Not on the last line of a step: who is interrupted there has no way of telling that the step was taken.
    """
    where: list[str] = []
    seen = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        if where or not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and linecache.getline(frame.f_code.co_filename, frame.f_lineno) != LAST_OF_STEP:
            seen += 1
            if seen > line:
                where.append(f"line {frame.f_lineno} of {frame.f_code.co_filename}")
                raise Interrupt(where[0])
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield where
    finally:
        sys.settrace(before)


LAST_OF_STEP = "        return loss\n"
EVERY = int(os.environ.get("INTERRUPTS_EVERY", 4))  # so many lines lie between the places that are tried


def places(storage: str = "device") -> Iterator[int]:
    """Numbers of lines to be interrupted at; fewer on disk, where a training takes longer to be set up."""
    return itertools.count(0, EVERY * (5 if storage == "disk" else 1))


class Training:
    """Steps over batches that are known beforehand: two to a step of the optimiser or, where backward takes
    it, one."""

    def __init__(self, in_backward: bool = False, storage: str = "device", path: Path | None = None) -> None:
        self.classifier = InstanceClassifier(
            COUNT,
            DIM,
            ACTIVE,
            storage,
            path,
            seed=2,
            dtype=torch.float64,  # type: ignore[arg-type]
        )
        self.optimizer = DelayedSGD(self.classifier, lr=0.3, momentum=0.9, weight_decay=0.01)
        self.in_backward = in_backward

    def calls(self, number: int) -> dict[str, Call]:
        """What is done with a batch, in order; each call may be made again if it raised."""
        of, optimizer = self.classifier, self.optimizer
        generator = torch.Generator().manual_seed(number)
        indices = torch.randint(COUNT, (BATCH,), generator=generator)
        views = torch.randn(2, BATCH, DIM, generator=generator, dtype=torch.float64)

        def activate() -> None:
            self.target = of.activate(indices)

        def backward() -> None:
            update = optimizer.in_backward() if self.in_backward else None
            conic_loss(views, of.weight, self.target, num_instances=COUNT, update=update).backward()

        calls: dict[str, Call] = {"activate": activate, "backward": backward}
        if self.in_backward or number % 2:
            calls |= {"step": optimizer.step, "zero_grad": optimizer.zero_grad}
        return calls

    def run(self, first: int, last: int, guarded: Callable[[Call], None] = lambda call: call()) -> None:
        for number in range(first, last):
            for call in self.calls(number).values():
                guarded(call)

    def rows(self) -> tuple[Tensor, ...]:
        every = torch.arange(COUNT)
        return (*self.classifier.read(every), self.classifier.active_instances)


def assert_same(one: Training, other: Training, tolerance: float = 0) -> None:
    assert len(one.classifier.history) == len(other.classifier.history)
    torch.testing.assert_close(one.rows(), other.rows(), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["device", "disk"])
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("name", ["activate", "step", "zero_grad"])
def test_called_again_a_call_has_been_made_once(
    name: str, in_backward: bool, storage: str, tmp_path: Path
) -> None:
    """Wherever it was interrupted, and with a gradient that evicted rows have a part in."""
    expected = Training(in_backward)
    expected.run(0, 8)
    for line in places(storage):
        training = Training(in_backward, storage, tmp_path / str(line) if storage == "disk" else None)
        training.run(0, 5)
        for each, call in training.calls(5).items():
            if each == name:
                with interrupted_at(line) as where, suppress(Interrupt):
                    call()
                if where:
                    call()
            else:
                call()
        training.run(6, 8)
        assert_same(training, expected)
        training.classifier.close()
        if not where:
            break
    assert line > 3


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["device", "disk"])
@pytest.mark.parametrize("name", ["read", "prefetch", "write", "state_dict", "in_backward", "activate"])
def test_without_being_called_again_nothing_was(name: str, storage: str, tmp_path: Path) -> None:
    expected = Training()
    expected.run(0, 8)
    some = torch.tensor([1, 7, 22, 39])
    for line in places(storage):
        training = Training(storage=storage, path=tmp_path / str(line) if storage == "disk" else None)
        training.run(0, 5)
        of = training.classifier
        rows = of.read(some)
        call = {
            "read": lambda of=of: of.read(some),
            "prefetch": lambda of=of: of.prefetch(some),
            "write": lambda of=of, rows=rows: of.write(some, *rows),  # which were caught up halfway
            "state_dict": lambda of=of: of.state_dict(),
            "in_backward": training.optimizer.in_backward,
            "activate": lambda of=of: of.activate(some),
        }[name]
        active = of.active_instances
        with interrupted_at(line) as where, suppress(Interrupt):
            call()
        if name == "activate" and not torch.equal(of.active_instances, active):
            assert torch.equal(of.activate(some), of.activate(some))  # it had run to its end
        else:
            training.run(5, 8)
            assert_same(training, expected, tolerance=1e-14 if name == "write" else 0)
        of.close()
        if not where:
            break
    assert line > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["activate", "step"])
def test_where_a_gpu_leaves_it_open_a_checkpoint_is_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU was told is not known when the call is interrupted that tells it; at other places it is."""
    monkeypatch.setattr(guard, "_runs_ahead", lambda tensor: True)
    expected = Training()
    expected.run(0, 8)
    asked = 0
    for line in places():
        training = Training()
        training.run(0, 5)
        for each, call in training.calls(5).items():
            if each != name:
                call()
                continue
            with interrupted_at(line) as where, suppress(Interrupt):
                call()
            if training.classifier._guard.torn:
                asked += 1
                with pytest.raises(RuntimeError, match="an interrupt came while rows were being written"):
                    call()
                break
            if where:
                call()
        else:
            training.run(6, 8)
            assert_same(training, expected)
        if not where:
            break
    assert 0 < asked < line / EVERY


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["device", "disk"])
def test_a_load_that_was_interrupted_has_to_be_made_again(storage: str, tmp_path: Path) -> None:
    source = Training(storage=storage, path=tmp_path if storage == "disk" else None)
    source.run(0, 4)
    states = source.classifier.state_dict(), source.optimizer.state_dict()
    source.run(4, 6)
    expected = Training()
    expected.run(0, 8)
    refused = 0
    for line in places(storage):
        with interrupted_at(line) as where, suppress(Interrupt):
            source.classifier.load_state_dict(states[0])
        if source.classifier._guard.torn:
            with pytest.raises(RuntimeError, match="interrupted: load a checkpoint to go on"):
                source.classifier.read(torch.arange(3))
            refused += 1
        source.classifier.load_state_dict(states[0])
        source.run(4, 8)
        assert_same(source, expected)
        if not where:
            break
    source.classifier.close()
    assert 0 < refused < line


@pytest.mark.parametrize("in_backward", [False, True])
def test_signals_at_random_times(in_backward: bool) -> None:
    """Real ones, which come while kernels run; every call that was interrupted is made again."""
    expected, training = Training(in_backward), Training(in_backward)
    expected.run(0, 400)
    generator, interrupts, armed = random.Random(3), 0, False

    def ring(number: int, frame: FrameType | None) -> None:
        """Not within PyTorch, which may be left without gradients by an exception in its `no_grad`; nor late,
        when what would have made the call again is over, or a call has returned to what wraps it."""
        if not armed:
            return
        file = frame.f_code.co_filename if frame else ""
        if not file.startswith(PACKAGE) or file == _eager.__file__ or not frame or not frame.f_lineno:
            return
        if linecache.getline(file, frame.f_lineno) != LAST_OF_STEP:
            raise Interrupt

    def guarded(call: Call) -> None:
        nonlocal interrupts, armed
        while True:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-6, 6e-4))
            try:
                call()
                return
            except Interrupt:
                interrupts += 1
            finally:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for number in range(400):
            for name, call in training.calls(number).items():
                call() if name == "backward" else guarded(call)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 20
    assert_same(training, expected)


def test_threads_wait_for_one_another() -> None:
    """Whoever activates, reads and saves at the same time."""
    of = InstanceClassifier(400, DIM, 200, seed=2, dtype=torch.float64)
    optimizer = DelayedSGD(of, lr=0.1)
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def repeat(work: Callable[[torch.Generator], None], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start.wait()
        try:
            for _ in range(150):
                work(generator)
        except BaseException as error:
            errors.append(error)

    def activate(generator: torch.Generator) -> None:
        with torch.no_grad():
            of.activate(torch.randint(400, (20,), generator=generator))

    def look(generator: torch.Generator) -> None:
        of.read(torch.randint(400, (20,), generator=generator))
        of.prefetch(torch.randint(400, (20,), generator=generator))

    def step(generator: torch.Generator) -> None:
        with of._guard.lock:  # the active set stays as it is in between
            of.weight.grad = torch.zeros_like(of.weight)
            optimizer.step()
            optimizer.zero_grad()
        of.state_dict()

    works = (activate, activate, look, step)
    threads = [threading.Thread(target=repeat, args=(work, seed)) for seed, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(of.active_instances.tolist())) == 200
    # Without gradients all rows move alike, whatever their order: as those of a classifier that has them all.
    whole = InstanceClassifier(400, DIM, 400, seed=2, dtype=torch.float64)
    plain = DelayedSGD(whole, lr=0.1)
    for _ in range(150):
        whole.weight.grad = torch.zeros_like(whole.weight)
        plain.step()
    torch.testing.assert_close(of.read(torch.arange(400)), whole.read(torch.arange(400)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
def test_an_exchange_is_undone_in_the_space_of_a_batch(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of all rows, which a GPU may not have once more, nor in memory that it cannot reach: rows come back
    from the records that they were written to, not from a copy. The error that is seen is the first."""
    training = Training(storage=storage, path=tmp_path if storage == "disk" else None)
    training.run(0, 5)
    of = training.classifier
    rows, read, written = training.rows(), [], []
    exchange = classifier.exchange_rows

    def spy(*arguments: Any) -> None:
        _, _, incoming, _, outgoing = arguments
        read.append(incoming.values)
        written.append(outgoing.values)
        exchange(*arguments)

    def full(*_: Any) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(classifier, "exchange_rows", spy)
        patch.setattr(of._storage, "commit", full)
        with pytest.raises(OSError, match="no room"):
            of.activate(torch.tensor([i for i in range(COUNT) if i not in of.active_instances][:BATCH]))
    assert len(written) == 2
    assert read[1] is written[0]
    assert len(written[1]) == BATCH
    assert written[1].device == of.weight.device
    assert all(map(torch.equal, training.rows(), rows))
    of.close()


def test_a_state_is_not_taken_while_backward_takes_a_step() -> None:
    """A snapshot would hold a part of that step, and another thread's `read` would return it."""
    expected, training = Training(in_backward=True), Training(in_backward=True)
    of, every = training.classifier, torch.arange(COUNT)
    rows = {0: of.read(every)}
    for number in range(200):
        expected.run(number, number + 1)
        rows[number + 1] = expected.classifier.read(every)
    states: list[dict[str, Any]] = []
    done = threading.Event()

    def save() -> None:
        while not done.is_set():
            states.append(of.state_dict())

    thread = threading.Thread(target=save)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        training.run(0, 200)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)
    other = Training().classifier
    for state in states:
        other.load_state_dict(state)
        torch.testing.assert_close(other.read(every), rows[len(other.history)], rtol=1e-9, atol=1e-12)


def test_the_reference_takes_a_step_whole_or_not_at_all() -> None:
    """On whichever line it is interrupted, weight and momentum are both moved or neither is."""
    settings = SGDSettings(0.1, 0.9, 0.01, nesterov=True)
    for line in itertools.count():
        weight, momentum, grad = torch.randn(3, 4, 5, dtype=torch.float64).unbind()
        before = weight.clone(), momentum.clone()
        with interrupted_at(line) as where, suppress(Interrupt):
            reference.sgd_(weight, momentum, grad, settings)
        assert torch.equal(weight, before[0]) == torch.equal(momentum, before[1])
        if not where:
            break
    assert line > 2
