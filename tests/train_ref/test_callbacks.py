from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from train_ref.callbacks import Curves, Evaluation
from train_ref.checkpoints import LastCheckpoint


class StepValues(Callback):
    def __init__(self):
        self.top5 = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.top5.append(trainer.callback_metrics["top5"].item())


def test_curves_are_the_means_of_each_epoch(make_moco, make_views, make_trainer):
    curves, steps = Curves(), StepValues()
    trainer = make_trainer(max_epochs=2, callbacks=[curves, steps])
    trainer.fit(make_moco(), make_views())
    assert [epoch["epoch"] for epoch in curves.history] == [1, 2]
    assert set(curves.history[0]) == {"epoch", "loss", "instance_loss", "consistency_loss", "top1", "top5"}
    means = torch.tensor(steps.top5).reshape(2, 2).mean(dim=1)
    assert [epoch["top5"] for epoch in curves.history] == pytest.approx(means.tolist())
    assert (Path(trainer.log_dir) / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_features_are_compared_with_those_before_any_training(make_moco, make_views, make_trainer):
    evaluation = Evaluation(k=3, seeds=2)
    trainer = make_trainer(callbacks=[LastCheckpoint(), evaluation], enable_checkpointing=True)
    trainer.fit(make_moco(), make_views())
    first = Path(trainer.log_dir)

    # A resumed run starts from trained weights, yet compares with the same untrained ones.
    trainer = make_trainer(
        max_epochs=2, callbacks=[LastCheckpoint(), Evaluation(k=3, seeds=2)], enable_checkpointing=True
    )
    trainer.fit(make_moco(), make_views(), ckpt_path=first / "last.ckpt")
    untrained = [
        [row["untrained"] for row in json.loads((run / "evaluation.json").read_text())]
        for run in (first, Path(trainer.log_dir))
    ]
    assert untrained[0] == untrained[1]
    for before, initial in zip(
        evaluation.untrained.parameters(), make_moco().backbone.parameters(), strict=True
    ):
        assert torch.equal(before, initial)
