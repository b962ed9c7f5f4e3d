"""Evaluations that train are stopped and go on: to the same bits, in the same folder, as they began."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml
from jsonargparse.typing import PositiveFloat
from lightning.pytorch import Callback

from train_ref import classifiers, evaluate
from train_ref.commands import COMMANDS
from train_ref.errors import UsageError
from train_ref.evaluation_run import claim_version

from .conftest import values_of

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = {
    "learning_rate": PositiveFloat(1.0),  # as the command line passes it
    "epochs": 2,
    "batch_size": 4,
    "max_images": 12,
}  # six steps
FINETUNE = {
    "fractions": [0.17],
    "seeds": 2,
    "epochs": 1,
    "min_steps": 2,
    "learning_rate": PositiveFloat(0.5),
    "batch_size": 5,
    "max_images": 60,
}  # four trainings of two steps


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint in a folder of its own."""
    return Path(shutil.copy(checkpoint, tmp_path / "last.ckpt"))


def evaluate_with(stop: Callback | None, command: str, source: Path, **settings):
    """Run a command with a callback that may stop it: returns what it returned, or None if it exited."""
    trainer = classifiers.Trainer

    def with_stop(*, callbacks=(), **arguments):
        return trainer(callbacks=[*callbacks, *([stop] if stop else [])], **arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(classifiers, "Trainer", with_stop)
        try:
            return COMMANDS[command].function()(str(source), accelerator="cpu", **settings)
        except SystemExit:
            return None


@pytest.fixture
def evaluated(source: Path):
    def run(command: str, stop: Callback | None = None, **settings):
        return evaluate_with(stop, command, source, **settings)

    return run


@pytest.fixture(scope="module")
def stopped_once(checkpoint: Path, tmp_path_factory) -> Path:
    source = shutil.copy(checkpoint, tmp_path_factory.mktemp("stopped") / "last.ckpt")
    evaluate_with(Stop(2, send(signal.SIGTERM)), "linear", source, **LINEAR)
    return Path(source).parent / "linear" / "version_0"


class Stop(Callback):
    """Does something to the process after so many steps of a training."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.act()


class StopBeforeTheTest(Callback):
    """Interrupts when a training is over, the first one or the next that is asked for."""

    def __init__(self, trainings: int = 1) -> None:
        self.trainings = trainings

    def on_test_start(self, trainer, module):
        self.trainings -= 1
        if not self.trainings:
            raise KeyboardInterrupt


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def interrupt() -> None:
    raise KeyboardInterrupt


def in_a_process_of_its_own(function) -> int:
    """Call a function in a fork; returns the signal that killed it, 0 if it returned, or 1 if it raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state_of(folder: Path) -> dict:
    """What a training has come to, bit for bit."""
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    (optimizer,), (scheduler,) = saved["optimizer_states"], saved["lr_schedulers"]
    momenta = {i: state["momentum_buffer"].tolist() for i, state in optimizer["state"].items()}
    weights = {name: x.tolist() for name, x in saved["state_dict"].items()}
    return {
        "weights": weights,
        "momenta": momenta,
        "rates": optimizer["param_groups"],
        "schedule": scheduler,
        "step": saved["global_step"],
        "random": saved["callbacks"]["RunCheckpoint"]["random_state"].tolist(),
    }


def figures_of(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def check_equal(one: Path, other: Path) -> None:
    assert values_of(one) == values_of(other)
    assert state_of(one) == state_of(other)
    assert figures_of(one) == figures_of(other)


@pytest.mark.parametrize(("augment", "steps"), [(True, range(1, 7)), (False, (2, 3, 4))])
def test_linear_goes_on_after_an_interrupt_at_every_batch(evaluated, tmp_path, augment, steps, capfd):
    settings = {**LINEAR, "augment": augment}
    rows = evaluated("linear", **settings)
    runs = tmp_path / "linear"
    for step in steps:
        number = (signal.SIGINT, signal.SIGTERM)[step % 2]
        assert evaluated("linear", Stop(step, send(number)), **settings) is None
        settings = {"resume": "last"}
        told = capfd.readouterr().out
        assert f"To go on: linear {tmp_path}/last.ckpt --resume {runs}/version_1" in told
        assert state_of(runs / "version_1")["step"] == step
        assert len(values_of(runs / "version_1")) == step
    assert evaluated("linear", resume=str(runs / "version_1" / "last.ckpt")) == rows
    check_equal(runs / "version_0", runs / "version_1")


def test_linear_goes_on_after_a_kill_at_every_batch(evaluated, tmp_path):
    rows = evaluated("linear", **LINEAR)
    runs = tmp_path / "linear"
    settings = {**LINEAR, "every_n_steps": 1}
    for step in range(1, 7):
        stop = Stop(step, send(signal.SIGKILL))  # before that step is saved
        resume = {"resume": "last"} if step > 1 else settings
        killed = in_a_process_of_its_own(lambda stop=stop, resume=resume: evaluated("linear", stop, **resume))
        assert killed == -signal.SIGKILL
        if step > 1:
            assert state_of(runs / "version_1")["step"] == step - 1
    assert evaluated("linear", resume="last") == rows
    check_equal(runs / "version_0", runs / "version_1")


@pytest.mark.parametrize("step", [2, 5])
def test_what_was_done_after_the_last_checkpoint_is_done_again(evaluated, tmp_path, step):
    rows = evaluated("linear", **LINEAR)
    evaluated("linear", Stop(step, interrupt), **LINEAR)  # at once: nothing is saved
    assert len(values_of(tmp_path / "linear" / "version_1")) == step
    assert evaluated("linear", resume=str(tmp_path / "linear" / "version_1")) == rows
    check_equal(*(tmp_path / "linear" / f"version_{number}" for number in (0, 1)))


def test_linear_stopped_before_its_test_is_not_trained_again(evaluated, tmp_path):
    rows = evaluated("linear", **LINEAR)
    assert evaluated("linear", StopBeforeTheTest(), **LINEAR) is None
    saved = tmp_path / "linear" / "version_1" / "last.ckpt"
    before = saved.stat().st_mtime_ns
    assert evaluated("linear", resume="last") == rows
    assert saved.stat().st_mtime_ns == before


def test_finetuning_goes_on_from_every_training(evaluated, tmp_path):
    rows = evaluated("finetune", **FINETUNE)
    whole, stopped = (tmp_path / "finetune" / f"version_{number}" for number in (0, 1))
    trainings = sorted(path.parent.relative_to(whole) for path in whole.rglob("steps.csv"))
    assert [str(training) for training in trainings] == [
        f"fraction_0.17/seed_{seed}/{name}" for seed in (0, 1) for name in ("fine-tuned", "from_scratch")
    ]
    settings = FINETUNE
    within = Stop(1, send(signal.SIGTERM))
    # The second stop lets the first training end, and stops when the second one has; and so on.
    stops = [(0, within), (1, StopBeforeTheTest(2)), (2, within), (3, within), (3, StopBeforeTheTest())]
    for done, stop in stops:
        assert evaluated("finetune", stop, **settings) is None
        settings = {"resume": "last"}
        assert len(list(stopped.rglob("accuracies.json"))) == done
        assert [path.parent for path in stopped.rglob("last.ckpt")] == [stopped / trainings[done]]
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("steps.csv")}
    assert evaluated("finetune", resume="last") == rows
    assert before == {path: path.stat().st_mtime_ns for path in stopped.rglob("steps.csv")}
    assert figures_of(stopped) == figures_of(whole)
    for training in trainings:
        assert len(values_of(stopped / training)) == 2
        assert values_of(stopped / training) == values_of(whole / training)
    assert not list((tmp_path / "finetune").rglob("last.ckpt"))


def test_two_runs_have_two_folders_with_all_that_repeats_them(evaluated, source, tmp_path):
    output = tmp_path / "it.json"
    for rate in (1.0, 2.0):
        evaluated("linear", **{**LINEAR, "learning_rate": rate, "output": str(output)})
    folders = [tmp_path / "linear" / f"version_{number}" for number in (0, 1)]
    for folder, rate in zip(folders, (1.0, 2.0), strict=True):
        assert {path.name for path in folder.iterdir()} >= {
            "config.yaml", "last.ckpt", "linear.json", "steps.csv",
        }  # fmt: skip
        assert list(folder.glob("events.out.tfevents*"))
        assert figures_of(folder)["settings"]["learning_rate"] == rate
        assert values_of(folder)[0]["learning_rate"] == str(rate)
    assert json.loads(output.read_text()) == figures_of(folders[1])
    config = yaml.safe_load((folders[1] / "config.yaml").read_text())
    assert config["checkpoint"] == str(source)
    parser = jsonargparse.ArgumentParser()
    parser.add_function_arguments(evaluate.linear)
    options = set(parser.parse_args(["--checkpoint=it"]).as_dict())
    assert config["options"].keys() == options - {"checkpoint", "resume", "directory"}
    again = evaluate.linear(config["checkpoint"], **config["options"])
    assert again == figures_of(folders[1])["rows"]


def test_a_checkpoint_of_a_frozen_backbone_is_small(evaluated, tmp_path):
    evaluated("linear", **LINEAR)
    saved = torch.load(tmp_path / "linear" / "version_0" / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {"layer.weight", "layer.bias"}


def test_processes_that_begin_at_once_get_a_folder_each(tmp_path):
    (tmp_path / "linear" / "version_7").mkdir(parents=True)
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            for _ in range(10):
                (claim_version(tmp_path / "linear") / "mine").mkdir()  # fails if it is another's, too
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    assert len(list((tmp_path / "linear").glob("version_*/mine"))) == 80
    assert not (tmp_path / "linear" / "version_6").exists()


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("linear", {"batch_size": 4, "dataset": "folder", "root": "nowhere"}),
        ("linear", {"output": "/"}),
        ("linear", {"devices": 2, "augment": False}),
        ("finetune", {"max_images": 5}),
        ("finetune", {"fractions": []}),
        ("knn", {"k": []}),
        ("linear", {"resume": "last"}),
        ("linear", {"resume": "elsewhere"}),
    ],
)
def test_a_start_that_fails_leaves_no_folder(evaluated, tmp_path, command, settings):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError):
        evaluated(command, **settings)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("failure", [UsageError, KeyboardInterrupt, RuntimeError])
