"""Torchvision's ResNets without their classifier, and the projection heads of MoCo v1, MoCo v2 and ConIC."""

from __future__ import annotations

from typing import Literal

import torchvision
from torch import nn

Architecture = Literal["resnet18", "resnet50"]
Stem = Literal["imagenet", "small"]
Head = Literal["linear", "mlp", "mlp_bn"]

FEATURES = {"resnet18": 512, "resnet50": 2048}


def resnet(arch: Architecture, stem: Stem = "imagenet") -> nn.Module:
    """An untrained ResNet that ends in its pooled features: (B, 3, H, W) to (B, `FEATURES[arch]`).

    The small stem is a 3×3 convolution of stride 1 without max-pooling, as is usual for images of 64 pixels
    and fewer: the ImageNet stem would shrink them fourfold before the first block.
    """
    network = getattr(torchvision.models, arch)()
    network.fc = nn.Identity()
    if stem == "small":
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network


def projection_head(kind: Head, in_features: int, dim: int) -> nn.Module:
    """(B, in_features) to (B, dim): MoCo v1's linear layer, MoCo v2's two layers with a ReLU between, or
    ConIC's, which are SimCLR's: batch-normalised, and so without biases."""
    if kind == "mlp_bn":
        return nn.Sequential(
            nn.Linear(in_features, in_features, bias=False),
            nn.BatchNorm1d(in_features),
            nn.ReLU(),
            nn.Linear(in_features, dim, bias=False),
            nn.BatchNorm1d(dim),
        )
    last = nn.Linear(in_features, dim)
    if kind == "linear":
        return last
    return nn.Sequential(nn.Linear(in_features, in_features), nn.ReLU(), last)
