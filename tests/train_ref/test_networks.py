from __future__ import annotations

import pytest
import torch
from torch import nn

from train_ref.networks import FEATURES, projection_head, resnet


@pytest.mark.parametrize("arch", FEATURES)
def test_a_resnet_ends_in_its_pooled_features(arch):
    assert resnet(arch)(torch.randn(2, 3, 32, 32)).shape == (2, FEATURES[arch])


@pytest.mark.parametrize(("stem", "stride"), [("small", 1), ("imagenet", 4)])
def test_the_small_stem_keeps_every_pixel(stem, stride):
    network = resnet("resnet18", stem)
    seen = []
    network.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    network(torch.randn(2, 3, 16, 16))
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
