"""Images in whatever way they are stored: the same ones, in the same order, with the same views."""

from __future__ import annotations

import copy
import io
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train_ref import convert, evaluate
from train_ref.classifiers import LabelledImages
from train_ref.data import labels_of
from train_ref.errors import UsageError, named_file
from train_ref.stored import INDEX, PIXELS, UNLABELLED, Decoded, Folder, Shards, open_images, write_index

from .conftest import RECIPES


def picture(number: int, height: int = 20, width: int = 26) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def archive(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """8 + 8 images of two classes."""
    for number in range(16):
        part, name = ("train", "val")[number % 2], ("cat", "dog")[number % 4 // 2]
        path = tmp_path / "folder" / part / name / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, height=20 + number).save(path)
    return tmp_path / "folder"


def sharded(folder: Path, output: Path, numbered: bool) -> Path:
    """The folder as two shards a part, with the classes' numbers or within their folders."""
    for part in ("train", "val"):
        images = Folder(folder / part)
        for shard in range(2):
            files = {}
            for i in range(shard * 4, shard * 4 + 4):
                name = images.names[i]
                key = name.replace("/", "_").removesuffix(".png") if numbered else name.removesuffix(".png")
                files[f"{key}.png"] = Path(images.path(i)).read_bytes()
                if numbered:
                    files[f"{key}.json"] = b"{}"
                    files[f"{key}.cls"] = str(images.targets[i]).encode()
            archive(output / part / f"{part}-{shard:04}.tar", files)
    return output


@pytest.fixture(params=["numbered shards", "shards", "decoded"])
def other(request, folder, tmp_path) -> Path:
    """The same images, stored in another way."""
    if request.param == "decoded":
        convert.pack(str(folder), str(tmp_path / "other"), size=64)
        return tmp_path / "other"
    return sharded(folder, tmp_path / "other", numbered=request.param == "numbered shards")


def first_epoch(make_views, root: Path, **settings):
    torch.manual_seed(5)
    views = make_views(dataset="folder", root=str(root), augmentation="small", batch_size=4, **settings)
    views.setup()
    return list(views.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_the_same_however_images_are_stored(make_views, folder, other, workers):
    expected = first_epoch(make_views, folder)
    torch.testing.assert_close(first_epoch(make_views, other, num_workers=workers), expected, rtol=0, atol=0)


def test_all_that_an_evaluation_asks_for_is_the_same(make_views, folder, other):
    loaders = []
    for root in (folder, other):
        views = make_views(dataset="folder", root=str(root), image_size=12)
        views.setup()
        views.read_test_images()
        labels = views.evaluation_labels()
        loaders.append([labels, *map(list, views.evaluation_dataloaders())])
    torch.testing.assert_close(loaders[1], loaders[0], rtol=0, atol=0)


def test_a_set_is_read_by_processes_that_do_not_share_memory(other):
    images = open_images(other / "train")
    images[3]  # a file that is mapped already
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again[5][0], images[5][0])


def test_another_way_of_storing_is_another_set_to_go_on_with(make_views, folder, tmp_path):
    convert.pack(str(folder), str(tmp_path / "packed"), size=8)
    roots = (folder, tmp_path / "packed")
    loaders = []
    for root in roots:
        views = make_views(dataset="folder", root=str(root), augmentation="small")
        views.setup()
        loaders.append(views.train_dataloader())
    with pytest.raises(UsageError, match=r"data.root is decoded images of 8 .* has a folder of 8"):
        loaders[1].load_state_dict(loaders[0].state_dict())


def test_decoded_images_are_smaller_and_never_larger(folder, tmp_path):
    convert.pack(str(folder), str(tmp_path / "packed"), size=22)
    images, originals = open_images(tmp_path / "packed" / "train"), Folder(folder / "train")
    assert isinstance(images, Decoded)
    assert images.names == originals.names
    for (image, label), (original, expected) in zip(images, originals, strict=True):
        assert min(image.shape[1:]) == min(22, *original.shape[1:])
        assert label == expected
    file = tmp_path / "packed" / "train" / PIXELS
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"pixels.bin has .* bytes of"):
        open_images(tmp_path / "packed" / "train")


