"""What the processes of a group, its ranks, say to each other around an operation of ours.

First they agree: each says how many rows it has, and what must be the same everywhere, or that it refuses its
arguments. So what is wrong on one rank is an error on all, and nothing has been exchanged when it is raised.
Then rows are gathered, and what belongs to rows is sent to the ranks that own them. Numbers travel as bytes:
what arrives is, bit for bit, what was sent, of whatever dtype, and is added up in the order of the ranks.

Agreeing is the hosts' business: it goes through the host's memory, over a group of its own where the group
serves only GPUs, so that no host waits for its GPU.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# As newer versions call it, and older ones.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

_ALIGNMENT = 16  # bytes, of each tensor in a message
_MOST_OWN = 8  # numbers that a rank says of itself


class Disagreement(ValueError):
    """The ranks of a group cannot do together what they were called for. All of them raise it."""


class _Refusal(NamedTuple):
    error: str
    message: str


def check_group(group: Any) -> None:
    """Refuse what is neither None nor a process group that this process belongs to."""
    if group is None:
        return
    if not dist.is_available():
        raise RuntimeError("group must be None: this PyTorch was built without torch.distributed")
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must be a process group that this process belongs to, got another's")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


def named(group_name: str) -> dist.ProcessGroup:
    """The group of that name, which is what operators are given, as PyTorch's own are."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group_name)  # type: ignore[arg-type]  # older versions have no GroupName


def copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy` of a module whose copy speaks to the same ranks: a group is no module's own."""
    group = module.__dict__.get("group")
    memo[id(group)] = group
    twin = memo[id(module)] = module.__class__.__new__(module.__class__)
    twin.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return twin


@functools.lru_cache(maxsize=16)
def mesh(group: dist.ProcessGroup, device_type: str) -> DeviceMesh:
    """The group as the mesh that a DTensor is on."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, device_type)


def as_shards(rows: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """A rank's rows of so many, cut as `torch.chunk` cuts, as checkpoints know them: a DTensor."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((count, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, mesh(group, rows.device.type), [Shard(0)], run_check=False, shape=shape, stride=stride
    )


def own_shard(saved: Tensor, first: int, count: int) -> Tensor:
    """Some rows of a checkpoint's: of a whole tensor, or of shards, gathered if cut otherwise."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(saved, DTensor):
        return saved[first : first + count]
    if saved.placements == (Shard(0),):
        local, each = saved.to_local(), -(-len(saved) // saved.device_mesh.size())
        if len(local) == count and (not count or each * saved.device_mesh.get_local_rank() == first):
            return local
    return saved.full_tensor()[first : first + count]


class Ranks:
    """A group around one operation, which errors name.

    Args:
        group: of this process and others; each calls the same operations on it in the same order.
        operation: what a user would call it.
        on_hosts: exchange what is in the hosts' memory.

    Attributes:
        size: P, how many ranks there are.
        rank: which of them this process is.
    """

    def __init__(self, group: dist.ProcessGroup, operation: str, on_hosts: bool = False) -> None:
        self.group, self.operation = _control_group(group) if on_hosts else group, operation
        self.size, self.rank = group.size(), group.rank()

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Whatever is refused in this block, before the ranks have agreed, the others are told of."""
        try:
            yield
        except Disagreement:
            raise
        except Exception as error:
            with contextlib.suppress(
                RuntimeError, Disagreement
            ):  # the error of this rank is the one that counts here
                self._exchange_headers({}, {}, _Refusal(type(error).__name__, str(error)))
            raise

    def agree(self, alike: Mapping[str, Any], **own: int) -> dict[str, list[int]]:
        """What each rank says of itself: of each name a number a rank.

        Args:
            alike: what must be the same on all ranks, by the name that the user knows it by.
            own: this rank's numbers, of which all ranks have the same names.

        Raises:
            Disagreement: something is not the same on all ranks, or a rank has refused its arguments. On each
                rank the message names ranks and values.
        """
        return self._exchange_headers(alike, own, None)

    def _exchange_headers(
        self, alike: Mapping[str, Any], own: Mapping[str, int], refusal: _Refusal | None
    ) -> dict[str, list[int]]:
        said = {"operation": self.operation, **{name: _plain(value) for name, value in alike.items()}}
        digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=7).digest()
        numbers = [refusal is not None, int.from_bytes(digest, "little"), *own.values()]
        header = torch.tensor(numbers + [0] * (2 + _MOST_OWN - len(numbers)), dtype=torch.int64, device="cpu")
        headers = torch.empty(self.size, len(header), dtype=torch.int64, device="cpu")
        with self._failing("agreeing"):
            control = _control_group(self.group)
            _all_gather(headers.view(-1), header, group=control)
        refused, digests, *columns = headers.T.tolist()
        if any(refused) or len(set(digests)) > 1:
            everything: list[Any] = [None] * self.size
            with self._failing("agreeing"):
                dist.all_gather_object(everything, (said, refusal), group=control)
            raise Disagreement(self._difference(everything))
        return dict(zip(own, columns, strict=False))

    def _difference(self, everything: Sequence[tuple[dict[str, Any], _Refusal | None]]) -> str:
        """Who refused, or what differs."""
        start = f"{self.operation} among {self.size} ranks"
        refusals = [f"rank {r}: {no.error}: {no.message}" for r, (_, no) in enumerate(everything) if no]
        if refusals:
            return f"{start}: arguments were refused on {'; '.join(refusals)}"
        values: dict[str, dict[str, list[int]]] = {}
        for rank, (said, _) in enumerate(everything):
            for name, value in said.items():
                values.setdefault(name, {}).setdefault(str(value), []).append(rank)
        operations = values.pop("operation")
        if len(operations) > 1:
            values = {"the operation": operations}
        differing = {name: by_value for name, by_value in values.items() if len(by_value) > 1}
        words = [
            f"{name} is {', '.join(f'{value} on {_ranks(ranks)}' for value, ranks in by_value.items())}"
            for name, by_value in differing.items()
        ]
        return f"{start}: all must be called alike, but {'; '.join(words)}"

    def gather(self, tensors: Sequence[Tensor], counts: Sequence[int], row: Sequence[int]) -> Gathering:
        """Begin to gather the rows of all ranks.

        Args:
            tensors: what this rank has of its rows, all of one device.
            counts: how many rows each rank has.
            row: for each tensor, which of its dimensions counts rows.
        """
        most = max(counts)
        padded = [_padded(x.detach(), most, dim) for x, dim in zip(tensors, row, strict=True)]
        sizes = [-x.nbytes % _ALIGNMENT + x.nbytes for x in padded]
        message = _joined([_bytes(x) for x in padded], sizes)
        messages = message.new_empty((self.size, len(message)))
        work = None
        if len(message):
            with self._failing("gathering rows"):
                work = _all_gather(messages.view(-1), message, group=self.group, async_op=True)
        return Gathering(self, work, message, messages, padded, sizes, list(counts), list(row))

    def send(self, rows: Tensor, counts: Sequence[int], received: Sequence[int]) -> Sending:
        """Begin to send rows to the ranks that they belong to.

        Args:
            rows: (Σ counts, …), in the order of the ranks.
            counts: how many of them belong to each rank.
            received: how many rows each rank sends to this one.
        """
        rows = rows.detach().contiguous()
        arriving = rows.new_empty((sum(received), *rows.shape[1:]))
        unit = rows.itemsize * rows[:1].numel() if len(rows) else arriving.itemsize * arriving[:1].numel()
        work = None
        with self._failing("sending rows"):
            work = dist.all_to_all_single(
                _bytes(arriving),
                _bytes(rows),
                [unit * count for count in received],
                [unit * count for count in counts],
                group=self.group,
                async_op=True,
            )
        return Sending(self, work, rows, arriving, list(received))

    def sum(self, x: Tensor) -> Tensor:
        """Σ over the ranks, of values each of which all ranks but one have as 0: exact, in any order."""
        x = x.contiguous()
        with self._failing("adding up"):
            dist.all_reduce(x, group=self.group)
        return x

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Says in an error of the network which operation of whom it has ended."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.operation}: {what} failed on rank {self.rank} of {self.size}: {error}"
            ) from error


class Gathering:
    """Rows on their way to all ranks."""

    def __init__(
        self, ranks: Ranks, work: Any, message: Tensor, messages: Tensor, like: Sequence[Tensor],
        sizes: Sequence[int], counts: Sequence[int], row: Sequence[int],
    ) -> None:  # fmt: skip
        self._ranks, self._work, self._message, self._messages = ranks, work, message, messages
        self._like, self._sizes, self._counts, self._row = like, sizes, counts, row

    def wait(self) -> list[list[Tensor]]:
        """Of each tensor, the rows of each rank. On a GPU its stream waits, not the host."""
        if self._work is not None:
            with self._ranks._failing("gathering rows"):
                self._work.wait()
        gathered, start = [], 0
        for x, size, row in zip(self._like, self._sizes, self._row, strict=True):
            every = self._messages[:, start : start + x.nbytes].reshape(-1).view(x.dtype)
            every = every.view(self._ranks.size, *x.shape)
            gathered.append([part.narrow(row, 0, n) for part, n in zip(every, self._counts, strict=True)])
            start += size
        return gathered


class Sending:
    """Rows on their way to their owners."""

    def __init__(
        self, ranks: Ranks, work: Any, leaving: Tensor, arriving: Tensor, received: Sequence[int]
    ) -> None:
        self._ranks, self._work, self._leaving, self._arriving = ranks, work, leaving, arriving
        self._received = received

    def wait(self) -> list[Tensor]:
        """What each rank has sent to this one."""
        if self._work is not None:
            with self._ranks._failing("sending rows"):
                self._work.wait()
        return list(self._arriving.split(list(self._received)))


def _padded(x: Tensor, count: int, dim: int) -> Tensor:
    """Contiguous, with zeros for the rows that it lacks."""
    if x.shape[dim] == count:
        return x.contiguous()
    padded = x.new_zeros((*x.shape[:dim], count, *x.shape[dim + 1 :]))
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    return padded


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor; one of a single number may have any stride."""
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


def _joined(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """One after the other, each at a multiple of the alignment."""
    if len(parts) == 1 and len(parts[0]) == sizes[0]:
        return parts[0]
    message, start = parts[0].new_empty(sum(sizes)), 0
    for part, size in zip(parts, sizes, strict=True):
        message[start : start + len(part)] = part
        start += size
    return message


def _plain(value: Any) -> Any:
    """What JSON can say."""
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


_control_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def _control_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks through which hosts agree."""
    if _serves_hosts(group):
        return group
    known = _control_groups.get(group)
    if known is None:
        known = _control_groups[group] = _group_of_hosts(group)
    return known


def _serves_hosts(group: dist.ProcessGroup) -> bool:
    return any(device.type == "cpu" for device in group._device_types)


def _group_of_hosts(group: dist.ProcessGroup) -> dist.ProcessGroup:
    ranks = dist.get_process_group_ranks(group)
    own = dist.new_group(ranks, timeout=_timeout(group), backend="gloo", use_local_synchronization=True)
    assert isinstance(own, dist.ProcessGroup)
    return own


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """That of the group's own operations, where it says so."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout
    return None
