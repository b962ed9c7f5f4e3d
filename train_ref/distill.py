"""The command ``distill``: a fine-tuned classifier labels images that have none, and teaches a network."""

from __future__ import annotations

from typing import Any, get_args

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from lightning.pytorch import seed_everything

from .classifiers import Batches, Classifier, Schedule, accuracies_of, fit
from .errors import UsageError
from .evaluate import Evaluator, Precision, Rows
from .evaluation import Score
from .evaluation_run import resumable
from .networks import Architecture, ResNet, Stem, check_size, network
from .parsing import NonNegativeFinite, PositiveFinite, Seed, Temperature
from .teachers import CLASSIFIER, Distillation, Teacher, keep_classifier, lesson, load_teacher

STUDENT = "student"  # the folder of its training
# Options that figures depend on, as they were said.
TOLD = (
    "unlabelled", "weight", "epochs", "batch_size", "learning_rate", "weight_decay", "seed", "devices",
    "precision",
)  # fmt: skip

# The paper's: 0.1 where the student's network is the teacher's, 1 where it is a smaller one.
SELF_TEMPERATURE, SMALLER_TEMPERATURE = 0.1, 1.0


# The paper trains a student as it has pre-trained: 400 epochs of 4096 images with LARS, weight decay 1e-4 and
# a cosine. Here it is SGD, of 256 images at the rate of 0.1 that is usual from scratch (Goyal et al., 2017).
@resumable
def distill(
    checkpoint: str,
    arch: Architecture | None = None,
    stem: Stem | None = None,
    unlabelled: str | None = None,
    temperature: Temperature | None = None,
    weight: ClosedUnitInterval = 1.0,
    epochs: PositiveInt = 100,
    batch_size: PositiveInt = 256,
    learning_rate: PositiveFinite = 0.1,
    weight_decay: NonNegativeFinite = 1e-4,
    seed: Seed = 0,
    devices: PositiveInt = 1,
    precision: Precision = "32-true",
    every_n_steps: PositiveInt | None = None,
    resume: str | None = None,
    **options: Any,
) -> Rows:
    """Distillation: an untrained network learns what a fine-tuned classifier says of images without labels.

    This is the third step of SimCLR v2 (Chen et al., NeurIPS 2020), self-training where the network is the
    teacher's. The images are all of the training, and nobody looks at their labels. The student is kept as
    student/classifier.ckpt in the run's folder: a teacher for another one, or for knn, linear and export.

    Args:
        checkpoint: the teacher, a classifier.ckpt that finetune or distill has kept.
        arch: the student's network; by default the teacher's.
        stem: how a ResNet of torchvision's starts; by default as the teacher's.
        unlabelled: a folder of more images to learn from, train/<class>/<image>, whatever their classes are.
        temperature: τ of both networks' answers; by default the paper's, 0.1 where the networks are the same,
            and else 1.
        weight: α of the teacher's answers; the rest, 1 − α, is for the labels that it was fine-tuned on.
        epochs: of training.
        batch_size: images a batch, of all devices together.
        learning_rate: at the start of a cosine.
        weight_decay: of SGD.
        seed: of the student, the crops and their order.
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
    teacher = load_teacher(checkpoint)
    evaluator = Evaluator("distill", checkpoint, **options)
    images = evaluator.images
    check(teacher, evaluator, weight)
    more = None if unlabelled is None else images.more(unlabelled)
    arch = arch or teacher.backbone.arch
    if stem is None:
        stem = teacher.backbone.stem if arch in (teacher.backbone.arch, *get_args(ResNet)) else "imagenet"
    same = (arch, stem) == (teacher.backbone.arch, teacher.backbone.stem)
    check_size(network(arch, stem), arch, images.hparams.image_size)
    if temperature is None:
        temperature = SELF_TEMPERATURE if same else SMALLER_TEMPERATURE

    taught = lesson(images, more, teacher.labelled.numpy(), seed)
    batches = Batches(images, taught, images.plain(train=False), batch_size, seed)
    computing = {"accelerator": evaluator.device.type, "devices": devices, "precision": precision}
    with evaluator.run(settings, images.digest(more)) as run:
        accuracies = run.accuracies(STUDENT)
        if accuracies is None:
            seed_everything(seed, verbose=False)
            net = network(arch, stem).to(memory_format=torch.channels_last)
            student = Classifier(
                net,
                net.num_features,
                teacher.classes,
                Schedule(learning_rate, learning_rate, weight_decay=weight_decay),
                Distillation(teacher.classifier(), temperature, weight),
            )
            accuracies = fit(student, batches, epochs, **computing, **run.training(STUDENT))
            facts = evaluator.backbone._replace(method="distill", arch=arch, stem=stem, data=evaluator.data)
            path = run.begin() / STUDENT / CLASSIFIER
            keep_classifier(student, path, facts, teacher.labelled.numpy(), images.digest())
            run.finish(STUDENT, accuracies)
        known = accuracies_of(teacher.classifier(), batches, **computing)
        rows = [
            {
                "measure": name,
                "labels": len(teacher.labelled),
                f"teacher, {teacher.backbone.arch}": Score(known[name], None)._asdict(),
                f"student, {arch}": Score(accuracies[name], None)._asdict(),
            }
            for name in accuracies
        ]
        chosen = {"arch": arch, "stem": stem, "temperature": temperature, "images": len(taught)}
        evaluator.report(rows, {name: settings[name] for name in TOLD} | chosen)
    return rows


def check(teacher: Teacher, evaluator: Evaluator, weight: float) -> None:
    """Raise UsageError where a teacher has learned from other images or classes than those that there are."""
    images, path = evaluator.images, teacher.backbone.path
    if teacher.classes != images.classes:
        raise UsageError(
            f"{path} tells {teacher.classes} classes apart, but the images have {images.classes}: dataset "
            "and root must be those that it was fine-tuned on"
        )
    if weight < 1 and teacher.images != images.digest():
        raise UsageError(
            f"weight is {weight}, but the labels that {path} has learned from are of other images: dataset, "
            "root and max_images must be those that it was fine-tuned on, or weight 1"
        )
