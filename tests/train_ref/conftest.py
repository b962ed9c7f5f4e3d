"""A MoCo and data small enough for a step to take a tenth of a second, and a trainer that stays silent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from train_ref.data import Views
from train_ref.moco import MoCo


@pytest.fixture
def make_moco():
    def make(**settings) -> MoCo:
        seed_everything(0, verbose=False)
        defaults = {"arch": "resnet18", "stem": "small", "dim": 16, "queue_size": 20, "momentum": 0.9}
        return MoCo(**{**defaults, **settings})

    return make


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
    """One training step of a MoCo that has no trainer, on random views: returns its loss."""

    def run(moco: MoCo, batch_size: int = 8) -> torch.Tensor:
        moco.log = lambda *args, **kwargs: None
        views = [torch.randn(batch_size, 3, 8, 8) for _ in range(2)]
        return moco.training_step((views, torch.zeros(batch_size, dtype=torch.int64)), 0)

    return run
