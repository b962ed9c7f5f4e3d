"""What a fine-tuned network teaches with images that have no labels, as SimCLR v2 has it (Chen et al., "Big
Self-Supervised Models are Strong Semi-Supervised Learners", NeurIPS 2020).

A seed pre-trains a network, draws labels, and learns from them and from what their teacher says of all
images. All its trainings have views of the pre-training: to draw others would take longer than the steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..classifiers import Batches, Classifier, LabelledImages, Schedule, fit
from ..evaluate import for_few_labels
from ..evaluation import labelled_subset
from ..figures import WIDTH
from ..methods import SimCLR
from ..networks import convnet, network
from ..parsing import NonNegativeFinite, PositiveFinite, Temperature
from ..teachers import Distillation
from .common import (
    Row,
    Run,
    Runs,
    SharedViews,
    Study,
    Variant,
    command,
    differences,
    dots,
    table,
    train,
)

ONE, TEN, ALL = "1 % of the labels, %", "10 % of the labels, %", "all labels, %"
FRACTIONS = {ONE: 0.01, TEN: 0.1, ALL: 1.0}
SUPERVISED, SMALL_SUPERVISED = "from scratch", "smaller network, from scratch"
FINE_TUNED, SELF, SMALL = "fine-tuned", "fine-tuned, then distilled", "distilled into the smaller network"
LABELS = {
    SUPERVISED: "from\nscratch",
    FINE_TUNED: "fine-\ntuned",
    SELF: "distilled",
    SMALL_SUPERVISED: "smaller,\nscratch",
    SMALL: "smaller,\ndistilled",
}
PAIRS = [(FINE_TUNED, SUPERVISED), (SELF, FINE_TUNED), (SMALL, SMALL_SUPERVISED), (SMALL, FINE_TUNED)]
SMALLER = (8, 16, 32)  # channels, a quarter of those of the other network


NewNet = Callable[[], nn.Module]  # a backbone


def whole() -> nn.Module:
    return network("convnet")


def smaller() -> nn.Module:
    """The same with `SMALLER` channels: 6 thousand parameters in place of 93."""
    return convnet(SMALLER)


class OneOfTheViews(Dataset):
    """One of the views of the pre-training, and its label: item (epoch, i) is of the i-th of the indices.

    Each of its epochs had two; when all are used up they come again.
    """

    def __init__(self, views: SharedViews, indices: np.ndarray, seed: int) -> None:
        self.views, self.indices, self.seed = views, indices, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, i = item
        pair, labels, _ = self.views.kept[[(epoch // 2 % self.views.epochs, int(self.indices[i]))]]
        return pair[epoch % 2][0], labels[0]


@dataclass(frozen=True)
class Learning:
    """Trainings of a seed, on the views of its pre-training.

    Attributes:
        settings: the study's, by their names.
    """

    seed: int
    views: SharedViews
    settings: Mapping[str, Any]
    quick: bool

    @cached_property
    def images(self) -> LabelledImages:
        return LabelledImages(dataset="digits", image_size=self.views.hparams.image_size)

    def from_labels(self, net: NewNet, labelled: np.ndarray, layer: float, backbone: float) -> Classifier:
        """A network that has learned from these labels, with rates for a whole batch of them."""
        batch_size, steps = self.settings["labelled_batch_size"], 2 if self.quick else self.settings["steps"]
        scale, epochs = for_few_labels(len(labelled), batch_size, epochs=1, min_steps=steps)
        schedule = Schedule(scale * layer, scale * backbone)
        return self._learn(net, labelled, batch_size, epochs, schedule)

    def from_teacher(self, net: NewNet, teacher: Classifier, temperature: float) -> Classifier:
        """A network that has learned what a teacher says of all images."""
        rate, decay = self.settings["student_learning_rate"], self.settings["weight_decay"]
        everything, batch_size = np.arange(len(self.images.labels)), self.settings["batch_size"]
        epochs = 2 if self.quick else self.settings["student_epochs"]
        schedule = Schedule(rate, rate, weight_decay=decay)
        criterion = Distillation(teacher, temperature)
        return self._learn(net, everything, batch_size, epochs, schedule, criterion)

    def _learn(self, net: NewNet, chosen: np.ndarray, batch_size: int, epochs: int, *how: Any) -> Classifier:
        seed_everything(self.seed, verbose=False)
        backbone = net()
        classifier = Classifier(backbone, backbone.num_features, self.images.classes, *how)
        train, test = OneOfTheViews(self.views, chosen, self.seed), self.images.plain(train=False)
        batches = Batches(self.images, train, test, batch_size, self.seed)
        quietly = {"enable_progress_bar": False, "limit_train_batches": 2 if self.quick else None}
        fit(classifier, batches, epochs, accelerator="cpu", devices=1, **quietly)
        return classifier


@dataclass(frozen=True)
class DistillationStudy(Study):
    """The three steps, for each part of the labels.

    Attributes:
        settings: the study's, by their names.
    """

    settings: dict[str, Any]

    def of_seed(self, seed: int, epochs: int, quick: bool) -> Iterator[tuple[str, Run]]:
        settings = self.settings
        pretraining = Variant(SimCLR, {"learning_rate": settings["learning_rate"]}, settings["batch_size"])
        views = SharedViews(seed, epochs, batch_size=pretraining.batch_size)
        module = pretraining.module(seed)
        train(module, views, epochs, quick)

        def pretrained() -> nn.Module:
            return copy.deepcopy(module.backbone)

        learning = Learning(seed, views, settings, quick)
        scratch = settings["scratch_learning_rate"], settings["scratch_learning_rate"]
        rates = settings["layer_learning_rate"], settings["backbone_learning_rate"]
        runs: dict[str, Run] = {name: {} for name in LABELS}
        for column, fraction in FRACTIONS.items():
            labelled = labelled_subset(learning.images.labels, fraction, seed)
            learned = {
                SUPERVISED: learning.from_labels(whole, labelled, *scratch),
                SMALL_SUPERVISED: learning.from_labels(smaller, labelled, *scratch),
            }
            if column != ALL:
                teacher = learning.from_labels(pretrained, labelled, *rates)
                learned[FINE_TUNED] = teacher
                learned[SELF] = learning.from_teacher(whole, teacher, settings["self_temperature"])
                learned[SMALL] = learning.from_teacher(smaller, teacher, settings["temperature"])
            for name, classifier in learned.items():
                runs[name][column] = classifier.percent()["top-1"]
        yield from runs.items()


@command("distillation")
def study(
    epochs: PositiveInt = 15,
    seeds: PositiveInt = 4,
    batch_size: PositiveInt = 32,
    learning_rate: PositiveFinite = 0.03,
    labelled_batch_size: PositiveInt = 256,
    steps: PositiveInt = 200,
    layer_learning_rate: PositiveFinite = 0.5,
    backbone_learning_rate: PositiveFinite = 0.1,
    scratch_learning_rate: PositiveFinite = 0.1,
    student_epochs: PositiveInt = 20,
    student_learning_rate: PositiveFinite = 0.05,
    weight_decay: NonNegativeFinite = 1e-4,
    self_temperature: Temperature = 0.1,
    temperature: Temperature = 1.0,
) -> Study:
    """SimCLR's network, fine-tuned on 1 % and 10 % of the labels, teaches itself and a smaller one.

    Leaves distillation.png and distillation.json. Trainings are as the commands finetune and distill have
    them, but for their views, which are those of the pre-training.

    Args:
        epochs: of the pre-training.
        seeds: how many pre-trainings, draws of the labels and trainings of each variant.
        batch_size: images a step of the pre-training and of the distillation.
        learning_rate: of the pre-training, at the start of the cosine.
        labelled_batch_size: images a step of learning from labels; fewer labels have rates as much lower.
        steps: at least, of learning from labels.
        layer_learning_rate: of the linear layer in fine-tuning.
        backbone_learning_rate: of the network below it.
        scratch_learning_rate: of a network without pre-training, that learns from labels alone.
        student_epochs: of a distillation.
        student_learning_rate: of a student.
        weight_decay: of a student.
        self_temperature: τ where the student is a network like the teacher's.
        temperature: τ where it is smaller.
    """
    return DistillationStudy(
        title="Learning digits from few labels",
        tables=tables,
        draw=draw,
        settings=dict(locals()),
    )


def tables(runs: Runs) -> dict[str, list[Row]]:
    return {
        "Accuracy on 360 test images": table(runs, FRACTIONS),
        "Paired differences": differences(runs, PAIRS, (ONE, TEN)),
    }


def draw(runs: Runs) -> Figure:
    """A panel for each part of the labels, and a line where all of them lead the network to."""
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2, sharex=True), (ONE, TEN), strict=True):
        dots(axes, runs, LABELS, column, linestyle="none")
        everything = np.mean([run[ALL] for run in runs[SUPERVISED]])
        axes.axhline(everything, color="0.5", linestyle="--", label="from scratch, with all labels")
    return figure
