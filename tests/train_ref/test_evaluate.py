from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from train_ref import evaluate
from train_ref.backbones import PREFIX, load_backbone
from train_ref.classifiers import Batches, Classifier, LabelledImages, Schedule, fit
from train_ref.data import Views
from train_ref.errors import UsageError
from train_ref.evaluation import extract_features
from train_ref.files import replacing
from train_ref.methods import KINDS
from train_ref.networks import network


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More of them cost more than they gain on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def changed(checkpoint: Path, tmp_path: Path):
    """A copy of the checkpoint with other entries."""

    def change(**entries) -> Path:
        contents = torch.load(checkpoint, weights_only=True) | entries
        path = tmp_path / "changed.ckpt"
        torch.save({name: value for name, value in contents.items() if value is not None}, path)
        return path

    return change


@pytest.fixture
def written(tmp_path: Path):
    """What a network's checkpoint is, to its backbone."""

    def write(arch: str, stem: str) -> tuple[Path, torch.nn.Module]:
        net = network(arch, stem)
        contents = {
            "method": "simclr",
            "hyper_parameters": {"arch": arch, "stem": stem},
            "datamodule_hyper_parameters": {"dataset": "digits"},
            "state_dict": {f"encoder.0.{name}": x for name, x in net.state_dict().items()},
            "epoch": 3,
            "global_step": 44,
        }
        torch.save(contents, tmp_path / "written.ckpt")
        return tmp_path / "written.ckpt", net

    return write


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state(module: torch.nn.Module) -> dict:
    return copy.deepcopy(dict(module.state_dict()))


def test_a_backbone_is_loaded_with_what_is_known_of_it(trained, checkpoint):
    backbone = load_backbone(checkpoint)
    assert same(backbone.network.state_dict(), trained.backbone.state_dict())
    assert backbone[2:5] == ("moco", "convnet", "imagenet")
    assert backbone.step == 2
    assert backbone.data["dataset"] == "digits"
    assert backbone.data["batch_size"] == 64


@pytest.mark.parametrize("method", KINDS)
def test_nothing_of_the_method_is_opened(changed, trained, method):
    state_dict = {
        **trained.state_dict(),
        "classifier._extra_state": {"path": "nowhere"},
        "classifier.weight": None,
    }
    hyper_parameters = {**trained.hparams, "storage": "disk", "path": "nowhere"}
    path = changed(method=method, state_dict=state_dict, hyper_parameters=hyper_parameters)
    backbone = load_backbone(path)
    assert backbone.method == method
    assert same(backbone.network.state_dict(), trained.backbone.state_dict())
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"method": None}, "no checkpoint of this trainer"),
        ({"state_dict": None}, "no checkpoint of this trainer"),
        ({"method": "byol"}, "method byol"),
        ({"hyper_parameters": {"arch": "vgg"}}, "network vgg"),
        ({"hyper_parameters": {"arch": "resnet18", "stem": "small"}}, "resnet18 with the small stem"),
        ({"state_dict": {}}, "other tensors"),
    ],
)
def test_a_checkpoint_of_something_else_is_told_so(changed, entries, message):
    path = changed(**entries)
    with pytest.raises(UsageError, match=message) as raised:
        load_backbone(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "tensor", "half", "most"])
