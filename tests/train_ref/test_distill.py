"""A fine-tuned classifier teaches what it says, and goes on after a stop as if there had been none."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from train_ref import distill as module
from train_ref import teachers
from train_ref.backbones import load_backbone
from train_ref.classifiers import Batches, Classifier, LabelledImages, Schedule, accuracies_of, fit
from train_ref.data import Digits, transforming
from train_ref.errors import UsageError
from train_ref.evaluate import finetune, knn
from train_ref.stored import UNLABELLED
from train_ref.teachers import Distillation, lesson, load_teacher

from .conftest import RECIPES, values_of
from .test_evaluation_run import Stop, StopBeforeTheTest, evaluate_with, figures_of, send

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = 48
TINY = {"epochs": 2, "batch_size": 12, "max_images": 36}  # six steps


@pytest.fixture(scope="module")
def finetuned(checkpoint: Path, tmp_path_factory) -> Path:
    """The folder of a run of finetune with two seeds."""
    directory = tmp_path_factory.mktemp("finetune")
    settings = {"fractions": [0.25], "seeds": 2, "epochs": 1, "min_steps": 4, "max_images": IMAGES}
    finetune(str(checkpoint), directory=str(directory), accelerator="cpu", **settings)
    return directory / "version_0"


@pytest.fixture
def teacher(finetuned: Path, tmp_path: Path) -> Path:
    """The first seed's classifier, in a folder of its own."""
    (kept,) = finetuned.rglob("classifier.ckpt")
    return Path(shutil.copy(kept, tmp_path / kept.name))


@pytest.fixture
def distilled(teacher: Path):
    def run(stop=None, **settings):
        return evaluate_with(stop, "distill", teacher, **{**TINY, **settings})

    return run


def student_of(folder: Path) -> dict:
    return torch.load(folder / "student" / "classifier.ckpt", weights_only=True)


