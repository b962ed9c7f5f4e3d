from __future__ import annotations

import sys
import warnings

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from contrastive_ops import use_backend
from train_ref import progress
from train_ref.progress import EpochLines, Plan, duration, lines_in_place_of_a_bar


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.6, "1 s"), (59, "59 s"), (60, "1 min"), (125, "2 min 5 s"), (3600, "1 h"),
        (3725, "1 h 2 min"), (3605, "1 h"), (2 * 86400 + 4 * 3600 + 59, "2 d 4 h"),
    ],
)  # fmt: skip
def test_a_duration_has_two_units_at_most(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals(make_trainer, monkeypatch, terminal):
    trainer = make_trainer(enable_progress_bar=True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    lines_in_place_of_a_bar(trainer)
    (bar,) = (each for each in trainer.callbacks if isinstance(each, ProgressBar))
    assert isinstance(bar, EpochLines) == (not terminal)
    assert trainer.progress_bar_callback is bar


def test_a_trainer_without_a_bar_stays_silent(make_trainer):
    trainer = make_trainer()
    lines_in_place_of_a_bar(trainer)
    assert trainer.progress_bar_callback is None


def test_a_line_an_epoch_has_its_means(make_method, make_views, make_trainer, capsys):
    steps = []

    class Steps(EpochLines):
        def on_train_batch_end(self, trainer, module, *arguments):
            super().on_train_batch_end(trainer, module, *arguments)
            steps.append({name: float(value) for name, value in module.values.items()})

    trainer = make_trainer(enable_progress_bar=True, callbacks=[Steps()], max_epochs=2)
    trainer.fit(make_method("simclr"), make_views(synthetic_size=24))
    *lines, last = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("epoch", "done"))
    ]
    assert len(lines) == 2
    for number, line in enumerate(lines):
        epoch = steps[3 * number : 3 * number + 3]
        loss, top1 = (sum(step[name] for step in epoch) / 3 for name in ("loss", "top1"))
        assert line.startswith(f"epoch {number + 1} of 2: loss {loss:.3f}, top-1 {100 * top1:.1f} %, ")
        assert "images/s" in line
    assert lines[0].endswith(" left")
    assert lines[1].endswith(" images/s")
    assert last.startswith("done in ")


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_tells_its_rest(
    make_moco, make_views, make_trainer, capsys, tmp_path
):
    """Lightning starts no epoch then."""
    settings = {"enable_checkpointing": True, "enable_progress_bar": True, "max_epochs": 2}
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    make_trainer(callbacks=[EpochLines(), saving], **settings).fit(make_moco(), make_views(synthetic_size=24))
    capsys.readouterr()
    trainer = make_trainer(callbacks=[EpochLines()], **settings)
    trainer.fit(make_moco(), make_views(synthetic_size=24), ckpt_path=str(tmp_path / "step=2.ckpt"))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("epoch", "done"))]
    assert [line.split(":")[0] for line in told[:-1]] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert told[-1].startswith("done in ")


@pytest.mark.parametrize(
    ("limits", "epochs"),
    [
        ({"max_steps": 5, "max_epochs": -1}, "3 epochs of 2"),
        ({"max_epochs": 4, "accumulate_grad_batches": 2}, "4 epochs of 1"),
    ],
)
def test_the_plan_tells_epochs_and_steps(make_moco, make_views, make_trainer, capsys, limits, epochs):
    make_trainer(callbacks=[Plan("moco")], **limits).fit(make_moco(), make_views())
    (plan,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("moco with"))
    assert f"moco with a convnet on 16 images (synthetic): {epochs} steps of 8 images, on the CPU" in plan


def test_the_plan_tells_which_backend_serves(make_moco, make_views, make_trainer, capsys):
    with use_backend("reference"):
        make_trainer(callbacks=[Plan("moco")]).fit(make_moco(), make_views())
    assert "served by the backend reference;" in capsys.readouterr().out


def test_the_plan_tells_why_the_reference_serves(make_moco, make_views, make_trainer, capsys, monkeypatch):
    def without_kernels(query, backend=None):
        warnings.warn("it is slow, because of something", RuntimeWarning, stacklevel=2)
        return "reference"

    monkeypatch.setattr(progress, "serving_backend", without_kernels)
    make_trainer(callbacks=[Plan("moco")]).fit(make_moco(), make_views())
    assert "by the backend reference (it is slow, because of something);" in capsys.readouterr().out
