"""The commands ``conversion``: from the files that sets of images come in to folders for the training.

A folder appears under its name when it is whole.
"""

from __future__ import annotations

import io
import lzma
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from .augmentations import Resize
from .errors import UsageError, naming
from .files import locked, replacing
from .stored import INDEX, PIXELS, StoredImages, open_images, scan, shards_of, write_index
from .workers import context

PARTS = ("train", "val")
MARKER = ".conversion"  # in a folder that is being filled: a later conversion may remove it
ROUND = 50_000  # images between two lines of progress


def cifar(source: str, output: str) -> None:
    """Makes a folder of CIFAR-10's or CIFAR-100's files for Python.

    Args:
        source: ``cifar-10-python.tar.gz``, ``cifar-100-python.tar.gz``, or the folder that is in it.
        output: the new folder, with ``train/<class>/<number>.png`` and ``val/…``.
    """
    with new_folder(output) as folder:
        files = dict(files_of(Path(source), "source"))
        meta = next((name for name in ("batches.meta", "meta") if name in files), None)
        if meta is None:
            raise UsageError(f"source: {source} has neither CIFAR-10's batches.meta nor CIFAR-100's meta")
        fine = meta == "meta"
        classes = unpickled(files[meta], meta)["fine_label_names" if fine else "label_names"]
        if outside := [name for name in classes if Path(name).name != name or name == ".."]:
            raise UsageError(
                f"source: {meta} has a class called {outside[0]!r}, which is no name of a folder"
            )
        trains, tests = (("train",), ("test",)) if fine else (cifar_10_batches(files), ("test_batch",))
        for part, names in zip(PARTS, (trains, tests), strict=True):
            number = 0
            for name in names:
                if name not in files:
                    raise UsageError(f"source: {source} has no file {name}")
                batch = unpickled(files[name], name)
                pixels = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                for image, label in zip(pixels, batch["fine_labels" if fine else "labels"], strict=True):
                    file = io.BytesIO()
                    Image.fromarray(np.ascontiguousarray(image)).save(file, "PNG")
                    write(folder / part / classes[label] / f"{number:05}.png", file.getvalue())
                    number += 1
            print(f"{part}: {number:,} images of {len(classes)} classes", flush=True)


def cifar_10_batches(files: dict[str, bytes]) -> list[str]:
    return sorted(name for name in files if name.startswith("data_batch_"))


