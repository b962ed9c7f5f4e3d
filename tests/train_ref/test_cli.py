from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch

from train_ref import __main__ as command_line
from train_ref import training
from train_ref.errors import UsageError, one_line
from train_ref.methods import ALIASES, METHODS, ConIC, InstDisc, MoCo, SimCLR

from .conftest import RECIPES

SYNTHETIC = ["--config", str(RECIPES / "synthetic.yaml")]
SMALL = [
    "--data.image_size=8",
    "--data.batch_size=8",
    "--data.synthetic_size=16",
    "--trainer.accelerator=cpu",
]


def test_a_run_prints_its_table_and_leaves_its_files(train_ref, tmp_path):
    output = train_ref("fit", *SYNTHETIC, *SMALL, "--model.arch=convnet")
    run = tmp_path / "runs" / "synthetic" / "version_0"
    assert "linear probe, 1 % of the labels" in output
    assert output.startswith(
        "moco_v2_co2 with a convnet on 16 images (synthetic): 2 epochs of 2 steps of 8 images, on the CPU; "
        "the loss is served by the backend cpu; nothing is downloaded.\n"
        "Everything is kept in runs/synthetic/version_0\n"
    )
    assert "\r" not in output
    epochs = re.findall(r"epoch (.*): loss \d+\.\d+, top-1 [\d.]+ %, [\d,]+ images/s(.*)\n", output)
    assert [number for number, _ in epochs] == ["1 of 2", "2 of 2"]
    assert epochs[0][1].endswith(" left")
    assert re.search(r"\ndone in [\d\w ]+\n", output)
    assert output.splitlines()[-1].endswith("runs/synthetic/version_0/overview.png")
    assert {"config.yaml", "overview.png", "evaluation.json", "last.ckpt", "steps.csv"} <= {
        file.name for file in run.iterdir()
    }
    assert list(run.glob("events.out.tfevents.*"))
    rows = json.loads((run / "evaluation.json").read_text())
    assert [row["measure"].split(",")[0] for row in rows] == ["20 nearest neighbours"] + ["linear probe"] * 3
    for row in rows:
        assert 0 <= row["untrained"]["mean"] <= 100
        assert 0 <= row["trained"]["mean"] <= 100


