"""The queue of keys."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ._checks import check_flag, check_floating, check_floating_dtype, check_integer
from ._eager import eager
from ._ranks import Ranks, as_shards, check_group, copied, own_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

_DRAWN_ROWS = 4096  # at a time: what a rank holds of the rows that are another's while it draws its own


class KeyQueue(nn.Module):
    """A first-in, first-out queue of keys: the dictionary of MoCo (He et al., CVPR 2020).

    It starts with random unit rows, as MoCo's does. `keys` and `pointer` are buffers, so the queue moves,
    is saved and is resumed with the model that holds it: a state_dict without them is refused by
    ``load_state_dict(strict=True)``, so that no queue is lost unnoticed.

    With a group the queue is cut into one shard of consecutive rows a rank, ⌈K/P⌉ rows each as far as they
    go, as by `torch.chunk`. All ranks together behave as one process that holds it whole. Seed all ranks
    alike to start with the same queue on any number of them; with other seeds the run is as valid, but not
    equal to one of another number. `keys` and `pointer` are then attributes that move, are saved and are
    loaded like buffers, but are none: DistributedDataParallel would overwrite all shards by rank 0's. In a
    state_dict ``keys`` is a `DTensor` of the whole queue, so `torch.distributed.checkpoint` saves each row
    once and loads it on any number of ranks (``set_model_state_dict`` wants the module inside
    DistributedDataParallel, as it renames only buffers); `torch.save` on one rank would save only the rows of
    that rank, unless of ``keys.full_tensor()``. ``load_state_dict`` takes a `DTensor`, or a whole (K, D)
    tensor such as the state of a queue without a group.

    Args:
        size: number of keys K.
        dim: dimension D of a key.
        dtype: float16, bfloat16, float32 or float64. Under mixed precision best that of the queries: losses
            multiply in it, and a queue in float32 would be rounded to it at every call.
        device: where the buffers live.
        persistent: whether the queue is a part of state_dicts. One that is not is neither saved nor wanted,
            as suits checkpoints that came without a queue; it starts anew.
        group: the processes that hold the queue together; None: this process holds it alone. Beside a queue
            on a GPU the group must serve GPUs.

    Attributes:
        keys: (K, D) buffer; with a group (K_r, D), this rank's shard, which may be empty.
        pointer: () int64 buffer, the row that the next key overwrites; with a group that of the whole queue,
            equal on all ranks.

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
    group: ProcessGroup | None = None

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
        size, dim = check_integer("size", size, 1), check_integer("dim", dim, 1)
        check_floating_dtype(dtype)
        check_flag("persistent", persistent)
        check_group(group)
        rows = range(size) if group is None else _shard(size, group.rank(), group.size())
        pointer = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("keys", _unit_rows(size, dim, rows, dtype, device), persistent)
        self.register_buffer("pointer", pointer, persistent)
        if group is not None:
            self.group, self._size = group, size
            self._unregister()
            self._note_pointer(0)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest rows by `keys` (N, D), in order; of more than K keys the last K remain.

        N need not divide the size. Keys are stored as they come: pass them normalised. Does not wait for the
        device, and without a group can be captured in a CUDA graph.

        With a group all ranks call it, each with keys of its own, whose number may differ and be 0: what is
        stored are the keys of all, in the order of the ranks. A key travels once, to the rank that holds the
        row it takes.

        Raises:
            TypeError, ValueError: `keys` is not a floating-point (N, D) tensor on the queue's device. With a
                group, the same is refused by all ranks if by one, as it is where their queues differ.
        """
        if self.group is not None:
            self._enqueue_together(keys, Ranks(self.group, "KeyQueue.enqueue"))
            return
        self._check(keys)
        size = len(self.keys)
        kept = keys[-size:] if len(keys) > size else keys
        dropped = len(keys) - len(kept)
        rows = torch.arange(dropped, len(keys), device=keys.device)
        self.keys.index_copy_(0, (self.pointer + rows) % size, kept.to(self.keys.dtype))
        self.pointer.add_(len(keys)).remainder_(size)

    def _check(self, keys: Tensor) -> None:
        check_floating("keys", keys)
        dim = self.keys.shape[1]
        if keys.ndim != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys must be (N, {dim}), got {tuple(keys.shape)}")
        if keys.device != self.keys.device:
            raise ValueError(f"keys must be on the queue's device, {self.keys.device}, got {keys.device}")

    @eager("ranks agree on the host who gets which keys")
    def _enqueue_together(self, keys: Tensor, ranks: Ranks) -> None:
        with ranks.telling():
            self._check(keys)
            if keys.numel() and keys.untyped_storage().data_ptr() == self.keys.untyped_storage().data_ptr():
                raise ValueError("keys must not be rows of the queue that they overwrite: pass a clone")
            pointer = self._pointer_on_host()
        alike = {"size": self._size, "dim": self.keys.shape[1], "dtype": self.keys.dtype, "pointer": pointer}
        counts = ranks.agree(alike, rows=len(keys))["rows"]
        if sum(counts) == 0:
            return
        batch = _Batch(counts, pointer, self._size)
        others = [rank for rank in range(ranks.size) if rank != ranks.rank]
        leaving = {rank: batch.moves(ranks.rank, rank) for rank in others}
        arriving = {rank: batch.moves(rank, ranks.rank) for rank in others}
        parts = [keys[move.key : move.key + move.length] for moves in leaving.values() for move in moves]
        parcel = torch.cat([part.to(self.keys.dtype) for part in parts]) if parts else self.keys[:0]
        arrived = ranks.send(
            parcel,
            [_count(leaving.get(rank, ())) for rank in range(ranks.size)],
            [_count(arriving.get(rank, ())) for rank in range(ranks.size)],
        ).wait()
        # Nothing is written before all keys are there: what fails on its way leaves the queue as it was.
        for rank, moves in arriving.items():
            self._write(arrived[rank].split([move.length for move in moves]), moves)
        own = batch.moves(ranks.rank, ranks.rank)
        self._write([keys[move.key : move.key + move.length] for move in own], own)
        self.pointer.fill_(batch.next_pointer)
        self._note_pointer(batch.next_pointer)

    def _write(self, parts: Sequence[Tensor], moves: Sequence[_Move]) -> None:
        for part, move in zip(parts, moves, strict=True):
            self.keys[move.row : move.row + move.length].copy_(part)

    def _pointer_on_host(self) -> int:
        """The pointer's value. The host waits for it only if something else than `enqueue` has written it."""
        seen, version = self._seen, _version(self.pointer)
        if self.pointer is not seen.pointer or version is None or version != seen.version:
            self._note_pointer(int(self.pointer))
        return self._seen.value

    def _note_pointer(self, value: int) -> None:
        self._seen = _Seen(self.pointer, _version(self.pointer), value)

    def _unregister(self) -> None:
        """Make attributes of the buffers."""
        for name in ("keys", "pointer"):
            self.__dict__[name] = self._buffers.pop(name)

    @contextlib.contextmanager
    def _registered(self) -> Iterator[None]:
        """With a group: keys and pointer are buffers in this block, so `Module` treats them as such."""
        if self.group is None:
            yield
            return
        for name in ("keys", "pointer"):
            self._buffers[name] = self.__dict__.pop(name)
        try:
            yield
        finally:
            self._unregister()

    def _apply(self, *arguments: Any, **settings: Any) -> KeyQueue:
        with self._registered():
            return super()._apply(*arguments, **settings)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self._registered():
            super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}keys"
        if self.group is not None and name in destination:
            destination[name] = as_shards(destination[name], self._size, self.group)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        name = f"{prefix}keys"
        if name in state_dict and "keys" not in self._non_persistent_buffers_set:
            try:
                mine = self._own_rows(state_dict[name])
            except ValueError as error:
                error_msgs.append(f"{name}: {error}")
                mine = self.keys
            if mine is not state_dict[name]:
                state_dict = {**state_dict, name: mine}
        with self._registered():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def _own_rows(self, keys: Any) -> Any:
        """What this process holds of a state's keys."""
        if self.group is None:
            if _is_dtensor(keys):
                raise ValueError(
                    "a DTensor, the state of a queue with a group, needs one here; load it by "
                    "torch.distributed.checkpoint, or pass its full_tensor()"
                )
            return keys
        if not isinstance(keys, Tensor):
            return keys
        whole = (self._size, self.keys.shape[1])
        if keys.shape != whole:
            raise ValueError(
                f"size mismatch: the checkpoint's is {list(keys.shape)}, that of all ranks {list(whole)}"
            )
        rows = _shard(self._size, self.group.rank(), self.group.size())
        own = own_shard(keys, rows.start, len(rows))
        # Where a state is assigned, a view of the whole would keep all of it.
        return own if own.untyped_storage().nbytes() == own.nbytes else own.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyQueue:
        return copied(self, memo)

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError(
                "a KeyQueue with a group cannot be pickled, for a group belongs to its process: save its "
                "state_dict() by torch.distributed.checkpoint"
            )
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
            group: as of `KeyQueue`; each rank passes the whole state and keeps its shard.

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
        shard, dim = self.keys.shape
        if self.group is None:
            return f"size={shard}, dim={dim}, dtype={self.keys.dtype}"
        rows = _shard(self._size, self.group.rank(), self.group.size())
        return (
            f"size={self._size}, dim={dim}, dtype={self.keys.dtype}, "
            f"rows {rows.start}:{rows.stop} on rank {self.group.rank()} of {self.group.size()}"
        )


