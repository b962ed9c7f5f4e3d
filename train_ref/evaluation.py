"""What frozen features are worth: nearest neighbours, and linear probes on few labels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Features(NamedTuple):
    """Features (N, F) in float32 and labels (N,), on the CPU."""

    features: Tensor
    labels: Tensor


class Score(NamedTuple):
    """Accuracies in percent over several draws of labelled images; one draw has no deviation."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, draws: Sequence[float]) -> Score:
        return cls(float(np.mean(draws)), float(np.std(draws, ddof=1)) if len(draws) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


@torch.no_grad()
def extract_features(backbone: nn.Module, loader: DataLoader, device: torch.device | str) -> Features:
    """Run a network in evaluation mode over batches of (images (B, 3, H, W), labels (B,))."""
    was_training = backbone.training
    backbone.to(device).eval()
    weight = next(backbone.parameters(), torch.empty(0))  # images take its device and dtype
    batches = [(backbone(images.to(weight)).float().cpu(), labels) for images, labels in loader]
    backbone.train(was_training)
    return Features(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


@torch.no_grad()
def knn_accuracies(
    train: Features,
    test: Features,
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
    chunk_size: int = 1024,
    device: torch.device | str = "cpu",
) -> dict[tuple[int, float], float]:
    """Weighted k-nearest-neighbour accuracies in percent, as InstDisc has it (Wu et al., CVPR 2018).

    Each of the k training features most similar to a test feature votes for its label with the weight
    e^{similarity/τ}, similarity being the cosine. It is computed once, for every k and τ.

    Args:
        train: the features that vote.
        test: the features to classify.
        ks: numbers of votes; those beyond the number of training features mean all of them.
        temperatures: each τ.
        chunk_size: test features that are compared at once: memory is chunk_size × N similarities.
        device: where they are compared; it takes the training features, 4 × N × F bytes, besides.

    Returns:
        The accuracy of each (k, τ).
    """
    keys = F.normalize(train.features.to(device), dim=1)  # (N, F)
    labels = train.labels.to(device)  # (N,)
    classes = int(labels.max()) + 1
    correct = dict.fromkeys(itertools.product(ks, temperatures), 0)
    for queries, truth in zip(test.features.split(chunk_size), test.labels.split(chunk_size), strict=True):
        similarity = F.normalize(queries.to(device), dim=1) @ keys.T  # (chunk, N)
        similarity, neighbours = similarity.topk(min(max(ks), len(keys)), dim=1)  # nearest first
        truth = truth.to(device)
        for k, temperature in correct:
            # Votes relative to the nearest neighbour's: no temperature is too small.
            weights = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()  # (chunk, k)
            votes = weights.new_zeros(len(truth), classes).scatter_add_(1, labels[neighbours[:, :k]], weights)
            correct[k, temperature] += int((votes.argmax(dim=1) == truth).sum())
    return {setting: 100 * count / len(test.labels) for setting, count in correct.items()}


def knn_accuracy(
    train: Features,
    test: Features,
    *,
    k: int = 200,
    temperature: float = 0.07,
    chunk_size: int = 1024,
    device: torch.device | str = "cpu",
) -> float:
    """`knn_accuracies` of one k and one τ."""
    settings = {"ks": (k,), "temperatures": (temperature,), "chunk_size": chunk_size, "device": device}
    return knn_accuracies(train, test, **settings)[k, temperature]


@torch.no_grad()
def nearest(train: Features, test: Features, k: int) -> Tensor:
    """Which k training features each test feature is most like, by cosine: indices (M, k), nearest first."""
    known, asked = (F.normalize(part.features, dim=1) for part in (train, test))
    k = min(k, len(known))
    # A few at a time: of a million training images, a thousand rows of similarities would take 5 GB.
    return torch.cat([(some @ known.T).topk(k, dim=1).indices for some in asked.split(64)])


def labelled_subset(labels: Tensor, fraction: float, seed: int) -> np.ndarray:
    """Indices of about that fraction of N labels (N,), as many from each class and at least one; 1 means all.

    They depend on the labels, the fraction and the seed alone: every network is probed on the same ones.
    """
    if fraction == 1:
        return np.arange(len(labels))
    random = np.random.default_rng(seed)
    classes = np.unique(labels)
    each = max(1, round(fraction * len(labels) / len(classes)))
    members = (np.flatnonzero(labels.numpy() == label) for label in classes)
    return np.concatenate([random.permutation(indices)[:each] for indices in members])


def probe_accuracy(train: Features, test: Features, labelled: np.ndarray) -> float:
    """Accuracy in percent of logistic regression on the labelled training features.

    Features are standardised by the mean and deviation of all training features, which needs no labels.
    """
    scaler = StandardScaler().fit(train.features.numpy())
    probe = LogisticRegression(max_iter=1000)
    probe.fit(scaler.transform(train.features[labelled].numpy()), train.labels[labelled].numpy())
    return 100 * probe.score(scaler.transform(test.features.numpy()), test.labels.numpy())


def probe_score(train: Features, test: Features, fraction: float, seeds: int) -> Score:
    """`probe_accuracy` over that many draws of a fraction of the labels; all labels are drawn but once."""
    draws = [
        probe_accuracy(train, test, labelled_subset(train.labels, fraction, seed))
        for seed in range(seeds if fraction < 1 else 1)
    ]
    return Score.of(draws)


def evaluate(
    features: Mapping[str, tuple[Features, Features]],
    *,
    k: int,
    temperature: float,
    label_fractions: Sequence[float],
    seeds: int,
) -> list[dict[str, Any]]:
    """Every measure of every network, by name, from its training and test features.

    Returns:
        A row a measure: its name, the number of labels it uses, and of each network the mean and deviation
        of its accuracy in percent; ready for JSON.
    """
    (train, _), *_ = features.values()
    rows = [
        {
            "measure": f"{k} nearest neighbours",
            "labels": len(train.labels),
            **{
                name: Score(knn_accuracy(*sets, k=k, temperature=temperature), None)._asdict()
                for name, sets in features.items()
            },
        }
    ]
    for fraction in label_fractions:
        rows.append(
            {
                "measure": f"linear probe, {100 * fraction:g} % of the labels",
                "labels": len(labelled_subset(train.labels, fraction, seed=0)),
                **{name: probe_score(*sets, fraction, seeds)._asdict() for name, sets in features.items()},
            }
        )
    return rows


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of `evaluate` as text, below their header."""
    texts = (
        [str(Score(**cell)) if isinstance(cell, dict) else str(cell) for cell in row.values()] for row in rows
    )
    return [list(rows[0]), *texts]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `evaluate` as plain text: the first column to the left, the others to the right."""
    table = cells(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
