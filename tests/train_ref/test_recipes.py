"""Every recipe takes two steps as it stands, but for the size of its network, its batches and its images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from .conftest import RECIPES, values_of


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Sixteen images of each of two classes to train on, and four to test."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 4)):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (20, 20, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_two_steps(train_ref, tmp_path, images, recipe):
    settings = yaml.safe_load(recipe.read_text())
    small = {
        "model.arch": "convnet", "model.dim": 16, "data.batch_size": 16, "trainer.max_steps": 2,
        "trainer.accelerator": "cpu", "evaluation.label_fractions": "[]", "evaluation.k": 3,
        "evaluation.max_images": 40,
    }  # fmt: skip
    if settings["data"]["dataset"] == "folder":
        small |= {"data.root": images, "data.num_workers": 0, "data.image_size": 16}
    if settings["method"].startswith("moco"):
        small["model.queue_size"] = 64
    output = train_ref("fit", f"--config={recipe.stem}", *(f"--{k}={v}" for k, v in small.items()))
    assert output.startswith(f"{settings['method']} with a convnet on ")
    run = tmp_path / "runs" / recipe.stem / "version_0"
    rows = list(values_of(run).values())
    assert len(rows) == 2
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    kept = checkpoint["hyper_parameters"]
    assert {name: kept[name] for name in settings["model"] if f"model.{name}" not in small} == {
        name: value for name, value in settings["model"].items() if f"model.{name}" not in small
    }
    # The last word while training and the first of the evaluation after it are of the same features.
    row, *_ = json.loads((run / "evaluation.json").read_text())
    header, *_, last = (run / "epochs.csv").read_text().splitlines()
    measured = dict(zip(header.split(","), last.split(","), strict=True))
    assert float(measured["knn_accuracy"]) == row["trained"]["mean"]