class _Seen(NamedTuple):
    """What the host knows of a pointer."""

    pointer: Tensor
    version: int | None
    value: int


def _version(x: Tensor) -> int | None:
    """How often it was written; unknown of an inference tensor, which is therefore never as it was."""
    return None if x.is_inference() else x._version


class _Move(NamedTuple):
    """Keys of one rank that take consecutive rows of one shard."""

    key: int  # the first, among those of its rank
    row: int  # its row in the shard
    length: int


def _count(moves: Sequence[_Move]) -> int:
    return sum(move.length for move in moves)


class _Batch:
    """The rows that the keys of all ranks take: key i, counted in the order of the ranks, takes row
    pointer + i modulo K, if it is among the last K.

    Args:
        counts: how many keys each rank has.
        pointer: where the first goes.
        size: K.
    """

    def __init__(self, counts: Sequence[int], pointer: int, size: int) -> None:
        self._counts, self._pointer, self._size = counts, pointer, size
        *self._before, total = itertools.accumulate(counts, initial=0)
        self._dropped = max(total - size, 0)
        self.next_pointer = (pointer + total) % size

    def moves(self, sender: int, owner: int) -> list[_Move]:
        """What the one rank sends to the other: two moves at most, as the keys of one wrap once at most."""
        shard = _shard(self._size, owner, len(self._counts))
        before = self._before[sender]
        skipped = min(max(self._dropped - before, 0), self._counts[sender])
        kept = self._counts[sender] - skipped
        start = (self._pointer + before + skipped) % self._size
        moves = []
        for first in (start, start - self._size):  # the row of the first kept key, and after the wrap
            low, high = max(first, shard.start), min(first + kept, shard.stop)
            if low < high:
                moves.append(_Move(skipped + low - first, low - shard.start, high - low))
        return moves


def _shard(size: int, rank: int, ranks: int) -> range:
    """The rows of a rank, as `torch.chunk` and `DTensor` cut them."""
    each = -(-size // ranks)
    return range(min(rank * each, size), min((rank + 1) * each, size))


def _unit_rows(
    size: int, dim: int, rows: range, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """Those rows of a whole of random ones, which are drawn alike whichever are wanted."""
    keys = torch.empty(len(rows), dim, dtype=dtype, device=device)
    for start in range(0, size, _DRAWN_ROWS):
        drawn = torch.randn(min(_DRAWN_ROWS, size - start), dim, device=device)
        low, high = max(start, rows.start), min(start + len(drawn), rows.stop)
        if low < high:
            wanted = nn.functional.normalize(drawn[low - start : high - start], dim=1)
            keys[low - rows.start : high - rows.start] = wanted
    return keys


def _is_dtensor(x: Any) -> TypeGuard[DTensor]:
    """Without importing what is slow to import: before it is, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


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
