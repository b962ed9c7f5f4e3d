"""Methods and data small enough for a step to take a hundredth of a second, and a silent trainer."""

from __future__ import annotations

import csv
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from train_ref import __main__ as command_line
from train_ref.data import Views
from train_ref.methods import KINDS, Method, MoCo

RECIPES = Path(command_line.__file__).parent / "recipes"


@pytest.fixture
def signals():
    """What they do before a test they do after it: Lightning ignores interrupts once it has seen one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def one_thread(signals):
    """More cost more than they gain in trainings as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_method():
    """An untrained method by its kind's name, with a network of three convolutions."""

    def make(name: str, **settings) -> Method:
        seed_everything(0, verbose=False)
        return KINDS[name](**{"arch": "convnet", "dim": 16, **settings})

    return make


@pytest.fixture
def make_moco(make_method):
    def make(**settings) -> MoCo:
        return make_method("moco", **{"queue_size": 20, "momentum": 0.9, **settings})

    return make


@pytest.fixture(scope="session")
def trained() -> MoCo:
    """A MoCo after two steps of training on digits."""
    seed_everything(0, verbose=False)
    module = MoCo(arch="convnet", dim=16, queue_size=64)
    Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, Views(batch_size=64))
    return module


@pytest.fixture(scope="session")
def checkpoint(trained: MoCo, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    trained.trainer.save_checkpoint(path)
    return path


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Six bright and six dark images for the training, and as many for the test."""
    for part in ("train", "val"):
        for name, brightness in (("bright", 200), ("dark", 40)):
            directory = tmp_path / "images" / part / name
            directory.mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (20, 16), (brightness + i,) * 3).save(directory / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def make_views():
    def make(**settings) -> Views:
        defaults = {"dataset": "synthetic", "augmentation": "moco_v2", "synthetic_size": 16, "batch_size": 8}
        return Views(**{**defaults, **settings})

    return make


@pytest.fixture
def make_trainer(tmp_path: Path):
    def make(**settings) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": TensorBoardLogger(str(tmp_path), name="run"),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
        return Trainer(**{**defaults, **settings})

    return make


@pytest.fixture
def step():
    """One training step of a method that has no trainer, on random views: returns its loss."""

    def run(method: Method, batch_size: int = 8, batch_idx: int = 0) -> torch.Tensor:
        method.log = lambda *args, **kwargs: None
        method._trainer = SimpleNamespace(accumulate_grad_batches=1, current_epoch=0)
        views = [torch.randn(batch_size, 3, 8, 8) for _ in range(2)]
        instances = torch.arange(batch_size)
        return method.training_step((views, torch.zeros_like(instances), instances), batch_idx)

    return run


@pytest.fixture
def train_ref(tmp_path, monkeypatch, capsys):
    """The command line in an empty directory: returns its output, or raises SystemExit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_ref"])

    def run(*args: str) -> str:
        command_line.main(list(args))
        return capsys.readouterr().out

    return run


def values_of(directory: Path) -> dict[int, dict[str, str]]:
    """What a run's steps.csv has of each batch, without what depends on the machine's mood."""
    with (directory / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["images_per_second"], row["loss_ms"]
    return {int(row["batch"]): row for row in rows}


class Sendings(TorchFunctionMode):
    """Notes which functions of torch's bring numbers from the CPU's memory to another device: copies, indices
    that an operation takes along, and new tensors of Python's numbers."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.blocking, self.copies = device, [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        reached = any(
            each.device == self.device for each in tree_leaves((result, given)) if isinstance(each, Tensor)
        )
        made = function in (torch.tensor, torch.as_tensor, torch.asarray)
        if reached and (made or any(each.device.type == "cpu" and each.ndim for each in given)):
            self.copies.append(function)
            if not kwargs.get("non_blocking"):
                self.blocking.append(function)
        return result