def test_a_file_that_is_no_checkpoint_is_told_so(checkpoint, tmp_path, kind):
    path, whole = tmp_path / "it.ckpt", checkpoint.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind != "missing":
        path.write_bytes({"text": b"hello", "half": whole[: len(whole) // 2], "most": whole[:-10]}[kind])
    with pytest.raises(UsageError, match="no checkpoint") as raised:
        load_backbone(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_nearest_neighbours_are_a_vote_counted_by_hand(checkpoint, tmp_path):
    output = tmp_path / "deep" / "knn.json"
    rows = evaluate.knn(checkpoint, k=(7, 500), max_images=60, memory=1, output=str(output))
    loaders = Views().evaluation_dataloaders(max_images=60)
    train, test = (extract_features(load_backbone(checkpoint).network, loader, "cpu") for loader in loaders)
    expected = []
    for k in (7, 60):
        for temperature in (0.07, 0.1):
            correct = 0
            for feature, label in zip(*test, strict=True):
                similarities = [F.cosine_similarity(feature, other, dim=0).item() for other in train.features]
                votes = [0.0] * 10
                for i in np.argsort(similarities)[::-1][:k]:
                    votes[train.labels[i]] += math.exp(similarities[i] / temperature)
                correct += int(np.argmax(votes) == label)
            expected.append(100 * correct / 60)
    assert [row["accuracy"]["mean"] for row in rows] == pytest.approx(expected)
    assert [row["measure"] for row in rows][::2] == [
        "7 nearest neighbours, τ = 0.07",
        "60 nearest neighbours, τ = 0.07",
    ]
    report = json.loads(output.read_text())
    assert report["rows"] == rows
    assert report["checkpoint"]["path"] == str(checkpoint)
    assert report["checkpoint"]["method"] == "moco"
    assert report["checkpoint"]["step"] == 2
    assert report["settings"]["k"] == [7, 60]
    assert report["settings"]["data"]["dataset"] == "digits"
    assert report["versions"]["torch"] == torch.__version__


def test_figures_go_beside_the_checkpoint_and_replace_none(changed, capsys):
    path = changed()
    for number in range(2):
        evaluate.knn(path, k=[1 + number], temperature=[0.1], max_images=20)
        assert f"{1 + number} nearest neighbours, τ = 0.1" in capsys.readouterr().out
    for number in range(2):
        folder = path.parent / "knn" / f"version_{number}"
        assert json.loads((folder / "knn.json").read_text())["settings"]["k"] == [1 + number]
        assert yaml.safe_load((folder / "config.yaml").read_text())["options"]["k"] == [1 + number]


@pytest.mark.parametrize("recipe", ["moco", "conic"])
def test_linear_evaluation_tells_digits_apart(checkpoint, tmp_path, recipe):
    output = str(tmp_path / "linear.json")
    settings = {"epochs": 10, "batch_size": 50, "augment": False, "max_images": 500}
    rows = evaluate.linear(checkpoint, recipe, output=output, **settings)
    top1, top5 = (row["accuracy"]["mean"] for row in rows)
    assert 75 < top1 < top5 <= 100  # by chance 10 and 50
    assert [row["labels"] for row in rows] == [500, 500]


def test_linear_evaluation_learns_from_random_crops_and_repeats_itself(checkpoint, tmp_path):
    def run(**settings):
        output = str(tmp_path / "linear.json")
        settings = {"learning_rate": 3.0, "epochs": 10, "batch_size": 40, "max_images": 200, **settings}
        return evaluate.linear(checkpoint, output=output, **settings)

    rows = run()
    assert rows[0]["accuracy"]["mean"] > 50  # by chance 10
    assert run() == rows
    assert run(seed=1) != rows


def classifier(checkpoint: Path, **rates) -> Classifier:
    return Classifier(load_backbone(checkpoint).network, 128, 10, Schedule(**rates))


def train(module: Classifier, *, images: int = 100, epochs: int = 2) -> dict[str, float]:
    data = LabelledImages(images)
    batches = Batches(data, data.augmented(slice(None), seed=0), data.plain(train=False), 50, seed=0)
    return fit(module, batches, epochs, accelerator="cpu", enable_progress_bar=False)


def test_a_frozen_backbone_is_the_same_bit_for_bit(checkpoint):
    module = classifier(checkpoint, learning_rate=1.0)
    backbone, layer = state(module.backbone), state(module.layer)
    train(module)
    assert same(backbone, module.backbone.state_dict())
    assert not same(layer, module.layer.state_dict())


@pytest.mark.parametrize("rate", [1e-12, 0.1])
def test_a_trained_backbone_has_its_own_learning_rate(checkpoint, rate):
    module = classifier(checkpoint, learning_rate=1.0, backbone_learning_rate=rate)
    before, layer = state(module.backbone), state(module.layer)
    train(module)
    after = module.backbone.state_dict()
    assert ((after["0.weight"] - before["0.weight"]).abs().max() > 1e-3) == (rate == 0.1)
    assert not torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert not same(layer, module.layer.state_dict())


def test_views_are_new_in_every_epoch_and_a_function_of_the_seed(checkpoint):
    class Recording(Classifier):
        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), batch]
            return super().training_step(batch, batch_idx)

    runs = []
    for _ in range(2):
        module = Recording(load_backbone(checkpoint).network, 128, 10, Schedule(1.0))
        train(module, epochs=3)
        runs.append(module.seen)
    assert len(runs[0]) == 6  # three epochs of two batches
    for (images, labels), (same_images, same_labels) in zip(*runs, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    epochs = [torch.cat([images for images, _ in runs[0][i : i + 2]]).flatten(1) for i in (0, 2, 4)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert torch.cdist(epochs[one], epochs[other]).min() > 0


@pytest.mark.parametrize(
    ("recipe", "factors"),
    [
        ("moco", {0: 30.0, 59: 30.0, 60: 3.0, 79: 3.0, 80: 0.3, 99: 0.3}),
        ("conic", {0: 75.0, 50: 37.5, 75: 75 * 0.1464466, 100: 0.0}),
    ],
)
def test_learning_rates_are_the_papers(checkpoint, recipe, factors):
    schedule = evaluate.RECIPES[recipe]
    module = Classifier(load_backbone(checkpoint).network, 128, 10, schedule)
    module._trainer = SimpleNamespace(estimated_stepping_batches=100)
    configured = module.configure_optimizers()
    (group,) = configured["optimizer"].param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 0)
    rates = []
    for _ in range(101):
        rates.append(group["lr"])
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
    assert {step: rates[step] for step in factors} == pytest.approx(factors, abs=1e-6)


def test_finetuning_has_a_column_for_the_untrained_network_and_deviations(checkpoint, tmp_path):
    def run(**settings):
        defaults = {"fractions": [0.02, 0.1], "seeds": 2, "epochs": 2, "min_steps": 20, "max_images": 500}
        return evaluate.finetune(checkpoint, output=str(tmp_path / "it.json"), **{**defaults, **settings})

    rows = run()
    assert [row["measure"] for row in rows] == [
        f"{percent} % of the labels, top-{k}" for percent in (2, 10) for k in (1, 5)
    ]
    assert [row["labels"] for row in rows] == [10, 10, 50, 50]
    for row in rows:
        assert row["fine-tuned"]["std"] > 0
        assert row["from scratch"]["std"] > 0
    assert rows[2]["fine-tuned"]["mean"] > 20
    draws = json.loads((tmp_path / "it.json").read_text())["draws"]
    assert np.mean([run["top-1"] for run in draws[1]["fine-tuned"]]) == rows[2]["fine-tuned"]["mean"]
    (alone, _) = run(fractions=[0.02], from_scratch=False)
    assert alone == {name: value for name, value in rows[0].items() if name != "from scratch"}


def test_few_labels_are_learnt_at_lower_rates_and_for_more_epochs(checkpoint, tmp_path, monkeypatch):
    runs = []

    def fit(classifier, batches, epochs, **settings):
        runs.append((len(batches.train), epochs, *(round(rate, 9) for rate in classifier.schedule[:2])))
        return {"top-1": 0.0}

    monkeypatch.setattr(evaluate, "fit", fit)
    settings = {
        "batch_size": 100,
        "epochs": 4,
        "min_steps": 50,
        "seeds": 1,
        "keep": 0,  # for there is nothing that was trained
        "output": str(tmp_path / "it.json"),
    }
    evaluate.finetune(
        checkpoint, fractions=[0.01, 1.0], learning_rate=0.5, backbone_learning_rate=0.002, **settings
    )
    assert runs == [
        (10, 50, 0.05, 0.0002),
        (10, 50, 0.01, 0.01),
        (1437, 4, 0.5, 0.002),  # 56 steps
        (1437, 4, 0.1, 0.1),
    ]


def test_two_classes_of_a_folder_have_no_top_five(checkpoint, image_folder, tmp_path):
    rows = evaluate.linear(
        checkpoint,
        epochs=5,
        learning_rate=0.1,
        dataset="folder",
        root=str(image_folder),
        output=str(tmp_path / "it.json"),
    )
    assert [(row["measure"], row["labels"]) for row in rows] == [("linear evaluation, top-1", 12)]
    assert rows[0]["accuracy"]["mean"] == 100


def test_a_convnet_is_exported_as_what_it_is(trained, checkpoint, tmp_path):
    evaluate.export(checkpoint, str(tmp_path / "net"))
    exported = torch.load(tmp_path / "net.pth", weights_only=True)
    assert same(exported, trained.backbone.state_dict())
    assert same(exported, load_file(tmp_path / "net.safetensors"))
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["method"] == "moco"
    assert metadata["arch"] == "convnet"
    assert metadata["step"] == "2"
    assert "no network of torchvision" in metadata["differences"]
    assert json.loads((tmp_path / "net.json").read_text())["differences"] == metadata["differences"]


def test_a_resnet_is_exported_as_torchvisions(written):
    path, net = written("resnet50", "imagenet")
    evaluate.export(path)
    theirs = torchvision.models.resnet50()
    for exported in (
        torch.load(path.with_suffix(".backbone.pth"), weights_only=True),
        load_file(path.with_suffix(".backbone.safetensors")),
    ):
        missing, unexpected = theirs.load_state_dict(exported, strict=False)
        assert missing == ["fc.weight", "fc.bias"]
        assert unexpected == []
        assert same(exported, net.state_dict())
    theirs.fc = torch.nn.Identity()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(theirs.eval()(images), net.eval()(images))


def test_an_export_says_that_the_small_stem_is_not_torchvisions(written, capsys):
    path, net = written("resnet18", "small")
    evaluate.export(path)
    with safe_open(path.with_suffix(".backbone.safetensors"), "pt") as file:
        assert "conv1" in file.metadata()["differences"]
        assert "maxpool" in file.metadata()["differences"]
        assert torch.equal(file.get_tensor("conv1.weight"), net.conv1.weight)
    assert "conv1" in capsys.readouterr().out


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "it"
    path.write_text("old")

    def interrupted():
        with replacing(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("knn", {"k": []}, "at least one value"),
        ("knn", {"dataset": "folder"}, "root must name the folder"),
        ("knn", {"dataset": "folder", "root": "nowhere"}, "no folder nowhere/train"),
        ("knn", {"output": "/"}, "output: /"),
        ("finetune", {"fractions": [0.1, 0.0]}, "fractions must be above 0"),
        ("finetune", {"fractions": [1.5]}, "fractions must be above 0"),
        ("finetune", {"max_images": 5}, "no training image of . of 10 classes"),
        ("linear", {"augment": False, "devices": 2}, "devices must be 1"),
        ("linear", {"augment": False, "epochs": 1, "learning_rate": 1e38}, "diverged"),
    ],
)
def test_a_mistake_is_one_clear_sentence(checkpoint, tmp_path, command, options, message):
    with pytest.raises(UsageError, match=message) as raised:
        getattr(evaluate, command)(checkpoint, **{"output": str(tmp_path / "it.json"), **options})
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_told_so(checkpoint):
    with pytest.raises(UsageError, match="no such GPU"):
        evaluate.knn(checkpoint, accelerator="cuda")


@pytest.mark.parametrize("command", ["knn", "linear", "finetune"])
def test_an_unreadable_test_image_is_named_before_any_work(checkpoint, image_folder, monkeypatch, command):
    broken = image_folder / "val" / "dark" / "3.png"
    broken.write_bytes(b"no image")
    for work in ("extract_features", "fit"):
        monkeypatch.setattr(evaluate, work, lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(UsageError, match=f"data.root: {broken} cannot be read as an image"):
        getattr(evaluate, command)(checkpoint, dataset="folder", root=str(image_folder))


@pytest.mark.parametrize("command", ["knn", "linear", "finetune"])
def test_a_size_that_the_network_does_not_take_is_told_before_any_work(tmp_path, monkeypatch, command):
    arch = "timm/test_vit"
    contents = {
        "method": "simclr",
        "hyper_parameters": {"arch": arch, "stem": "imagenet"},
        "datamodule_hyper_parameters": {"dataset": "digits", "image_size": 32},
        "state_dict": {f"{PREFIX}{name}": x for name, x in network(arch).state_dict().items()},
        "epoch": 0,
        "global_step": 0,
    }
    torch.save(contents, tmp_path / "last.ckpt")
    monkeypatch.setattr(evaluate, "LabelledImages", lambda *_, **__: pytest.fail("images are read"))
    with pytest.raises(UsageError, match=rf"^image_size is 20, which a {arch} does not take: .*16"):
        getattr(evaluate, command)(str(tmp_path / "last.ckpt"), image_size=20, accelerator="cpu")


@pytest.mark.parametrize("command", ["knn", "linear", "finetune"])
def test_every_command_has_the_options_of_the_images(command):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(getattr(evaluate, command), as_positional=True)
    said = parser.parse_args(["last.ckpt", "--dataset=digits", "--max_images=100", "--accelerator=cpu"])
    options = {"root", "image_size", "num_workers", "output", "max_images", "accelerator"}
    assert options < said.as_dict().keys()
    assert said.checkpoint == "last.ckpt"
    assert all(said.as_dict()[option] is None for option in ("root", "image_size", "num_workers", "output"))


@pytest.mark.parametrize("arch", ["timm/test_vit", "timm/test_efficientnet"])
def test_networks_of_timm_are_trained_evaluated_and_exported(train_ref, tmp_path, arch):
    """Through the command line, whose types must not come into checkpoints."""
    train_ref(
        "fit", "--config=synthetic", f"--model.arch={arch}", "--model.stem=imagenet", "--data.image_size=32",
        "--model.norm_groups=4", "--data.synthetic_size=32", "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu", "--evaluation.k=3", "--evaluation.label_fractions=[]",
    )  # fmt: skip
    path = tmp_path / "runs" / "synthetic" / "version_0" / "last.ckpt"
    backbone = load_backbone(path)
    assert backbone.arch == arch
    (row,) = evaluate.knn(str(path), k=[3], temperature=[0.07])
    (kept, *_) = json.loads(path.with_name("evaluation.json").read_text())
    assert row["accuracy"]["mean"] == kept["trained"]["mean"]
    rows = evaluate.linear(str(path), augment=False, epochs=1)
    assert 0 <= rows[0]["accuracy"]["mean"] <= 100

    evaluate.export(str(path))
    theirs = timm.create_model(arch.removeprefix("timm/"), num_classes=0)
    theirs.load_state_dict(torch.load(path.with_suffix(".backbone.pth"), weights_only=True), strict=True)
    with safe_open(path.with_suffix(".backbone.safetensors"), "pt") as file:
        assert "timm.create_model(" in file.metadata()["differences"]
