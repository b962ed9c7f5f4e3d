"""The images: scikit-learn's digits, a folder, or an endless synthetic set. Nothing is ever downloaded."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from .augmentations import (
    LARGE,
    SMALL,
    Augmentation,
    Drawn,
    SeveralViews,
    augmentation,
    plain,
    smallest_image,
)
from .colours import Colours, finished
from .distributed import rank, world_size
from .errors import UsageError
from .parsing import Seed
from .resuming import of_data, refuse_changes
from .stored import UNLABELLED, StoredImages, Transform, open_images
from .workers import context

SMALLEST = 2  # pixels: torch does not resize tensors of bytes to a single one
MANY = 2000  # images: to read them takes long enough for it to be told


def unchanged(image: Any) -> Any:
    return image


@functools.cache  # reading them takes longer than a step on them
def split_digits() -> tuple[np.ndarray, ...]:
    """Pixels from 0 to 16 for the training (1437, 64) and the test (360, 64), and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return tuple(train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0))


class Digits(Dataset):
    """scikit-learn's 1797 scans of handwritten digits as (3, 8, 8) uint8 images, one in five for the test.

    The split is stratified, and always the same.
    """

    def __init__(self, train: bool, transform: Transform | None = None) -> None:
        train_pixels, test_pixels, train_labels, test_labels = split_digits()
        pixels, self.labels = (train_pixels, train_labels) if train else (test_pixels, test_labels)
        gray = torch.from_numpy(pixels * (255 / 16)).round().to(torch.uint8)
        self.images = gray.reshape(-1, 1, 8, 8).repeat(1, 3, 1, 1)  # (N, 3, 8, 8)
        self.transform = transform or unchanged

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), int(self.labels[index])


class SyntheticImages(Dataset):
    """Endless (3, size, size) uint8 images; image i is a function of (seed, i) alone, its label i mod 4.

    Each is a grating with noise: the label sets its slope, chance its frequency, phase and two colours.

    Args:
        seed: another seed is another set.
        size: height and width.
        length: how many of the images an epoch of training and the evaluation take.
        transform: applied to each image.
    """

    def __init__(self, seed: int, size: int, length: int, transform: Transform | None = None) -> None:
        self.seed, self.size, self.length = seed, size, length
        self.transform = transform or unchanged

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.image(index)), index % 4

    def image(self, index: int) -> Tensor:
        random = np.random.default_rng([self.seed, index])
        slope = np.pi / 2 * (index % 4) / 3  # up to a right angle: a mirror image keeps its label
        frequency, phase = random.uniform(1.5, 3.0), random.uniform(0, 2 * np.pi)
        dark, bright = np.sort(random.uniform(0, 255, (2, 3, 1, 1)), axis=0)  # per colour channel
        y, x = np.mgrid[: self.size, : self.size] / self.size
        wave = np.sin(2 * np.pi * frequency * (x * np.cos(slope) + y * np.sin(slope)) + phase)  # (size, size)
        image = dark + (bright - dark) * (wave + 1) / 2 + random.normal(0, 16, (3, self.size, self.size))
        return torch.from_numpy(image.clip(0, 255).astype(np.uint8))


def transforming(images: Dataset, index: int) -> AbstractContextManager[None]:
    """Within this, whatever fails with an image names it, if it is stored, alone or among several sets."""
    while not isinstance(images, StoredImages):
        if isinstance(images, ConcatDataset):
            number = bisect.bisect_right(images.cumulative_sizes, index)
            index -= images.cumulative_sizes[number] - len(images.datasets[number])
            images = images.datasets[number]
        elif isinstance(images, Subset):
            images, index = images.dataset, int(images.indices[index])
        else:
            return nullcontext()
    return images.transforming(index)


def labels_of(images: Dataset) -> Tensor:
    """The labels (N,) of a set, none of whose images is read for it; `UNLABELLED` where there are none."""
    if isinstance(images, SyntheticImages):
        return torch.arange(len(images)) % 4
    return torch.as_tensor(images.targets if isinstance(images, StoredImages) else images.labels)


def evenly_spaced(count: int, most: int | None) -> np.ndarray:
    """Indices of so many things, or of no more than some of them, which are then evenly spaced."""
    return np.linspace(0, count - 1, min(count if most is None else most, count), dtype=int)


class DrawnViews(Dataset):
    """What a random transform makes of an image, its label, and which instance it is: item (epoch, index).

    What is drawn is a function of (seed, epoch, index) alone, whoever draws it and in whatever order: a run
    that is resumed, or has other processes or workers, sees the same views.
    """

    def __init__(self, images: Dataset, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Any, ...]:
        epoch, index = item
        image, label = self.images[index]
        state = torch.get_rng_state()
        (seed,) = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)
        try:
            torch.default_generator.manual_seed(int(seed >> np.uint64(1)))
            with transforming(self.images, index):
                return self.transform(image), label, index
        finally:
            torch.set_rng_state(state)


