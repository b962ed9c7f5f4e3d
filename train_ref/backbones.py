"""The backbone of a checkpoint, whichever method trained it: into this program, and out of it for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .errors import UsageError
from .files import replacing, verify
from .methods import KINDS
from .networks import is_network, network, timm_name

KEYS = ("method", "hyper_parameters", "datamodule_hyper_parameters", "state_dict", "epoch", "global_step")
PREFIX = "encoder.0."  # the backbone's tensors in the state_dict of every method
LABELLED = ("finetune", "distill")  # commands whose classifiers, which learned from labels, are kept alike


class Backbone(NamedTuple):
    """A trained network (B, 3, H, W) to (B, F), and what its checkpoint says of it.

    Attributes:
        path: the checkpoint.
        network: in float32 on the CPU.
        method: what has trained it: a name in `KINDS`, or the command that did.
        arch: a name that `network` takes.
        stem: how a ResNet starts.
        data: the arguments of `Views` in the training.
        epoch: in which the checkpoint was written, as Lightning counts them.
        step: how many steps of the optimizer it has been trained.
    """

    path: Path
    network: nn.Module
    method: str
    arch: str
    stem: str
    data: dict[str, Any]
    epoch: int
    step: int


def load_tensors(path: Path) -> Any:
    """What a file of PyTorch's holds. Mapped, not read: tensors that nobody looks at cost nothing.

    Raises:
        UsageError: it is missing, not whole, or damaged.
    """
    if not path.exists():
        raise UsageError(f"there is no checkpoint {path}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder, and no checkpoint")
    verify(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # what unpickling raises depends on where it goes wrong
        raise UsageError(f"{path} is no checkpoint, or not a whole one") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of this trainer's methods holds, as `load_tensors` has it.

    Raises:
        UsageError: it is missing, not whole, damaged, or of another program.
    """
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in KEYS):
        raise UsageError(f"{path} is no checkpoint of this trainer")
    return checkpoint


def load_backbone(path: str | Path) -> Backbone:
    """Read a checkpoint's backbone; nothing else in it is looked at, nor are files that it speaks of.

    Raises:
        UsageError: it is missing, not whole, of another program, or its tensors are not those of its network.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    settings, method = checkpoint["hyper_parameters"], checkpoint["method"]
    arch, stem = settings.get("arch"), settings.get("stem")
    if method not in (*KINDS, *LABELLED) or not is_network(arch):
        raise UsageError(f"{path} is a checkpoint of method {method} and network {arch}, which are unknown")
    net = network(arch, stem)
    tensors = checkpoint["state_dict"].items()
    try:
        net.load_state_dict({name.removeprefix(PREFIX): x for name, x in tensors if name.startswith(PREFIX)})
    except RuntimeError as error:  # a page of names and shapes
        raise UsageError(f"{path} holds other tensors than those of a {arch} with the {stem} stem") from error
    # On CPUs as on GPUs in mixed precision, convolutions are fastest in this order.
    net.to(memory_format=torch.channels_last)
    data = checkpoint["datamodule_hyper_parameters"]
    return Backbone(path, net, method, arch, stem, data, checkpoint["epoch"], checkpoint["global_step"])


def differences(backbone: Backbone) -> str:
    """How its network is unlike torchvision's of that name; nothing where it is the same but for fc."""
    if backbone.arch == "convnet":
        return "three convolutions, no network of torchvision"
    if name := timm_name(backbone.arch):
        return f"tensors are those of timm.create_model('{name}', num_classes=0)"
    if backbone.stem == "small":
        return "conv1 is 3x3 with stride 1 and padding 1, maxpool is the identity"
    return ""


def export_backbone(backbone: Backbone, stem: Path) -> list[Path]:
    """Write the network's state_dict, named as in torchvision or timm, to ``<stem>.pth`` and
    ``<stem>.safetensors``.

    A ResNet of torchvision lacks but fc's tensors, unless `differences` names more. The second file says in
    its metadata what the tensors are.
    """
    tensors: dict[str, Tensor] = {
        name: x.contiguous() for name, x in backbone.network.state_dict().items()
    }  # not channels_last, which safetensors does not know
    metadata = {name: str(getattr(backbone, name)) for name in ("method", "arch", "stem", "epoch", "step")}
    metadata |= {"format": "pt", "differences": differences(backbone)}
    files = [stem.with_name(stem.name + ending) for ending in (".pth", ".safetensors")]
    with replacing(files[0]) as file:
        torch.save(tensors, file)
    with replacing(files[1]) as file:
        file.write(save(tensors, metadata))
    return files
