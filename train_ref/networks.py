"""Networks by name without their classifier, projection heads, and whose statistics batch norm takes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import torchvision
from jsonargparse.typing import restricted_string_type
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import distributed
from .errors import UsageError, one_line

ResNet = Literal["resnet18", "resnet34", "resnet50", "resnet101"]  # torchvision's
Named = Literal[ResNet, "vit_s16", "convnet"]
TIMM = "timm/"  # before the name of any network of timm's
TimmName = restricted_string_type("TimmName", f"^{TIMM}.+$")
Architecture = Named | TimmName
Stem = Literal["imagenet", "small"]
Head = Literal["linear", "mlp", "mlp_bn"]

ARCHITECTURES: tuple[str, ...] = get_args(Named)
VIT_S16 = "vit_small_patch16_224"  # timm's name


def is_network(arch: object) -> bool:
    """Whether this is a name that `network` takes; which names timm has, only timm can tell."""
    return isinstance(arch, str) and (arch in ARCHITECTURES or arch.startswith(TIMM))


def network(arch: str, stem: Stem = "imagenet") -> nn.Module:
    """An untrained network that ends in its pooled features: (B, 3, H, W) to (B, F), F being its attribute
    `num_features`, as timm calls it.

    ResNets' small stem is a 3×3 convolution of stride 1 without max-pooling, as is usual for images of 64
    pixels and fewer: the ImageNet stem would shrink them fourfold before the first block. "convnet" is three
    convolutions of digits' size: an epoch of them takes a second.

    Args:
        arch: a name in `ARCHITECTURES`, or ``timm/<name>``.
        stem: how a ResNet of torchvision's starts.

    Raises:
        UsageError: timm is not installed or has no such network, or it would have another stem.
    """
    if arch == "convnet":
        return convnet((32, 64, 128))
    if arch not in get_args(ResNet):
        return _of_timm(timm_name(arch), stem)
    net = getattr(torchvision.models, arch)()
    net.num_features = net.fc.in_features
    net.fc = nn.Identity()
    if stem == "small":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


def convnet(widths: Sequence[int]) -> nn.Module:
    """ "convnet" with so many channels after each of its three convolutions."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip((3, *widths), widths, (1, 2, 2), strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.num_features = widths[-1]
    return net


def timm_name(arch: str) -> str:
    """What timm calls a network; nothing where it is not one of timm's."""
    return VIT_S16 if arch == "vit_s16" else arch.removeprefix(TIMM) if arch.startswith(TIMM) else ""


def _of_timm(name: str, stem: Stem) -> nn.Module:
    """A network of timm's, without its classifier. Transformers take images of all multiples of their
    patches, and bring their embeddings of positions to that size."""
    try:
        import timm  # takes seconds
    except ModuleNotFoundError as error:
        raise UsageError(f"model.arch: {name} is of timm, which is missing: pip install timm") from error
    if not timm.is_model(name):  # nor a file or a place on the web, which timm would fetch
        known = timm.list_models()
        near = difflib.get_close_matches(name, known, 4) or [each for each in known if name in each][:4]
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise UsageError(f"model.arch: timm has no network {name}{hint}")
    if stem == "small":
        raise UsageError(
            f"model.stem is small, which ResNets of torchvision have, and not timm's {name}: it must be "
            "imagenet"
        )
    try:
        net = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    except TypeError:  # convolutions take any size as they are
        net = timm.create_model(name, num_classes=0)
    net.num_features = getattr(net, "head_hidden_size", net.num_features)  # some have a layer after the pool
    return net


def check_size(net: nn.Module, arch: str, size: int, option: str = "image_size") -> None:
    """Raise UsageError where a network does not take images of that size, as some transformers.

    Args:
        net: (B, 3, H, W) to (B, F).
        arch: its name.
        size: height and width.
        option: of the user's, that says the size.
    """
    image = torch.zeros(1, 3, size, size).to(next(net.parameters()))
    was_training = net.training
    try:
        with torch.no_grad():
            net.eval()(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(f"{option} is {size}, which a {arch} does not take: {one_line(error)}") from error
    finally:
        net.train(was_training)


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
        return _replace_norms(net, SplitBatchNorm, max(1, groups // processes))
    if next(net.parameters()).is_cuda:
        return _replace_norms(net, TorchSyncBatchNorm)
    return _replace_norms(net, SynchronizedBatchNorm)  # torch's own synchronises GPUs only


def has_batch_norm(net: nn.Module) -> bool:
    """Whether what a network makes of an image in training depends on the others in the batch."""
    return any(isinstance(each, _BatchNorm) for each in net.modules())


def _replace_norms(net: nn.Module, kind: type[_BatchNorm], groups: int = 0) -> nn.Module:
    if groups == 1:
        return net
    for name, child in net.named_children():
        if isinstance(child, _BatchNorm):
            norm = kind(child.num_features, child.eps, child.momentum)
            norm.groups = groups
            norm._parameters, norm._buffers = child._parameters, child._buffers
            # Norms of timm's have what comes after them within, as their activation.
            norm._modules = child._modules
            setattr(net, name, norm)
        else:
            _replace_norms(child, kind, groups)
    return net


class _AnyBatchNorm(_BatchNorm):
    """Batch norm of any images or rows, in place of another one, and of what that has within.

    A subclass normalises by a batch; by running statistics all do alike.
    """

    groups = 0

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        x = self.by_batch(x) if self.training else super().forward(x)
        for after in self.children():
            x = after(x)
        return x

    def by_batch(self, x: Tensor) -> Tensor:
        return super().forward(x)


class TorchSyncBatchNorm(_AnyBatchNorm, nn.SyncBatchNorm):
    """Batch norm with the statistics of all processes' rows, by torch's own operations, on GPUs."""


class SplitBatchNorm(_AnyBatchNorm):
    """Batch norm with the statistics of each of `groups` parts of a batch, as on that many processes; its
    running statistics are averages over the parts."""

    def by_batch(self, x: Tensor) -> Tensor:
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


class SynchronizedBatchNorm(_AnyBatchNorm):
    """Batch norm with the statistics of all processes' rows, on any device; as many rows in each process."""

    def by_batch(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # in which sums are taken
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
        return (centred * scale.view(shape) + self.bias.view(shape)).to(dtype)
