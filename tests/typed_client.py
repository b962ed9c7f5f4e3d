"""What a user's type checker sees of the package: checked by `make lint`, and never run."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor

from contrastive_ops import (
    CO2Loss,
    ConICLoss,
    ConICMetrics,
    DelayedSGD,
    InstanceClassifier,
    KeyQueue,
    LossMetrics,
    NTXentLoss,
    available_backends,
    co2_loss,
    conic_loss,
    consistency_loss,
    info_nce_loss,
    nt_xent_loss,
    serving_backend,
    use_backend,
)


def losses_over_a_queue(query: Tensor, key: Tensor, with_metrics: bool) -> None:
    queue = KeyQueue(size=65536, dim=128)
    assert_type(queue.keys, Tensor)
    assert_type(queue.pointer, Tensor)
    assert_type(co2_loss(query, key, queue.keys), Tensor)
    assert_type(info_nce_loss(query, key, queue.keys, temperature=0.07, return_metrics=False), Tensor)
    loss, metrics = consistency_loss(query, key, queue.keys, reduction="none", return_metrics=True)
    assert_type(loss, Tensor)
    assert_type(metrics, LossMetrics)
    assert_type(metrics.positive_rank, Tensor)
    either = co2_loss(query, key, queue.keys, include_positive=True, return_metrics=with_metrics)
    assert_type(either, Tensor | tuple[Tensor, LossMetrics])
    queue.enqueue(key)


def losses_of_views(view1: Tensor, view2: Tensor) -> None:
    assert_type(nt_xent_loss(view1, view2, consistency_weight=1.0), Tensor)
    assert_type(nt_xent_loss(view1, view2, return_metrics=True), tuple[Tensor, LossMetrics])


def instance_classification(views: Tensor, indices: Tensor) -> None:
    classifier = InstanceClassifier(1_000_000, 128, active=65536)
    optimizer = DelayedSGD(classifier, lr=0.06, momentum=0.9, weight_decay=1e-4)
    target = classifier.activate(indices)
    loss = conic_loss(views, classifier.weight, target, num_instances=classifier.num_instances)
    assert_type(loss, Tensor)
    loss, metrics = conic_loss(
        views, classifier.weight, target, update=optimizer.in_backward(), return_metrics=True
    )
    assert_type(metrics, ConICMetrics)
    optimizer.step()
    optimizer.zero_grad()
    weight, momentum = classifier.read(indices)
    assert_type(weight, Tensor)
    assert_type(momentum, Tensor)


def modules() -> None:
    criterion = CO2Loss(temperature=0.07, consistency_weight=10.0)
    criterion.temperature *= 0.5
    assert_type(criterion.temperature, float)
    assert_type(ConICLoss(num_instances=10).num_instances, int | None)
    NTXentLoss(reduction="sum", backend="cpu")


def backends(query: Tensor) -> None:
    assert_type(available_backends()["triton"].reason, str)
    with use_backend("reference"):
        assert_type(serving_backend(query), str)


# Each of these is a mistake, and has to be one for the type checker too.
def mistakes(query: Tensor) -> None:
    co2_loss(query, query, query, temprature=0.1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    co2_loss(query, query, query, 0.1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    nt_xent_loss(query, query, reduction="average")  # type: ignore[call-overload]  # pyright: ignore
    CO2Loss(0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    CO2Loss(tau=0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    KeyQueue(size="large", dim=torch.tensor(3))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
