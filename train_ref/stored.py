"""Images that are stored in a folder: as files, in tar shards, or decoded, in one file."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from .errors import UsageError
from .files import replacing
from .images import decoded, image_errors, read_image

Transform = Callable[[Any], Any]
UNLABELLED = -1
INDEX, PIXELS = "index.npz", "pixels.bin"


class StoredImages(Dataset, ABC):
    """Images (3, H, W) of bytes and their labels. Whatever fails with one names it.

    Args:
        root: the folder.
        names: of the images, within it.
        targets: labels (N,); `UNLABELLED` where there is none.
        classes: names of the labels; none where there are no labels.
        transform: applied to each image.
    """

    kind = "a folder"

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        targets: np.ndarray,
        classes: Sequence[str],
        transform: Transform | None,
    ) -> None:
        self.root, self.names, self.targets, self.classes = root, names, targets, list(classes)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with self.transforming(index):
            image = self.read(index)
            return (image if self.transform is None else self.transform(image)), int(self.targets[index])

    def number_as(self, classes: Sequence[str]) -> None:
        """Let labels be the numbers that their classes have in another set, which may have more of them.

        Raises:
            UsageError: it does not have one of them.
        """
        numbers = {name: number for number, name in enumerate(classes)}
        if others := [name for name in self.classes if name not in numbers]:
            raise UsageError(
                f"data.root must hold no other classes under val/ than under train/, but {self.root} has "
                f"{others[0]}"
            )
        # The last of these is what `UNLABELLED` finds.
        self.targets = np.array([*(numbers[name] for name in self.classes), UNLABELLED])[self.targets]
        self.classes = list(classes)

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """An image as it is stored, (3, H, W) of bytes."""

    def path(self, index: int) -> str:
        """Where an image is, as messages have it."""
        return str(self.root / self.names[index])

    def transforming(self, index: int) -> AbstractContextManager[None]:
        """Within this, whatever fails with an image names it."""
        return image_errors(self.path(index), "cannot be transformed")

    def digest(self, indices: np.ndarray | None = None) -> str:
        """A digest of the names of all images, or of these, in order: classes first."""
        names = hashlib.blake2b(digest_size=6)
        for name in self.names if indices is None else (self.names[i] for i in indices):
            names.update(f"/{name}".encode(errors="surrogateescape") + b"\0")
        return names.hexdigest()


class Folder(StoredImages):
    """Files of images: ``<class>/<image>``, or no classes at all."""

    def __init__(self, root: str | Path, transform: Transform | None = None) -> None:
        root = Path(root)
        with os.scandir(root) as entries:
            has_classes = any(entry.is_dir() for entry in entries)
        if has_classes:
            classes, numbers = find_classes(root)
            found = make_dataset(root, numbers, IMG_EXTENSIONS)
        else:
            classes = []
            files = (entry.path for entry in os.scandir(root) if is_image(entry.name))
            found = [(path, UNLABELLED) for path in sorted(files)]
        start = len(str(root)) + 1
        names = [path[start:] for path, _ in found]
        super().__init__(root, names, np.array([label for _, label in found]), classes, transform)

    def read(self, index: int) -> Tensor:
        return read_image(self.path(index))


class Shards(StoredImages):
    """WebDataset's: tar files of samples, each an image and, beside it, ``.cls`` with its class's number.
    Without numbers the folders of the images within the shards are their classes.

    Any image can be read at any time, by an index of where it begins. The command ``conversion index`` keeps
    one; without, the headers of all shards are read, which takes minutes where there are a million images.
    """

    kind = "shards"

    def __init__(self, root: str | Path, transform: Transform | None = None) -> None:
        root = Path(root)
        shards = shards_of(root)
        path = root / INDEX
        index = read_index(path, "places", "shards") if path.exists() else scan(shards)
        if index["shards"].tolist() != list(map(size_and_name, shards)):
            raise UsageError(f"data.root: {path} is an index of other shards; make it again")
        self.shards, self.places = shards, index["places"]
        names = names_in(index)
        super().__init__(root, names, index["targets"], index["classes"].tolist(), transform)

    def read(self, index: int) -> Tensor:
        shard, offset, size = self.places[index].tolist()
        with image_errors(self.path(index), "cannot be read as an image"):
            with open(self.shards[shard], "rb") as file:
                file.seek(offset)
                data = file.read(size)
            return decoded(io.BytesIO(data), self.path(index))

    def path(self, index: int) -> str:
        return f"{self.shards[self.places[index, 0]]}/{self.names[index]}"


class Decoded(StoredImages):
    """Images that were decoded and made smaller once: a step reads the pixels of its crops alone."""

    kind = "decoded images"

    def __init__(self, root: str | Path, transform: Transform | None = None) -> None:
        root = Path(root)
        index = read_index(root / INDEX, "shapes")
        self.shapes = index["shapes"]  # (N, 2) heights and widths
        sizes = 3 * self.shapes.astype(np.int64).prod(axis=1)
        self.offsets = np.concatenate([[0], sizes.cumsum()])
        found = (root / PIXELS).stat().st_size
        if found != self.offsets[-1]:
            raise UsageError(f"data.root: {root / PIXELS} has {found:,} bytes of {self.offsets[-1]:,}")
        names = names_in(index)
        super().__init__(root, names, index["targets"], index["classes"].tolist(), transform)

    @cached_property
    def pixels(self) -> Tensor:
        """All images' pixels, which are read from the disk as they are looked at."""
        # A mapping that could be written to would have to fit into memory.
        mapped = np.memmap(self.root / PIXELS, mode="r")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")
            return torch.from_numpy(mapped)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "pixels"}  # each process maps

    def read(self, index: int) -> Tensor:
        height, width = self.shapes[index].tolist()
        return (
            self.pixels[self.offsets[index] : self.offsets[index + 1]].view(height, width, 3).permute(2, 0, 1)
        )