def check_equal(one: Path, other: Path) -> None:
    assert values_of(one / "student") == values_of(other / "student")
    assert figures_of(one) == figures_of(other)
    states = [student_of(folder)["state_dict"] for folder in (one, other)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("weight", [1.0, 0.7, 0.0])
def test_the_loss_is_the_papers_in_float64(temperature, weight):
    random = torch.Generator().manual_seed(0)
    logits, answers = (torch.randn(6, 4, generator=random) for _ in range(2))
    labels = torch.tensor([2, UNLABELLED, 0, UNLABELLED, UNLABELLED, 3])
    logits.requires_grad_()
    criterion = Distillation(torch.nn.Identity(), temperature, weight)
    loss = criterion(logits, labels, answers)
    loss.backward()

    f = logits.detach().numpy().astype(np.float64)
    t = answers.numpy().astype(np.float64) / temperature
    p = np.exp(f / temperature) / np.exp(f / temperature).sum(1, keepdims=True)
    q = np.exp(t) / np.exp(t).sum(1, keepdims=True)
    taught, known = -(q * np.log(p)).sum(), 0.0
    gradient = weight * temperature * (p - q) / 6
    for i, label in enumerate(labels.tolist()):
        if label != UNLABELLED:
            answer = np.exp(f[i]) / np.exp(f[i]).sum()
            known -= np.log(answer[label])
            gradient[i] += (1 - weight) * (answer - np.eye(4)[label]) / 6
    expected = ((1 - weight) * known + weight * temperature**2 * taught) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(logits.grad, gradient, rtol=1e-4, atol=1e-7)


def test_a_student_that_answers_as_its_teacher_has_nothing_to_learn():
    logits = torch.randn(5, 3, requires_grad=True)
    Distillation(torch.nn.Identity(), 0.5)(
        logits, torch.zeros(5, dtype=torch.int64), logits.detach()
    ).backward()
    assert logits.grad.abs().max() < 1e-7


def test_labels_that_are_not_known_are_not_looked_at():
    images = LabelledImages(20)
    known = np.array([3, 11])
    views = lesson(images, None, known, seed=0)
    told = [views[0, i][1] for i in range(len(views))]
    assert len(told) == 20
    assert [i for i, label in enumerate(told) if label != UNLABELLED] == [3, 11]
    assert [told[i] for i in known] == images.labels[known].tolist()


def test_an_image_of_either_folder_that_cannot_be_transformed_is_named(image_folder, tmp_path, monkeypatch):
    """Also of those behind the labelled ones, in a set of several or a part of one."""
    other = shutil.copytree(image_folder, tmp_path / "more")
    images = LabelledImages(dataset="folder", root=str(image_folder), image_size=8)
    more = images.more(str(other))

    def fail(image: torch.Tensor) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(teachers, "supervised", lambda *_, **__: fail)
    views = lesson(images, more, np.array([0]), seed=0)
    expected = [root / "train" / name for root in (image_folder, other) for name in more.names]
    assert len(views) == len(expected) == 24
    for i, path in enumerate(expected):
        with pytest.raises(UsageError, match=f"^data.root: {path} cannot be transformed: ZeroDivisionError"):
            views[0, i]
    several = ConcatDataset([Digits(True), Subset(ConcatDataset([images.sets[True], more]), [3, 20])])
    with (
        pytest.raises(UsageError, match=f"^data.root: {expected[20]} cannot be transformed"),
        transforming(several, len(Digits(True)) + 1),
    ):
        fail(several)
    with pytest.raises(ZeroDivisionError), transforming(several, 0):
        fail(several)


def test_the_teacher_stays_as_it_is_while_the_student_learns_its_answers(teacher):
    known = load_teacher(teacher)
    known.layer["weight"] *= 100  # answers that are decided, after the few steps it has learned
    images, criterion = LabelledImages(60), Distillation(known.classifier(), 1.0)
    before = {name: x.clone() for name, x in criterion.state_dict().items()}
    student = Classifier(load_backbone(teacher).network, 128, 10, Schedule(0.5, 0.01), criterion)
    batches = Batches(images, lesson(images, None, known.labelled.numpy(), 0), images.plain(False), 20, 0)
    fit(student, batches, 15, accelerator="cpu", enable_progress_bar=False)
    torch.testing.assert_close(dict(criterion.state_dict()), before, rtol=0, atol=0)
    views = torch.stack([view for view, _ in (images.plain(False)[0, i] for i in range(60))])
    with torch.no_grad():
        student.eval()
        same = (student(views).argmax(1) == criterion.teacher(views).argmax(1)).float().mean()
    assert same > 0.7  # of images that neither has learned from


def test_a_kept_classifier_is_the_one_that_was_measured(finetuned, teacher):
    assert [str(path.relative_to(finetuned)) for path in finetuned.rglob("classifier.ckpt")] == [
        "fraction_0.25/seed_0/fine-tuned/classifier.ckpt"
    ]
    known, images = load_teacher(teacher), LabelledImages(IMAGES)
    assert known.images == images.digest()
    assert len(known.labelled) == figures_of(finetuned)["rows"][0]["labels"]
    batches = Batches(images, images.plain(True), images.plain(False), 12, 0)
    measured = accuracies_of(known.classifier(), batches, accelerator="cpu")
    assert measured == figures_of(finetuned)["draws"][0]["fine-tuned"][0]


def test_a_kept_classifier_is_a_checkpoint_to_others(teacher, tmp_path):
    backbone = load_backbone(teacher)
    assert backbone[2:5] == ("finetune", "convnet", "imagenet")
    rows = knn(teacher, k=[5], temperature=[0.1], max_images=40, accelerator="cpu")
    assert rows[0]["accuracy"]["mean"] > 10
    sizes = [path.stat().st_size for path in (teacher, *backbone.path.parent.glob("*.sha256"))]
    weights = sum(x.numel() for x in backbone.network.state_dict().values())
    assert sizes[0] < 4 * weights + 60_000  # no momenta, no encoder of keys


def test_finetune_keeps_as_many_as_it_is_told(checkpoint, tmp_path):
    settings = {"fractions": [0.25], "epochs": 1, "min_steps": 1, "max_images": 40, "from_scratch": False}
    for keep, seeds in ((0, []), (2, [0, 1])):
        directory = tmp_path / str(keep)
        finetune(str(checkpoint), seeds=2, keep=keep, directory=str(directory), accelerator="cpu", **settings)
        kept = sorted(path.parts[-3] for path in directory.rglob("classifier.ckpt"))
        assert kept == [f"seed_{seed}" for seed in seeds]


def test_what_is_distilled_is_told_and_can_teach_again(distilled, teacher, tmp_path):
    rows = distilled(arch="resnet18", stem="small", epochs=1)
    figures = figures_of(tmp_path / "distill" / "version_0")
    assert figures["rows"] == rows
    assert figures["checkpoint"]["method"] == "finetune"
    assert {name: figures["settings"][name] for name in ("temperature", "weight", "images", "arch")} == {
        "temperature": 1.0, "weight": 1.0, "images": 36, "arch": "resnet18",
    }  # fmt: skip
    assert [row["measure"] for row in rows] == ["top-1", "top-5"]
    assert {*rows[0]} == {"measure", "labels", "teacher, convnet", "student, resnet18"}
    student = tmp_path / "distill" / "version_0" / "student" / "classifier.ckpt"
    assert load_teacher(student).backbone[2:5] == ("distill", "resnet18", "small")
    assert not list(tmp_path.rglob("last.ckpt"))
    module.distill(str(student), arch="convnet", accelerator="cpu", **TINY)
    (again,) = student.parent.glob("distill/*/distill.json")
    assert '"temperature": 1.0' in again.read_text()


def test_of_the_same_network_the_temperature_is_the_papers(distilled, tmp_path):
    distilled(epochs=1)
    assert figures_of(tmp_path / "distill" / "version_0")["settings"]["temperature"] == 0.1


def test_images_of_a_folder_are_taught_too(distilled, image_folder, tmp_path):
    distilled(unlabelled=str(image_folder), epochs=1)
    assert figures_of(tmp_path / "distill" / "version_0")["settings"]["images"] == 36 + 12
    assert len(values_of(tmp_path / "distill" / "version_0" / "student")) == (36 + 12) // 12


def test_distill_goes_on_after_a_stop_at_every_step(distilled, tmp_path, capfd):
    rows = distilled()
    runs = tmp_path / "distill"
    settings = {}
    for step in range(1, 7):
        stop = Stop(step, send((signal.SIGINT, signal.SIGTERM)[step % 2]))
        assert distilled(stop, **settings) is None
        settings = {"resume": "last"}
        assert f"To go on: distill {tmp_path}/classifier.ckpt --resume" in capfd.readouterr().out
        saved = torch.load(runs / "version_1" / "student" / "last.ckpt", weights_only=True)
        assert saved["global_step"] == step
        assert not [name for name in saved["state_dict"] if "teacher" in name]
    assert distilled(StopBeforeTheTest(), **settings) is None
    assert distilled(**settings) == rows
    check_equal(runs / "version_0", runs / "version_1")


def test_a_finished_student_is_not_trained_again(distilled, tmp_path):
    rows = distilled()
    folder = tmp_path / "distill" / "version_0"
    (folder / "distill.json").unlink()
    before = (folder / "student" / "classifier.ckpt").stat().st_mtime_ns
    assert distilled(resume="last") == rows
    assert (folder / "student" / "classifier.ckpt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "synthetic"}, "tells 10 classes apart, but the images have 4"),
        ({"weight": 0.5}, r"weight is 0\.5, but the labels that .*classifier\.ckpt has learned from"),
        ({"unlabelled": "nowhere"}, "unlabelled: .*no folder nowhere/train"),
        ({"learning_rate": 1e38}, "diverged"),
        ({"arch": "vit_s16", "stem": "small"}, "model.stem is small, which ResNets of torchvision have"),
    ],
)
def test_a_mistake_is_one_clear_sentence(distilled, settings, message):
    with pytest.raises(UsageError, match=message) as raised:
        distilled(**settings)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path, other: path.write_bytes(other.read_bytes()), "a checkpoint of moco, and no classifier"),
        (lambda path, other: path.unlink(), "there is no checkpoint"),
        (lambda path, other: path.write_bytes(path.read_bytes()[:-9]), "no checkpoint, or not a whole one"),
    ],
)
def test_what_cannot_teach_is_told_before_any_work(teacher, checkpoint, tmp_path, change, message):
    change(teacher, checkpoint)
    with pytest.raises(UsageError, match=message) as raised:
        module.distill(str(teacher), accelerator="cpu", **TINY)
    assert str(teacher) in str(raised.value)
    assert not (tmp_path / "distill").exists()


