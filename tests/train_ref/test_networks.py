from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from train_ref.networks import FEATURES, SplitBatchNorm, network, normalize_in_groups, projection_head


@pytest.mark.parametrize("arch", FEATURES)
def test_a_network_ends_in_its_pooled_features(arch):
    assert network(arch)(torch.randn(2, 3, 32, 32)).shape == (2, FEATURES[arch])


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
