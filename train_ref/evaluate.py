"""The commands ``knn``, ``linear``, ``finetune`` and ``export``: what a checkpoint's features are worth, and
its backbone for other programs. What ``distill`` shares with them is here, too.

Each takes any checkpoint that this trainer wrote and prints a table. Every evaluation keeps its settings and
its figures in a folder of its own; those that train keep checkpoints and the values of their steps too, and
go on from where they were stopped. An export depends on its checkpoint alone: its files replace older ones.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
import torchvision
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from .backbones import Backbone, differences, export_backbone, load_backbone
from .classifiers import Batches, Classifier, LabelledFeatures, LabelledImages, Schedule, fit
from .data import Views
from .errors import UsageError
from .evaluation import Features, Score, extract_features, format_table, knn_accuracies, labelled_subset
from .evaluation_run import Run, configured, directory_of, options_of, resumable, say
from .files import verified_sha256, writable, write_text
from .networks import check_size, network
from .parsing import PositiveFinite, Seed
from .teachers import CLASSIFIER, keep_classifier

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Rows = list[dict[str, Any]]

RECIPES = {
    "moco": Schedule(30.0, cosine=False),  # He et al., CVPR 2020
    "conic": Schedule(75.0),  # section C.2
}


def knn(
    checkpoint: str,
    k: Sequence[PositiveInt] = (200, 20),
    temperature: Sequence[PositiveFinite] = (0.07, 0.1),
    memory: PositiveInt = 1024,
    **options: Any,
) -> Rows:
    """Weighted nearest neighbours: the training images most like a test image vote, as InstDisc has it.

    Args:
        checkpoint: a file that the training wrote, ``last.ckpt`` in a run's directory.
        k: numbers of votes; larger ones than there are training images are cut to that.
        temperature: each τ of the votes' weights e^{cosine/τ}.
        memory: MB of similarities at once, besides the features.
        **options: those of `Evaluator`.

    Returns:
        The rows of the table.
    """
    settings = dict(locals())  # all options, before there are other names
    if not (k and temperature):
        raise UsageError("k and temperature need at least one value each")
    evaluator = Evaluator("knn", checkpoint, **options)
    with evaluator.run(settings):
        train, test = (evaluator.features(part) for part in (True, False))
        votes = list(dict.fromkeys(min(each, len(train.labels)) for each in k))
        accuracies = knn_accuracies(
            train,
            test,
            ks=votes,
            temperatures=temperature,
            chunk_size=max(1, memory * 10**6 // (4 * len(train.labels))),
            device=evaluator.device,
        )
        rows = [
            {
                "measure": f"{neighbours} nearest neighbours, τ = {tau:g}",
                "labels": len(train.labels),
                "accuracy": Score(accuracy, None)._asdict(),
            }
            for (neighbours, tau), accuracy in accuracies.items()
        ]
        evaluator.report(rows, {"k": votes, "temperature": list(temperature)})
    return rows


@resumable
def linear(
    checkpoint: str,
    recipe: Literal["moco", "conic"] = "moco",
    learning_rate: PositiveFinite | None = None,
    epochs: PositiveInt = 100,
    batch_size: PositiveInt = 256,
    augment: bool = True,
    seed: Seed = 0,
    devices: PositiveInt = 1,
    precision: Precision = "32-true",
    every_n_steps: PositiveInt | None = None,
    resume: str | None = None,
    **options: Any,
) -> Rows:
    """Linear evaluation: a linear layer learns from all labels, on the frozen backbone.

    Args:
        checkpoint: a file that the training wrote, ``last.ckpt`` in a run's directory.
        recipe: whose schedule: "moco": a rate of 30, a tenth of it after 60 % and a hundredth after 80 % of
            the epochs; "conic": a rate of 75, cosine.
        learning_rate: another rate at the start; these are for ImageNet's features, which are small.
        epochs: of training.
        batch_size: images a batch, of all devices together.
        augment: learn from random crops; false takes the images as they are, and their features but once.
        seed: of the layer, the crops and their order.
        devices: how many GPUs, or processes.
        precision: of the computation.
        every_n_steps: write a checkpoint as often, besides those at the end of every epoch.
        resume: go on with a run that was stopped, with its settings: "last", the newest one of this
            checkpoint that is not finished, or a run's folder.
        **options: those of `Evaluator`.

    Returns:
        The rows of the table.
    """
    settings = dict(locals())  # all options, before there are other names
    if devices > 1 and not augment:
        raise UsageError(
            "devices must be 1 where augment is false: features are extracted once, by one process"
        )
    schedule = RECIPES[recipe]
    if learning_rate is not None:
        schedule = schedule._replace(learning_rate=learning_rate)
    evaluator = Evaluator("linear", checkpoint, **options)
    images, backbone = evaluator.images, evaluator.backbone.network
    with evaluator.run(settings) as run:
        if augment:
            train, test = images.augmented(slice(None), seed), images.plain(train=False)
        else:
            train, test = (LabelledFeatures(evaluator.features(part), seed) for part in (True, False))
            backbone = nn.Identity()
        seed_everything(seed, verbose=False)
        features = evaluator.backbone.network.num_features
        classifier = Classifier(backbone, features, images.classes, schedule)
        training = {"epochs": epochs, "devices": devices, "precision": precision}
        accuracies = fit(
            classifier,
            Batches(images, train, test, batch_size, seed),
            accelerator=evaluator.device.type,
            **training,
            **run.training(),
        )
        rows = [
            {
                "measure": f"linear evaluation, {name}",
                "labels": len(train),
                "accuracy": Score(accuracy, None)._asdict(),
            }
            for name, accuracy in accuracies.items()
        ]
        told = {
            "recipe": recipe,
            **schedule._asdict(),
            "batch_size": batch_size,
            "augment": augment,
            "seed": seed,
        }
        evaluator.report(rows, told | training)
    return rows


def for_few_labels(labels: int, batch_size: int, epochs: int, min_steps: int) -> tuple[float, int]:
    """By what rates are multiplied, and how many epochs there are, where labels may be less than a batch."""
    steps = max(1, labels // batch_size)  # an epoch
    return min(1, labels / batch_size), max(epochs, math.ceil(min_steps / steps))


# 20 epochs of 256 images a batch with a cosine from these two rates, and no weight decay: Barlow Twins
# (Zbontar et al., ICML 2021) on 1 % of ImageNet's labels; SwAV's protocol has 20 epochs too. From scratch,
# 0.002 would hardly move a network: all of it learns at 0.1, usual on ImageNet for 256 images (Goyal et al.,
# 2017). Digits differ: their 10 or 140 labels are less than a batch. Rates are as much lower, by the linear
# rule of Goyal et al., and where 20 epochs were 20 steps, there are `min_steps`.
@resumable
def finetune(
    checkpoint: str,
    fractions: Sequence[float] = (0.01, 0.1),
    seeds: PositiveInt = 5,
    epochs: PositiveInt = 20,
    min_steps: NonNegativeInt = 200,
    backbone_learning_rate: PositiveFinite = 0.002,
    learning_rate: PositiveFinite = 0.5,
    batch_size: PositiveInt = 256,
    from_scratch: bool = True,
    scratch_learning_rate: PositiveFinite = 0.1,
    devices: PositiveInt = 1,
    precision: Precision = "32-true",
    keep: NonNegativeInt = 1,
    every_n_steps: PositiveInt | None = None,
    resume: str | None = None,
    **options: Any,
) -> Rows:
    """Semi-supervised learning: the backbone, and a linear layer on it, learn from a few of the labels.

    Each training has a folder of its own in the run's. One that is done leaves its accuracies, its steps and
    its logs, but no checkpoint: they would be many, each twice as large as the network. The first seed's
    fine-tuned classifiers are kept, as fraction_<part>/seed_0/fine-tuned/classifier.ckpt: distill makes
    teachers of them, and knn, linear, finetune and export take them as they take checkpoints.

    Args:
        checkpoint: a file that the training wrote, ``last.ckpt`` in a run's directory.
        fractions: parts of the labels, as many of each class, and at least one.
        seeds: trainings for each fraction: draws of the labels, the layer and the crops.
        epochs: of training.
        min_steps: where few labels make fewer steps than this, the epochs are as many more.
        backbone_learning_rate: of the backbone, at the start of a cosine, and for a whole batch: where there
            are fewer labels, rates are as much lower.
        learning_rate: of the linear layer, likewise.
        batch_size: images a batch, of all devices together.
        from_scratch: train the same network without the checkpoint, too: what has the pretraining gained?
        scratch_learning_rate: of all its layers, likewise.
        devices: how many GPUs, or processes.
        precision: of the computation.
        keep: of each fraction, the fine-tuned classifiers of so many seeds; each is as large as the network.
        every_n_steps: write a checkpoint as often, besides those at the end of every epoch.
        resume: go on with a run that was stopped, with its settings: "last", the newest one of this
            checkpoint that is not finished, or a run's folder.
        **options: those of `Evaluator`.

    Returns:
        The rows of the table.
    """
    settings = dict(locals())  # all options, before there are other names
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        said = ", ".join(map(str, fractions)) or "none"
        raise UsageError(f"fractions must be above 0 and at most 1, and one at least, not {said}")
    rates = {"fine-tuned": (learning_rate, backbone_learning_rate)}
    if from_scratch:
        rates["from scratch"] = (scratch_learning_rate, scratch_learning_rate)
    evaluator = Evaluator("finetune", checkpoint, **options)
    images, arch = evaluator.images, evaluator.backbone.arch
    facts = evaluator.backbone._replace(method="finetune", data=evaluator.data)
    unseen = set(range(images.classes)) - set(images.labels.tolist())
    if unseen:
        raise UsageError(f"max_images leaves no training image of {len(unseen)} of {images.classes} classes")
    computing = {"devices": devices, "precision": precision}

    rows, draws = [], []
    with evaluator.run(settings) as run:
        for fraction in dict.fromkeys(fractions):
            results: dict[str, list[dict[str, float]]] = {name: [] for name in rates}
            for seed in range(seeds):
                labelled = labelled_subset(images.labels, fraction, seed)
                train, test = images.augmented(labelled, seed), images.plain(train=False)
                scale, lasting = for_few_labels(len(labelled), batch_size, epochs, min_steps)
                for name, (layer, backbone) in rates.items():
                    place = f"fraction_{fraction}/seed_{seed}/{name.replace(' ', '_')}"
                    accuracies = run.accuracies(place)
                    if accuracies is None:
                        seed_everything(seed, verbose=False)
                        net = network(arch, evaluator.backbone.stem).to(memory_format=torch.channels_last)
                        if name == "fine-tuned":
                            net = copy.deepcopy(evaluator.backbone.network)
                        schedule = Schedule(scale * layer, scale * backbone)
                        classifier = Classifier(net, net.num_features, images.classes, schedule)
                        accuracies = fit(
                            classifier,
                            Batches(images, train, test, batch_size, seed),
                            lasting,
                            accelerator=evaluator.device.type,
                            enable_progress_bar=False,
                            **computing,
                            # Where more epochs make up for fewer steps, there are not more checkpoints.
                            **run.training(place, every_n_epochs=math.ceil(lasting / epochs)),
                        )
                        if name == "fine-tuned" and seed < keep:
                            path = run.begin() / place / CLASSIFIER
                            keep_classifier(classifier, path, facts, labelled, images.digest())
                        run.finish(place, accuracies)
                    results[name].append(accuracies)
                text = ", ".join(f"{name} {runs[-1]['top-1']:.1f} %" for name, runs in results.items())
                say(f"{len(labelled)} labels, seed {seed}: {text}")
            for measure in accuracies:
                scores = {name: Score.of([run[measure] for run in runs]) for name, runs in results.items()}
                rows.append(
                    {
                        "measure": f"{100 * fraction:g} % of the labels, {measure}",
                        "labels": len(labelled),
                        **{name: score._asdict() for name, score in scores.items()},
                    }
                )
            draws.append({"fraction": fraction, **results})
        told = {
            "fractions": list(fractions),
            "seeds": seeds,
            "epochs": epochs,
            "min_steps": min_steps,
            "backbone_learning_rate": backbone_learning_rate,
            "learning_rate": learning_rate,
            "scratch_learning_rate": scratch_learning_rate,
            "batch_size": batch_size,
        }
        evaluator.report(rows, told | computing, draws=draws)
    return rows


def export(checkpoint: str, output: str | None = None) -> Rows:
    """Write the backbone for other programs: torchvision's or timm's names, as PyTorch's state_dict and as
    safetensors.

    Args:
        checkpoint: a file that the training wrote, ``last.ckpt`` in a run's directory.
        output: where they go, without the endings .pth and .safetensors; by default beside the checkpoint.

    Returns:
        The rows of the table.
    """
    backbone = load_backbone(checkpoint)
    stem = writable(output or Path(checkpoint).with_suffix(".backbone"))
    files = export_backbone(backbone, stem)
    count = len(backbone.network.state_dict())
    rows = [
        {"file": str(file), "tensors": count, "MB": round(file.stat().st_size / 1e6, 1)} for file in files
    ]
    differs = differences(backbone)
    report = stem.with_name(stem.name + ".json")
    write_report(report, "export", backbone, rows, {"differences": differs})
    print(f"The {backbone.arch} that {backbone.method} trained in {backbone.step} steps:\n")
    print(format_table(rows))
    if differs:
        print(f"\nUnlike torchvision's: {differs}.")
    print(f"\nThese figures are kept in {report}", flush=True)
    return rows


class Evaluator:
    """A checkpoint's backbone, the images it is evaluated on, and where the figures go.

    Args:
        command: what is done.
        checkpoint: a file that the training wrote.
        dataset: the images, by default those of the training: "digits", "folder" or "synthetic".
        root: the folder of images: train/<class>/<image> and val/<class>/<image>.
        image_size: height and width that images are brought to.
        num_workers: processes that load images.
        max_images: take no more training and test images than this, evenly spaced; by default all.
        accelerator: where it is computed; auto is a GPU, if there is one.
        output: where the figures go besides, as JSON; a file that is there is replaced.
        directory: where the run has its folder, version_<N>; by default that of the command's name beside the
            checkpoint.
    """

    def __init__(
        self,
        command: str,
        checkpoint: str,
        dataset: Literal["digits", "folder", "synthetic"] | None = None,
        root: str | None = None,
        image_size: PositiveInt | None = None,
        num_workers: NonNegativeInt | None = None,
        max_images: PositiveInt | None = None,
        accelerator: Literal["auto", "cpu", "cuda"] = "auto",
        output: str | None = None,
        directory: str | None = None,
    ) -> None:
        if accelerator == "cuda" and not torch.cuda.is_available():
            raise UsageError("accelerator is cuda, but there is no such GPU")
        on_gpu = accelerator != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.command = command
        before = modified(checkpoint)
        self.backbone, self.sha256 = load_backbone(checkpoint), verified_sha256(Path(checkpoint))
        if modified(checkpoint) != before:  # a training that still runs has replaced it
            raise UsageError(f"{checkpoint} was replaced while it was read: begin again, or copy it first")
        self.output = None if output is None else writable(output)
        self.directory = directory_of(command, checkpoint, directory)
        said = {"dataset": dataset, "root": root, "image_size": image_size, "num_workers": num_workers}
        data = self.backbone.data | {name: value for name, value in said.items() if value is not None}
        self.data = {name: data[name] for name in inspect.signature(Views).parameters if name in data}
        self.max_images = max_images
        # Known before the images are read.
        check_size(self.backbone.network, self.backbone.arch, Views(**self.data).hparams.image_size)
        self.images = LabelledImages(max_images, **self.data)

    def run(self, settings: Mapping[str, Any], images: str | None = None) -> Run:
        """The run of the command, new or resumed, from the values of its arguments.

        Args:
            settings: these values.
            images: a digest of what the figures depend on, by default of the labelled images.
        """
        defaults = inspect.signature(Evaluator).parameters.values()
        known = {each.name: each.default for each in defaults if each.default is not each.empty}
        config = {
            "command": self.command,
            "checkpoint": str(self.backbone.path.absolute()),
            "sha256": self.sha256,
            "images": images or self.images.digest(),
            "options": options_of(settings, known),
            "data": {name: configured(value) for name, value in self.data.items()},
        }
        resume = settings.get("resume")
        self.kept_in = Run(
            self.command,
            self.directory,
            config,
            Path(resume) if resume else None,
            settings.get("every_n_steps"),
        )
        return self.kept_in

    def features(self, train: bool) -> Features:
        """Features of the training or the test images, without augmentation."""
        loader = self.images.in_order(self.images.plain(train))
        return extract_features(self.backbone.network, loader, self.device)

    @rank_zero_only
    def report(self, rows: Rows, settings: dict[str, Any], **details: Any) -> None:
        """Write the rows, with what is needed to get them again, and print them."""
        settings = {"data": self.data, "max_images": self.max_images, **settings}
        details = {"settings": settings, "device": str(self.device), **details}
        folder = self.kept_in.begin()
        files = [folder / f"{self.command}.json"]  # comes last: with it the run is finished
        if self.output is not None:
            files.insert(0, self.output)
        for path in files:
            write_report(path, self.command, self.backbone, rows, {"sha256": self.sha256, **details})
        print(f"\nAccuracy on {len(self.images.indices[False])} test images, in percent:\n")
        print(format_table(rows))
        print(f"\nThese figures are kept in {' and '.join(map(str, files))}", flush=True)


def modified(path: str) -> int | None:
    """When a file was written, if there is one."""
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


def write_report(path: Path, command: str, backbone: Backbone, rows: Rows, details: dict[str, Any]) -> None:
    """A command's figures as JSON."""
    facts = {name: getattr(backbone, name) for name in ("method", "arch", "stem", "epoch", "step")}
    packages = {package.__name__: package.__version__ for package in (torch, torchvision, lightning)}
    report = {
        "command": command,
        "checkpoint": {"path": str(backbone.path), **facts},
        "rows": rows,
        **details,
        "versions": {"python": platform.python_version(), **packages},
    }
    write_text(path, json.dumps(report, indent=2) + "\n")