@pytest.mark.thorough
def test_runs_leave_the_same_picture_whatever_the_order_of_sets(tmp_path):
    command = [sys.executable, "-m", "train_ref", "fit", "--config", "synthetic", *SMALL]
    runs = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(RECIPES.parents[1]), "PYTHONHASHSEED": seed}
        folder = tmp_path / seed
        folder.mkdir()
        arguments = [*command, "--model.arch=convnet", "--evaluation.seeds=1"]
        subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, check=True)
        runs.append(folder / "runs" / "synthetic" / "version_0")
    one, other = ((run / "overview.png").read_bytes() for run in runs)
    assert one == other
    one, other = ((run / "steps.csv").read_text().splitlines()[0] for run in runs)
    assert one == other


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "a command is missing: python -m train_ref takes one of fit, validate, knn, linear, finetune, "),
        (["train"], "there is no command train: python -m train_ref takes one of fit, validate, knn, "),
        (["--config", "synthetic"], "there is no command --config"),
        (["fit"], "fit needs --config"),
        (
            ["fit", "--config", "nowhere.yaml"],
            "there is no file nowhere.yaml, and no recipe",
        ),
        (["fit", "--config=nowhere"], "there are cifar_conic, "),
        (["fit", *SYNTHETIC, "--model.temprature=0.1"], "temprature"),
        (["fit", *SYNTHETIC, "--model.temp=0.1"], "model.temp"),  # no abbreviations
        (["fit", *SYNTHETIC, "--model.temperature=0"], "temperature"),
        (["fit", *SYNTHETIC, "--model.arch=resnet35"], "resnet35"),
        (["fit", *SYNTHETIC, "--ckpt_path=nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        (["fit", *SYNTHETIC, "--method=byol"], "there is no method byol; there are moco_v1, moco_v1_co2, "),
        (["fit", *SYNTHETIC, "--data.augmentations=digits_v1"], "augmentations"),
        (["fit", *SYNTHETIC, "--model.norm_groups=5"], "model.norm_groups is 5"),
        (["study"], "a study is missing: python -m train_ref study takes one of co2, simclr, "),
        (["study", "byol"], "there is no study byol: python -m train_ref study takes one of co2, "),
        (["validate", "--methods=[byol]"], "there is no method byol; there are moco_v1, moco_v1_co2, "),
        (["validate", "--methods=conic,byol"], "there is no method byol; there are moco_v1, moco_v1_co2, "),
        (["report"], "document: there is no docs/results.md"),
        (["report", "--document=results.md"], "document: there is no results.md"),
        (["validate", "--backend=cuda"], "cuda cannot serve here"),
        (["validate", "--step=3"], "step"),
        (["validate", "--image_size=1"], "image_size is 1, and must be 2 at least"),
        (["validate", "--augmentation=moco_v2", "--image_size=6"], "augmentation moco_v2 needs 7 at least"),
        (["fit", *SYNTHETIC, "--data.image_size=1"], "image_size is 1, and must be 2 at least"),
        (["fit", *SYNTHETIC, "--data.image_size=6"], "augmentation moco_v2 needs 7 at least"),
        (["validate", "--methods=[]"], "methods must name one at least"),
        (["validate", "--output=/proc/nowhere"], "cannot be written"),
        (["finetune", "last.ckpt", "--fractions=[]"], "and one at least, not none"),
        (["finetune", "last.ckpt", "--fractions=[1.5]"], "and one at least, not 1.5"),
        (["finetune", "last.ckpt", "--learning_rate=inf"], "learning_rate"),
        (["linear", "last.ckpt", "--learning_rate=inf"], "learning_rate"),
        (["linear", "last.ckpt", f"--seed={2**32}"], "seed"),
        (["knn", "last.ckpt", "--temperature=[inf]"], "temperature"),
        (["fit", *SYNTHETIC, f"--data.synthetic_seed={2**32}"], "synthetic_seed"),
        (["fit", "--config"], "--config"),
        (["fit", *SYNTHETIC, "--seed_everything=-1"], "seed_everything is -1: a seed is 0 or more"),
        (["fit", *SYNTHETIC, "--trainer.devices=3.5", "--trainer.accelerator=cpu"], "`devices`"),
        (["fit", *SYNTHETIC, "--trainer.callbacks+=LearningRateFinder"], "LearningRateFinder cannot be had"),
        (["fit", *SYNTHETIC, "--trainer.max_epochs=-1"], "leave the training without an end"),
        (["fit", *SYNTHETIC, "--data.batch_size=200"], "batch_size is 200, but there are only 160"),
        (["fit", *SYNTHETIC, "--data.dataset=folder"], "data.root must name the folder"),
        (["fit", *SYNTHETIC, "--data.dataset=folder", "--data.root=nowhere"], "no folder nowhere/train"),
    ],
)
def test_a_mistake_is_one_clear_line(train_ref, args, message):
    with pytest.raises(SystemExit) as stopped:
        train_ref(*args)
    line = str(stopped.value.code)
    assert line.startswith("error: ")
    assert message in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it.yaml holds nothing, where a recipe has settings by their names"),
        (b"# nothing", "it.yaml holds nothing"),
        (b"[1, 2]", "it.yaml holds a list"),
        (b"digits", "it.yaml holds a str"),
        (b"\xff\xfe\x00", "it.yaml is no text in UTF-8"),
        (b"a: [", "it.yaml is no YAML"),
        (b"a: \x00", "it.yaml is no YAML"),
        (b"model: 5", "it.yaml has 5 for model"),
        (b"model: &a {b: *a}", "it.yaml has an anchor that is part of itself"),
    ],
)
def test_a_recipe_that_is_none_is_told_so(tmp_path, content, message):
    file = tmp_path / "it.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"^config: ") as refused:
        training.recipe_settings(str(file))
    assert message in str(refused.value)


