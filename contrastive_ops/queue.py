"""The queue of keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import check_flag, check_floating, check_floating_dtype, check_integer
from ._eager import eager
from ._ranks import Ranks, as_shards, check_group, copied, own_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DRAWN_AT_A_TIME = 1024  # rows, by every rank of a group: each keeps its own


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
        group: a `torch.distributed.ProcessGroup`, whose ranks share the queue: each holds ⌈K/P⌉ consecutive
            rows, the last ones less, and `enqueue` is called by all. Seed the ranks alike, and the queue
            starts as one process's does.

    Attributes:
        keys: (K, D) buffer; in a group this rank's rows, no buffer, since DistributedDataParallel would
            overwrite it by rank 0's. In the state_dict these are a DTensor, which
            `torch.distributed.checkpoint` saves, and loads on any other number of ranks.
        pointer: () int64 buffer, the row that the next key overwrites; in a group of the whole queue.

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
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.size, dim = check_integer("size", size, 1), check_integer("dim", dim, 1)
        check_floating_dtype(dtype)
        check_flag("persistent", persistent)
        check_group(group)
        self.group, self._persistent = group, persistent
        first, last = (0, self.size) if group is None else self._rows_of(group.rank())
        keys = _unit_rows(self.size, dim, first, last, device).to(dtype)
        if group is None:
            self.register_buffer("keys", keys, persistent)
        else:
            self.keys = keys
        pointer = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("pointer", pointer, persistent)
        self._at = 0  # the pointer as the host knows it, which in a group decides who gets what

    def _rows_of(self, rank: int) -> tuple[int, int]:
        """The first of a rank's rows, and the one after its last."""
        assert self.group is not None
        share = -(-self.size // self.group.size())
        return min(rank * share, self.size), min((rank + 1) * share, self.size)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest rows by `keys` (N, D), in order; of more than K keys the last K remain.

        N need not divide the size. Keys are stored as they come: pass them normalised. Does not wait for the
        device, and can be captured in a CUDA graph.

        In a group all ranks call it, each with its own keys, any number of them. What the ranks hold together
        is then as one process's queue would be that gets the keys of all, in the order of the ranks. A key
        travels once, to the rank whose row it takes.

        Raises:
            TypeError, ValueError: `keys` is not a floating-point (N, D) tensor on the queue's device.
        """
        if self.group is not None:
            self._enqueue_across_ranks(keys)
            return
        self._check(keys)
        size = self.size
        kept = keys[-size:] if len(keys) > size else keys
        dropped = len(keys) - len(kept)
        rows = torch.arange(dropped, len(keys), device=keys.device)
        self.keys.index_copy_(0, (self.pointer + rows) % size, kept.to(self.keys.dtype))
        self.pointer.add_(len(keys)).remainder_(size)

    def _check(self, keys: Any) -> None:
        check_floating("keys", keys)
        dim = self.keys.shape[1]
        if keys.ndim != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys must be (N, {dim}), got {tuple(keys.shape)}")
        if keys.device != self.keys.device:
            raise ValueError(f"keys must be on the queue's device, {self.keys.device}, got {keys.device}")

    @eager("ranks agree on the host who gets which keys")
    def _enqueue_across_ranks(self, keys: Tensor) -> None:
        assert self.group is not None
        ranks = Ranks(self.group, "KeyQueue.enqueue")
        with ranks.telling():
            self._check(keys)
        alike = {"size": self.size, "D": self.keys.shape[1], "dtype": self.keys.dtype, "pointer": self._at}
        counts = ranks.agree(alike, keys=len(keys))["keys"]

        # The rows that the keys of each rank take, of which the last K keys count, and whose rows they are.
        taken = np.split(self._at + np.arange(sum(counts)), np.cumsum(counts)[:-1])
        lost = self._at + sum(counts) - self.size
        kept = [rows[rows >= lost] % self.size for rows in taken]
        share = -(-self.size // ranks.size)
        owners = [rows // share for rows in kept]

        own = owners[ranks.rank]
        leaving = keys[len(keys) - len(own) :].to(self.keys.dtype)
        order = np.argsort(own, kind="stable")
        if (np.diff(own) < 0).any():  # it goes around
            leaving = leaving[torch.from_numpy(order).to(keys.device)]
        sent = np.bincount(own, minlength=ranks.size).tolist()
        received = [int((of_rank == ranks.rank).sum()) for of_rank in owners]
        arrived = ranks.send(leaving, sent, received).wait()
        first, _ = self._rows_of(ranks.rank)
        rows = np.concatenate([rows[of == ranks.rank] for rows, of in zip(kept, owners, strict=True)]) - first
        self.keys.index_copy_(0, torch.from_numpy(rows).to(self.keys.device), torch.cat(arrived))
        self._at = (self._at + sum(counts)) % self.size
        self.pointer.fill_(self._at)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeyQueue:
        super()._apply(fn, recurse)
        if self.group is not None:
            self.keys = fn(self.keys)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.group is not None and self._persistent:
            destination[f"{prefix}keys"] = as_shards(self.keys, self.size, self.group)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name, wanted = f"{prefix}keys", (self.size, self.keys.shape[1])
        saved = state_dict.get(name)
        if self.group is not None and self._persistent:
            state_dict = {key: value for key, value in state_dict.items() if key != name}
            if saved is None:
                missing_keys.append(name)
            elif tuple(saved.shape) != wanted:
                error_msgs.append(f"{name} must be the whole queue's {wanted}, got {tuple(saved.shape)}")
            else:
                first, last = self._rows_of(self.group.rank())
                self.keys.copy_(own_shard(saved, first, last - first))
        elif hasattr(saved, "full_tensor"):
            error_msgs.append(
                f"{name} is in shards, and this queue has no group: pass {name}.full_tensor(), or load by "
                "torch.distributed.checkpoint"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not self.pointer.is_meta:
            self._at = int(self.pointer)

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyQueue:
        return copied(self, memo)

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError("a KeyQueue with a group cannot be pickled: save its state_dict()")
        return self.__dict__

    @classmethod
    def from_moco(
        cls, state_dict: Mapping[str, Any], prefix: str | None = None, group: ProcessGroup | None = None
    ) -> KeyQueue:
        """The queue in a checkpoint of MoCo's code: its (D, K) ``queue`` and (1,) ``queue_ptr``.

        Args:
            state_dict: a model's state, names prefixed or not (``module.queue``), or the checkpoint around
                it (``{"state_dict": …}``).
            prefix: what stands before ``queue``, such as ``"module."``, where there are several.
            group: as of the class; each rank keeps its rows.

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
        queue = cls(len(keys), keys.shape[1], dtype=keys.dtype, device=keys.device, group=group)
        queue.load_state_dict({"keys": keys, "pointer": pointer})
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
        rows, dim = self.keys.shape
        share = "" if self.group is None else f", rows of this rank={rows}"
        return f"size={self.size}, dim={dim}, dtype={self.keys.dtype}{share}"


def _unit_rows(size: int, dim: int, first: int, last: int, device: torch.device | str | None) -> Tensor:
    """Some of so many random unit rows, which are the same whichever of them are wanted."""
    rows = torch.empty(last - first, dim, device=device)
    for begin in range(0, size, _DRAWN_AT_A_TIME):
        drawn = torch.randn(min(_DRAWN_AT_A_TIME, size - begin), dim, device=device)
        own = slice(max(first, begin), max(min(last, begin + len(drawn)), max(first, begin)))
        rows[own.start - first : own.stop - first] = drawn[own.start - begin : own.stop - begin]
    return nn.functional.normalize(rows, dim=1)


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