def test_a_failure_before_the_first_step_leaves_no_folder(evaluated, tmp_path, failure):
    class Failing(Callback):
        def on_train_start(self, trainer, module):
            assert (tmp_path / "linear" / "version_0").exists()
            raise failure("as an image that cannot be read would")

    if failure is KeyboardInterrupt:
        assert evaluated("linear", Failing(), **LINEAR) is None
    else:
        with pytest.raises(failure):
            evaluated("linear", Failing(), **LINEAR)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture
def stopped(source, stopped_once, tmp_path) -> Path:
    """The folder of a linear evaluation of the checkpoint that was stopped."""
    return Path(shutil.copytree(stopped_once, tmp_path / "linear" / "version_0"))


def test_other_settings_are_refused_by_name_and_equal_ones_are_not(evaluated, stopped):
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    for option, value in {
        "recipe": "conic",
        "learning_rate": 0.5,
        "epochs": 100,  # the default, but not what the run has
        "batch_size": 5,
        "augment": False,
        "seed": 1,
        "precision": "16-mixed",
        "devices": 2,
        "dataset": "synthetic",
        "image_size": 16,
        "max_images": 13,
    }.items():
        with pytest.raises(UsageError, match=f"^{option}: .*version_0 began with"):
            evaluated("linear", resume="last", **{option: value})
    with pytest.raises(UsageError, match="directory is for new runs"):
        evaluated("linear", resume=str(stopped), directory="elsewhere")
    assert before == {path: path.read_bytes() for path in before}
    assert evaluated("linear", resume="last", **LINEAR, num_workers=0, every_n_steps=2)