def test_a_student_that_does_not_take_the_images_is_told_before_any_work(distilled, tmp_path, monkeypatch):
    for work in ("fit", "accuracies_of", "lesson"):
        monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(UsageError, match=r"^image_size is 8, which a timm/test_vit does not take: .*16"):
        distilled(arch="timm/test_vit")
    assert not (tmp_path / "distill").exists()


@pytest.mark.slow
@pytest.mark.thorough
def test_two_processes_are_one(teacher, tmp_path):
    def run(devices: int) -> Path:
        options = [f"--{name}={value}" for name, value in {**TINY, "max_images": IMAGES}.items()]
        options += [f"--devices={devices}", f"--directory={tmp_path / str(devices)}", "--weight=0.5"]
        command = [sys.executable, "-m", "train_ref", "distill", str(teacher), "--accelerator=cpu", *options]
        environment = {**os.environ, "PYTHONPATH": str(RECIPES.parents[1]), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return tmp_path / str(devices) / "version_0"

    one, two = run(1), run(2)
    for row, expected in zip(
        values_of(two / "student").values(), values_of(one / "student").values(), strict=True
    ):
        assert float(row["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-4)
    for name, expected in student_of(one)["state_dict"].items():
        torch.testing.assert_close(student_of(two)["state_dict"][name], expected, rtol=1e-3, atol=1e-5)
