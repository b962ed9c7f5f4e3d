from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from train_ref import data
from train_ref.augmentations import SeveralViews
from train_ref.colours import Colours
from train_ref.data import Digits, Order, SyntheticImages, finish, finished_together, together, unchanged
from train_ref.errors import UsageError, one_line


def synthetic(seed: int = 0, length: int = 8) -> SyntheticImages:
    return SyntheticImages(seed, 8, length, unchanged)


@pytest.fixture
def folder(tmp_path):
    """A folder of 12 + 12 random images in 2 classes, of differing sizes."""
    random = np.random.default_rng(0)
    for index in range(24):
        path = tmp_path / ("train", "val")[index % 2] / ("cat", "dog")[index % 4 // 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20 + index, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path


def test_digits_are_split_for_good_and_in_equal_shares():
    train, test = Digits(True, unchanged), Digits(False, unchanged)
    assert (len(train), len(test)) == (1437, 360)
    for labels in (train.labels, test.labels):
        share = np.bincount(labels) / len(labels)
        assert np.abs(share - 0.1).max() < 0.005
    assert torch.equal(train.images, Digits(True, unchanged).images)
    image, _ = train[0]
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert train.images.max() == 255


def test_no_digit_is_in_both_splits():
    train, test = (
        {image.numpy().tobytes() for image in Digits(part, unchanged).images} for part in (True, False)
    )
    assert not train & test


def test_a_synthetic_image_depends_on_seed_and_index_alone():
    later_first, fresh = synthetic(), synthetic(length=4)
    for index in (10**9, 3, 0):
        assert torch.equal(later_first[index][0], fresh[index][0])
        assert not torch.equal(fresh[index][0], synthetic(seed=1)[index][0])
        assert not torch.equal(fresh[index][0], fresh[index + 4][0])
        assert fresh[index][1] == index % 4


def indices_of(order: Order) -> list[list[int]]:
    return [[index for _, index in batch] for batch in order]


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    order, epochs = Order(20, 5, seed=3), []
    for epoch in range(3):
        order.set_epoch(epoch)
        assert [{e for e, _ in batch} for batch in order] == [{epoch}] * 4
        epochs.append([*itertools.chain(*indices_of(order))])
        assert sorted(epochs[-1]) == list(range(20))
    assert epochs[0] != epochs[1] != epochs[2]
    assert indices_of(Order(20, 5, seed=3)) != indices_of(Order(20, 5, seed=4))


def test_the_synthetic_set_never_repeats_an_image():
    order, epochs = Order(5, 5, seed=None), []
    for epoch in range(3):
        order.set_epoch(epoch)
        epochs += indices_of(order)
    assert [*itertools.chain(*epochs)] == list(range(15))


def test_processes_share_each_batch(monkeypatch):
    whole = indices_of(Order(20, 6, seed=3))
    monkeypatch.setattr("train_ref.data.world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr("train_ref.data.rank", lambda rank=rank: rank)
        shares.append(indices_of(Order(20, 6, seed=3)))
    assert [first + second for first, second in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("given", [3, 5])
def test_a_loader_goes_on_where_another_stopped(make_views, workers, given):
    def loader():
        torch.manual_seed(7)
        views = make_views(synthetic_size=40, num_workers=workers)
        views.setup()
        return views.train_dataloader()

    def batches(loader, epochs):
        for epoch in epochs:
            loader.batch_sampler.set_epoch(epoch)
            yield from loader

    expected = list(batches(loader(), range(3)))
    stopped = loader()
    for _ in zip(range(5 + given), batches(stopped, range(3)), strict=False):
        pass
    state = stopped.state_dict()
    torch.manual_seed(8)  # draws no part in it
    resumed = make_views(synthetic_size=40, num_workers=workers)
    resumed.setup()
    resumed = resumed.train_dataloader()
    resumed.load_state_dict(state)
    rest = list(batches(resumed, range(1 if given < 5 else 2, 3)))
    assert len(rest) == 15 - 5 - given
    torch.testing.assert_close(rest, expected[5 + given :], rtol=0, atol=0)


def loader_of(make_views, **settings):
    views = make_views(**settings)
    views.setup()
    return views.train_dataloader()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 6}, "data.batch_size is 6, but the run of the checkpoint has 4: "),
        ({"batch_size": 2}, "data.batch_size is 2, but the run of the checkpoint has 4: "),
        ({"synthetic_size": 20}, "data.synthetic_size is 20, but the run of the checkpoint has 24: "),
        ({"synthetic_seed": 5}, "data.synthetic_seed is 5, but the run of the checkpoint has 0: "),
        ({"image_size": 9}, "data.image_size is 9, but the run of the checkpoint has 8: "),
        ({"dataset": "digits"}, "data.dataset is digits, but the run of the checkpoint has synthetic: "),
    ],
)
def test_a_loader_of_other_batches_refuses_the_state(make_views, changed, message):
    settings = {"synthetic_size": 24, "batch_size": 4, "augmentation": "small"}
    stopped = loader_of(make_views, **settings)
    next(iter(stopped))
    with pytest.raises(UsageError, match=f"^{message}"):
        loader_of(make_views, **settings | changed).load_state_dict(stopped.state_dict())
    views = make_views(**settings | changed)
    views.setup()
    views.load_state_dict(stopped.state_dict())
    with pytest.raises(UsageError, match=f"^{message}"):
        views.train_dataloader()