def test_a_recipe_is_utf_8_and_may_have_anchors(train_ref, monkeypatch, tmp_path):
    text = (
        "# τ, ×\ndata: {root: &root ü}\ntrainer: {default_root_dir: *root}\n"
        "model: {arch: convnet, queue_size: 7}\n"
    )
    (tmp_path / "it.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    opened = io.open
    monkeypatch.setattr("builtins.open", lambda file, *a, **k: opened(file, *a, **{"encoding": "ascii"} | k))
    assert model_of(train_ref, monkeypatch, "--config=it.yaml").hparams.queue_size == 7


@pytest.fixture
def command(monkeypatch):
    """A command in place of those that there are, which calls a function."""

    def make(function):
        told = SimpleNamespace(choices={}, parses=True, examples=(), function=lambda: lambda *_: function())
        monkeypatch.setitem(command_line.COMMANDS, "it", told)

    return make


def test_every_command_prints_in_any_encoding(train_ref, command, monkeypatch, tmp_path):
    command(lambda: print("τ ± 1"))
    with (tmp_path / "told").open("wb", buffering=0) as file:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, "ascii"))
        command_line.main(["it"])
        assert (tmp_path / "told").read_text() == "? ? 1\n"


def test_an_error_of_the_system_is_a_line_that_names_the_file(train_ref, command, tmp_path):
    command(lambda: (tmp_path / "nowhere").read_text())
    with pytest.raises(SystemExit, match=rf"error: {tmp_path}/nowhere: No such file or directory$"):
        train_ref("it")

    def unnamed():
        raise OSError(5, "of a mistake in the program")

    command(unnamed)
    with pytest.raises(OSError, match="of a mistake"):
        train_ref("it")


def test_an_error_of_a_parser_does_not_list_all_types():
    error = ValueError(
        'Parser key "a":\n  Does not validate against any of the Union subtypes\n'
        "  Subtypes: [list[int], int]\n  Errors:\n    - Expected a <class 'int'>\n  Given value: x"
    )
    assert one_line(error) == "Parser key \"a\": Expected a <class 'int'> Given value: x"


def test_a_checkpoint_that_is_not_whole_is_told_so(train_ref, tmp_path):
    (tmp_path / "half.ckpt").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(SystemExit, match="not a whole one"):
        train_ref("fit", *SYNTHETIC, "--ckpt_path=half.ckpt")
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as other:
        other.writestr("and", "so on")
    with pytest.raises(SystemExit, match=r"error: ckpt_path: other\.ckpt is no checkpoint"):
        train_ref("fit", *SYNTHETIC, "--ckpt_path=other.ckpt")
    torch.save({"method": "moco"}, tmp_path / "third.ckpt")
    with pytest.raises(SystemExit, match=r"error: ckpt_path: third\.ckpt is no checkpoint of this trainer"):
        train_ref("fit", *SYNTHETIC, "--ckpt_path=third.ckpt")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_built(train_ref, monkeypatch, recipe):
    built = []
    monkeypatch.setattr(
        training.ReferenceCLI, "fit", lambda self, **settings: built.append(self), raising=False
    )
    train_ref("fit", "--config", str(recipe))
    (cli,) = built
    assert recipe.read_text().startswith("# ")
    assert cli.trainer.log_dir == f"runs/{recipe.stem}/version_0"
    if recipe.stem == "synthetic":
        return
    images, _, method = recipe.stem.partition("_")
    assert cli.config.fit.method == method
    model, data = cli.model.hparams, cli.datamodule.hparams
    assert model.arch == ("resnet50" if images == "imagenet" else "resnet18")
    assert (data.dataset, data.image_size) == {
        "imagenet": ("folder", 224), "cifar": ("folder", 32), "digits": ("digits", 8)
    }[images]  # fmt: skip
    large_batches = recipe.stem.startswith("imagenet_simclr")
    assert model.weight_decay == (1e-6 if large_batches else 1e-4)
    assert model.optimizer == ("lars" if large_batches else "sgd")
    assert cli.config.fit.trainer.precision == ("bf16-mixed" if images == "imagenet" else None)
    if method.startswith("moco"):
        version = method[:7]
        assert isinstance(cli.model, MoCo)
        assert model.head == {"moco_v1": "linear", "moco_v2": "mlp"}[version]
        assert model.temperature == {"moco_v1": 0.07, "moco_v2": 0.2}[version]
        assert model.consistency_temperature == {"moco_v1": 0.04, "moco_v2": 0.05}[version]
        weight = {"moco_v1": 10.0, "moco_v2": 0.3}[version] if "co2" in method else 0.0
        assert model.consistency_weight == (1.0 if recipe.stem == "digits_moco_v1_co2" else weight)
        assert model.schedule == {"moco_v1": "step", "moco_v2": "cosine"}[version]
        if images == "imagenet":
            assert (model.queue_size, model.momentum, model.norm_groups) == (65536, 0.999, 8)
            assert (data.augmentation, data.batch_size, model.learning_rate) == (version, 256, 0.03)
    elif method.startswith("simclr"):
        assert isinstance(cli.model, SimCLR)
        assert (model.consistency_weight > 0) == ("co2" in method)
        if images == "imagenet":
            assert model.learning_rate == pytest.approx(0.3 * data.batch_size / 256)
            assert (data.batch_size, model.warmup * cli.config.fit.trainer.max_epochs) == (4096, 10)
    elif method == "instdisc":
        assert isinstance(cli.model, InstDisc)
        assert model.temperature == 0.07
    else:
        assert isinstance(cli.model, ConIC)
        assert (model.head, model.temperature) == ("mlp_bn", 0.1)
        assert model.consistency_weight == (0.0 if method == "exemplar_cnn" else 2.5)
        assert (model.active is None) == ("sampled" not in method)
        if images == "imagenet":
            assert model.active in (None, 65536)
            assert (data.augmentation, data.batch_size, model.learning_rate) == ("conic", 512, 0.06)


