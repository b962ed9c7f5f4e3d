"""A classifier that was fine-tuned on a few labels, in a file, and what it teaches another network."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from .augmentations import supervised
from .backbones import PREFIX, Backbone, load_backbone, load_tensors
from .checkpoints import AtomicCheckpointIO
from .classifiers import Classifier, LabelledImages, LabelledViews, Schedule
from .errors import UsageError
from .stored import UNLABELLED, Transform

CLASSIFIER = "classifier.ckpt"  # in the folder of its training
LAYER = "layer."  # the linear layer's tensors in the state_dict of a classifier's file


class Teacher(NamedTuple):
    """A classifier that was fine-tuned, or distilled from one that was.

    Attributes:
        backbone: its network without the linear layer, and what its file says of it.
        layer: the linear layer's weight and bias.
        labelled: (L,) which of the training images had the labels that it has learned from.
        images: the digest of these images, as `LabelledImages` has it.
    """

    backbone: Backbone
    layer: dict[str, Tensor]
    labelled: Tensor
    images: str

    @property
    def classes(self) -> int:
        return len(self.layer["bias"])

    def classifier(self) -> Classifier:
        """The whole network, as it is."""
        features = self.layer["weight"].shape[1]
        classifier = Classifier(self.backbone.network, features, self.classes, Schedule(learning_rate=0.0))
        classifier.layer.load_state_dict(self.layer)
        return classifier.requires_grad_(False)


def keep_classifier(
    classifier: Classifier,
    path: Path,
    backbone: Backbone,
    labelled: np.ndarray,
    images: str,
) -> None:
    """Leave a classifier that has been trained, its weights alone, where `load_teacher` finds it.

    The file is a checkpoint as those of the methods are: what evaluates or exports their backbones takes a
    classifier's, too.

    Args:
        classifier: after its training; of several processes, the first one's is kept.
        path: of the file.
        backbone: what is to be told of its network.
        labelled: which of the training images had labels.
        images: their digest.
    """
    if not classifier.trainer.is_global_zero:
        return
    parts = {PREFIX: classifier.backbone, LAYER: classifier.layer}
    tensors = {
        f"{prefix}{name}": x.cpu() for prefix, part in parts.items() for name, x in part.state_dict().items()
    }
    contents = {
        "method": backbone.method,
        "hyper_parameters": {"arch": backbone.arch, "stem": backbone.stem},
        "datamodule_hyper_parameters": backbone.data,
        "state_dict": tensors,
        "epoch": classifier.trainer.current_epoch,
        "global_step": classifier.trainer.global_step,
        "labelled": torch.as_tensor(labelled),
        "images": images,
    }
    AtomicCheckpointIO().save_checkpoint(contents, path)


def load_teacher(path: str | Path) -> Teacher:
    """Read a classifier that `keep_classifier` has written.

    Raises:
        UsageError: it is no such file, or not whole.
    """
    backbone = load_backbone(path)
    checkpoint = load_tensors(Path(path))
    tensors = checkpoint["state_dict"].items()
    layer = {name.removeprefix(LAYER): x for name, x in tensors if name.startswith(LAYER)}
    if not {"labelled", "images"} <= checkpoint.keys() or layer.keys() != {"weight", "bias"}:
        raise UsageError(
            f"{path} is a checkpoint of {backbone.method}, and no classifier that could teach: finetune "
            f"keeps them, in <run>/fraction_<part>/seed_<number>/fine-tuned/{CLASSIFIER}"
        )
    return Teacher(backbone, layer, checkpoint["labelled"], checkpoint["images"])


class Distillation(nn.Module):
    """The loss of SimCLR v2's third step: a student learns what a teacher says of images, labelled or not.

    With P(y|x; τ) = e^{f(x)_y/τ} / Σ_y' e^{f(x)_y'/τ}, the answer of a network f softened by a temperature τ,
    it is equation 2 of Chen et al., "Big Self-Supervised Models are Strong Semi-Supervised Learners"
    (NeurIPS 2020), of teacher T and student S::

        L = −Σ_{x ∈ D} Σ_y P_T(y|x; τ) log P_S(y|x; τ)

    and, where some of the images D have labels that are known, D_L, equation 3::

        L = −(1 − α) Σ_{(x, y) ∈ D_L} log P_S(y|x) − α Σ_{x ∈ D} Σ_y P_T(y|x; τ) log P_S(y|x; τ)

    Both sums are divided by the number of a batch's images: the loss is the mean of those that processes with
    equal shares have. As in the authors' code, the teacher's sum is multiplied by τ², by which the speed of
    learning does not depend on τ (Hinton et al., 2015), and the teacher sees the student's views.

    Args:
        teacher: (B, …) to logits (B, classes).
        temperature: τ.
        weight: α.
    """

    def __init__(self, teacher: nn.Module, temperature: float, weight: float = 1.0) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.temperature, self.weight = temperature, weight

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        """The loss of a student's logits (B, classes).

        Args:
            labels: (B,); `UNLABELLED` where there is none.
            images: (B, …) that the logits are of.
        """
        with torch.no_grad():
            softened = (self.teacher(images).float() / self.temperature).softmax(dim=1)  # P_T, (B, classes)
        logits = logits.float()
        loss = self.weight * self.temperature**2 * F.cross_entropy(logits / self.temperature, softened)
        if self.weight < 1:
            known = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum") / len(labels)
            loss = loss + (1 - self.weight) * known
        return loss


class PartlyLabelledViews(LabelledViews):
    """One view of an image, and its label if it is one of those that are known, else `UNLABELLED`.

    Args:
        images: items (image, label).
        indices: of the images that there are views of.
        transform: that makes a view.
        seed: of the views and their order.
        known: which of the indices have a label.
    """

    def __init__(
        self, images: Dataset, indices: np.ndarray, transform: Transform, seed: int, known: np.ndarray
    ) -> None:
        super().__init__(images, indices, transform, seed)
        self.known = frozenset(known.tolist())

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        view, label = super().__getitem__(item)
        return view, label if item[1] in self.known else UNLABELLED


def lesson(
    images: LabelledImages, unlabelled: Dataset | None, labelled: np.ndarray, seed: int
) -> PartlyLabelledViews:
    """Random views of what a teacher teaches: all training images and, behind them, those of another set.

    Args:
        images: the training images.
        unlabelled: the other set, nobody looks at whose labels.
        labelled: which of the training images have labels that are known.
        seed: of the views and their order.
    """
    every, indices = images.sets[True], images.indices[True]
    if unlabelled is not None:
        indices = np.concatenate([indices, len(every) + np.arange(len(unlabelled))])
        every = ConcatDataset([every, unlabelled])
    transform = supervised(images.hparams.image_size, digits=images.hparams.dataset == "digits")
    return PartlyLabelledViews(every, indices, transform, seed, labelled)
