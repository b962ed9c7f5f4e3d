from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from train_ref.callbacks import Record
from train_ref.checkpoints import AtomicCheckpointIO, LastCheckpoint


@pytest.fixture
def fit(make_moco, make_views, make_trainer):
    """Train a fresh MoCo for some epochs of two steps with every callback that keeps state."""

    def run(epochs: int = 1, ckpt_path: Path | None = None, every_n_epochs: int = 1, **settings):
        trainer = make_trainer(
            max_epochs=epochs,
            enable_checkpointing=True,
            plugins=[AtomicCheckpointIO()],
            callbacks=[Record(), LastCheckpoint(every_n_epochs), *settings.pop("callbacks", ())],
        )
        moco = make_moco(**settings)
        trainer.fit(moco, make_views(), ckpt_path=ckpt_path)
        return moco, Path(trainer.log_dir) / "last.ckpt"

    return run


class StateAtStart(Callback):
    def on_train_start(self, trainer, module):
        self.state = {name: value.clone() for name, value in module.state_dict().items()}
        self.epoch = trainer.current_epoch


def test_a_checkpoint_holds_both_encoders_the_queue_and_its_pointer(fit):
    moco, path = fit()
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved["queue.pointer"] == 16
    torch.testing.assert_close(saved, dict(moco.state_dict()), rtol=0, atol=0)


def test_training_resumes_where_it_stopped(fit):
    moco, path = fit()
    start = StateAtStart()
    resumed, _ = fit(epochs=2, ckpt_path=path, callbacks=[start])
    torch.testing.assert_close(start.state, dict(moco.state_dict()), rtol=0, atol=0)
    assert start.epoch == 1
    assert resumed.queue.pointer == 32 % 20
    (record,) = (callback for callback in resumed.trainer.callbacks if isinstance(callback, Record))
    assert [epoch["epoch"] for epoch in record.epochs] == [1, 2]


def test_the_end_of_training_is_saved_whatever_the_interval(fit):
    moco, path = fit(epochs=3, every_n_epochs=2)
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 6
    torch.testing.assert_close(saved["state_dict"], dict(moco.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_an_interrupted_save_leaves_the_checkpoint_before_it(fit, monkeypatch, moment):
    save, times = torch.save, []

    def interrupted_save(checkpoint, file):
        times.append(1)
        save(checkpoint, file)
        if len(times) == 2:
            if moment == "writing":
                file.truncate(1000)
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted_save)
    directory = []

    class Directory(Callback):
        def on_train_start(self, trainer, module):
            directory.append(Path(trainer.log_dir))

    with pytest.raises(SystemExit):
        fit(epochs=3, callbacks=[Directory()])
    assert len(times) == 2
    path = directory[0] / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 2

    monkeypatch.undo()
    resumed, _ = fit(epochs=2, ckpt_path=path)
    assert resumed.trainer.global_step == 4


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "last.ckpt"
    checkpoints = AtomicCheckpointIO()
    checkpoints.save_checkpoint({"step": 1}, path)
    monkeypatch.setattr("os.fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.save_checkpoint({"step": 2}, path)
    assert checkpoints.load_checkpoint(path) == {"step": 1}
    monkeypatch.undo()
    checkpoints.save_checkpoint({"step": 3}, path)
    assert checkpoints.load_checkpoint(path) == {"step": 3}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
