from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from train_ref.augmentations import plain
from train_ref.data import Digits, SyntheticImages
from train_ref.evaluation import Features, evaluate, nearest
from train_ref.pictures import NEIGHBOURS, QUERIES, choose, class_name, gallery, overview, thumbnail


def features(count: int, labels: torch.Tensor, noise: float, seed: int) -> Features:
    """One direction a label, and noise."""
    random = torch.Generator().manual_seed(seed)
    directions = F.one_hot(labels, 10).float()
    return Features(directions + noise * torch.randn(count, 10, generator=random), labels)


@pytest.fixture(scope="module")
def digits():
    return tuple(Digits(train, plain(8, crop=False)) for train in (True, False))


@pytest.fixture(scope="module")
def compared(digits):
    labels = [torch.tensor(images.labels) for images in digits]
    return {
        name: tuple(features(len(truth), truth, noise, seed) for seed, truth in enumerate(labels))
        for name, noise in (("untrained", 0.7), ("trained", 0.1))
    }


def rows_of(compared):
    return evaluate(compared, k=5, temperature=0.1, label_fractions=[0.1], seeds=2)


def test_the_nearest_are_found_one_at_a_time():
    train, test = (Features(torch.randn(count, 6), torch.zeros(count)) for count in (30, 7))
    found = nearest(train, test, 4)
    for feature, indices in zip(test.features, found, strict=True):
        similarities = [F.cosine_similarity(feature, other, dim=0).item() for other in train.features]
        assert indices.tolist() == np.argsort(similarities)[::-1][:4].tolist()
    assert nearest(train, test, 100).shape == (7, 30)


def test_half_of_the_images_have_changed_and_labels_differ():
    labels = np.arange(40) % 8
    changed = np.zeros(40, dtype=bool)
    changed[[11, 19, 20, 29, 38]] = True  # labels 3, 3, 4, 5, 6
    chosen = choose(changed, labels)
    assert len(chosen) == QUERIES == len(set(labels[chosen]))
    assert {11, 20, 29} <= set(chosen)
    assert labels[chosen].tolist() == sorted(labels[chosen])


@pytest.mark.parametrize(("changed", "count", "expected"), [(0, 40, 6), (40, 40, 6), (2, 4, 4)])
def test_there_may_be_few_images_and_none_or_all_of_them_changed(changed, count, expected):
    chosen = choose(np.arange(count) < changed, np.zeros(count, dtype=int))
    assert len(chosen) == len(set(chosen)) == expected


def test_frames_tell_whether_labels_are_the_same(digits, compared):
    shown = gallery(digits, compared, rows_of(compared))
    assert [title.split(":")[1] for title in shown.titles["trained"]] == [
        " 5 nearest neighbours", " linear probe, 10 % of the labels"
    ]  # fmt: skip
    assert len(shown.rows) == QUERIES
    images = {image.numpy().tobytes(): int(label) for image, label in digits[0]}
    as_drawn = {thumbnail(image).tobytes(): int(label) for image, label in digits[0]}
    assert len(images) == len(as_drawn)
    for row in shown.rows:
        assert list(row.neighbours) == ["untrained", "trained"]
        for neighbours in row.neighbours.values():
            assert len(neighbours) == NEIGHBOURS
            for image, same in neighbours:
                assert same == (as_drawn[image.tobytes()] == int(row.label))
    untrained, trained = (
        sum(same for row in shown.rows for _, same in row.neighbours[name]) for name in compared
    )
    assert untrained < trained == QUERIES * NEIGHBOURS
    assert ", 3 of them from those where the training changed how many" in shown.caption


def test_no_change_is_told_where_there_is_none(digits, compared):
    same = dict.fromkeys(compared, compared["trained"])
    shown = gallery(digits, same, rows_of(same))
    assert shown.caption == "6 of 360 test images, drawn at random"


def test_nothing_is_claimed_without_labels(digits, compared):
    one_label = {
        name: tuple(Features(part.features, torch.zeros_like(part.labels)) for part in sets)
        for name, sets in compared.items()
    }
    shown = gallery(digits, one_label, [])
    assert shown.titles == {"untrained": [], "trained": []}
    assert "label" not in shown.caption
    for row in shown.rows:
        assert row.label == ""
        assert all(same is None for near in row.neighbours.values() for _, same in near)


def test_the_same_features_give_the_same_picture(digits, compared, tmp_path):
    epochs = [{"epoch": 1, "loss": 2.0, "consistency_loss": 0.5, "top1": 0.1, "top5": 0.2}]
    shuffled = [{name: epochs[0][name] for name in reversed(epochs[0])}]
    for path, told in (("one.png", epochs), ("other.png", shuffled)):
        overview(told, gallery(digits, compared, rows_of(compared)), tmp_path / path)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()
    overview(epochs, None, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_thumbnail_is_the_image_before_its_normalisation_and_no_larger_than_needed():
    images = SyntheticImages(seed=0, size=64, length=4)
    normalised = plain(64, crop=False)(images[1][0])
    expected = images[1][0].permute(1, 2, 0).numpy() / 255
    np.testing.assert_allclose(thumbnail(normalised), expected, atol=1e-5)
    assert thumbnail(plain(224, crop=False)(images[1][0])).shape == (96, 96, 3)


def test_a_label_is_called_as_its_folder_is():
    class Folder(SyntheticImages):
        classes = ("great_tit", "a_bird_with_a_long_name")

    images = Subset(Subset(Folder(0, 8, 4), [0, 1]), [0])
    assert class_name(images, 0) == "great tit"
    assert class_name(images, 1) == "a bird with…"
    assert class_name(Digits(train=True), 7) == "7"