def test_there_is_a_recipe_of_every_method_for_every_kind_of_image():
    names = {recipe.stem.partition("_")[::2] for recipe in RECIPES.glob("*_*.yaml")}
    assert names == {(images, method) for images in ("imagenet", "cifar", "digits") for method in METHODS}


def model_of(train_ref, monkeypatch, *args: str):
    """What `fit` would train."""
    built = []
    monkeypatch.setattr(training.ReferenceCLI, "fit", lambda self, **_: built.append(self), raising=False)
    train_ref("fit", *args)
    return built[0].model


@pytest.mark.parametrize("name", [*METHODS, *ALIASES])
def test_a_method_brings_its_paper_s_settings(train_ref, monkeypatch, tmp_path, name):
    (tmp_path / "empty.yaml").write_text("{model: {arch: convnet}}")
    model = model_of(train_ref, monkeypatch, "--config", "empty.yaml", f"--method={name}")
    kind, settings = METHODS[ALIASES.get(name, name)]
    assert type(model) is kind
    assert settings.items() <= dict(model.hparams).items()


def test_moco_is_another_name_of_moco_s_defaults(train_ref, monkeypatch, tmp_path):
    (tmp_path / "empty.yaml").write_text("{model: {arch: convnet}}")
    models = [
        model_of(train_ref, monkeypatch, "--config", "empty.yaml", *method)
        for method in (["--method=moco"], ["--method=moco_v2_co2"], [])
    ]
    defaults = dict(MoCo(arch="convnet").hparams)
    for model in models:
        assert defaults == {name: value for name, value in model.hparams.items() if name[0] != "_"}


def test_recipes_outrank_a_method_s_settings_and_options_outrank_those(train_ref, monkeypatch, tmp_path):
    (tmp_path / "it.yaml").write_text("{method: moco_v1_co2, model: {arch: convnet, temperature: 0.5}}")
    model = model_of(train_ref, monkeypatch, "--config=it.yaml", "--model.schedule=cosine")
    settings = model.hparams
    assert (settings.consistency_weight, settings.temperature, settings.schedule) == (10, 0.5, "cosine")


@pytest.mark.parametrize(
    "args",
    [["--config", "synthetic"], ["--config=synthetic.yaml"], ["-c", "synthetic"]],
    ids=" ".join,
)
def test_a_recipe_of_the_package_goes_by_its_name(train_ref, monkeypatch, args):
    model = model_of(train_ref, monkeypatch, *args)
    assert model.hparams.queue_size == 256


