from __future__ import annotations

import copy
import sys

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from train_ref.errors import UsageError
from train_ref.networks import (
    ARCHITECTURES,
    SplitBatchNorm,
    SynchronizedBatchNorm,
    TorchSyncBatchNorm,
    _replace_norms,
    has_batch_norm,
    network,
    normalize_in_groups,
    projection_head,
)

WIDTHS = {
    "resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048, "vit_s16": 384, "convnet": 128,
    "timm/resnet10t": 512, "timm/test_vit": 64, "timm/test_efficientnet": 256,
    "timm/mobilenetv3_small_050": 1024,  # of a layer after the pooling
}  # fmt: skip


@pytest.mark.parametrize("arch", WIDTHS)
def test_a_network_ends_in_its_pooled_features(arch):
    net = network(arch)
    assert net.num_features == WIDTHS[arch]
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, WIDTHS[arch])


def test_the_names_are_those_that_are_tested():
    assert set(ARCHITECTURES) <= set(WIDTHS)


def test_a_transformer_takes_images_of_any_size_and_keeps_timm_s_tensors():
    net, theirs = network("vit_s16").eval(), timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(net.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(net(images), theirs(images))
        assert net(torch.randn(1, 3, 96, 96)).shape == (1, 384)


@pytest.mark.parametrize(
    ("arch", "stem", "message"),
    [
        ("timm/resnet18x", "imagenet", "timm has no network resnet18x; near it are resnet18"),
        ("timm/hf-hub:someone/something", "imagenet", "timm has no network hf-hub:someone/something"),
        ("timm/resnet18", "small", "model.stem is small, which ResNets of torchvision have"),
        ("vit_s16", "small", "and not timm's vit_small_patch16_224"),
    ],
)
def test_what_timm_has_not_is_told(arch, stem, message):
    with pytest.raises(UsageError, match=message):
        network(arch, stem)


def test_without_timm_its_networks_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="resnet10t is of timm, which is missing: pip install timm"):
        network("timm/resnet10t")


@pytest.mark.parametrize("kind", [SplitBatchNorm, SynchronizedBatchNorm, TorchSyncBatchNorm])
def test_norms_of_timm_keep_their_activation(kind):
    net = network("timm/test_efficientnet").double().eval()
    replaced = _replace_norms(copy.deepcopy(net), kind, 2)
    assert {type(each) for each in replaced.modules() if isinstance(each, _BatchNorm)} == {kind}
    assert list(replaced.state_dict()) == list(net.state_dict())
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(replaced.eval()(images), net(images))
    if kind is SplitBatchNorm:
        parts = torch.cat([copy.deepcopy(net).train()(part) for part in images.chunk(2)])
        torch.testing.assert_close(replaced.train()(images), parts)


def test_synchronized_statistics_of_half_precision_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr("train_ref.distributed.differentiable_sum", lambda x: x)  # of one process
    norm = SynchronizedBatchNorm(8, 1)
    wide = copy.deepcopy(norm)
    rows = (3 + torch.randn(64, 8, 4, 4)).bfloat16()
    out = norm.by_batch(rows)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wide.by_batch(rows.float()).bfloat16())
    torch.testing.assert_close(norm.running_mean, wide.running_mean, rtol=0, atol=0)


def test_a_transformer_has_no_batch_norm():
    assert has_batch_norm(network("resnet18"))
    assert has_batch_norm(network("timm/test_efficientnet"))
    assert not has_batch_norm(network("timm/test_vit"))


@pytest.mark.parametrize(("stem", "stride"), [("small", 1), ("imagenet", 4)])
def test_the_small_stem_keeps_every_pixel(stem, stride):
    net = network("resnet18", stem)
    seen = []
    net.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    net(torch.randn(2, 3, 16, 16))
    assert seen == [(2, 64, 16 // stride, 16 // stride)]


def test_the_heads_are_those_of_moco_v1_moco_v2_and_conic():
    assert isinstance(projection_head("linear", 512, 128), nn.Linear)
    assert [type(layer) for layer in projection_head("mlp", 512, 128)] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in projection_head("mlp_bn", 512, 128)] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Linear,
        nn.BatchNorm1d,
    ]
    for kind in ("linear", "mlp", "mlp_bn"):
        assert projection_head(kind, 512, 128)(torch.randn(3, 512)).shape == (3, 128)


def test_norms_in_groups_are_those_of_the_parts_alone():
    torch.manual_seed(0)
    whole = network("resnet18", "small").double().requires_grad_(False)
    names = list(whole.state_dict())
    split = normalize_in_groups(copy.deepcopy(whole), 4)
    assert list(split.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in split.parameters())
    images = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    expected = torch.cat([copy.deepcopy(whole)(part) for part in images.split(4)])
    torch.testing.assert_close(split(images), expected)
    assert isinstance(split.bn1, SplitBatchNorm)

    # Running statistics are means over the parts, and serve the evaluation.
    parts = [copy.deepcopy(whole) for _ in range(4)]
    for net, part in zip(parts, images.split(4), strict=True):
        net(part)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(net.bn1, name) for net in parts]).mean(0)
        torch.testing.assert_close(getattr(split.bn1, name), mean)
    assert split.bn1.num_batches_tracked == 1
    plain = network("resnet18", "small").double()
    plain.load_state_dict(split.state_dict())
    torch.testing.assert_close(split.eval()(images), plain.eval()(images))


def test_a_single_group_in_a_single_process_is_left_alone():
    net = network("convnet")
    assert type(normalize_in_groups(net, 1)[1]) is nn.BatchNorm2d
