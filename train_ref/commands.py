"""The commands and the studies, an entry each. Nothing is imported here that takes time to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Command:
    """What follows the program's name on the command line.

    Attributes:
        purpose: what it does, in a line.
        place: "module:function" within this package. The function's arguments are the command's options, its
            docstring is their help; it is imported when the command is run or asked for help.
        examples: command lines to try, without the program's and the command's names.
        parses: the function takes the command line itself: its arguments, the name of program and command,
            and the text of the examples.
        choices: in place of a function, what the next word chooses from.
    """

    purpose: str
    place: str = ""
    examples: tuple[str, ...] = ()
    parses: bool = False
    choices: Mapping[str, Command] = field(default_factory=dict)

    def function(self) -> Callable[..., Any]:
        module, name = self.place.split(":")
        return getattr(import_module(f".{module}", __package__), name)


RUN = "runs/digits_moco_v2_co2/version_0"  # as the recipe says
CHECKPOINT = f"{RUN}/last.ckpt"
TEACHER = f"{RUN}/finetune/version_0/fraction_0.1/seed_0/fine-tuned/classifier.ckpt"

STUDIES = {
    "co2": Command(
        "what CO2 adds to MoCo and MoCo v2",
        "studies.co2:study",
        ("--quick true", "--seeds 3 --directory runs/co2"),
    ),
    "simclr": Command(
        "what CO2 adds to SimCLR",
        "studies.simclr:study",
        ("--quick true", "--seeds 3 --learning_rate 0.03"),
    ),
    "consistency": Command(
        "what the weight of ConIC's consistency does to its losses and features",
        "studies.consistency:study",
        ("--quick true", "--epochs 60"),
    ),
    "batch_size": Command(
        "how much ConIC and SimCLR care about the batch size",
        "studies.batch_size:study",
        ("--quick true", "--epochs 40 --seeds 3"),
    ),
    "sampling": Command(
        "what sampling the classifier's rows does to ConIC's loss",
        "studies.sampling:study",
        ("--quick true", "--active 144 --seeds 5"),
    ),
    "distillation": Command(
        "what a network that was fine-tuned on few labels teaches itself and a smaller one",
        "studies.distillation:study",
        ("--quick true", "--seeds 3 --self_temperature 1"),
    ),
    "toy": Command(
        "ConIC on eight images with features of two dimensions",
        "studies.toy:study",
        ("--quick true", "--seeds 4 --consistency_weight 0.2"),
    ),
}

CONVERSIONS = {
    "cifar": Command(
        "makes a folder of CIFAR's files",
        "convert:cifar",
        ("cifar-10-python.tar.gz ~/cifar10",),
    ),
    "imagenet": Command(
        "makes a folder of ImageNet's archives",
        "convert:imagenet",
        (
            "ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar ILSVRC2012_devkit_t12.tar.gz ~/imagenet",
            "ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar classes_of_val.txt ~/imagenet",
        ),
    ),
    "index": Command("keeps an index of WebDataset's shards", "convert:index", ("~/shards/train",)),
    "pack": Command(
        "decodes a folder of images once",
        "convert:pack",
        ("~/imagenet ~/imagenet_256", "~/imagenet ~/imagenet_160 --size 160 --num_workers 16"),
    ),
}

COMMANDS = {
    "fit": Command(
        "trains a method as a recipe says, and evaluates its features",
        "training:fit",
        (
            "--config digits_moco_v2_co2",
            "--config imagenet_simclr --data.root ~/imagenet --trainer.devices 8",
            "--config digits_simclr --model.temperature 0.2 --trainer.max_epochs 8",
        ),
        parses=True,
    ),
    "validate": Command(
        "shows that the fused losses train as eager PyTorch does",
        "validate:validate",
        ("--methods moco_v2_co2,conic --steps 20", "--network resnet18 --precision 64-true --batch_size 16"),
    ),
    "knn": Command(
        "evaluates a checkpoint by nearest neighbours",
        "evaluate:knn",
        (CHECKPOINT, f"{CHECKPOINT} --k [10,50] --temperature [0.1]"),
    ),
    "linear": Command(
        "evaluates a checkpoint by a linear layer on its frozen features",
        "evaluate:linear",
        (
            f"{CHECKPOINT} --learning_rate 3",
            f"{CHECKPOINT} --recipe conic --augment false",
            f"{CHECKPOINT} --resume last",
        ),
    ),
    "finetune": Command(
        "evaluates a checkpoint by training it on a few of the labels",
        "evaluate:finetune",
        (f"{CHECKPOINT} --seeds 2", f"{CHECKPOINT} --fractions [0.05] --from_scratch false"),
    ),
    "distill": Command(
        "lets a fine-tuned classifier label images that have none, and teach a network",
        "distill:distill",
        (TEACHER, f"{TEACHER} --arch convnet", f"{TEACHER} --unlabelled ~/more --resume last"),
    ),
    "export": Command(
        "writes a checkpoint's backbone for other programs",
        "evaluate:export",
        (CHECKPOINT, f"{CHECKPOINT} --output digits_backbone"),
    ),
    "conversion": Command("makes what sets of images come in ready for the training", choices=CONVERSIONS),
    "study": Command("repeats a result of the papers on digits", choices=STUDIES),
    "report": Command(
        "puts the tables of studies and validations into a document",
        "report:report",
        ("", "runs/studies --document runs/results.md"),
        parses=True,
    ),
    "sampling": STUDIES["sampling"],
}