def open_images(root: Path, transform: Transform | None = None) -> StoredImages:
    """The images of a folder, in whatever way they are stored there.

    Raises:
        UsageError: there is none.
    """
    try:
        if (root / PIXELS).is_file():
            images: StoredImages = Decoded(root, transform)
        else:
            images = (Shards if holds_shards(root) else Folder)(root, transform)
    except FileNotFoundError as error:  # a class without images
        raise UsageError(f"data.root holds a folder without images: {error}") from None
    if not len(images):
        raise UsageError(f"data.root holds a folder without images: {root}")
    return images


def is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def shards_of(root: Path) -> list[Path]:
    return sorted(root.glob("*.tar"))


def holds_shards(root: Path) -> bool:
    """Whether images are in shards. Raises UsageError where some are beside them, which nobody would see."""
    shards = shards_of(root)
    others = (each for each in root.iterdir() if is_image(each.name) or each.is_dir())
    if shards and (other := next((each for each in others if not each.name.startswith(".")), None)):
        raise UsageError(
            f"data.root: {root} holds {shards[0].name}, as shards are called, and {other.name} beside it: "
            "leave shards or images there, not both"
        )
    return bool(shards)


def size_and_name(shard: Path) -> str:
    return f"{shard.stat().st_size} {shard.name}"


def read_index(path: Path, *columns: str) -> dict[str, np.ndarray]:
    """What `write_index` wrote, with these of its `more`."""
    try:
        with np.load(path) as index:
            read = dict(index)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"data.root: {path} cannot be read: {error}") from error
    if missing := {"names", "targets", "classes", *columns} - read.keys():
        raise UsageError(f"data.root: {path} is no index of these images: it has no {sorted(missing)[0]}")
    return read


def names_in(index: dict[str, np.ndarray]) -> list[str]:
    """The images' names, which stand in an index as they do in a file system."""
    return [name.decode(errors="surrogateescape") for name in index["names"].tolist()]


def write_index(path: Path, names: Sequence[str], targets: Any, classes: Sequence[str], **more: Any) -> None:
    """An index for `read_index`: names and labels of images, and where or how large they are."""
    encoded = np.array([name.encode(errors="surrogateescape") for name in names])
    with replacing(path) as file:
        np.savez(file, names=encoded, targets=np.array(targets), classes=np.array(classes, dtype=str), **more)


def parts_of(name: str) -> tuple[str, str, str]:
    """Folder, sample and extension of a member of a shard. As WebDataset has it, the extension is all that
    follows the first dot of the file's name: 7.seg.png is no image of sample 7, but its field seg.png."""
    folder, _, file = name.rpartition("/")
    sample, _, extension = file.partition(".")
    return folder, sample, extension.lower()


def class_number(archive: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    """The number that a .cls holds. Raises ValueError where it holds something else."""
    text = archive.extractfile(member).read()
    if not text.strip().isdigit():
        raise ValueError(f"{member.name} holds no class's number, but {text[:20]!r}")
    return int(text)


def scan(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    """The index of shards, from the headers of what they hold."""
    # By (the shard's number, folder, sample): names of images, and numbers of classes.
    names: dict[tuple[int, str, str], str] = {}
    numbers: dict[tuple[int, str, str], int] = {}
    places = []
    for number, shard in enumerate(shards):
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    folder, sample, extension = parts_of(member.name)
                    key = number, folder, sample
                    if not member.isfile() or not sample:
                        continue
                    if extension == "cls":
                        numbers[key] = class_number(archive, member)
                    elif f".{extension}" in IMG_EXTENSIONS:
                        if key in names:
                            raise ValueError(
                                f"its sample {sample} has two images, {names[key]} and {member.name}"
                            )
                        names[key] = member.name
                        places.append((number, member.offset_data, member.size))
        except (tarfile.TarError, OSError, ValueError) as error:
            raise UsageError(f"data.root: {shard} cannot be read as a shard: {error}") from error
    if not names:
        shard = shards[min(numbers, default=(0,))[0]]
        labels = " but labels of samples" if numbers else ""
        raise UsageError(
            f"data.root: {shard} holds no images{labels}: they are called <sample>.<extension>, and what "
            f"follows the first dot is one of {', '.join(each[1:] for each in IMG_EXTENSIONS)}"
        )
    folders = sorted({folder for _, folder, _ in names})
    if numbers:
        targets = [numbers.get(key, UNLABELLED) for key in names]
        classes = [str(number) for number in range(max(targets) + 1)]
    elif "" in folders:
        targets, classes = [UNLABELLED] * len(names), []
    else:
        targets, classes = [folders.index(folder) for _, folder, _ in names], folders
    return {
        "names": np.array([name.encode(errors="surrogateescape") for name in names.values()], dtype=bytes),
        "targets": np.array(targets, dtype=np.int64),
        "classes": np.array(classes, dtype=str),
        "places": np.array(places, dtype=np.int64).reshape(-1, 3),
        "shards": np.array(list(map(size_and_name, shards)), dtype=str),
    }