def files_of(source: Path, option: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a folder's files, or of those in an archive.

    Args:
        source: the folder or the archive.
        option: of the user's, that says where it is.
    """
    if source.is_dir():
        for path in source.iterdir():
            if path.is_file():
                with naming(path):
                    data = path.read_bytes()
                yield path.name, data
        return
    yield from ((Path(name).name, data) for name, data in members(source, f"{option}: {source}"))


def members(archive: Path | bytes, what: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in an archive, compressed or not.

    Errors are the archive's only while it is read, here: a disk that is full where its files are written
    raises one of the same kind elsewhere.

    Args:
        archive: where it is, or its contents.
        what: messages call it.

    Raises:
        UsageError: it cannot be read.
    """
    given: dict[str, Any] = (
        {"name": archive} if isinstance(archive, Path) else {"fileobj": io.BytesIO(archive)}
    )
    try:
        with closing(tarfile.open(**given)) as opened:
            for member in opened:
                if member.isfile():
                    yield member.name, opened.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UsageError(f"{what} cannot be read as an archive: {error}") from error


def write(path: Path, data: bytes) -> None:
    """Write a file, whose folder is made where there is none. An error of the system names one of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        path.write_bytes(data)


class _Arrays(pickle.Unpickler):
    """Of lists, texts, numbers and NumPy's arrays: any other class in a pickle could be a program."""

    KNOWN = ("multiarray._reconstruct", "numpy.ndarray", "numpy.dtype", "_codecs.encode")

    def find_class(self, module: str, name: str) -> Any:
        # NumPy's own modules have had several names.
        if f"{module}.{name}".removeprefix("numpy.core.").removeprefix("numpy._core.") not in self.KNOWN:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return super().find_class(module, name)


def unpickled(data: bytes, name: str) -> dict[str, Any]:
    """What is in a file of CIFAR's, which Python 2 has written."""
    try:
        return _Arrays(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # whatever is wrong with the file
        raise UsageError(f"source: {name} is no file of CIFAR's: {error}") from error


def imagenet(train: str, val: str, labels: str, output: str) -> None:
    """Makes a folder of ImageNet's archives (ILSVRC 2012).

    Args:
        train: ``ILSVRC2012_img_train.tar``, an archive of an archive for each class.
        val: ``ILSVRC2012_img_val.tar``.
        labels: what classes the images of ``val`` are of: the development kit,
            ``ILSVRC2012_devkit_t12.tar.gz``, or a text with a line for each image in order, its class as the
            archives in ``train`` are called, such as n01440764.
        output: the new folder, with ``train/<class>/<image>`` and ``val/<class>/<image>``.
    """
    with new_folder(output) as folder:
        of_images = classes_in(Path(labels))
        count = 0
        for name, archive in members(Path(train), f"train: {train}"):
            if not name.endswith(".tar"):
                continue
            place = folder / "train" / Path(name).stem
            count += extract(members(archive, f"train: {name} in {train}"), lambda _, place=place: place)
            print(f"train: {count:,} images", flush=True)
        unknown = set(of_images) - {path.name for path in (folder / "train").iterdir()}
        if unknown:
            raise UsageError(f"labels: {labels} names {min(unknown)}, a class that {train} does not have")
        count = extract(
            members(Path(val), f"val: {val}"), lambda number: folder / "val" / of_images[number - 1]
        )
        if count != len(of_images):
            raise UsageError(f"labels: {labels} has {len(of_images):,} labels, but {val} {count:,} images")
        print(f"val: {count:,} images", flush=True)


def extract(files: Iterable[tuple[str, bytes]], folder_of: Callable[[int], Path]) -> int:
    """Write those of the files that are images into the folders of their numbers, which names end in; returns
    how many."""
    count = 0
    for name, data in files:
        path = Path(name)
        if path.suffix.lower() not in (".jpeg", ".jpg"):
            continue
        try:
            folder = folder_of(int(path.stem.rpartition("_")[2]))
        except (IndexError, ValueError):
            raise UsageError(f"labels: there is none for {name}") from None
        write(folder / path.name, data)
        count += 1
    return count


def classes_in(labels: Path) -> list[str]:
    """The class of each image for validation, in the order of their numbers."""
    try:
        if not tarfile.is_tarfile(labels):
            return labels.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise UsageError(f"labels: {labels} cannot be read: {error}") from error
    from scipy.io import loadmat

    files = dict(files_of(labels, "labels"))
    try:
        synsets = loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
        names = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets}
        numbers = files["ILSVRC2012_validation_ground_truth.txt"].split()
        return [names[int(number)] for number in numbers]
    except (KeyError, ValueError) as error:
        raise UsageError(f"labels: {labels} is not ImageNet's development kit: {error}") from error


def index(shards: str) -> None:
    """Keeps an index of tar shards beside them, so that no run needs to read through them first.

    Args:
        shards: the folder of WebDataset's shards.
    """
    folder = Path(shards)
    found = shards_of(folder)
    if not found:
        raise UsageError(f"shards: {folder} has no file <name>.tar")
    columns = scan(found)
    with replacing(folder / INDEX) as file:
        np.savez(file, **columns)
    print(f"{len(columns['names']):,} images in {len(found)} shards: {folder / INDEX}")


def pack(source: str, output: str, size: PositiveInt = 256, num_workers: NonNegativeInt = 0) -> None:
    """Decodes images once, and makes them smaller: a training then takes its crops from pixels in one file.

    Crops of smaller images have fewer details, so views are others than those of the source.

    Args:
        source: a folder of images, as --data.root takes it.
        output: the new folder, for --data.root.
        size: pixels of the shorter side; smaller images stay as they are. At 256, ImageNet takes 330 GB.
        num_workers: processes that decode; 0 does it in this one.
    """
    root = Path(source)
    parts = [name for name in PARTS if (root / name).is_dir()]
    with new_folder(output) as folder:
        for name in parts or ["."]:
            images = open_images(root / name, Smaller(size))
            (folder / name).mkdir(exist_ok=True)
            pack_part(images, folder / name, num_workers)


class Smaller:
    """An image whose shorter side has no more than so many pixels."""

    def __init__(self, size: int) -> None:
        self.size, self.resize = size, Resize(size, square=False)

    def __call__(self, image: Tensor) -> Tensor:
        if min(image.shape[1:]) <= self.size:
            return image.clone()  # for a part of other images' memory takes all of it to another process
        return self.resize(image)


def pack_part(images: StoredImages, folder: Path, num_workers: int) -> None:
    loader = DataLoader(
        images,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=context() if num_workers else None,
    )
    shapes = []
    path = folder / PIXELS
    file = path.open("wb")
    try:
        for number, (image, _) in enumerate(loader, 1):
            pixels = image.permute(1, 2, 0).contiguous().numpy()
            with naming(path):  # not while images are read
                file.write(pixels.data)
            shapes.append(pixels.shape[:2])
            if number % ROUND == 0 or number == len(images):
                print(f"{images.root}: {number:,} of {len(images):,} images", flush=True)
    finally:
        with naming(path):  # the last ones are written now
            file.close()
    write_index(
        folder / INDEX, images.names, images.targets, images.classes, shapes=np.array(shapes, dtype=np.int32)
    )


@contextmanager
def new_folder(output: str) -> Iterator[Path]:
    """A folder to fill, which takes its name when it is whole; a failure leaves nothing.

    Until then it is ``<output>.partial``. What a kill has left there is removed by the next conversion; and
    nothing else is, be it someone's own or a conversion's that still runs.
    """
    final = Path(output)
    if final.exists():
        raise UsageError(f"output: {final} is there already")
    partial = final.with_name(final.name + ".partial")
    marker = partial / MARKER
    if partial.exists() and not marker.exists() and not (partial.is_dir() and is_empty(partial)):
        raise UsageError(
            f"output: {partial} is there already, which no conversion has left: it would be filled, and then "
            f"become {final}; move it, or choose another output"
        )
    partial.mkdir(parents=True, exist_ok=True)
    try:
        lock = locked(marker)
    except BlockingIOError as error:
        raise UsageError(f"output: {partial} is being filled by another process") from error
    with lock:
        for left in partial.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left != marker:
                left.unlink()
        try:
            yield partial
            partial.replace(final)
            (final / MARKER).unlink()
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None
