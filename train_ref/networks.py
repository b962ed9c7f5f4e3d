"""Torchvision's ResNets without their classifier, projection heads, and whose statistics batch norm takes."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import distributed

Architecture = Literal["resnet18", "resnet50", "convnet"]
Stem = Literal["imagenet", "small"]
Head = Literal["linear", "mlp", "mlp_bn"]

FEATURES = {"resnet18": 512, "resnet50": 2048, "convnet": 128}


def network(arch: Architecture, stem: Stem = "imagenet") -> nn.Module:
    """An untrained network that ends in its pooled features: (B, 3, H, W) to (B, `FEATURES[arch]`).

    ResNets' small stem is a 3×3 convolution of stride 1 without max-pooling, as is usual for images of 64
    pixels and fewer: the ImageNet stem would shrink them fourfold before the first block. "convnet" is three
    convolutions of digits' size: an epoch of them takes a second.
    """
    if arch == "convnet":
        return _convnet()
    net = getattr(torchvision.models, arch)()
    net.fc = nn.Identity()
    if stem == "small":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


def _convnet() -> nn.Module:
    widths, layers = (3, 32, 64, FEATURES["convnet"]), []
    for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 2), strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def projection_head(kind: Head, in_features: int, dim: int) -> nn.Module:
    """(B, in_features) to (B, dim): the linear layer of MoCo v1 and InstDisc, MoCo v2's two layers with a
    ReLU between, or SimCLR's and ConIC's, which are batch-normalised, and so without biases."""
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


def normalize_in_groups(net: nn.Module, groups: int) -> nn.Module:
    """Let batch norm take its statistics from that many parts of a step's batch, however many processes share
    it: with 8 of them one process computes what eight would, and with 1 eight compute what one would.

    Args:
        net: its batch norms are replaced, with the same parameters.
        groups: a multiple of the number of processes, or 1: the whole batch, synchronised over them.
    """
    processes = distributed.world_size()
    if groups > 1 or processes == 1:
        return _replace_norms(net, max(1, groups // processes))
    if next(net.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return _replace_norms(net, groups=0)  # torch's own synchronises GPUs only


def _replace_norms(net: nn.Module, groups: int) -> nn.Module:
    if groups == 1:
        return net
    for name, child in net.named_children():
        if isinstance(child, _BatchNorm):
            kind = SplitBatchNorm if groups else SynchronizedBatchNorm
            norm = kind(child.num_features, child.eps, child.momentum)
            norm.groups = groups
            norm._parameters, norm._buffers = child._parameters, child._buffers
            setattr(net, name, norm)
        else:
            _replace_norms(child, groups)
    return net


class SplitBatchNorm(_BatchNorm):
    """Batch norm of any images or rows with the statistics of each of `groups` parts of a batch, as on that
    many processes; its running statistics are averages over the parts."""

    groups = 1

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        means, variances = (x.new_zeros((self.groups, self.num_features)).to(self.running_mean) for _ in "mv")
        parts = x.tensor_split(self.groups)
        normalized = torch.cat(
            [
                F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
                for part, mean, variance in zip(parts, means, variances, strict=True)
            ]
        )
        with torch.no_grad():
            self.running_mean.lerp_(means.mean(0), self.momentum)
            self.running_var.lerp_(variances.mean(0), self.momentum)
            self.num_batches_tracked += 1
        return normalized


class SynchronizedBatchNorm(_BatchNorm):
    """Batch norm with the statistics of all processes' rows, on any device; as many rows in each process."""

    groups = 0

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count = distributed.world_size() * x.numel() // self.num_features
        mean = distributed.differentiable_sum(x.sum(dims)) / count
        centred = x - mean.view(shape)
        variance = distributed.differentiable_sum(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(shape) + self.bias.view(shape)
