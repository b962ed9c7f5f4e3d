"""Learning from labels: a linear layer on a backbone, which stays as it is or is trained too."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from .augmentations import plain, supervised
from .checkpoints import AtomicCheckpointIO
from .data import (
    DrawnViews,
    Order,
    ResumableData,
    TrainingLoader,
    Views,
    evenly_spaced,
    labels_of,
)
from .distributed import mean, rank, world_size
from .errors import UsageError
from .evaluation import Features
from .networks import normalize_in_groups
from .progress import lines_in_place_of_a_bar
from .stored import UNLABELLED, StoredImages, Transform


class LabelledViews(DrawnViews):
    """One view of an image, and its label: item (epoch, i) is of the i-th of the indices."""

    def __init__(self, images: Dataset, indices: np.ndarray, transform: Transform, seed: int = 0) -> None:
        super().__init__(images, transform, seed)
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, i = item
        view, label, _ = super().__getitem__((epoch, int(self.indices[i])))
        return view, label


class LabelledFeatures(Dataset):
    """Features that were extracted once, in place of `LabelledViews`: the same in every epoch."""

    def __init__(self, features: Features, seed: int = 0) -> None:
        self.features, self.seed = features, seed  # the seed is the order's, which a loader asks of its items

    def __len__(self) -> int:
        return len(self.features.labels)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        _, i = item
        return self.features.features[i], self.features.labels[i]


class LabelledImages(Views):
    """Training and test images with their labels.

    Args:
        max_images: take no more of each than this many, evenly spaced.
        **views: arguments of `Views`.

    Raises:
        UsageError: there are none, of a single class, or of other classes in the test than in the training;
            or a test image cannot be read.
    """

    def __init__(self, max_images: int | None = None, **views: Any) -> None:
        super().__init__(**views)
        labels = labels_of(self.train_images)
        if (labels == UNLABELLED).any():
            raise UsageError("data.root has training images without labels, and there is nothing to classify")
        self.classes = int(labels.max()) + 1
        if self.classes == 1:
            raise UsageError("data.root holds a single class, and there is nothing to classify")
        self.sets = {True: self.train_images, False: self._dataset(train=False)}
        if (labels_of(self.sets[False]) == UNLABELLED).any():
            raise UsageError("data.root has test images without labels, and nothing can be measured on them")
        self.indices = {train: evenly_spaced(len(images), max_images) for train, images in self.sets.items()}
        self.labels = labels[torch.from_numpy(self.indices[True])]  # (N,) of the training images
        # Before hours of work, and once, whatever the number of processes.
        rank_zero_only(self.read_test_images)(max_images)

    def plain(self, train: bool) -> LabelledViews:
        """Images without augmentation."""
        transform = plain(self.hparams.image_size, crop=self.hparams.dataset == "folder")
        return LabelledViews(self.sets[train], self.indices[train], transform)

    def augmented(self, chosen: np.ndarray | slice, seed: int) -> LabelledViews:
        """Random views of these of the N training images."""
        transform = supervised(self.hparams.image_size, digits=self.hparams.dataset == "digits")
        return LabelledViews(self.sets[True], self.indices[True][chosen], transform, seed)

    def in_order(self, dataset: Dataset) -> DataLoader:
        """Batches of a dataset's items (0, i), each once and in turn; of several processes, this one's."""
        share = [(0, i) for i in range(rank(), len(dataset), world_size())]
        return DataLoader(dataset, self.evaluation_batch, sampler=share, **self._loading())

    def shuffled(self, dataset: Dataset, batch_size: int, seed: int) -> TrainingLoader:
        """Batches, no larger than that, of its items (epoch, i), in another order every epoch."""
        batch_size = min(batch_size, len(dataset))
        if batch_size < world_size():
            raise UsageError(f"{batch_size} images a batch are too few for {world_size()} devices")
        order = Order(len(dataset), batch_size - batch_size % world_size(), seed)
        workers = self.hparams.num_workers > 0
        return TrainingLoader(dataset, order, persistent_workers=workers, **self._loading())

    def more(self, root: str) -> Dataset:
        """The training images of another folder, nobody looks at whose labels.

        Raises:
            UsageError: there is no such folder, or it holds none.
        """
        try:
            return Views(dataset="folder", root=root)._dataset(train=True)
        except UsageError as error:
            raise UsageError(f"unlabelled: {str(error).removeprefix('data.')}") from error

    def digest(self, more: Dataset | None = None) -> str:
        """A digest of the labels and, in a folder, of the images' names: others would give other figures.

        Args:
            more: images of another folder, if there are any, that figures depend on, too.
        """
        digest = hashlib.sha256() if more is None else hashlib.sha256(more.digest().encode())
        for train, images in self.sets.items():
            chosen = self.indices[train]
            names = images.digest(chosen) if isinstance(images, StoredImages) else ""
            digest.update(f"{len(images)} {len(chosen)} {names}\n".encode())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


class Batches(ResumableData):
    """What a classifier is trained and tested on, in batches that are made as soon as processes are known."""

    def __init__(
        self, images: LabelledImages, train: Dataset, test: Dataset, batch_size: int, seed: int
    ) -> None:
        super().__init__()
        self.images, self.train, self.test, self.batch_size, self.seed = images, train, test, batch_size, seed

    def train_dataloader(self) -> TrainingLoader:
        return self.resumed(self.images.shuffled(self.train, self.batch_size, self.seed))

    def test_dataloader(self) -> DataLoader:
        return self.images.in_order(self.test)


class Schedule(NamedTuple):
    """SGD with momentum 0.9: learning rates at the start, and how they fall step by step.

    Attributes:
        learning_rate: of the linear layer.
        backbone_learning_rate: None leaves the backbone as it is.
        cosine: down to 0; else a tenth after 60 % and a hundredth after 80 % of the steps.
        weight_decay: of all parameters that are trained.
    """

    learning_rate: float
    backbone_learning_rate: float | None = None
    cosine: bool = True
    weight_decay: float = 0.0


class LabelLoss(nn.CrossEntropyLoss):
    """Cross-entropy of labels and logits, the loss of a classifier that learns from labels alone."""

    def forward(self, logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        return super().forward(logits, labels)  # other losses look at the images, too


class Classifier(LightningModule):
    """A linear layer on a backbone. One that is not trained stays in evaluation mode: neither its parameters
    nor its statistics change.

    Args:
        backbone: (B, …) to (B, features).
        features: of the backbone.
        classes: labels are below this.
        schedule: of the learning rates.
        criterion: the loss of logits (B, classes), labels (B,) and images (B, …): by default `LabelLoss`.
            What it holds is in no checkpoint.
    """

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        classes: int,
        schedule: Schedule,
        criterion: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.frozen = schedule.backbone_learning_rate is None
        self.backbone = backbone.requires_grad_(not self.frozen)
        self.layer = nn.Linear(features, classes)
        nn.init.normal_(self.layer.weight, std=0.01)  # as MoCo's
        nn.init.zeros_(self.layer.bias)
        self.criterion = criterion or LabelLoss()
        self.accuracies = nn.ModuleDict(
            {f"top-{k}": MulticlassAccuracy(classes, top_k=k, average="micro") for k in (1, 5) if k < classes}
        )
        self.train()

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def setup(self, stage: str) -> None:
        if stage == "fit" and not self.frozen:
            normalize_in_groups(self.backbone, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(self.backbone(images))  # (B, classes)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = self.criterion(self(images), labels, images)
        self.values = {"loss": mean(loss.detach())}  # of all processes
        self.log("loss", self.values["loss"], prog_bar=True)
        # To look at a loss is to wait for a GPU, which therefore is asked as often as values are logged.
        if self.device.type == "cpu" or (batch_idx + 1) % self.trainer.log_every_n_steps == 0:
            self.check_loss()
        return loss

    def on_train_epoch_end(self) -> None:
        self.check_loss()

    def check_loss(self) -> None:
        if not self.values["loss"].isfinite():  # in all processes, which stop together
            raise UsageError(
                f"the training diverged: its loss is not finite after {self.trainer.global_step} steps; "
                "lower the learning rate"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tensors, known = checkpoint["state_dict"].items(), self._known()
        checkpoint["state_dict"] = {name: x for name, x in tensors if name not in known}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self._known() | checkpoint["state_dict"]

    def _known(self) -> dict[str, Tensor]:
        """Tensors that training does not change: they are in the checkpoint that is evaluated."""
        fixed = {"criterion": self.criterion} | ({"backbone": self.backbone} if self.frozen else {})
        return {f"{name}.{key}": x for name, part in fixed.items() for key, x in part.state_dict().items()}

    def on_checkpoint_saved(self) -> None:
        """Nothing of a classifier is kept elsewhere than in the checkpoint."""

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        for accuracy in self.accuracies.values():
            accuracy.update(logits, labels)

    def percent(self) -> dict[str, float]:
        """The accuracies of the test, of all processes' images."""
        return {name: round(100 * float(accuracy.compute()), 4) for name, accuracy in self.accuracies.items()}

    def configure_optimizers(self) -> dict[str, Any]:
        groups = [{"params": self.layer.parameters(), "lr": self.schedule.learning_rate}]
        if not self.frozen:
            rate = self.schedule.backbone_learning_rate
            groups.append({"params": self.backbone.parameters(), "lr": rate})
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=self.schedule.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        if self.schedule.cosine:
            scheduler = CosineAnnealingLR(optimizer, steps)
        else:
            scheduler = MultiStepLR(optimizer, [round(0.6 * steps), round(0.8 * steps)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(
    classifier: Classifier, batches: Batches, epochs: int, ckpt_path: Path | None = None, **settings: Any
) -> dict[str, float]:
    """Train a classifier; returns its accuracies on the test images, as `accuracies_of` does.

    Args:
        ckpt_path: the checkpoint to go on from.
        **settings: arguments of Lightning's Trainer. Without any, nothing is kept.
    """
    trainer = _trainer(max_epochs=epochs, **settings)
    lines_in_place_of_a_bar(trainer)
    with _what_is_meant():
        trainer.fit(classifier, batches, ckpt_path=ckpt_path)
        trainer.test(classifier, batches, verbose=False)
    return classifier.percent()


def accuracies_of(classifier: Classifier, batches: Batches, **settings: Any) -> dict[str, float]:
    """The accuracies of a classifier on the test images in percent: top-1 and, of more than five classes,
    top-5.

    Args:
        **settings: arguments of Lightning's Trainer.
    """
    with _what_is_meant():
        _trainer(enable_progress_bar=False, **settings).test(classifier, batches, verbose=False)
    return classifier.percent()


def _trainer(**settings: Any) -> Trainer:
    """Lightning's, which keeps nothing unless the settings say so."""
    keeping_nothing = {"logger": False, "enable_checkpointing": False}
    return Trainer(
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()],
        **{**keeping_nothing, **settings},
    )


@contextmanager
def _what_is_meant() -> Iterator[None]:
    """Without Lightning's warnings of what is done here on purpose."""
    with warnings.catch_warnings():
        # A frozen network is meant to be in evaluation mode, and a loader without workers is asked for. Few
        # labels are few batches, fewer than there are between two that are logged.
        for told in ("in eval mode", "does not have many workers", "logging interval"):
            warnings.filterwarnings("ignore", message=f".*{told}")
        yield
