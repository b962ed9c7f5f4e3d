"""The queue of keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_flag, check_floating, check_floating_dtype, check_integer


class KeyQueue(nn.Module):
    """A first-in, first-out queue of keys: the dictionary of MoCo (He et al., CVPR 2020).

    It starts with random unit rows, as MoCo's does. `keys` and `pointer` are buffers, so the queue moves,
    is saved and is resumed with the model that holds it: a state_dict without them is refused by
    ``load_state_dict(strict=True)``, so that no queue is lost unnoticed.

    Args:
        size: number of keys K.
        dim: dimension D of a key.
        dtype: float16, bfloat16, float32 or float64. Under mixed precision best that of the queries: losses
            multiply in it, and a queue in float32 would be rounded to it at every call.
        device: where the buffers live.
        persistent: whether the queue is a part of state_dicts. One that is not is neither saved nor wanted,
            as suits checkpoints that came without a queue; it starts anew.

    Attributes:
        keys: (K, D) buffer.
        pointer: () int64 buffer, the row that the next key overwrites.

    Example:
        >>> import torch
        >>> from contrastive_ops import KeyQueue
        >>> queue = KeyQueue(size=8, dim=4)
        >>> queue.enqueue(torch.ones(3, 4))
        >>> queue.pointer.item(), queue.keys[:3].sum().item()
        (3, 12.0)
    """

    keys: Tensor
    pointer: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        persistent: bool = True,
    ) -> None:
        super().__init__()
        size, dim = check_integer("size", size, 1), check_integer("dim", dim, 1)
        check_floating_dtype(dtype)
        check_flag("persistent", persistent)
        keys = nn.functional.normalize(torch.randn(size, dim, device=device), dim=1)
        pointer = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("keys", keys.to(dtype), persistent)
        self.register_buffer("pointer", pointer, persistent)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest rows by `keys` (N, D), in order; of more than K keys the last K remain.

        N need not divide the size. Keys are stored as they come: pass them normalised. Does not wait for the
        device, and can be captured in a CUDA graph.

        Raises:
            TypeError, ValueError: `keys` is not a floating-point (N, D) tensor on the queue's device.
        """
        check_floating("keys", keys)
        size, dim = self.keys.shape
        if keys.ndim != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys must be (N, {dim}), got {tuple(keys.shape)}")
        if keys.device != self.keys.device:
            raise ValueError(f"keys must be on the queue's device, {self.keys.device}, got {keys.device}")
        kept = keys[-size:] if len(keys) > size else keys
        dropped = len(keys) - len(kept)
        rows = torch.arange(dropped, len(keys), device=keys.device)
        self.keys.index_copy_(0, (self.pointer + rows) % size, kept.to(self.keys.dtype))
        self.pointer.add_(len(keys)).remainder_(size)

    @classmethod
    def from_moco(cls, state_dict: Mapping[str, Any], prefix: str | None = None) -> KeyQueue:
        """The queue in a checkpoint of MoCo's code: its (D, K) ``queue`` and (1,) ``queue_ptr``.

        Args:
            state_dict: a model's state, names prefixed or not (``module.queue``), or the checkpoint around
                it (``{"state_dict": …}``).
            prefix: what stands before ``queue``, such as ``"module."``, where there are several.

        Raises:
            TypeError: one of the two is not the tensor that it must be.
            ValueError: there is no such queue, or more than one, or its shape or pointer makes no sense.

        Example:
            >>> import torch
            >>> from contrastive_ops import KeyQueue
            >>> state = {"rgb.queue": torch.ones(4, 8), "rgb.queue_ptr": torch.tensor([3])}
            >>> state |= {"flow.queue": torch.zeros(4, 8), "flow.queue_ptr": torch.tensor([5])}
            >>> KeyQueue.from_moco(state, prefix="flow.").pointer.item()
            5
        """
        state_dict = _model_state(state_dict)
        found = _moco_queues(state_dict)
        if prefix is not None:
            if not isinstance(prefix, str):
                raise TypeError(f"prefix must be a string or None, got {prefix!r}")
            found = [name for name in found if name.removesuffix("queue").strip(".") == prefix.strip(".")]
        if len(found) != 1:
            raise ValueError(_which_queue(state_dict, prefix))
        keys, pointer = _moco_queue(state_dict, found[0])
        queue = cls(len(keys), keys.shape[1], dtype=keys.dtype, device=keys.device)
        queue.keys.copy_(keys)
        queue.pointer.copy_(pointer)
        return queue

    @staticmethod
    def rename_moco(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint of MoCo's code, for a model that holds a `KeyQueue` where MoCo's has two buffers.

        Every (D, K) ``queue`` with its ``queue_ptr`` becomes the ``queue.keys`` and ``queue.pointer`` of a
        `KeyQueue` named ``queue``, prefixed as it was; all else stays as it is. Tensors are not copied.

        Args:
            state_dict: as of `from_moco`.

        Raises:
            TypeError, ValueError: as of `from_moco`; a state without a queue is returned as it is.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from contrastive_ops import KeyQueue
            >>> model = nn.ModuleDict({"encoder_q": nn.Linear(3, 4), "queue": KeyQueue(8, 4)})
            >>> moco = {f"encoder_q.{name}": x for name, x in nn.Linear(3, 4).state_dict().items()}
            >>> moco |= {"queue": torch.randn(4, 8), "queue_ptr": torch.tensor([5])}
            >>> model.load_state_dict(KeyQueue.rename_moco(moco))
            <All keys matched successfully>
        """
        renamed = dict(_model_state(state_dict))
        for name in _moco_queues(renamed):
            keys, pointer = _moco_queue(renamed, name)
            del renamed[name], renamed[f"{name}_ptr"]
            renamed |= {f"{name}.keys": keys, f"{name}.pointer": pointer}
        return renamed

    def extra_repr(self) -> str:
        size, dim = self.keys.shape
        return f"size={size}, dim={dim}, dtype={self.keys.dtype}"


def _model_state(state_dict: Any) -> Mapping[str, Any]:
    """A model's state, out of the checkpoint around it if there is one."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    inner = state_dict.get("state_dict")
    return inner if isinstance(inner, Mapping) else state_dict


def _moco_queues(state_dict: Mapping[str, Any], entry: str = "queue") -> list[str]:
    return [name for name in state_dict if isinstance(name, str) and name.split(".")[-1] == entry]


def _which_queue(state_dict: Mapping[str, Any], prefix: str | None) -> str:
    """Why no queue, or not a single one, was found."""
    found = _moco_queues(state_dict)
    prefixes = " or ".join(f"prefix={name.removesuffix('queue')!r}" for name in found)
    if prefix is not None:
        return f"state_dict has no queue with prefix {prefix!r}, but {prefixes or 'none'}"
    if found:
        return f"state_dict must hold one entry 'queue', found {len(found)}; choose by {prefixes}"
    pointers = ", ".join(_moco_queues(state_dict, "queue_ptr"))
    return f"state_dict must hold one entry 'queue', found 0{', though there is ' * bool(pointers)}{pointers}"


def _moco_queue(state_dict: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
    """The (K, D) keys and the () pointer of the (D, K) queue of that name."""
    if f"{name}_ptr" not in state_dict:
        raise ValueError(f"state_dict must hold one entry 'queue_ptr', found 0: {name} has no {name}_ptr")
    keys, pointer = state_dict[name], state_dict[f"{name}_ptr"]
    check_floating(f"state_dict's {name}", keys)
    if keys.ndim != 2 or keys.numel() == 0:
        raise ValueError(f"state_dict's {name} must be (D, K), got {tuple(keys.shape)}")
    if not isinstance(pointer, Tensor) or pointer.is_floating_point() or pointer.is_complex():
        got = pointer.dtype if isinstance(pointer, Tensor) else type(pointer).__name__
        raise TypeError(f"state_dict's {name}_ptr must be a torch.Tensor of integers, got {got}")
    if pointer.numel() != 1 or not 0 <= int(pointer) < keys.shape[1]:
        raise ValueError(
            f"state_dict's {name}_ptr must be one row below {keys.shape[1]}, got {pointer.tolist()}"
        )
    return keys.T, pointer.reshape(()).to(torch.int64)
