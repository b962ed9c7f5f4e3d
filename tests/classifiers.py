"""A small classifier on each tier of storage, and a loop that trains it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive_ops import DelayedSGD, InstanceClassifier, conic_loss

STORAGES = ("device", "host", "disk")


def classifier(storage: str = "device", path: Path | None = None, **arguments: Any) -> InstanceClassifier:
    arguments = {"num_instances": 50, "dim": 6, "active": 20, "seed": 3} | arguments
    return InstanceClassifier(**arguments, storage=storage, path=path if storage == "disk" else None)


class Training:
    """A loop over random batches with a schedule, whose losses are to be compared."""

    def __init__(self, classifier: InstanceClassifier, **settings: Any) -> None:
        self.classifier = classifier
        settings = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01} | settings
        self.optimizer = DelayedSGD(classifier, **settings)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=7, gamma=0.9)
        self.generator = torch.Generator().manual_seed(5)

    def batch(self) -> Tensor:
        return torch.randint(self.classifier.num_instances, (8,), generator=self.generator)

    def step(self, indices: Tensor | None = None) -> float:
        classifier = self.classifier
        indices = self.batch() if indices is None else indices
        views = torch.randn(2, len(indices), classifier.dim, generator=self.generator).to(classifier.weight)
        target = classifier.activate(indices)
        loss = conic_loss(views, classifier.weight, target, num_instances=classifier.num_instances)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def steps(self, count: int) -> list[float]:
        return [self.step() for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])


def saved(state: Any) -> Any:
    """Through a file, and without trusting it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