# Of each view of the images, a batch of crops and their colours; labels (B,) and instances (B,).
DrawnBatch = tuple[list[Drawn], Tensor, Tensor]
FinishedBatch = tuple[list[Tensor], Tensor, Tensor]


def together(items: Sequence[tuple[tuple[Drawn, ...], int, int]]) -> DrawnBatch:
    """The batch of several items of `DrawnViews`, whose transform is `SeveralViews`."""
    drawn, labels, instances = zip(*items, strict=True)
    views = (zip(*view, strict=True) for view in zip(*drawn, strict=True))
    return (
        [(torch.stack(crops), Colours.together(colours)) for crops, colours in views],
        torch.tensor(labels),
        torch.tensor(instances),
    )


def finish(batch: DrawnBatch, device: torch.device | str = "cpu") -> FinishedBatch:
    """A batch's views (B, 3, H, W), coloured on a device."""
    views, labels, instances = batch
    return finished(views, torch.device(device)), labels, instances


def finished_together(items: Sequence[tuple[tuple[Drawn, ...], int, int]]) -> FinishedBatch:
    return finish(together(items))


class Order(Sampler[list[tuple[int, int]]]):
    """The batches of every epoch, as lists of (epoch, index); of each, this process's share.

    The order of an epoch is a function of (seed, epoch). An endless set is taken as it comes: epoch e has its
    images e·length … (e + 1)·length − 1. Images that do not fill a batch are left out of the epoch.

    Args:
        length: images an epoch.
        batch_size: images a batch, of all processes together.
        seed: of the shuffling; None for an endless set.
    """

    def __init__(self, length: int, batch_size: int, seed: int | None) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = self.start = 0  # the next epoch, and its next batch

    @property
    def sampler(self) -> Order:
        """Where Lightning looks for whom it tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.epoch, self.start
        self.start = 0
        if self.seed is None:
            indices = np.arange(epoch * self.length, (epoch + 1) * self.length)
        else:
            indices = np.random.default_rng((self.seed, epoch)).permutation(self.length)
        share = self.batch_size // world_size()
        for batch in range(start, len(self)):
            first = batch * self.batch_size + rank() * share
            yield [(epoch, int(index)) for index in indices[first : first + share]]


class TrainingLoader(DataLoader):
    """A loader that can be resumed in the middle of an epoch; Lightning keeps its state in checkpoints.

    Args:
        views: items (epoch, index).
        order: of the items.
        source: what else an epoch's batches are a function of, by names in `FIXED`: a loader of others
            refuses the state.
        device: that colours drawn views. On a CPU whoever draws them does it, a process of the loader where
            there are some. None if items need nothing more.
        **options: arguments of `DataLoader`.
    """

    batch_sampler: Order

    def __init__(
        self,
        views: DrawnViews,
        order: Order,
        source: dict[str, Any] | None = None,
        device: torch.device | None = None,
        **options: Any,
    ) -> None:
        self.coloured_by = None if device is None or device.type == "cpu" else device
        if device is not None:
            options["collate_fn"] = finished_together if self.coloured_by is None else together
        super().__init__(views, batch_sampler=order, **options)
        self.source = {"data.batch_size": order.batch_size, **(source or {})}
        # The epoch of the latest batch, and how many of it there were.
        self.given = (order.epoch, order.start)

    def __iter__(self) -> Iterator[Any]:
        order = self.batch_sampler
        epoch, start = order.epoch, order.start
        for number, batch in enumerate(super().__iter__(), start + 1):
            self.given = (epoch, number)
            yield batch if self.coloured_by is None else finish(batch, self.coloured_by)

    def state_dict(self) -> dict[str, Any]:
        epoch, batches = self.given
        return {"epoch": epoch, "batches": batches, "seed": self.dataset.seed, **self.source}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was.

        Raises:
            UsageError: its batches were others than this one's.
        """
        refuse_changes(self.source, state)
        order = self.batch_sampler
        order.epoch, order.start = state["epoch"], state["batches"]
        if order.start == len(order):
            order.epoch, order.start = order.epoch + 1, 0
        self.dataset.seed = state["seed"]
        if order.seed is not None:
            order.seed = state["seed"]
        self.given = (order.epoch, order.start)


