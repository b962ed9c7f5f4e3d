from __future__ import annotations

import json

import pytest
import torch

from contrastive_ops import CO2Loss, ConICLoss, NTXentLoss
from train_ref import validate as module
from train_ref.validate import CASES, Eager, validate


@pytest.fixture
def run(tmp_path):
    def validate_in(**settings):
        return validate(**{"output": str(tmp_path), "batch_size": 16, "queue_size": 300, **settings})

    return validate_in


def test_every_method_passes_and_leaves_its_curves(run, tmp_path, capsys):
    verdicts = run(steps=3)
    assert [verdict.method for verdict in verdicts] == list(CASES)
    for verdict in verdicts:
        assert verdict.passed
        assert verdict.backend == "cpu"
        assert 0 < verdict.gradient_difference <= 1e-5  # two implementations, not one twice
        curves = [verdict.fused.curve, verdict.eager.curve, *(run.curve for run in verdict.permuted)]
        assert [len(curve) for curve in curves] == [3] * 4
        assert 0 < verdict.fused.loss_ms < verdict.fused.step_ms
    assert (tmp_path / "validate.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "validate.json").read_text())
    assert [verdict["method"] for verdict in saved["verdicts"]] == list(CASES)
    assert "conic_sampled" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["moco_v1_co2", "simclr_co2", "conic_sampled"])
def test_float64_curves_stay_together(run, method):
    (verdict,) = run(methods=[method], steps=8, precision="64-true")
    assert verdict.passed
    assert verdict.gradient_difference <= 1e-10
    assert verdict.drift <= 1e-8


@pytest.mark.parametrize("method", ["moco_v2_co2", "simclr_co2", "conic"])
def test_resnet50_on_small_images(run, method):
    (verdict,) = run(methods=[method], network="resnet50", steps=2, free=False)
    assert verdict.passed


def test_bfloat16_is_measured_too(run):
    (verdict,) = run(methods=["moco_v2_co2"], steps=3, precision="bf16-mixed")
    assert verdict.passed


@pytest.mark.parametrize(("method", "eager"), [("moco_v1", "eager_co2"), ("conic", "eager_conic")])
def test_a_slightly_different_loss_fails(run, monkeypatch, method, eager):
    right = getattr(module, eager)
    monkeypatch.setattr(module, eager, lambda *args, **settings: 1.0001 * right(*args, **settings))
    with pytest.raises(SystemExit, match=f"error: not within the tolerance: {method}"):
        run(methods=[method], steps=2)


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