def test_decoded_images_may_be_more_than_there_is_memory(tmp_path):
    sides = 1 << 20, 1 << 17  # two images of 384 GiB
    write_index(tmp_path / INDEX, ["a", "b"], [0, 1], ["x", "y"], shapes=np.array([sides, sides]))
    with (tmp_path / PIXELS).open("wb") as file:
        file.truncate(2 * 3 * sides[0] * sides[1])
    images = Decoded(tmp_path)
    assert images.read(1).shape == (3, *sides)
    assert not images.read(1)[:, -2:, :2].any()


def test_shards_and_images_in_one_folder_are_refused(folder, tmp_path):
    """As archives are left beside what was in them."""
    archive(folder / "train" / "cat.tar", {"a.png": encoded(picture(0))})
    with pytest.raises(UsageError, match=r"holds cat\.tar, as shards are called, and (cat|dog) beside it"):
        open_images(folder / "train")


@pytest.mark.parametrize("damage", ["cut", "empty", "another"])
def test_a_damaged_index_is_named(folder, tmp_path, damage):
    root = sharded(folder, tmp_path / "shards", numbered=False) / "train"
    index = root / INDEX
    if damage == "another":
        np.savez(index, names=np.array([b"a"]), targets=np.array([0]), classes=np.array(["x"]))
    else:
        write_index(index, ["a"], [0], ["x"], shards=np.array([""]), places=np.zeros((1, 3)))
        index.write_bytes(index.read_bytes()[: 200 if damage == "cut" else 0])
    with pytest.raises(UsageError, match=str(index)):
        open_images(root)


def test_an_index_of_shards_is_used_and_refused_when_they_have_changed(folder, tmp_path, monkeypatch):
    root = sharded(folder, tmp_path / "shards", numbered=True) / "train"
    scanned = Shards(root)
    convert.index(str(root))
    monkeypatch.setattr("train_ref.stored.scan", lambda shards: pytest.fail("read through the shards"))
    indexed = Shards(root)
    assert (indexed.names, indexed.classes) == (scanned.names, scanned.classes)
    assert torch.equal(indexed[7][0], scanned[7][0])
    archive(root / "train-0002.tar", {"more.png": encoded(picture(0))})
    with pytest.raises(UsageError, match=r"index.npz is an index of other shards"):
        Shards(root)


def test_what_is_wrong_with_a_shard_is_named(folder, tmp_path):
    root = tmp_path / "shards"
    archive(root / "a.tar", {"x.png": encoded(picture(0)), "y.jpg": encoded(picture(1), "JPEG")[:300]})
    images = Shards(root)
    assert labels_of(images).tolist() == [UNLABELLED] * 2
    assert images[0][0].shape == (3, 20, 26)
    with pytest.raises(UsageError, match=r"a\.tar/y\.jpg cannot be read as an image"):
        images[1]
    (root / "b.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(UsageError, match=r"b\.tar cannot be read as a shard"):
        Shards(root)
    (root / INDEX).write_bytes(b"no index")
    with pytest.raises(UsageError, match=r"index\.npz cannot be read"):
        Shards(root)


@pytest.mark.parametrize("numbered", [True, False])
def test_a_sample_is_webdatasets(tmp_path, numbered):
    """Its image is the member whose whole extension says so, in whatever case; others are other fields."""
    image, mask = encoded(picture(0)), encoded(picture(1))
    files = {
        "cat/7.seg.png": mask,
        "cat/7.png": image,
        "cat/._7.png": b"",
        "dog/7.1.png": mask,
        "dog/8.JPG": b"",
    }
    if numbered:
        files |= {"cat/7.cls": b"3\n", "dog/8.cls": b"1", "dog/7.1.cls": b"2"}
    archive(tmp_path / "a.tar", files)
    images = Shards(tmp_path)
    assert images.names == ["cat/7.png", "dog/8.JPG"]
    assert images.targets.tolist() == ([3, 1] if numbered else [0, 1])
    assert torch.equal(images[0][0], torch.from_numpy(np.array(picture(0))).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["7.jpg", "7.cls", "7.png"], r"a\.tar .*sample 7 has two images, 7\.jpg and 7\.png"),
        (["x/7.jpg", "y/7.jpg", "x/7.jpg"], r"a\.tar .*sample 7 has two images, x/7\.jpg and x/7\.jpg"),
        (
            ["7.cls", "8.cls", "8.seg.png"],
            r"a\.tar holds no images but labels of samples: .*one of jpg, jpeg",
        ),
        (["7.seg.png", "8.txt"], r"a\.tar holds no images: "),
        ([], r"a\.tar holds no images: "),
    ],
)
@pytest.mark.parametrize("indexing", [False, True])
def test_shards_that_are_no_set_of_images_are_named(tmp_path, files, message, indexing):
    with tarfile.open(archive(tmp_path / "a.tar", {}), "w") as file:
        for name in files:
            member = tarfile.TarInfo(name)
            member.size = 1
            file.addfile(member, io.BytesIO(b"5"))
    with pytest.raises(UsageError, match=message):
        convert.index(str(tmp_path)) if indexing else open_images(tmp_path)
    assert not (tmp_path / INDEX).exists()