class ResumableData(LightningDataModule):
    """Images whose training loader goes on where a checkpoint's was.

    Lightning asks a loader for its state too, but has no use for it where the loader was made before the
    loops were restored, as it is for a schedule that wants to know the number of steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.resume_from: dict[str, int] | None = None  # of a loader, from a checkpoint

    def resumed(self, loader: TrainingLoader) -> TrainingLoader:
        """The loader, where the checkpoint's was, if there is one."""
        self.loader = loader
        if self.resume_from is not None:
            loader.load_state_dict(self.resume_from)
        return loader

    def state_dict(self) -> dict[str, int]:
        return self.loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.resume_from = state_dict


class Views(ResumableData):
    """Batches of two augmented views an image for the training, of plain images for the evaluation.

    Args:
        dataset: "digits" (bundled with scikit-learn), "folder" or "synthetic" (endless).
        root: the folder of images: ``train`` to train on and ``val`` for the evaluation, each with classes,
            ``<class>/<image>``, or WebDataset's shards, or decoded images; ``val`` need not have all of
            the classes. Where nothing is evaluated there need be no ``val``, and no classes:
            ``train/<image>``, or the images alone.
        augmentation: what makes a view of an image: a paper's own, or the like of it for smaller images.
        image_size: height and width of a view.
        small_views: of each image besides the two, cut from a small part of it, where the two are then cut
            from 14 % of its area and more: SwAV's multi-crop, for methods whose loss takes more than two.
        small_size: height and width of these.
        batch_size: images a batch, of all processes together; the last, incomplete batch of an epoch is
            dropped.
        num_workers: processes that load and augment images, for each that trains; 0 does it between steps.
        synthetic_size: images an epoch of the synthetic set, and as many to evaluate on.
        synthetic_seed: another seed is another synthetic set.
    """

    def __init__(
        self,
        dataset: Literal["digits", "folder", "synthetic"] = "digits",
        root: str | None = None,
        augmentation: Augmentation = "digits_v2",
        image_size: PositiveInt = 8,
        small_views: NonNegativeInt = 0,
        small_size: PositiveInt = 96,
        batch_size: PositiveInt = 256,
        num_workers: NonNegativeInt = 0,
        synthetic_size: PositiveInt = 4096,
        synthetic_seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if image_size < SMALLEST:
            raise UsageError(f"data.image_size is {image_size}, and must be {SMALLEST} at least")

    def setup(self, stage: str | None = None) -> None:
        """Open the training images: a mistake is better known before the training.

        Raises:
            UsageError: there is no such folder, it holds fewer images than a batch, or views are too small
                for their augmentation.
        """
        name = self.hparams.augmentation
        for option in ("image_size", *(["small_size"] if self.hparams.small_views else [])):
            size, smallest = self.hparams[option], max(SMALLEST, smallest_image(name))
            if size < smallest:
                raise UsageError(
                    f"data.{option} is {size}, but data.augmentation {name} needs {smallest} at least: its "
                    "blur takes in as many pixels to each side"
                )
        count, batch = len(self.train_images), self.hparams.batch_size
        if count < batch:
            raise UsageError(f"data.batch_size is {batch}, but there are only {count} training images")
        if batch % world_size():
            raise UsageError(
                f"data.batch_size is {batch}, which {world_size()} processes cannot share evenly"
            )
        self.seed = torch.initial_seed()  # as of `seed_everything`

    @functools.cached_property
    def train_images(self) -> Dataset:
        """The images to train on, as they are stored."""
        return self._dataset(train=True)

    def lacks_for_evaluation(self) -> str | None:
        """What the images lack to be evaluated on, if anything: that is no mistake before they are."""
        if self.hparams.dataset != "folder":
            return None
        if (labels_of(self.train_images) == UNLABELLED).any():
            return f"the training images in {self.train_images.root} have no labels, as <class>/<image> has"
        if self._part(train=False) is None:
            return f"data.root has no folder {Path(self.hparams.root, 'val')} of images to evaluate on"
        try:
            test_images = self._dataset(train=False)
        except UsageError as error:
            return str(error)
        if (labels_of(test_images) == UNLABELLED).any():
            return f"the test images in {test_images.root} have no labels, as <class>/<image> has"
        return None

    @property
    def num_instances(self) -> int:
        """How many images there are to train on. Raises UsageError where there is no end of them."""
        if isinstance(self.train_images, SyntheticImages):
            raise UsageError(
                "data.dataset is synthetic, which is endless: to count instances, it must be digits or folder"
            )
        return len(self.train_images)

    def train_dataloader(self) -> TrainingLoader:
        """This process's share of batches of ([views (B, 3, H, W), other views (B, 3, H, W)], labels (B,),
        instances (B,)). An instance is an image's index in the set. Small views, if any, follow the two."""
        endless = isinstance(self.train_images, SyntheticImages)
        order = Order(len(self.train_images), self.hparams.batch_size, None if endless else self.seed)
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        workers = self.hparams.num_workers > 0
        return self.resumed(
            TrainingLoader(
                self.drawn_views(),
                order,
                self._source(),
                device,
                persistent_workers=workers,
                **self._loading(),
            )
        )

    def drawn_views(self) -> DrawnViews:
        """What is drawn of the training images."""
        name, size, small = (self.hparams[each] for each in ("augmentation", "image_size", "small_views"))
        drawings = [augmentation(name, size, LARGE if small else None)] * 2
        drawings += [augmentation(name, self.hparams.small_size, SMALL)] * small
        return DrawnViews(self.train_images, SeveralViews(*drawings), self.seed)

    def evaluation_dataloaders(self, max_images: int | None = None) -> tuple[DataLoader, DataLoader]:
        """Training and test images without augmentation, as batches of (images (B, 3, H, W), labels (B,)).

        Args:
            max_images: take no more of each than this many, evenly spaced over the classes.
        """
        train, test = (
            DataLoader(images, batch_size=self.evaluation_batch, **self._loading())
            for images in (self._evaluated(part, max_images) for part in (True, False))
        )
        return train, test

    @property
    def evaluation_batch(self) -> int:
        """Images at once where nothing is trained: on one device alone, SimCLR's 4096 could be too many."""
        return min(self.hparams.batch_size, 512)

    def evaluation_labels(self, max_images: int | None = None) -> Tensor:
        """Labels of the training images that `evaluation_dataloaders` takes; no image is read for it.

        Raises:
            UsageError: there are no labels, or no test images.
        """
        if lack := self.lacks_for_evaluation():
            raise UsageError(
                f"{lack}: nothing can be measured; --evaluation.enabled false leaves the evaluation out"
            )
        labels = labels_of(self.train_images)
        return labels[torch.from_numpy(evenly_spaced(len(labels), max_images))]

    def read_test_images(self, max_images: int | None = None) -> None:
        """Read every test image that an evaluation takes: a damaged one is better known before the training.

        Args:
            max_images: as for `evaluation_dataloaders`.

        Raises:
            UsageError: an image cannot be read; it is named.
        """
        if self.hparams.dataset != "folder":
            return  # the others' images are in memory, or made
        images = self._evaluated(False, max_images)
        if len(images) >= MANY:
            print(f"Reading {len(images):,} test images once, in case one of them is damaged ...", flush=True)
        # The processes that read a batch send its length alone.
        for _ in DataLoader(images, self.evaluation_batch, collate_fn=len, **self._loading()):
            pass

    def _evaluated(self, train: bool, max_images: int | None) -> Dataset:
        transform = plain(self.hparams.image_size, crop=self.hparams.dataset == "folder")
        images = self._dataset(train, transform)
        return Subset(images, evenly_spaced(len(images), max_images)) if max_images else images

    def _source(self) -> dict[str, Any]:
        """What an epoch's batches are a function of, and how they make steps."""
        source = of_data(self.hparams)
        if isinstance(self.train_images, StoredImages):
            kind, count, digest = self.train_images.kind, len(self.train_images), self.train_images.digest()
            source["data.root"] = f"{kind} of {count} training images (digest {digest})"
        if self.trainer is not None:
            for name in ("limit_train_batches", "accumulate_grad_batches"):
                source[f"trainer.{name}"] = getattr(self.trainer, name)
        return source

    def _dataset(self, train: bool, transform: Transform | None = None) -> Dataset:
        if self.hparams.dataset == "digits":
            return Digits(train, transform)
        if self.hparams.dataset == "synthetic":
            # Twice the seed and one more: no set's test images are another's training images.
            seed = 2 * self.hparams.synthetic_seed + (not train)
            return SyntheticImages(seed, self.hparams.image_size, self.hparams.synthetic_size, transform)
        if self.hparams.root is None:
            raise UsageError("data.root must name the folder of images when data.dataset is folder")
        part = self._part(train)
        if part is None:
            folder = Path(self.hparams.root, "train" if train else "val")
            raise UsageError(
                f"data.root has no folder {folder}: it must hold train/<class>/<image> and val/…"
            )
        images = open_images(part, transform)
        if not train:
            images.number_as(self.train_images.classes)
        return images

    def _part(self, train: bool) -> Path | None:
        """The folder of the training or test images, if there is one; without parts all are to train on."""
        root, parts = Path(self.hparams.root), ("train", "val")
        part = root / parts[not train]
        if part.is_dir():
            return part
        whole = train and root.is_dir() and not any((root / each).is_dir() for each in parts)
        return root if whole else None

    def _loading(self) -> dict[str, Any]:
        workers = self.hparams.num_workers
        return {
            "num_workers": workers,
            "multiprocessing_context": context() if workers else None,
            "pin_memory": torch.cuda.is_available(),
            "generator": torch.Generator(),  # or starting a loader would draw from the global one
        }
