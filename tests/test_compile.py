"""What keeps state of its own, inside compiled code: as in eager, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from contrastive_ops import DelayedSGD, InstanceClassifier, KeyQueue, MemoryBank, conic_loss

COUNT, DIM, ACTIVE, BATCH = 40, 4, 12, 4


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch.compiler.reset()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(COUNT, (BATCH,), generator=generator), torch.randn(2, BATCH, DIM, generator=generator))
        for _ in range(count)
    ]


def train(compiled: bool, in_backward: bool) -> tuple[InstanceClassifier, list[Tensor]]:
    of = InstanceClassifier(COUNT, DIM, ACTIVE, seed=2)
    optimizer = DelayedSGD(of, lr=0.3)
    losses = []

    def step(indices: Tensor, views: Tensor) -> Tensor:
        target = of.activate(indices)
        update = optimizer.in_backward() if in_backward else None
        loss = conic_loss(views * 2, of.weight, target, num_instances=COUNT, update=update)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    run = torch.compile(step, backend="eager") if compiled else step
    for indices, views in batches(5):
        losses.append(run(indices, views))
    return of, losses


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_compiled_step_is_that_of_eager(in_backward: bool) -> None:
    expected, compiled = train(False, in_backward), train(True, in_backward)
    assert len(compiled[0].history) == 5
    assert all(map(torch.equal, compiled[1], expected[1]))
    every = torch.arange(COUNT)
    assert all(map(torch.equal, compiled[0].read(every), expected[0].read(every)))


@pytest.mark.parametrize("warm", [False, True])
def test_only_the_loss_is_compiled(warm: bool) -> None:
    """With `update`, called before or for the first time in compiled code."""

    def run(compiled: bool) -> tuple[Tensor, Tensor, int]:
        of = InstanceClassifier(COUNT, DIM, ACTIVE, seed=2)
        optimizer = DelayedSGD(of, lr=0.3)

        def loss(views: Tensor, weight: Tensor, target: Tensor, update: Any) -> Tensor:
            return conic_loss(views * 2, weight, target, num_instances=COUNT, update=update) * 3

        call = torch.compile(loss, backend="aot_eager") if compiled else loss
        for indices, views in batches(4):
            views.requires_grad_()
            call(views, of.weight, of.activate(indices), optimizer.in_backward()).backward()
            assert of.weight.grad is None
            optimizer.step()
        assert views.grad is not None
        return of.read(torch.arange(COUNT))[0], views.grad, len(of.history)

    if warm:
        run(False)
    for compiled, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(compiled, expected)


def activate(of: InstanceClassifier, _: DelayedSGD, __: MemoryBank) -> Any:
    return of.activate(torch.tensor([1, 2])) + 1


def read(of: InstanceClassifier, _: DelayedSGD, __: MemoryBank) -> Any:
    return of.read(torch.tensor([1, 2]))[0] + 1


def write(of: InstanceClassifier, _: DelayedSGD, __: MemoryBank) -> Any:
    return of.write(torch.tensor([1, 2]), torch.ones(2, DIM))


def prefetch(of: InstanceClassifier, _: DelayedSGD, __: MemoryBank) -> Any:
    return of.prefetch(torch.tensor([1, 2]))


def step(_: InstanceClassifier, optimizer: DelayedSGD, __: MemoryBank) -> Any:
    return optimizer.step()


def zero_grad(_: InstanceClassifier, optimizer: DelayedSGD, __: MemoryBank) -> Any:
    return optimizer.zero_grad()


def in_backward(of: InstanceClassifier, optimizer: DelayedSGD, _: MemoryBank) -> Any:
    views, target = torch.ones(2, 1, DIM), torch.tensor([3])
    return conic_loss(views, of.weight, target, update=optimizer.in_backward())


def update(_: InstanceClassifier, __: DelayedSGD, bank: MemoryBank) -> Any:
    return bank.update(torch.tensor([1, 2]), torch.ones(2, DIM))


CALLS = [activate, read, write, prefetch, step, zero_grad, in_backward, update]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("warm", [False, True])
def test_a_full_graph_is_refused(call: Callable[..., Any], warm: bool) -> None:
    of = InstanceClassifier(COUNT, DIM, ACTIVE)
    parts = of, DelayedSGD(of), MemoryBank(COUNT, DIM)
    if warm:
        call(*parts)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(call, backend="eager", fullgraph=True)(*parts)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_enqueue_is_compiled_whole(backend: str) -> None:
    """Ragged, around the end, and more than the queue holds."""
    queues = [KeyQueue(7, DIM) for _ in range(2)]
    queues[1].load_state_dict(queues[0].state_dict())

    def both(queue: KeyQueue, keys: Tensor) -> Tensor:
        queue.enqueue(keys * 2)
        return queue.keys.sum()

    compiled = torch.compile(both, backend=backend, fullgraph=True)
    for count in (3, 3, 3, 1, 20, 5, 3):
        keys = torch.randn(count, DIM)
        assert torch.equal(both(queues[0], keys), compiled(queues[1], keys))
        assert torch.equal(queues[0].keys, queues[1].keys)
        assert torch.equal(queues[0].pointer, queues[1].pointer)