@pytest.mark.parametrize("text", [b"cat", b"-1", b"", b"1.5"])
def test_a_label_that_is_no_number_is_named(tmp_path, text):
    archive(tmp_path / "a.tar", {"7.png": encoded(picture(0)), "7.cls": text})
    with pytest.raises(UsageError, match=r"a\.tar .*7\.cls holds no class's number, but "):
        Shards(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "shards", "numbered shards", "decoded"])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_some_of_the_classes_are_enough_to_be_tested_on(make_views, tmp_path, kind, missing):
    """Their labels are those of the same classes in the training, whichever are missing."""
    names = ["ant", "bee", "cat"]
    for part, label in ((part, label) for part in ("train", "val") for label in range(3)):
        if part == "val" and label == missing:
            continue
        for number in range(4):
            path = tmp_path / "folder" / part / names[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(path)
    root = tmp_path / "folder"
    if kind == "decoded":
        convert.pack(str(root), str(tmp_path / kind), size=8)
        root = tmp_path / kind
    elif kind != "folder":
        for part in ("train", "val"):
            files = {}
            for path in sorted((root / part).glob("*/*.png")):
                name = path.parent.name
                files[f"{name}/{path.name}"] = path.read_bytes()
                if kind == "numbered shards":
                    files[f"{name}/{path.stem}.cls"] = str(names.index(name)).encode()
            archive(tmp_path / kind / part / "0.tar", files)
        root = tmp_path / kind
    settings = {"dataset": "folder", "root": str(root), "image_size": 8, "augmentation": "small"}
    views = make_views(**settings, batch_size=4)
    views.setup()
    assert views.evaluation_labels().tolist() == [0] * 4 + [1] * 4 + [2] * 4
    expected = [label for label in range(3) if label != missing for _ in range(4)]
    _, test = views.evaluation_dataloaders()
    assert torch.cat([labels for _, labels in test]).tolist() == expected
    images = LabelledImages(**settings)
    assert images.classes == 3
    assert [images.plain(train=False)[0, i][1] for i in range(8)] == expected
    assert images.sets[False].classes == images.sets[True].classes


@pytest.mark.parametrize("labelled", ["none", "some"])
def test_test_images_without_labels_are_not_measured_on(folder, tmp_path, labelled):
    root = sharded(folder, tmp_path / "shards", numbered=True)
    files = {f"{i}.png": encoded(picture(i)) for i in range(4)} | (
        {"1.cls": b"1"} if labelled == "some" else {}
    )
    shutil.rmtree(root / "val")
    archive(root / "val" / "0.tar", files)
    with pytest.raises(UsageError, match="has test images without labels"):
        LabelledImages(dataset="folder", root=str(root), image_size=8)


@pytest.fixture
def flat(folder, tmp_path) -> Path:
    (tmp_path / "flat").mkdir()
    for path in (folder / "train").glob("*/*.png"):
        shutil.copy(path, tmp_path / "flat")
    (tmp_path / "flat" / "notes.txt").write_text("no image")
    return tmp_path / "flat"


@pytest.mark.parametrize("part", [".", "train"])
def test_images_without_labels_are_trained_on(make_moco, make_views, make_trainer, flat, tmp_path, part):
    root = flat
    if part == "train":
        root = tmp_path / "whole"
        root.mkdir()
        flat.rename(root / "train")
    views = make_views(dataset="folder", root=str(root), augmentation="small", batch_size=4)
    trainer = make_trainer()
    trainer.fit(make_moco(), views)
    assert trainer.global_step == 2
    assert views.num_instances == 8
    assert views.evaluation_labels is not None
    with pytest.raises(UsageError, match=r"have no labels.*evaluation.enabled false leaves"):
        views.evaluation_labels()


def test_a_training_says_before_it_starts_what_an_evaluation_lacks(train_ref, flat, folder):
    run = ["fit", "--config", "synthetic", "--data.dataset=folder", "--data.augmentation=small"]
    run += ["--data.batch_size=4", "--trainer.max_steps=1", "--trainer.max_epochs=1"]
    shutil.rmtree(folder / "val")
    for root, lack in ((flat, "have no labels, as <class>/<image> has"), (folder, "has no folder")):
        with pytest.raises(SystemExit, match=lack):
            train_ref(*run, f"--data.root={root}")
        train_ref(*run, f"--data.root={root}", "--evaluation.enabled=false")


def test_images_without_labels_cannot_be_classified(checkpoint, flat):
    with pytest.raises(UsageError, match="has training images without labels"):
        evaluate.knn(str(checkpoint), dataset="folder", root=str(flat))


def cifar_files(hundred: bool) -> dict[str, bytes]:
    """Files as CIFAR's archives have them, as Python 2 would write them, with 6 + 4 images."""
    random = np.random.default_rng(0)

    def batch(count: int) -> bytes:
        key = "fine_labels" if hundred else "labels"
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        return pickle.dumps({"data": pixels, key: [i % 2 for i in range(count)]}, protocol=2)

    if hundred:
        names = {"fine_label_names": ["apple", "bear"]}
        return {"meta": pickle.dumps(names, protocol=2), "train": batch(6), "test": batch(4)}
    meta = pickle.dumps({"label_names": ["cat", "dog"]}, protocol=2)
    return {
        "batches.meta": meta,
        "data_batch_1": batch(3),
        "data_batch_2": batch(3),
        "test_batch": batch(4),
    }


def labels(file: bytes) -> list[int]:
    batch = pickle.loads(file)
    return batch.get("labels") or batch["fine_labels"]


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize("as_archive", [False, True])
def test_cifars_files_become_a_folder(tmp_path, hundred, as_archive):
    files = cifar_files(hundred)
    source = tmp_path / "source"
    if as_archive:
        source = archive(tmp_path / "s.tar.gz", {f"cifar/{n}": d for n, d in files.items()}, "w:gz")
    else:
        source.mkdir()
        for name, data in files.items():
            (source / name).write_bytes(data)
    convert.cifar(str(source), str(tmp_path / "out"))
    part_files = {"train": ("data_batch", "train"), "val": "test"}
    for part, count in (("train", 6), ("val", 4)):
        images = open_images(tmp_path / "out" / part)
        assert images.classes == (["apple", "bear"] if hundred else ["cat", "dog"])
        of_part = [labels(files[name]) for name in files if name.startswith(part_files[part])]
        ones = sum(map(sum, of_part))
        assert images.targets.tolist() == [0] * (count - ones) + [1] * ones
    batch = pickle.loads(files["test" if hundred else "test_batch"])
    expected = torch.from_numpy(batch["data"].reshape(-1, 3, 32, 32)[[0, 2, 1, 3]])
    assert torch.equal(torch.stack([image for image, _ in images]), expected)
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(UsageError, match="is there already"):
        convert.cifar(str(source), str(tmp_path / "out"))


class Program:
    def __reduce__(self):
        return (print, ("a program ran",))


def test_a_pickle_that_is_a_program_does_not_run(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "meta").write_bytes(pickle.dumps(Program()))
    with pytest.raises(UsageError, match=r"meta is no file of CIFAR's: it wants .*print"):
        convert.cifar(str(tmp_path / "source"), str(tmp_path / "out"))
    assert "a program ran" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", ".."])
def test_a_class_of_another_folder_is_refused(tmp_path, name):
    files = cifar_files(hundred=False)
    (tmp_path / "source").mkdir()
    for file, data in files.items():
        (tmp_path / "source" / file).write_bytes(data)
    (tmp_path / "source" / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", name]}))
    with pytest.raises(UsageError, match=f"has a class called '{name}'"):
        convert.cifar(str(tmp_path / "source"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def imagenet(tmp_path) -> dict[str, Path]:
    """Archives of ImageNet's form, of two classes with three images each, and four images for validation."""
    classes = {}
    for name in ("n01", "n02"):
        images = {f"{name}_{i}.JPEG": encoded(picture(i), "JPEG") for i in range(3)}
        classes[f"{name}.tar"] = archive(tmp_path / "classes" / name, images).read_bytes()
    images = {f"ILSVRC2012_val_{i:08}.JPEG": encoded(picture(9 + i), "JPEG") for i in (1, 2, 3, 4)}
    labels = tmp_path / "labels.txt"
    labels.write_text("n02\nn01\nn01\nn02\n")
    scipy_io = pytest.importorskip("scipy.io")
    synsets = np.array([(1, "n02"), (2, "n01")], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": synsets[:, None]})
    kit = {
        "kit/data/meta.mat": meta.getvalue(),
        "kit/data/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n2\n1\n",
    }
    return {
        "train": archive(tmp_path / "train.tar", classes),
        "val": archive(tmp_path / "val.tar", images),
        "text": labels,
        "kit": archive(tmp_path / "kit.tar.gz", kit, "w:gz"),
        "output": tmp_path / "out",
    }


@pytest.mark.parametrize("labels", ["text", "kit"])
def test_imagenets_archives_become_a_folder(imagenet, labels):
    convert.imagenet(*(str(imagenet[name]) for name in ("train", "val", labels, "output")))
    train, val = (open_images(imagenet["output"] / part) for part in ("train", "val"))
    assert train.classes == val.classes == ["n01", "n02"]
    assert train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert [Path(name).stem[-1] for name in val.names] == ["2", "3", "1", "4"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("n01\nn02\nn01\n", "there is none for ILSVRC2012_val_00000004.JPEG"),
        ("n01\n" * 5, "has 5 labels, but .* 4 images"),
        ("n01\nn02\nn03\nn01\n", "names n03, a class that .* does not have"),
    ],
)
def test_labels_that_do_not_fit_leave_no_folder(imagenet, labels, message):
    imagenet["text"].write_text(labels)
    with pytest.raises(UsageError, match=message):
        convert.imagenet(*(str(imagenet[name]) for name in ("train", "val", "text", "output")))
    assert not imagenet["output"].exists()
    assert not list(imagenet["output"].parent.glob("*.partial"))


@contextmanager
def full_disk() -> Iterator[None]:
    """Within this, files may have no more than 100 bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_not_blamed_on_the_archive(imagenet, folder, tmp_path):
    cifar = archive(tmp_path / "s.tar.gz", cifar_files(hundred=False), "w:gz")
    conversions = {
        "train/cat/00000.png": lambda: convert.cifar(str(cifar), str(tmp_path / "out")),
        "train/n01/n01_0.JPEG": lambda: convert.imagenet(
            *(str(imagenet[name]) for name in ("train", "val", "text", "output"))
        ),
        f"train/{PIXELS}": lambda: convert.pack(str(folder), str(tmp_path / "out")),
    }
    for name, conversion in conversions.items():
        with pytest.raises(OSError, match="File too large") as raised, full_disk():
            conversion()
        assert named_file(raised.value) == str(tmp_path / "out.partial" / name)
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("train", r"^train: \S*train\.tar cannot be read as an archive"),
        ("class", r"^train: n02\.tar in \S*train\.tar cannot be read as an archive"),
        ("val", r"^val: \S*val\.tar cannot be read as an archive"),
        ("kit", r"^labels: \S*kit\.tar\.gz cannot be read"),
    ],
)
def test_a_damaged_archive_is_named(imagenet, damaged, message):
    if damaged == "class":
        with tarfile.open(imagenet["train"]) as file:
            classes = {name: file.extractfile(name).read() for name in file.getnames()}
        archive(
            imagenet["train"],
            {name: data[: 1000 if name == "n02.tar" else None] for name, data in classes.items()},
        )
    else:
        imagenet[damaged].write_bytes(imagenet[damaged].read_bytes()[: 200 if damaged == "kit" else 5000])
    with pytest.raises(UsageError, match=message):
        convert.imagenet(*(str(imagenet[name]) for name in ("train", "val", "kit", "output")))
    assert not list(imagenet["output"].parent.glob("out*"))


def test_a_damaged_compression_is_the_archives(tmp_path):
    """Its error is none of the system's and none of tarfile's."""
    path = archive(tmp_path / "s.tar.gz", {"meta": np.arange(50_000).tobytes()}, "w:gz")
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + b"\xff" * 20 + whole[middle + 20 :])
    with pytest.raises(UsageError, match=r"^source: \S*s\.tar\.gz cannot be read as an archive"):
        convert.cifar(str(path), str(tmp_path / "out"))


def test_only_what_a_conversion_has_left_is_removed(folder, tmp_path):
    partial, mine = tmp_path / "out.partial", tmp_path / "out.partial" / "mine.txt"
    partial.mkdir()
    convert.pack(str(folder), str(tmp_path / "out"))  # an empty folder is nobody's
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]
    shutil.rmtree(tmp_path / "out")

    partial.mkdir()
    mine.write_text("a thesis")
    with pytest.raises(
        UsageError, match=r"output: .*out\.partial is there already, which no conversion has left"
    ):
        convert.pack(str(folder), str(tmp_path / "out"))
    assert mine.read_text() == "a thesis"

    (partial / convert.MARKER).touch()
    (partial / "train").mkdir()
    (partial / "train" / "left.png").touch()
    convert.pack(str(folder), str(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]
    assert not (tmp_path / "out" / "train" / "left.png").exists()
    assert not partial.exists()


def test_a_conversion_that_still_runs_is_left_alone(folder, tmp_path):
    program = (
        "import sys; from train_ref.convert import new_folder\n"
        "with new_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'image.png').touch(); print('begun', flush=True); input()"
    )
    out = tmp_path / "out"
    command, pipe = [sys.executable, "-c", program, str(out)], subprocess.PIPE
    with subprocess.Popen(command, cwd=RECIPES.parents[1], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "begun\n"
        with pytest.raises(UsageError, match=r"out\.partial is being filled by another process"):
            convert.pack(str(folder), str(out))
        other.communicate("\n", timeout=600)
    assert other.returncode == 0
    assert [path.name for path in out.iterdir()] == ["image.png"]


def test_a_conversion_is_a_command(train_ref, folder, tmp_path):
    out = train_ref("conversion", "pack", str(folder), str(tmp_path / "packed"), "--num_workers", "1")
    assert f"{folder / 'train'}: 8 of 8 images" in out
    assert len(open_images(tmp_path / "packed" / "val")) == 8
    with pytest.raises(SystemExit):
        train_ref("conversion", "mnist")


def test_two_processes_share_the_batches_of_one(make_views, other, monkeypatch):
    whole = first_epoch(make_views, other)
    monkeypatch.setattr("train_ref.data.world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr("train_ref.data.rank", lambda rank=rank: rank)
        shares.append(first_epoch(make_views, other))
    for batch, *halves in zip(whole, *copy.copy(shares), strict=True):
        for i in range(2):
            assert torch.equal(torch.cat([half[0][i] for half in halves]), batch[0][i])
        assert torch.equal(torch.cat([half[2] for half in halves]), batch[2])
