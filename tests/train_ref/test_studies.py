from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ttest_rel

from tests.cases import mostly_thorough
from train_ref import __main__ as command_line
from train_ref import report
from train_ref.commands import STUDIES
from train_ref.data import Views
from train_ref.errors import UsageError
from train_ref.markdown import parts
from train_ref.methods import ConIC, MoCo, SimCLR
from train_ref.studies import sampling, toy
from train_ref.studies.common import SharedViews, Variant, differences, text, train

DOCS = Path(__file__).resolve().parents[2] / "docs"

# The rows of each study's first table, and how many differences it tells.
ROWS = {
    "co2": (
        ["untrained", "MoCo", "MoCo + CO2, α = 1", "MoCo + CO2, α = 10", "MoCo v2", "MoCo v2 + CO2, α = 0.3"],
        3,
    ),
    "simclr": (
        [
            "untrained",
            *(
                f"SimCLR, τ = {τ}{co2}"
                for τ in (0.5, 0.1)
                for co2 in ("", " + CO2, α = 0.3", " + CO2, α = 1")
            ),
        ],
        4,
    ),
    "consistency": (["untrained", "α = 0", "α = 0.5", "α = 1", "α = 2.5", "α = 5"], 4),
    "batch_size": (
        ["untrained", *(f"{method}, {size}" for method in ("ConIC", "SimCLR") for size in (16, 32, 64, 128))],
        6,
    ),
    "sampling": (["full softmax, another seed", "sampled, compensated", "sampled, not compensated"], 2),
    "distillation": (
        [
            "from scratch",
            "fine-tuned",
            "fine-tuned, then distilled",
            "smaller network, from scratch",
            "distilled into the smaller network",
        ],
        4,
    ),
    "toy": (["untrained", "α = 0", "α = 0.1", "α = 2.5"], 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly_thorough(STUDIES, ("toy", "co2").__contains__))
def test_a_quick_study_leaves_its_figure_and_its_numbers(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    result = STUDIES[name].function()(quick=True, directory=str(tmp_path / "study"))
    assert (tmp_path / "study" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "study" / f"{name}.json").read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["study"]
    assert torch.get_num_threads() == threads

    rows, pairs = ROWS[name]
    first, *_, last = result["tables"].values()
    assert [row["variant"] for row in first] == rows
    assert len(last) == pairs
    trained = [runs for variant, runs in result["runs"].items() if variant != "untrained"]
    assert all(len(runs) == 2 and runs[0] != runs[1] for runs in trained)  # two seeds
    output = capsys.readouterr().out
    assert all(row in output for row in rows)
    # Without compensation the training loss misses most of the denominator.
    if name == "sampling":
        assert first[2]["training loss"]["mean"] > first[1]["training loss"]["mean"]


def inputs_of(method, views: SharedViews, **settings) -> list[torch.Tensor]:
    """What the encoder is given in two short epochs."""
    module = Variant(method, settings, views.hparams.batch_size).module(seed=0)
    inputs = []
    module.encoder.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    train(module, views, epochs=2, quick=True)
    return inputs


def test_all_trainings_of_a_seed_see_the_same_views_in_the_same_order():
    views = SharedViews(3, epochs=2, batch_size=16)
    conic = inputs_of(ConIC, views)  # (2 · 16, 3, 8, 8), both views
    drawn = views.kept.drawn.sum()
    simclr = inputs_of(SimCLR, views)
    moco = inputs_of(MoCo, views, queue_size=64)  # (16, 3, 8, 8), the first of both
    assert views.kept.drawn.sum() == drawn == 2 * 2 * 16  # nothing was drawn anew
    torch.testing.assert_close(simclr, conic, rtol=0, atol=0)
    torch.testing.assert_close(moco, [both[:16] for both in conic], rtol=0, atol=0)
    assert len({float(batch.sum()) for batch in conic}) == 4  # no step has another's, nor an epoch

    views.hparams.batch_size = 8  # the same images, in twice as many batches
    halves = inputs_of(SimCLR, views)
    torch.testing.assert_close(torch.cat([half[:8] for half in halves[:2]]), conic[0][:16], rtol=0, atol=0)


def test_shared_views_are_those_of_the_trainer():
    torch.manual_seed(3)
    views = Views(batch_size=4)
    views.setup()
    expected, given = (
        next(iter(data.train_dataloader())) for data in (views, SharedViews(3, 1, batch_size=4))
    )
    torch.testing.assert_close(list(given[0]), list(expected[0]), rtol=0, atol=0)
    assert torch.equal(given[1], expected[1])
    assert torch.equal(given[2], expected[2])


def test_views_of_more_than_a_gibibyte_are_refused_before_any_is_drawn():
    with pytest.raises(UsageError, match=r"epochs is 500, whose views would take 1\.0 GiB"):
        SharedViews(0, epochs=500)


def test_variants_of_a_seed_begin_with_the_same_backbone():
    one, other = (Variant(method, {}).module(seed=1).backbone.state_dict() for method in (MoCo, SimCLR))
    torch.testing.assert_close(dict(one), dict(other), rtol=0, atol=0)


def test_a_training_that_diverges_is_told():
    views = SharedViews(0, epochs=1, batch_size=8)
    with pytest.raises(UsageError, match="diverged"):
        train(Variant(SimCLR, {"learning_rate": 1e30}, 8).module(seed=0), views, epochs=1, quick=True)


def test_differences_are_paired():
    runs = {
        "a": [{"x, %": value} for value in (1.0, 2.0, 4.0)],
        "b": [{"x, %": value} for value in (0, 2, 1)],
    }
    (row,) = differences(runs, [("a", "b")], ["x, %"])
    cell = row["x, %"]
    assert cell["mean"] == pytest.approx(4 / 3)
    assert cell["std"] == pytest.approx(np.std([1, 0, 3], ddof=1))
    assert cell["p"] == pytest.approx(ttest_rel([1, 2, 4], [0, 2, 1]).pvalue)
    assert text("x, %", cell) == "+1.3 ± 1.5 (p = 0.27)"
    assert differences(runs, [("a", "a")], ["x, %"])[0]["x, %"] == {"mean": 0, "std": 0, "p": None}


def test_the_loss_over_all_rows_is_that_of_all_rows_whichever_are_active():
    conic = Variant(ConIC, {"active": 16, "dim": 16}, 8).module(seed=0)
    train(conic, SharedViews(0, epochs=1, batch_size=8), epochs=1, quick=True)
    count = conic.classifier.num_instances
    views = torch.randn(count, 3, 8, 8)
    loss = sampling.full_softmax_loss(conic, views)
    assert conic.encoder.training
    rows = torch.cat([weight for _, weight, _ in conic.classifier.export()])
    conic.encoder.eval()
    logits = F.normalize(conic.encoder(views)) @ F.normalize(rows).T / 0.1
    assert loss == pytest.approx(F.cross_entropy(logits, torch.arange(count)).item(), rel=1e-4)


def test_the_density_integrates_to_one():
    axis = np.linspace(-1.3, 1.3, 131)
    directions = np.random.default_rng(0).uniform(-180, 180, 20)
    density = toy.density(directions, axis)
    assert density.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-3)
    y, x = np.unravel_index(toy.density(np.array([90.0]), axis).argmax(), density.shape)
    assert (axis[x], axis[y]) == pytest.approx((0, 1), abs=0.02)


def test_angles_are_measured_the_short_way_round():
    directions = torch.arange(8.0)[:, None] * 45 - 180 + torch.tensor([-1.0, 1.0])  # from −181° to 136°
    assert toy.angles(directions) == {
        toy.WITHIN: 2,
        toy.BETWEEN: pytest.approx((45 + 90 + 135 + 180 + 135 + 90 + 45) / 7, abs=0.2),
        toy.NEAREST: 100,
    }


def test_the_toys_network_goes_on_training_after_a_look_at_its_features():
    views = toy.EightImages(0, epochs=2)
    assert len(views.train_images) == 8
    module = Variant(ConIC, {"dim": 2}, 8).module(seed=0)
    toy.spread(module, views)
    assert all(part.training for part in module.encoder.modules())


def test_the_report_replaces_what_stands_between_markers(tmp_path):
    score = {"mean": 97.25, "std": 0.5}
    result = {
        "study": "toy",
        "settings": {"epochs": 3, "learning_rate": 0.01},
        "torch": "2",
        "tables": {"Accuracy": [{"variant": "α = 0", "x, %": score, "loss": None}]},
    }
    (tmp_path / "toy.json").write_text(json.dumps(result))
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- toy:begin -->\nold\n<!-- toy:end -->\nafter\n")
    assert report.put(tmp_path, document) == ["toy"]
    written = document.read_text()
    assert written.startswith("before\n<!-- toy:begin -->\n![")
    assert written.endswith("\n<!-- toy:end -->\nafter\n")
    assert "old" not in written
    assert "| α = 0 | 97.2 ± 0.5 | – |" in written
    assert "epochs 3, learning rate 0.01" in written


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"study": ', "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[]", "lacks what a result of its name has"),
        (b"{}", "lacks what a result of its name has (KeyError: 'study')"),
    ],
)
def test_a_result_that_is_none_is_told_and_leaves_the_document(tmp_path, content, message):
    whole = {"study": "co2", "settings": {}, "torch": "2", "tables": {}}
    (tmp_path / "co2.json").write_text(json.dumps(whole))
    (tmp_path / "toy.json").write_bytes(content)
    document = tmp_path / "results.md"
    text = "<!-- co2:begin -->\n<!-- co2:end -->\n<!-- toy:begin -->\nold\n<!-- toy:end -->\n"
    document.write_text(text)
    with pytest.raises(UsageError, match=r"folder: .*toy\.json ") as refused:
        report.put(tmp_path, document)
    assert message in str(refused.value)
    assert document.read_text() == text


