from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from train_ref.evaluation import (
    Features,
    Score,
    evaluate,
    extract_features,
    format_table,
    knn_accuracies,
    knn_accuracy,
    labelled_subset,
    probe_accuracy,
)


def clusters(count: int, seed: int, spread: float = 0.5) -> Features:
    """Three classes around the corners of a triangle, in turn."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    corners = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])
    return Features(corners[labels] + spread * torch.randn(count, 2, generator=random), labels)


def knn_oracle(train: Features, test: Features, k: int, temperature: float) -> float:
    """One test image and one neighbour at a time."""
    correct = 0
    for feature, label in zip(*test, strict=True):
        similarities = [
            F.cosine_similarity(feature.double(), other.double(), dim=0).item() for other in train.features
        ]
        nearest = sorted(range(len(similarities)), key=lambda i: -similarities[i])[:k]
        votes = [0.0] * 3
        for i in nearest:
            votes[train.labels[i]] += math.exp(similarities[i] / temperature)
        correct += int(votes.index(max(votes)) == label)
    return 100 * correct / len(test.labels)


@pytest.mark.parametrize("k", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 16, 1024])
def test_nearest_neighbours_agree_with_a_vote_counted_by_hand(k, temperature, chunk_size):
    train, test = clusters(50, seed=0), clusters(37, seed=1)
    accuracy = knn_accuracy(train, test, k=k, temperature=temperature, chunk_size=chunk_size)
    assert accuracy == pytest.approx(knn_oracle(train, test, k, temperature))
    assert 40 < accuracy < 100


def test_several_votes_and_temperatures_are_those_of_one_at_a_time():
    train, test = clusters(50, seed=0, spread=0.9), clusters(37, seed=1, spread=0.9)
    accuracies = knn_accuracies(train, test, ks=(3, 20, 1000), temperatures=(0.07, 10.0), chunk_size=10)
    assert list(accuracies) == [(k, temperature) for k in (3, 20, 1000) for temperature in (0.07, 10.0)]
    for (k, temperature), accuracy in accuracies.items():
        assert accuracy == knn_accuracy(train, test, k=k, temperature=temperature)
    assert len(set(accuracies.values())) > 2


def test_near_votes_outweigh_many_far_ones():
    train = Features(torch.tensor([[1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 1, 1]))
    test = Features(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert knn_accuracy(train, test, k=3, temperature=1e-4) == 100
    assert knn_accuracy(train, test, k=3, temperature=100.0) == 0


def test_features_come_from_the_network_in_evaluation_mode_which_is_undone():
    network = nn.BatchNorm1d(4)
    network.running_mean.fill_(1.0)
    images, labels = torch.randn(10, 4), torch.arange(10)
    features = extract_features(network, DataLoader(TensorDataset(images, labels), batch_size=3), "cpu")
    torch.testing.assert_close(features.features, (images - 1) / math.sqrt(1 + network.eps))
    assert torch.equal(features.labels, labels)
    assert network.training
    assert torch.equal(network.running_mean, torch.ones(4))


@pytest.mark.parametrize(("fraction", "each"), [(0.001, 1), (0.01, 2), (0.1, 20)])
def test_label_subsets_are_balanced_and_depend_on_the_seed_alone(fraction, each):
    labels = torch.randint(0, 5, (1000,), generator=torch.Generator().manual_seed(0))
    subset = labelled_subset(labels, fraction, seed=3)
    assert np.bincount(labels[subset]).tolist() == [each] * 5
    assert len(set(subset.tolist())) == len(subset)
    assert np.array_equal(subset, labelled_subset(labels, fraction, seed=3))
    assert not np.array_equal(subset, labelled_subset(labels, fraction, seed=4))


def test_all_labels_are_all_labels():
    assert labelled_subset(torch.tensor([0, 0, 1]), 1.0, seed=0).tolist() == [0, 1, 2]


def test_a_probe_is_logistic_regression_whatever_the_scale_of_the_features():
    train, test = clusters(60, seed=0), clusters(60, seed=1)
    everything = np.arange(60)
    accuracy = probe_accuracy(train, test, everything)
    # Two equal-spread neighbours a distance of 1.75 apart: the best rule, the nearest corner, by hand.
    corners = torch.stack([train.features[train.labels == label].mean(dim=0) for label in range(3)])
    nearest = torch.cdist(test.features, corners).argmin(dim=1)
    assert accuracy == pytest.approx(100 * (nearest == test.labels).float().mean().item(), abs=5)

    scale = torch.tensor([1e-3, 1e3])
    scaled = [Features(part.features * scale + 5, part.labels) for part in (train, test)]
    assert probe_accuracy(*scaled, everything) == pytest.approx(accuracy, abs=2)


def test_a_probe_looks_at_no_label_outside_its_subset():
    train, test = clusters(60, seed=0), clusters(60, seed=1)
    labelled = labelled_subset(train.labels, 0.1, seed=0)
    hidden = torch.full_like(train.labels, 2)
    hidden[labelled] = train.labels[labelled]
    assert probe_accuracy(train, test, labelled) == probe_accuracy(Features(train[0], hidden), test, labelled)


def test_networks_are_compared_on_the_same_measures():
    sets = (clusters(60, seed=0), clusters(30, seed=1))
    rows = evaluate({"one": sets, "other": sets}, k=5, temperature=0.1, label_fractions=(0.1, 1.0), seeds=3)
    assert [row["labels"] for row in rows] == [60, 6, 60]
    for row in rows:
        assert row["one"] == row["other"]
    assert rows[1]["one"]["std"] > 0
    assert rows[0]["one"]["std"] is None
    assert rows[2]["one"]["std"] is None
    assert json.loads(json.dumps(rows)) == rows


def test_the_table_is_aligned_plain_text():
    rows = [
        {"measure": "kNN", "labels": 100, "trained": Score(97.25, None)._asdict()},
        {"measure": "linear probe", "labels": 10, "trained": Score(80.0, 1.26)._asdict()},
    ]
    assert format_table(rows).splitlines() == [
        "measure       labels     trained",
        "--------------------------------",
        "kNN              100        97.2",
        "linear probe      10  80.0 ± 1.3",
    ]