def test_a_state_goes_on_wherever_the_folder_lies_and_in_whatever_size(make_views, folder):
    settings = {"dataset": "folder", "batch_size": 4, "augmentation": "small"}
    state = loader_of(make_views, **settings, root=f"{folder}/").state_dict()
    moved = folder.parent / "moved"
    folder.rename(moved)
    loader_of(make_views, **settings, root=str(moved), image_size=12, num_workers=1).load_state_dict(state)
    old = {name: state[name] for name in ("epoch", "batches", "seed")}  # as it was once
    loader_of(make_views, **settings, root=str(moved)).load_state_dict(old)


@pytest.mark.parametrize("change", ["one more", "another name", "another class"])
def test_a_folder_of_other_images_refuses_the_state(make_views, folder, change):
    settings = {"dataset": "folder", "batch_size": 4, "augmentation": "small", "root": str(folder)}
    state = loader_of(make_views, **settings).state_dict()
    image = next((folder / "train" / "cat").iterdir())
    if change == "one more":
        shutil.copy(image, image.with_name("more.png"))
    else:
        image.rename(image.with_name("z.png") if change == "another name" else folder / "train/dog/a.png")
    with pytest.raises(
        UsageError, match=r"^data.root is a folder of 1[23] training images \(digest .* has a folder"
    ):
        loader_of(make_views, **settings).load_state_dict(state)