def test_the_results_that_are_told_are_those_that_are_kept(tmp_path):
    told = DOCS / "results.md"
    for name in STUDIES:
        result = json.loads((DOCS / "figures" / f"{name}.json").read_text())
        assert parts(told, name)[1] == report.section(result, "figures")
        runs = next(iter(result["runs"].values()))
        assert len(runs) == result["settings"]["seeds"] >= 3
    for name, tell in (("validate", report.agreement), ("step", report.step)):
        files = sorted((DOCS / "figures").glob(f"{name}-*.json"))
        results = [json.loads(file.read_text()) for file in files]
        assert parts(told, name)[1] == tell(results)
        assert all(verdict["passed"] for result in results for verdict in result["verdicts"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sampling", "--seeds=0"], "seeds"),
        (["sampling", "--active=1437"], "nothing is sampled"),
        (["co2", "--epoch=3"], "epoch"),
        (["co2", "--directory=/dev/null"], "directory: /dev/null/co2.json cannot be written"),
        (["toy", "--larger_weight=1e9"], "larger_weight"),
        (["simclr", "--epochs=1000"], "1 GiB is kept at most"),
        (["colorization"], "there is no study colorization: python -m train_ref study takes one of co2,"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_ref"])
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["study", *args])
    line = str(stopped.value.code)
    assert line.startswith("error: ")
    assert message in line
    assert len(line.splitlines()) == 1
