"""The images: scikit-learn's digits, a folder, or an endless synthetic set. Nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision.datasets import ImageFolder

from .augmentations import Augmentation, TwoViews, augmentation, plain
from .errors import UsageError

Transform = Callable[[Any], Any]


class Digits(Dataset):
    """scikit-learn's 1797 scans of handwritten digits as (3, 8, 8) uint8 images, one in five for the test.

    The split is stratified, and always the same.
    """

    def __init__(self, train: bool, transform: Transform) -> None:
        pixels, labels = load_digits(return_X_y=True)  # (1797, 64) from 0 to 16, (1797,)
        split = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
        pixels, self.labels = (split[0], split[2]) if train else (split[1], split[3])
        gray = torch.from_numpy(pixels * (255 / 16)).round().to(torch.uint8)
        self.images = gray.reshape(-1, 1, 8, 8).repeat(1, 3, 1, 1)  # (N, 3, 8, 8)
        self.transform = transform

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

    def __init__(self, seed: int, size: int, length: int, transform: Transform) -> None:
        self.seed, self.size, self.length, self.transform = seed, size, length, transform

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


class Numbered(Dataset):
    """The items of another set, each with its index at its end: which instance it is."""

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return *self.images[index], index


class EndlessSampler(Sampler[int]):
    """Never the same index twice: epoch e takes e·length … (e + 1)·length − 1. Lightning sets the epoch."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.length, (self.epoch + 1) * self.length))


class Views(LightningDataModule):
    """Batches of two augmented views an image for the training, of plain images for the evaluation.

    Args:
        dataset: "digits" (bundled with scikit-learn), "folder" (``root/train/<class>/<image>`` and
            ``root/val/<class>/<image>``) or "synthetic" (endless).
        root: the folder of images.
        augmentation: what makes a view of an image: a paper's own, or the like of MoCo's for digits.
        image_size: height and width of a view.
        batch_size: images a step; the last, incomplete batch of an epoch is dropped.
        num_workers: processes that load and augment images; 0 does it between the steps.
        synthetic_size: images an epoch of the synthetic set, and as many to evaluate on.
        synthetic_seed: another seed is another synthetic set.
    """

    def __init__(
        self,
        dataset: Literal["digits", "folder", "synthetic"] = "digits",
        root: str | None = None,
        augmentation: Augmentation = "digits_v2",
        image_size: PositiveInt = 8,
        batch_size: PositiveInt = 256,
        num_workers: NonNegativeInt = 0,
        synthetic_size: PositiveInt = 4096,
        synthetic_seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        """Open the training images, and the test images too: a mistake is better known before the training.

        Raises:
            UsageError: there is no such folder, its classes differ, or it holds fewer images than a batch.
        """
        two_views = TwoViews(augmentation(self.hparams.augmentation, self.hparams.image_size))
        self.train_images = self._dataset(train=True, transform=two_views)
        test_images = self._dataset(train=False, transform=two_views)
        if getattr(self.train_images, "classes", None) != getattr(test_images, "classes", None):
            raise UsageError("data.root must hold the same classes under train/ and val/")
        count, batch = len(self.train_images), self.hparams.batch_size
        if count < batch:
            raise UsageError(f"data.batch_size is {batch}, but there are only {count} training images")

    @property
    def num_instances(self) -> int:
        """How many images there are to train on. Raises UsageError where there is no end of them."""
        if isinstance(self.train_images, SyntheticImages):
            raise UsageError(
                "data.dataset is synthetic, which is endless: to count instances, it must be digits or folder"
            )
        return len(self.train_images)

    def train_dataloader(self) -> DataLoader:
        """Batches of ([views (B, 3, H, W), other views (B, 3, H, W)], labels (B,), instances (B,)).

        An instance is an image's index in the set.
        """
        endless = isinstance(self.train_images, SyntheticImages)
        return self._loader(
            Numbered(self.train_images),
            sampler=EndlessSampler(len(self.train_images)) if endless else None,
            shuffle=None if endless else True,
            drop_last=True,
            persistent_workers=self.hparams.num_workers > 0,
        )

    def evaluation_dataloaders(self, max_images: int | None = None) -> tuple[DataLoader, DataLoader]:
        """Training and test images without augmentation, as batches of (images (B, 3, H, W), labels (B,)).

        Args:
            max_images: take no more of each than this many, evenly spaced over the classes.
        """
        transform = plain(self.hparams.image_size, crop=self.hparams.dataset == "folder")
        datasets = [self._dataset(train, transform) for train in (True, False)]
        if max_images is not None:
            datasets = [
                Subset(images, np.linspace(0, len(images) - 1, min(max_images, len(images)), dtype=int))
                for images in datasets
            ]
        train, test = (self._loader(images) for images in datasets)
        return train, test

    def _dataset(self, train: bool, transform: Transform) -> Dataset:
        if self.hparams.dataset == "digits":
            return Digits(train, transform)
        if self.hparams.dataset == "synthetic":
            # Twice the seed and one more: no set's test images are another's training images.
            seed = 2 * self.hparams.synthetic_seed + (not train)
            return SyntheticImages(seed, self.hparams.image_size, self.hparams.synthetic_size, transform)
        if self.hparams.root is None:
            raise UsageError("data.root must name the folder of images when data.dataset is folder")
        folder = Path(self.hparams.root, "train" if train else "val")
        if not folder.is_dir():
            raise UsageError(
                f"data.root has no folder {folder}: it must hold train/<class>/<image> and val/…"
            )
        try:
            return ImageFolder(str(folder), transform)
        except FileNotFoundError as error:  # no class, or a class without images
            raise UsageError(f"data.root holds a folder without images: {error}") from None

    def _loader(self, images: Dataset, **options: Any) -> DataLoader:
        return DataLoader(
            images,
            batch_size=self.hparams.batch_size,
            num_workers=self.hparams.num_workers,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