def test_the_command_line_brings_only_what_was_said(train_ref, source, stopped):
    with pytest.raises(SystemExit, match=r"error: epochs: .* began with 2, not 100: leave epochs out"):
        train_ref("linear", str(source), "--resume", "last", "--epochs=100")
    told = train_ref("linear", str(source), "--resume", "last")
    assert f"{stopped}/linear.json" in told
    assert figures_of(stopped)["settings"]["epochs"] == 2
    with pytest.raises(SystemExit, match="error: resume: there is no unfinished run of linear"):
        train_ref("linear", str(source), "--resume", "last")
    with pytest.raises(SystemExit, match=r"error: resume: .*version_0 is finished"):
        train_ref("linear", str(source), "--resume", str(stopped))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def with_config(**entries):
    def change(path: Path) -> None:
        config = yaml.safe_load(path.read_text())
        options = {**config["options"], **entries.pop("options", {})}
        path.write_text(yaml.safe_dump({**config, "options": options, **entries}))

    return change


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("../../last.ckpt", lambda path: os.replace(f"{path}.other", path), "another checkpoint"),
        ("last.ckpt", truncate, "version_0/last.ckpt is damaged"),
        ("config.yaml", lambda path: path.write_text("- [it"), "config.yaml cannot be read"),
        ("config.yaml", lambda path: path.write_bytes(b"\xff\xfe\x00"), "config.yaml cannot be read"),
        ("config.yaml", lambda path: path.write_text("[1]"), "config.yaml is not the configuration"),
        ("config.yaml", with_config(command="finetune"), "config.yaml is not the configuration"),
        ("config.yaml", with_config(options={"epochs": "ten"}), "not as it was written.*epochs"),
        ("config.yaml", with_config(options={"epoch": 3}), "not as it was written.*epoch"),
        ("config.yaml", with_config(images="0" * 64), "other images"),
    ],
)  # fmt: skip
def test_what_has_changed_is_told(evaluated, source, stopped, file, change, message):
    contents = torch.load(source, weights_only=True)
    torch.save({**contents, "global_step": 3}, f"{source}.other")
    change(stopped / file)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        evaluated("linear", resume=str(stopped))


