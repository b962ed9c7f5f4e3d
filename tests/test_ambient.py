"""What surrounds a call does not change it: a default device, and numbers that are NumPy's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contrastive_ops import (
    DelayedSGD,
    InstanceClassifier,
    KeyQueue,
    MemoryBank,
    co2_loss,
    conic_loss,
    consistency_loss,
    info_nce_loss,
    nt_xent_loss,
)

QUERY, KEY = torch.randn(2, 4, 8).unbind()
QUEUE = F.normalize(torch.randn(16, 8), dim=1)
LOSSES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, float]]] = {
    "co2": (
        co2_loss,
        (QUERY, KEY, QUEUE),
        {"temperature": 0.25, "consistency_temperature": 0.5, "consistency_weight": 2.0},
    ),
    "info_nce": (info_nce_loss, (QUERY, KEY, QUEUE), {"temperature": 0.25}),
    "consistency": (consistency_loss, (QUERY, KEY, QUEUE), {"temperature": 0.25}),
    "nt_xent": (
        nt_xent_loss,
        (QUERY, KEY),
        {"temperature": 0.25, "consistency_temperature": 0.5, "consistency_weight": 2.0},
    ),
    "conic": (
        conic_loss,
        (torch.stack([QUERY, KEY]), QUEUE, torch.arange(4)),
        {"num_instances": 100, "temperature": 0.25, "consistency_weight": 2.0},
    ),
}
# Values of the settings that each of these holds without rounding.
FLOATS = [np.float16, np.float32, np.float64]
INTEGERS = [np.int8, np.uint8, np.int32, np.int64]


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Tensors are made on a device of their own kind unless somebody says where: on none of the tests'."""
    with torch.device("meta"):
        yield


def gradients(loss: str, **settings: Any) -> list[torch.Tensor]:
    function, tensors, defaults = LOSSES[loss]
    rows = tensors[0].clone().requires_grad_()
    value = function(rows, *tensors[1:], **{**defaults, **settings})
    return [value.detach(), *torch.autograd.grad(value, rows)]


@pytest.mark.parametrize("serving", ["cpu", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_where_their_tensors_are(loss: str, serving: str) -> None:
    expected = gradients(loss, backend=serving)
    with torch.device("meta"):
        actual = gradients(loss, backend=serving)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("loss", "name"), [(loss, name) for loss, (*_, settings) in LOSSES.items() for name in settings]
)
def test_numbers_of_numpy_are_numbers(loss: str, name: str) -> None:
    value = LOSSES[loss][2][name]
    expected = gradients(loss)
    for kind in INTEGERS if value == int(value) else FLOATS:
        actual = gradients(loss, **{name: kind(value)})
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), kind
    with pytest.raises(TypeError, match=name):
        gradients(loss, **{name: np.bool_(True)})
    with pytest.raises(TypeError, match=name):
        gradients(loss, **{name: np.array([value])})


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", [b"cpu", 3, True, ["cpu"]])
def test_a_backend_is_named_by_a_string(loss: str, name: Any) -> None:
    with pytest.raises(TypeError, match="backend must be a name or None"):
        gradients(loss, backend=name)


def train(storage: str, path: Path | None, number: Callable[[int], Any] = int) -> dict[str, Any]:
    """Every call that a classifier takes, and where it ends."""
    host = torch.device("cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    classifier = InstanceClassifier(
        number(40), number(4), active=number(8), storage=storage, path=path, seed=number(3), device=host
    )
    optimizer = DelayedSGD(classifier, lr=np.float32(0.5), momentum=np.float64(0.75), weight_decay=number(0))
    for first in (0, 20, 2):
        indices = torch.arange(first, first + 5, device=host)
        target = classifier.activate(indices)
        classifier.prefetch(indices + 7)
        views = torch.randn(2, 5, 4, generator=generator, device=host)
        conic_loss(views, classifier.weight, target, num_instances=number(40)).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = [torch.cat(parts) for parts in zip(*classifier.export(number(16)), strict=True)]
    assert all(each.device == host for each in (*rows, classifier.active_instances))
    state = copy.deepcopy(classifier.state_dict())
    classifier.load_state_dict(state)
    classifier.close()
    return dict(zip(("instances", "weight", "momentum"), rows, strict=True))


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
def test_a_classifier_is_where_it_was_put(storage: str, tmp_path: Path) -> None:
    expected = train(storage, tmp_path / "plain" if storage == "disk" else None)
    with torch.device("meta"):
        actual = train(storage, tmp_path / "elsewhere" if storage == "disk" else None, np.int64)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("elsewhere")
def test_what_names_no_device_is_on_the_default_one() -> None:
    assert InstanceClassifier(10, 4).weight.is_meta
    assert MemoryBank(10, 4).rows.is_meta
    assert KeyQueue(10, 4).keys.is_meta


@pytest.mark.parametrize("kind", INTEGERS)
def test_queue_and_bank_take_them_too(kind: Callable[[int], Any]) -> None:
    bank, same = (
        MemoryBank(kind(10), kind(4), momentum=np.float32(0.5), seed=kind(3)),
        MemoryBank(10, 4, seed=3),
    )
    with torch.device("meta"):
        for each in (MemoryBank(kind(10), kind(4), seed=kind(3), device="cpu"), bank, same):
            each.update(torch.tensor([1, 2], device="cpu"), torch.ones(2, 4, device="cpu"))
        queue = KeyQueue(kind(5), kind(4), device="cpu")
        queue.enqueue(torch.ones(3, 4, device="cpu"))
    assert torch.equal(bank.rows, same.rows)
    assert queue.pointer.item() == 3
    assert type(bank.momentum) is float
