"""The queue of keys."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .functional import check_floating, check_floating_dtype, check_integer


class KeyQueue(nn.Module):
    """A first-in, first-out queue of keys: the dictionary of MoCo (He et al., CVPR 2020).

    It starts with random unit rows, as MoCo's does. `keys` and `pointer` are buffers, so the queue moves,
    is saved and is resumed with the model that holds it.

    Args:
        size: number of keys K.
        dim: dimension D of a key.
        dtype: float16, bfloat16, float32 or float64.
        device: where the buffers live.

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
    ) -> None:
        super().__init__()
        size, dim = check_integer("size", size, 1), check_integer("dim", dim, 1)
        check_floating_dtype(dtype)
        keys = nn.functional.normalize(torch.randn(size, dim, device=device), dim=1)
        self.register_buffer("keys", keys.to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64, device=device))

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
    def from_moco(cls, state_dict: Mapping[str, Tensor]) -> KeyQueue:
        """The queue in a checkpoint of MoCo's code: its (D, K) ``queue`` and (1,) ``queue_ptr``.

        Args:
            state_dict: a model's state, names prefixed or not (``module.queue``), or the checkpoint around
                it (``{"state_dict": …}``).

        Raises:
            ValueError: there is no such queue, or its shape or pointer makes no sense.
        """
        inner = state_dict.get("state_dict")
        if isinstance(inner, Mapping):
            state_dict = inner
        found = {
            name: [value for key, value in state_dict.items() if key.split(".")[-1] == name]
            for name in ("queue", "queue_ptr")
        }
        for name, values in found.items():
            if len(values) != 1:
                raise ValueError(f"state_dict must hold one entry {name!r}, found {len(values)}")
        (keys,), (pointer,) = found["queue"], found["queue_ptr"]
        if keys.ndim != 2 or keys.numel() == 0:
            raise ValueError(f"state_dict's queue must be (D, K), got {tuple(keys.shape)}")
        if pointer.numel() != 1 or not 0 <= int(pointer) < keys.shape[1]:
            raise ValueError(
                f"state_dict's queue_ptr must be one row below {keys.shape[1]}, got {pointer.tolist()}"
            )
        queue = cls(keys.shape[1], keys.shape[0], dtype=keys.dtype, device=keys.device)
        queue.keys.copy_(keys.T)
        queue.pointer.copy_(pointer.reshape(()))
        return queue

    def extra_repr(self) -> str:
        size, dim = self.keys.shape
        return f"size={size}, dim={dim}, dtype={self.keys.dtype}"
