from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from contrastive_ops import CO2Loss, ConICLoss, NTXentLoss
from tests.cases import mostly_thorough
from tests.elsewhere import pass_elsewhere
from tests.gpu_emulator.driver import REQUESTED
from train_ref import comparison
from train_ref import validate as module
from train_ref.comparison import Eager
from train_ref.errors import UsageError
from train_ref.methods import METHODS
from train_ref.validate import Run, Verdict, validate


@pytest.fixture
def run(tmp_path):
    def validate_in(**settings):
        return validate(**{"output": str(tmp_path), "batch_size": 16, "queue_size": 300, **settings})

    return validate_in


@pytest.mark.slow
def test_every_method_passes_and_leaves_its_curves(run, tmp_path, capsys):
    verdicts = run(steps=3)
    assert [verdict.method for verdict in verdicts] == list(METHODS)
    for verdict in verdicts:
        assert verdict.passed
        assert verdict.backend == "cpu"
        assert 0 < verdict.gradient_difference <= 1e-5  # two implementations, not one twice
        curves = [verdict.fused.curve, verdict.eager.curve, *(run.curve for run in verdict.permuted)]
        assert len(curves) >= 4
        assert {len(curve) for curve in curves} == {3}
        assert 0 < verdict.fused.loss_ms < verdict.fused.step_ms
    assert (tmp_path / "validate.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "validate.json").read_text())
    assert [verdict["method"] for verdict in saved["verdicts"]] == list(METHODS)
    assert "conic_sampled" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["moco_v1_co2", "simclr_co2", "conic_sampled"])
def test_float64_curves_stay_together(run, method):
    (verdict,) = run(methods=[method], steps=8, precision="64-true")
    assert verdict.passed
    assert verdict.gradient_difference <= 1e-10
    assert verdict.drift <= 1e-8


def test_a_transformer_is_compared_on_small_images_that_it_takes(run, monkeypatch):
    """It has no small stem; and a size that it does not take is told before views are drawn."""
    settings = {"methods": ["simclr"], "network": "timm/test_vit", "free": False, "steps": 1}
    (verdict,) = run(**settings, image_size=16)
    assert verdict.passed
    monkeypatch.setattr(module.Validation, "views", lambda self: pytest.fail("views are drawn"))
    with pytest.raises(UsageError, match=r"^image_size is 20, which a timm/test_vit does not take: "):
        run(**settings, image_size=20)


@pytest.mark.parametrize("method", mostly_thorough(["moco_v2_co2", "simclr_co2", "conic"], "conic".__eq__))
def test_resnet50_on_small_images(run, method):
    (verdict,) = run(methods=[method], network="resnet50", steps=2, free=False)
    assert verdict.passed


def test_bfloat16_is_measured_too(run):
    (verdict,) = run(methods=["moco_v2_co2"], steps=3, precision="bf16-mixed")
    assert verdict.passed


@pytest.mark.parametrize(("method", "eager"), [("moco_v1", "eager_co2"), ("conic", "eager_conic")])
def test_a_slightly_different_loss_fails(run, monkeypatch, method, eager):
    right = getattr(comparison, eager)
    monkeypatch.setattr(comparison, eager, lambda *args, **settings: 1.0001 * right(*args, **settings))
    with pytest.raises(SystemExit, match=f"error: not within the tolerance: {method}"):
        run(methods=[method], steps=2)


def test_a_nan_on_the_way_fails(run, monkeypatch):
    steps = itertools.count()
    right = comparison.eager_co2
    monkeypatch.setattr(
        comparison,
        "eager_co2",
        lambda *args, **settings: right(*args, **settings) * [1, math.nan, 1][next(steps)],
    )
    with pytest.raises(SystemExit, match="error: not within the tolerance: moco_v2"):
        run(methods=["moco_v2"], steps=3, free=False)


def test_curves_that_are_never_near_an_eager_one_fail(run, tmp_path, monkeypatch):
    """A drift that is not seen at the same weights: the last step of the fused run alone is off."""
    monkeypatch.setattr(module, "MOST_PERMUTED", 4)

    class OffAtTheEnd(module.Measure):
        def on_train_end(self, trainer, method):
            super().on_train_end(trainer, method)
            if isinstance(method.criterion, CO2Loss):
                self.run.curve[-1] *= 1.001

    monkeypatch.setattr(module, "Measure", OffAtTheEnd)
    with pytest.raises(SystemExit, match="error: not within the tolerance: moco_v2"):
        run(methods=["moco_v2"], steps=2)
    (verdict,) = json.loads((tmp_path / "validate.json").read_text())["verdicts"]
    assert verdict["loss_difference"] <= 1e-6
    assert len(verdict["permuted"]) == 4


def curves(fused, *eager):
    eager, *permuted = [Run(curve=[2.0, 1.0 + off]) for off in eager]
    return Verdict("", "", 0.0, 0.0, Run(curve=[2.0, 1.0 + fused]), eager, permuted)


@pytest.mark.parametrize(
    ("verdict", "precision", "near"),
    [
        (curves(1e-3, 0, 1e-6, 1e-6), "32-true", False),
        (curves(1e-3, 0, 1e-6, 6e-4), "32-true", True),  # curves that fork: as near to one as two are
        (curves(-1e-3, 0, 1e-6, 6e-4), "32-true", False),
        (curves(5e-6, 0), "32-true", True),  # within the tolerance at the same weights
        (curves(1e-7, 0, 1e-7), "64-true", False),  # whatever eager runs do
        (curves(1e-9, 0, 1e-7), "64-true", True),
        (curves(math.nan, 0, 1e-6), "32-true", False),
        (curves(math.nan, 0, math.nan), "32-true", False),
        (curves(1e-9, 0, math.nan), "bf16-mixed", False),
        (curves(math.nan, math.nan), "64-true", False),
    ],
)
def test_how_near_is_near(verdict, precision, near):
    verdict.judge(precision)
    assert verdict.passed == near


@pytest.mark.parametrize(
    ("criterion", "tensors"),
    [
        (CO2Loss(), (torch.randn(6, 8), torch.randn(6, 8), torch.randn(40, 8))),
        (NTXentLoss(consistency_weight=1.0), (torch.randn(6, 8), torch.randn(6, 8))),
        (ConICLoss(), (torch.randn(2, 6, 8), torch.randn(40, 8), torch.arange(6))),
    ],
    ids=["co2", "nt_xent", "conic"],
)
def test_another_order_of_the_keys_changes_roundings_alone(criterion, tensors):
    tensors = [x.double() if x.is_floating_point() else x for x in tensors]
    plain, _ = Eager(criterion)(*tensors)
    permuted, _ = Eager(criterion, order=1)(*tensors)
    torch.testing.assert_close(plain, criterion(*tensors), rtol=1e-10, atol=0)
    torch.testing.assert_close(permuted, plain, rtol=1e-12, atol=0)


@pytest.mark.skipif(not REQUESTED, reason="runs in a process with GPU_EMULATOR=sm_75")
@pytest.mark.parametrize("method", ["moco_v2_co2", "simclr", "conic_sampled"])
def test_emulated_kernels_train(run, method):
    tiny = {"steps": 2, "batch_size": 8, "queue_size": 100, "dim": 32, "free": False}
    (verdict,) = run(methods=[method], backend="cuda", **tiny)
    assert verdict.passed


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.skipif(REQUESTED is not None, reason="this is such a process")
def test_training_on_a_gpu_before_ampere():
    """By the kernels in CUDA C++, as compiled for Turing and executed without a GPU."""
    pass_elsewhere([__file__], "emulated", {"GPU_EMULATOR": "sm_75"})