def test_a_file_outranks_a_recipe_of_its_name_and_a_folder_does_not(train_ref, monkeypatch, tmp_path):
    (tmp_path / "synthetic").mkdir()
    assert model_of(train_ref, monkeypatch, "--config", "synthetic").hparams.queue_size == 256
    (tmp_path / "synthetic.yaml").write_text("{model: {arch: convnet, queue_size: 7}}")
    assert model_of(train_ref, monkeypatch, "--config", "synthetic.yaml").hparams.queue_size == 7


def test_a_checkpoint_goes_on_with_any_method_of_its_kind(train_ref, monkeypatch, tmp_path):
    train_ref("fit", *SYNTHETIC, *SMALL, "--evaluation.enabled=false", "--model.arch=convnet")
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["method"] == "moco"
    go_on = ["--config=synthetic", f"--ckpt_path={checkpoint}", "--model.arch=convnet", *SMALL]
    assert type(model_of(train_ref, monkeypatch, *go_on, "--method=moco_v1")) is MoCo
    (tmp_path / "simclr.yaml").write_text("{method: simclr_co2}")
    with pytest.raises(SystemExit, match="is a checkpoint of moco, not of simclr"):
        train_ref("fit", "--config=simclr.yaml", f"--ckpt_path={checkpoint}")
    for option, kept in {
        "model.learning_rate=0.5": "0.03",
        "model.weight_decay=0": "0.0001",
        "data.batch_size=4": "8",
        "data.synthetic_seed=1": "0",
        "seed_everything=7": "0",
    }.items():
        name, _, value = option.partition("=")
        with pytest.raises(SystemExit, match=rf"error: {name} is {value}\S*, but the run of .* has {kept}: "):
            train_ref("fit", *go_on, f"--{option}")
    assert len(list(tmp_path.rglob("config.yaml"))) == 1  # nothing was begun
    model_of(train_ref, monkeypatch, *go_on, "--seed_everything=true", "--trainer.max_epochs=9")


@pytest.mark.parametrize(
    ("given", "methods"),
    [
        ("moco_v1", ["moco_v1"]),
        ("moco", ["moco_v2_co2"]),
        ("moco_v1,conic", ["moco_v1", "conic"]),
        ("[simclr, instdisc]", ["simclr", "instdisc"]),
    ],
)
def test_validate_takes_one_method_or_several(train_ref, tmp_path, given, methods):
    train_ref("validate", f"--methods={given}", "--steps=1", "--batch_size=8", "--free=false", "--output=it")
    verdicts = json.loads((tmp_path / "it" / "validate.json").read_text())["verdicts"]
    assert [verdict["method"] for verdict in verdicts] == methods


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["digits_moco_v2_co2"], {"consistency_weight": 0.3, "temperature": 0.2, "head": "mlp"}),
        (["digits_moco_v1_co2"], {"consistency_weight": 1.0}),  # the recipe's own
        (["digits_moco_v1_co2", "--method=moco_v1_co2"], {"consistency_weight": 1.0}),
        (["digits_moco_v2_co2", "--method", "moco_v2"], {"consistency_weight": 0.0, "temperature": 0.2}),
        (
            ["digits_moco_v2_co2", "--method=moco_v1"],
            {"consistency_weight": 0.0, "temperature": 0.07, "head": "linear", "schedule": "step"},
        ),
        (["digits_moco_v2", "--method=moco"], {"consistency_weight": 0.3}),
        (
            ["digits_moco_v2_co2", "--method=moco_v2", "--model.consistency_weight=7"],
            {"consistency_weight": 7.0, "queue_size": 1024},
        ),
        (["digits_conic", "--method=exemplar_cnn"], {"consistency_weight": 0.0, "active": None}),
        (["digits_conic_sampled", "--method=conic"], {"active": None, "consistency_weight": 2.5}),
    ],
)
def test_a_method_that_is_asked_for_outranks_the_recipe(train_ref, monkeypatch, words, expected):
    built = []
    monkeypatch.setattr(
        training.ReferenceCLI, "fit", lambda self, **settings: built.append(self), raising=False
    )
    train_ref("fit", "--config", *words)
    assert expected.items() <= dict(built[0].model.hparams).items()