def test_a_view_depends_on_seed_epoch_and_instance_alone(make_views):
    def views(seed: int, before: int):
        torch.manual_seed(seed)
        views = make_views(dataset="digits", augmentation="digits_v2")
        views.setup()
        torch.rand(before)
        return views.train_dataloader().dataset

    def both(drawn, item):
        views, _, _ = finished_together([drawn[item]])
        return views

    drawn = views(1, 0)
    state = torch.get_rng_state()
    first, second = both(drawn, (0, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    torch.testing.assert_close(both(views(1, 9), (0, 5)), [first, second], rtol=0, atol=0)
    assert not torch.equal(both(drawn, (1, 5))[0], first)
    assert not torch.equal(both(drawn, (0, 6))[0], first)
    assert not torch.equal(both(views(2, 0), (0, 5))[0], first)


def test_lightning_moves_the_endless_set_on_every_epoch(make_moco, make_views, make_trainer):
    views, seen = make_views(), []
    views.setup()
    draw = views.train_images.image
    views.train_images.image = lambda index: seen.append(index) or draw(index)
    views.setup = lambda stage: None
    make_trainer(max_epochs=2).fit(make_moco(), views)
    assert seen == list(range(32))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(make_views, folder, workers):
    path = next((folder / "train" / "cat").iterdir())
    path.write_bytes(path.read_bytes()[:100])
    views = make_views(dataset="folder", root=str(folder), num_workers=workers, batch_size=12)
    views.setup()
    with pytest.raises(UsageError) as raised:
        list(views.train_dataloader())
    line = one_line(raised.value)
    assert line.startswith(f"data.root: {path} cannot be read as an image: ")
    assert "Traceback" not in line


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("fault", ["missing", "bomb", "transform"])
def test_whatever_fails_with_an_image_names_it(make_views, folder, monkeypatch, workers, evaluated, fault):
    path = next((folder / "train" / "cat").iterdir())
    size = Image.open(path).size

    def transform(image):
        crop = torch.zeros(3, 8, 8 // (image.shape[1:] != size[::-1]), dtype=torch.uint8)
        return crop if evaluated else (crop, Colours((), (), (1.0,)))

    what = "cannot be read as an image: "
    if fault == "transform":
        what = "cannot be transformed: ZeroDivisionError: "
        monkeypatch.setattr(data, "augmentation", lambda *_: transform)
        monkeypatch.setattr(data, "plain", lambda *_, crop: transform)
    views = make_views(dataset="folder", root=str(folder), num_workers=workers, batch_size=12)
    views.setup()
    loader = views.evaluation_dataloaders()[0] if evaluated else views.train_dataloader()
    if fault == "missing":
        path.unlink()
    elif fault == "bomb":
        Image.new("1", (400, 400)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(UsageError) as raised:
        list(loader)
    line = one_line(raised.value)
    assert line.startswith(f"data.root: {path} {what}")
    assert "Traceback" not in line


def test_test_images_are_read_once_as_far_as_they_are_evaluated(make_views, folder, monkeypatch, capsys):
    views = make_views(dataset="folder", root=str(folder), batch_size=4)
    views.setup()
    monkeypatch.setattr(data, "MANY", 12)
    views.read_test_images()
    assert capsys.readouterr().out.startswith("Reading 12 test images once")
    test_images = views._dataset(train=False)
    paths = [test_images.path(i) for i in range(len(test_images))]
    Path(paths[5]).write_bytes(b"")
    views.read_test_images(max_images=2)  # the first and the last
    assert not capsys.readouterr().out
    with pytest.raises(UsageError, match=f"data.root: {paths[5]} cannot be read as an image"):
        views.read_test_images()


@pytest.mark.parametrize(("dataset", "count"), [("digits", 1437), ("synthetic", 16), ("folder", 12)])
def test_every_dataset_gives_two_views_to_train_and_plain_images_to_evaluate(
    make_views, folder, dataset, count
):
    views = make_views(dataset=dataset, root=str(folder), image_size=12)
    views.setup()
    (query, key), labels, instances = next(iter(views.train_dataloader()))
    assert query.shape == key.shape == (8, 3, 12, 12)
    assert labels.shape == instances.shape == (8,)
    assert not torch.equal(query, key)

    train, test = views.evaluation_dataloaders()
    again, _ = views.evaluation_dataloaders()
    assert len(train.dataset) == count
    (images, labels), (same_images, same_labels) = next(iter(train)), next(iter(again))
    assert images.shape == (8, 3, 12, 12)
    assert torch.equal(images, same_images)
    assert torch.equal(labels, same_labels)
    assert not torch.equal(images, next(iter(test))[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_device_that_trains_colours_what_others_have_cropped(make_views, workers):
    """A device without values stands for a GPU."""
    views = make_views(num_workers=workers)
    views.setup()
    views.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("meta")),
        limit_train_batches=1.0,
        accumulate_grad_batches=1,
    )
    loader = views.train_dataloader()
    both, labels, instances = next(iter(loader))
    assert [(each.device.type, each.dtype, each.shape) for each in both] == [
        ("meta", torch.float32, (8, 3, 8, 8))
    ] * 2
    assert labels.device.type == instances.device.type == "cpu"
    drawn = loader.collate_fn([loader.dataset[0, i] for i in instances.tolist()])
    assert [crops.dtype for crops, _ in drawn[0]] == [torch.uint8] * 2
    expected, _, _ = finish(drawn)
    views.trainer = None
    (query, key), _, _ = next(iter(views.train_dataloader()))
    assert torch.equal(query, expected[0])
    assert torch.equal(key, expected[1])


def test_a_batch_says_which_instances_it_has(make_views, folder):
    views = make_views(dataset="folder", root=str(folder), batch_size=12)
    views.setup()
    assert views.num_instances == 12
    loader = views.train_dataloader()
    size_as_crop = lambda image: (torch.tensor(image.shape), Colours((), (), (1.0,)))  # noqa: E731
    loader.dataset.transform, loader.collate_fn = SeveralViews(size_as_crop), together
    [(sizes, _)], labels, instances = next(iter(loader))
    assert sorted(instances.tolist()) == list(range(12))
    for (_, height, width), label, instance in zip(
        sizes.tolist(), labels.tolist(), instances.tolist(), strict=True
    ):
        assert (width, height) == Image.open(views.train_images.path(instance)).size
        assert label == views.train_images.targets[instance]


def test_a_capped_evaluation_still_sees_every_class(make_views, folder):
    views = make_views(dataset="folder", root=str(folder))
    for loader in views.evaluation_dataloaders(max_images=4):
        labels = torch.cat([labels for _, labels in loader])
        assert labels.tolist() == [0, 0, 1, 1]


def test_an_incomplete_batch_is_dropped(make_views):
    views = make_views(synthetic_size=21)
    views.setup()
    assert len(list(views.train_dataloader())) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"synthetic_size": 7}, "batch_size is 8, but there are only 7"),
        ({"dataset": "folder"}, "data.root must name the folder"),
        ({"image_size": 1}, "data.image_size is 1, and must be 2 at least"),
        ({"image_size": 6}, "data.image_size is 6, but data.augmentation moco_v2 needs 7 at least"),
        ({"dataset": "folder", "root": "nowhere"}, "data.root has no folder nowhere/train"),
    ],
)
def test_a_set_that_cannot_be_opened_is_a_usage_error(make_views, settings, message):
    with pytest.raises(UsageError, match=message):
        make_views(**settings).setup()


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ("other classes", "no other classes under val/ than under train/, but .*val has eel"),
        ("unlabelled", "the test images in .*val have no labels"),
        ("empty", "a folder without images"),
    ],
)
def test_only_an_evaluation_asks_for_its_images(make_views, folder, val, message):
    if val == "other classes":
        (folder / "val" / "cat").rename(folder / "val" / "eel")
    else:
        images = sorted((folder / "val" / "cat").iterdir())
        shutil.move(folder / "val", folder / "moved")
        (folder / "val").mkdir()
        if val == "unlabelled":
            shutil.copy(folder / "moved" / "cat" / images[0].name, folder / "val")
    views = make_views(dataset="folder", root=str(folder))
    views.setup()
    next(iter(views.train_dataloader()))
    with pytest.raises(UsageError, match=message):
        views.evaluation_labels()


def test_a_folder_without_images_is_a_usage_error(make_views, tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UsageError, match="a folder without images"):
        make_views(dataset="folder", root=str(tmp_path)).setup()
