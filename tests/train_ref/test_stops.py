"""A training that stops after any batch, however often, and goes on: the same bits, the same counts."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from train_ref.callbacks import Record
from train_ref.checkpoints import AtomicCheckpointIO, LastCheckpoint

pytestmark = pytest.mark.usefixtures("signals")

BATCHES, EPOCHS = 3, 2  # of an epoch, and of a training
METHODS = {
    "moco": {"queue_size": 20, "consistency_weight": 0.3},
    "moco in groups": {"queue_size": 20, "norm_groups": 2},
    "conic": {"active": 32},
    "conic on disk": {"active": 32, "storage": "disk"},
    "simclr": {"consistency_weight": 0.5},
    "instdisc": {},
}


class Asked(Callback):
    """Within a batch, sends the process a signal, as people and schedulers do, or has training end early."""

    def __init__(self, step: int, number: int | None) -> None:
        self.step, self.number = step, number

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: object) -> None:
        if trainer.global_step == self.step - 1:
            if self.number is None:
                trainer.should_stop = True
            else:
                os.kill(os.getpid(), self.number)


@pytest.fixture
def train(make_method, make_views, tmp_path):
    """Train a method, from a checkpoint or the start, to the end or a stop: returns the run's directory."""
    count = iter(range(1000))

    def run(
        which: str,
        ckpt_path: Path | None = None,
        stop: int | None = None,
        number: int | None = None,
        callbacks=(),
        **options,
    ):
        trainer = Trainer(
            logger=CSVLogger(str(tmp_path), name="run", version=next(count)),
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            max_epochs=EPOCHS,
            limit_train_batches=BATCHES,
            plugins=[AtomicCheckpointIO()],
            callbacks=[
                Record(),
                LastCheckpoint(**{"every_n_steps": 1, "keep": 100, **options}),
                *([] if stop is None else [Asked(stop, number)]),
                *callbacks,
            ],
        )
        settings = {"learning_rate": 0.1, **METHODS[which]}
        if which == "conic on disk":
            settings["path"] = str(tmp_path / ("rows" if stop or ckpt_path else "rows of the whole"))
        method = make_method(which.split()[0], **settings)
        views = make_views(dataset="digits", augmentation="digits_v2", batch_size=8)
        with suppress(SystemExit) if number else nullcontext():
            trainer.fit(method, views, ckpt_path=ckpt_path)
        if which == "conic on disk":
            method.classifier.close()
        return Path(trainer.log_dir)

    return run


def contents(path: Path) -> dict:
    """What a checkpoint says of the training, but where it keeps which generation of rows on disk."""
    contents = torch.load(path, weights_only=True)
    contents["hyper_parameters"].pop("path", None)
    if state := contents["state_dict"].get("classifier._extra_state"):
        state.pop("storage")
    return contents


def check_same(one: object, other: object, where: str = "") -> None:
    """Two checkpoints, or parts of them."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert list(one) == list(other), where
        for name in one:
            check_same(one[name], other[name], f"{where} {name}")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            check_same(*pair, f"{where} [{i}]")
    else:
        assert one == other, where


def steps_in(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.glob("step_*.ckpt"))


STEPS = BATCHES * EPOCHS
ALL = [f"step_{step:08}.ckpt" for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("which", ["moco", "conic"])
def test_from_every_step_training_goes_on_as_if_it_had_not_stopped(train, which):
    """Each checkpoint leads to all that come after it, bit for bit: so any stops lead to the same end."""
    whole = train(which)
    assert steps_in(whole) == ALL
    for step in range(1, STEPS + 1):
        rest = train(which, whole / ALL[step - 1])
        assert steps_in(rest) == ALL[step:]
        for name in ALL[step:]:
            check_same(contents(rest / name), contents(whole / name), name)


# A signal is answered with a checkpoint. Training that is to end early, as EarlyStopping has it, saves at its
# end. Lightning's own checkpoints are of every batch, saved by a hook that comes before the epoch's end.
@pytest.mark.parametrize(
    ("which", "how"),
    [
        ("moco", signal.SIGINT),
        ("moco", "early"),
        ("moco", "ModelCheckpoint"),
        ("moco in groups", signal.SIGTERM),
        ("conic", signal.SIGTERM),
        ("simclr", signal.SIGTERM),
        ("instdisc", signal.SIGINT),
        ("conic on disk", signal.SIGINT),
    ],
)
def test_a_run_that_is_stopped_after_each_of_its_steps(train, which, how):
    whole, checkpoint = train(which), None
    for step in range(1, STEPS + 1):
        number = how if isinstance(how, signal.Signals) else None
        others = [ModelCheckpoint(every_n_train_steps=1, filename="it")] if how == "ModelCheckpoint" else []
        stopped = train(which, checkpoint, step, number, others, every_n_steps=None, every_n_epochs=100)
        assert steps_in(stopped) == [ALL[step - 1]]
        checkpoint = stopped / "last.ckpt"
        saved, expected = contents(checkpoint), contents(whole / ALL[step - 1])
        if number is None:  # the end of training is an epoch's end, too, with the means so far
            for name in ("epoch", "callbacks"):
                del saved[name], expected[name]
        check_same(saved, expected, f"step {step}")
        if how == "ModelCheckpoint":
            checkpoint = stopped / "checkpoints" / "it.ckpt"
    # The training is over, and going on finds nothing to do.
    assert steps_in(train(which, checkpoint)) == []
