from __future__ import annotations

import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from train_ref import files
from train_ref.backbones import read_checkpoint
from train_ref.callbacks import Record
from train_ref.checkpoints import AtomicCheckpointIO, LastCheckpoint
from train_ref.data import DrawnViews
from train_ref.errors import UsageError
from train_ref.files import recorded, verify


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
                file.file.truncate(1000)
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
    assert {file.name for file in path.parent.iterdir()} == {"last.ckpt", "last.ckpt.sha256"}
    checkpoints.remove_checkpoint(path)
    assert not list(path.parent.iterdir())


@pytest.fixture(params=["without a name", "beside"])
def way(request, monkeypatch):
    """How a file is written: not all file systems have files without a name."""
    if request.param == "beside":
        monkeypatch.setattr(files, "_nameless", lambda folder: None)
    return request.param


def kill_within(code: str, folder: Path) -> None:
    """Run some lines in a process that kills itself."""
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        exec(
            code,
            {
                "files": files,
                "os": os,
                "torch": torch,
                "Path": Path,
                "AtomicCheckpointIO": AtomicCheckpointIO,
            },
        )
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


WITHIN = "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
AFTER = """
rename = os.replace
def replace(*names):
    rename(*names)
    if str(names[1]) == NAME:
        os.kill(os.getpid(), 9)
os.replace = replace
"""
SAVE = "AtomicCheckpointIO().save_checkpoint({'step': 2}, 'last.ckpt')\n"


@pytest.mark.parametrize("moment", ["checkpoint", "sum", "before the name", "name"])
def test_a_kill_while_a_checkpoint_is_written_leaves_one_that_is_whole(tmp_path, way, moment):
    path, checkpoints = tmp_path / "last.ckpt", AtomicCheckpointIO()
    checkpoints.save_checkpoint({"step": 1}, path)
    code = {
        "checkpoint": "torch.save = lambda *arguments: os.kill(os.getpid(), 9)\n",
        "sum": WITHIN,
        "before the name": AFTER.replace("NAME", "'last.ckpt.sha256'"),
        "name": AFTER.replace("NAME", "'last.ckpt'"),
    }[moment]
    kill_within(code + SAVE, tmp_path)
    verify(path)
    assert checkpoints.load_checkpoint(path) == {"step": 2 if moment == "name" else 1}
    left = {file.name for file in tmp_path.iterdir()} - {"last.ckpt", "last.ckpt.sha256"}
    assert way == "beside" or not left
    checkpoints.save_checkpoint({"step": 3}, path)
    verify(path)
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", "last.ckpt.sha256"}
    assert len(recorded(path)) == 1


def test_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(20.0)}, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(
            UsageError, match=r"last\.ckpt is damaged: its SHA-256 is not that in last\.ckpt\.sha"
        ):
            read_checkpoint(path)
    path.write_bytes(whole)
    assert subprocess.run(["sha256sum", "--check", "last.ckpt.sha256"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("size", [0, 500, 20_000])
def test_a_disk_that_is_full_is_told_with_the_checkpoint_s_name(tmp_path, way, size):
    path, checkpoints = tmp_path / "last.ckpt", AtomicCheckpointIO()
    checkpoints.save_checkpoint({"step": 1}, path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            checkpoints.save_checkpoint({"step": torch.zeros(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.filename == str(path)
    verify(path)
    assert checkpoints.load_checkpoint(path) == {"step": 1}
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", "last.ckpt.sha256"}


@pytest.mark.parametrize("linked", [True, False])
def test_the_last_checkpoints_are_kept_on_request(make_moco, make_views, make_trainer, monkeypatch, linked):
    if not linked:
        link = os.link
        monkeypatch.setattr(
            os, "link", lambda *names, **how: link(*names, **how) if how else os.readv(-1, [])
        )  # an OSError

    def run(ckpt_path=None):
        callbacks = [LastCheckpoint(every_n_steps=1, keep=3)]
        trainer = make_trainer(
            max_epochs=3, enable_checkpointing=True, plugins=[AtomicCheckpointIO()], callbacks=callbacks
        )
        trainer.fit(make_moco(), make_views(), ckpt_path=ckpt_path)
        return Path(trainer.log_dir)

    directory = run()
    kept = sorted(directory.glob("step_*.ckpt"))
    assert [path.name for path in kept] == [f"step_0000000{step}.ckpt" for step in (4, 5, 6)]
    assert {path.name for path in directory.glob("*.sha256")} == {
        f"{path.name}.sha256" for path in [*kept, directory / "last.ckpt"]
    }
    assert [read_checkpoint(path)["global_step"] for path in kept] == [4, 5, 6]
    assert kept[-1].samefile(directory / "last.ckpt") == linked
    rest = run(kept[0])
    assert [path.name for path in sorted(rest.glob("step_*.ckpt"))] == [path.name for path in kept[1:]]


def test_rows_on_disk_are_kept_for_every_checkpoint_that_is(make_method, make_views, make_trainer, tmp_path):
    def run(ckpt_path=None, epochs=4):
        callbacks = [LastCheckpoint(every_n_steps=1, keep=6)]
        trainer = make_trainer(
            max_epochs=epochs,
            limit_train_batches=2,
            enable_checkpointing=True,
            plugins=[AtomicCheckpointIO()],
            callbacks=callbacks,
        )
        method = make_method("conic", active=32, storage="disk", path=str(tmp_path / "rows"))
        trainer.fit(method, make_views(dataset="digits", augmentation="digits_v1"), ckpt_path=ckpt_path)
        method.classifier.close()
        return Path(trainer.log_dir)

    kept = sorted(run().glob("step_*.ckpt"))
    assert len(kept) == 6
    run(kept[0])  # of which the rows are six generations old


def test_a_failure_between_two_steps_is_saved(fit, make_views, monkeypatch):
    draw, directory = DrawnViews.__getitem__, []

    def fails(views, item):
        if item[0] == 1:
            raise UsageError("data.root: it.png cannot be read as an image")
        return draw(views, item)

    class Directory(Callback):
        def on_train_start(self, trainer, module):
            directory.append(Path(trainer.log_dir))

    monkeypatch.setattr(DrawnViews, "__getitem__", fails)
    with pytest.raises(UsageError):
        fit(epochs=3, every_n_epochs=100, callbacks=[Directory()])
    monkeypatch.undo()
    resumed, _ = fit(epochs=3, ckpt_path=directory[0] / "last.ckpt")
    assert resumed.trainer.global_step == 6


def test_a_training_that_diverged_leaves_the_checkpoint_before_it(fit):
    class Diverges(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.directory = Path(trainer.log_dir)
            if trainer.global_step == 3:
                next(module.parameters()).data.fill_(float("nan"))

    diverges = Diverges()
    with pytest.raises(UsageError, match="diverged"):
        fit(epochs=3, callbacks=[diverges])
    saved = read_checkpoint(diverges.directory / "last.ckpt")
    assert saved["global_step"] == 2
    assert saved["state_dict"]["encoder.0.0.weight"].isfinite().all()


def test_a_request_to_terminate_ends_the_evaluation_at_once(fit):
    """Lightning's own handler waits for the end of a step."""

    class Handler(Callback):
        def on_fit_end(self, trainer, module):
            self.seen = signal.getsignal(signal.SIGTERM)

    handler, before = Handler(), signal.getsignal(signal.SIGTERM)
    fit(callbacks=[handler])
    assert handler.seen is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before