def test_other_images_are_told_wherever_they_are(evaluated, image_folder, tmp_path):
    settings = {**LINEAR, "dataset": "folder", "root": str(image_folder)}
    evaluated("linear", Stop(2, send(signal.SIGTERM)), **settings)
    moved = image_folder.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="has no folder"):
        evaluated("linear", resume="last")
    extra = moved / "train" / "dark" / "0a.png"
    shutil.copy(moved / "train" / "dark" / "0.png", extra)
    with pytest.raises(UsageError, match="images"):
        evaluated("linear", resume="last", root=str(moved))
    extra.unlink()
    assert evaluated("linear", resume="last", root=str(moved))


def test_a_run_that_is_being_run_is_not_resumed(evaluated, stopped):
    said = []

    def resume_it_too():
        said.append(in_a_process_of_its_own(lambda: os._exit(refused())))

    def refused() -> int:
        try:
            evaluated("linear", resume=str(stopped))
        except UsageError as error:
            return 5 if re.search("being run by another process", str(error)) else 6
        return 7

    evaluated("linear", Stop(4, resume_it_too), resume=str(stopped))
    assert said == [5]


def test_a_diverged_loss_is_told_at_its_step(evaluated, tmp_path):
    with pytest.raises(UsageError, match=r"diverged: its loss is not finite after [12] steps"):
        evaluated("linear", **{**LINEAR, "learning_rate": 1e38, "epochs": 50})
    assert len(values_of(tmp_path / "linear" / "version_0")) in (1, 2)


@pytest.mark.slow
def test_two_processes_have_one_folder_and_go_on_in_it(source, tmp_path):
    def run(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "train_ref", "linear", "last.ckpt", *options]
        environment = {**os.environ, "PYTHONPATH": str(Path(evaluate.__file__).parents[1])}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )

    settings = [f"--{name}={value}" for name, value in LINEAR.items()]
    result = run(*settings, "--devices=2", "--accelerator=cpu")
    assert result.returncode == 0, result.stderr[-2000:]
    folder = tmp_path / "linear" / "version_0"
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    figures, steps = figures_of(folder), values_of(folder)
    (folder / "linear.json").unlink()
    result = run("--resume=last")
    assert result.returncode == 0, result.stderr[-2000:]
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert figures_of(folder) == figures
    assert values_of(folder) == steps
