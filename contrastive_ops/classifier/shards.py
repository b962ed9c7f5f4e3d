"""Which instances, and which rows of the weight, belong together: the virtual shards of a classifier.

An instance belongs to one of S shards, whatever number of processes there is: a fixed permutation of the N
instances, a function of the seed, deals them out in turn, so shards are equal and no map is kept. A shard has
its own A/S rows of the weight and its own order of last sampling; a process holds some whole shards. So which
instances are active, which row is whose and every number drawn depend on S alone.

Inside the classifier instances have *local numbers*, from 0 on, shard after shard of this process's. With one
shard these are the instances themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .. import _store
from .indices import Indices

Unsigned = NDArray[np.uint64]

_ROUNDS = 6
_USE = 2  # of the seed; csrc/store/philox.h has the others


class Permutation:
    """A permutation of the numbers below N that looks drawn, and is computed: a Feistel network.

    It permutes a power of four from N on. What leaves [0, N) is permuted again until it comes back.

    Example:
        >>> import numpy as np
        >>> from contrastive_ops.classifier.shards import Permutation
        >>> shuffled = Permutation(10, seed=1)
        >>> shuffled.backwards(shuffled(np.arange(10))).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = np.uint64(count)
        self._bits = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._bits)) - 1)
        halves = seed & 0xFFFFFFFF, seed >> 32
        words = [_store.philox((round_, 0, 0, _USE), halves)[:2] for round_ in range(_ROUNDS)]
        self._keys = tuple(np.uint64(high << 32 | low) for low, high in words)

    def __call__(self, numbers: Indices) -> Indices:
        """Where the permutation takes them."""
        return self._walk(numbers, self._forwards)

    def backwards(self, numbers: Indices) -> Indices:
        """What it takes there."""
        return self._walk(numbers, self._backwards)

    def _walk(self, numbers: Indices, step: Any) -> Indices:
        moved = step(numbers.astype(np.uint64))
        (outside,) = np.nonzero(moved >= self._count)
        while len(outside):
            moved[outside] = step(moved[outside])
            outside = outside[moved[outside] >= self._count]
        return moved.astype(np.int64)

    def _forwards(self, x: Unsigned) -> Unsigned:
        left, right = x >> self._bits, x & self._mask
        for key in self._keys:
            left, right = right, left ^ self._mixed(right, key)
        return left << self._bits | right

    def _backwards(self, x: Unsigned) -> Unsigned:
        left, right = x >> self._bits, x & self._mask
        for key in reversed(self._keys):
            left, right = right ^ self._mixed(left, key), left
        return left << self._bits | right

    def _mixed(self, half: Unsigned, key: np.uint64) -> Unsigned:
        """Some bits of all of the half's and the key's (the finish of SplitMix64)."""
        x = half ^ key
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))) & self._mask


class Shards:
    """The shards of a classifier, and those of them that a process holds.

    Args:
        num_instances: N.
        active: A.
        count: S.
        seed: of the classifier.
        rank, ranks: which of how many processes this is.

    Attributes:
        own: the numbers of this process's shards.
        instances, rows: how many instances and rows of the weight each shard has.
        starts: the first local number of each own shard, and the number of all; `row_starts` likewise.
        first_row: which row of the whole weight this process's first is.

    Raises:
        ValueError: the processes cannot share the shards evenly, or the shards the rows.
    """

    def __init__(
        self, num_instances: int, active: int, count: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        if count > num_instances:
            raise ValueError(f"shards must be at most the {num_instances} instances, got {count}")
        if count % ranks:
            raise ValueError(
                f"shards must be a multiple of the number of ranks, {ranks}, which hold whole shards, got "
                f"{count}"
            )
        if active < num_instances and active % count:
            below, above = active // count * count, -(-active // count) * count
            near = above if below == 0 else f"{below} or {above}"
            raise ValueError(
                f"active must be a multiple of shards, {count}, which have equally many rows, got {active}: "
                f"{near} is one"
            )
        self.count, self.seed = count, seed
        self._permutation = Permutation(num_instances, seed) if count > 1 else None
        self.instances = [num_instances // count + (i < num_instances % count) for i in range(count)]
        full = active == num_instances
        self.rows = list(self.instances) if full else [active // count] * count
        first = rank * count // ranks
        self.own = range(first, first + count // ranks)
        self.starts = _ends([self.instances[i] for i in self.own])
        self.row_starts = _ends([self.rows[i] for i in self.own])
        self.first_row = sum(self.rows[:first])

    def rank_of(self, instances: Indices) -> Indices:
        """The process that holds each instance."""
        if self._permutation is None:
            return np.zeros_like(instances)
        return self._permutation(instances) % self.count // len(self.own)

    def local(self, instances: Indices) -> Indices:
        """The local numbers of instances, −1 of those that are another process's."""
        if self._permutation is None:
            return instances
        place = self._permutation(instances)
        own = place % self.count - self.own.start
        here = (own >= 0) & (own < len(self.own))
        return np.where(here, place // self.count + self.starts[np.where(here, own, 0)], -1)

    def instances_of(self, local: Indices) -> Indices:
        """The instances that have these local numbers."""
        if self._permutation is None:
            return local
        own = self.of(local)
        position = local - self.starts[own]
        return self._permutation.backwards(position * self.count + own + self.own.start)

    def of(self, local: Indices) -> Indices:
        """Which of the own shards each local number is in, counted from 0."""
        return np.searchsorted(self.starts, local, side="right") - 1

    def seed_of(self, shard: int) -> int:
        """What the first active set of a shard is drawn from."""
        return (self.seed + shard * 0x9E3779B97F4A7C15) % 2**64

    def active_set(self) -> Any:
        """Which of this process's instances are active, by local number."""
        sets = [
            _store.ActiveSet(self.instances[shard], self.rows[shard], self.seed_of(shard))
            for shard in self.own
        ]
        return sets[0] if self.count == 1 else ActiveSet(self, sets)


def _ends(sizes: Sequence[int]) -> Indices:
    return np.cumsum([0, *sizes], dtype=np.int64)


@dataclass(eq=False)
class Plan:
    """What activating a batch changes, as a `_store.Plan` says it, in several shards.

    Attributes:
        target: (B,) the row of each index.
        slots, incoming, evicted: (n,) rows that change hands, to whom and from whom.
        parts: the shards' own plans.
    """

    target: Indices
    slots: Indices
    incoming: Indices
    evicted: Indices
    parts: list[Any] = field(repr=False)


AnyPlan: TypeAlias = Plan | _store.Plan


class ActiveSet:
    """Several of `_store.ActiveSet` as one: of local numbers and of rows that follow one another.

    Args:
        shards: which there are.
        sets: one for each that this process holds.
    """

    def __init__(self, shards: Shards, sets: Sequence[Any]) -> None:
        self._shards, self._sets = shards, sets
        self._committing: tuple[Plan, bool] | None = None

    @property
    def instances(self) -> Indices:
        """(A/P,) the local number that owns each row."""
        starts = self._shards.starts
        return np.concatenate(
            [each.instances + start for each, start in zip(self._sets, starts, strict=False)]
        )

    def find(self, local: Indices) -> Indices:
        """The row of each local number, −1 where it is not active."""
        shards, own, rows = self._shards, self._shards.of(local), np.empty_like(local)
        for i, each in enumerate(self._sets):
            (here,) = np.nonzero(own == i)
            if len(here):
                slots = each.find(np.ascontiguousarray(local[here] - shards.starts[i]))
                rows[here] = np.where(slots < 0, -1, slots + shards.row_starts[i])
        return rows

    def plan(self, local: Indices) -> Plan:
        """What activating them takes; changes nothing.

        Raises:
            ValueError: they do not fit in the rows of their shard, which the message names.
        """
        shards, own, target = self._shards, self._shards.of(local), np.empty_like(local)
        parts, changes = [], []
        for i, each in enumerate(self._sets):
            (here,) = np.nonzero(own == i)
            try:
                part = each.plan(np.ascontiguousarray(local[here] - shards.starts[i]))
            except ValueError as error:
                raise ValueError(
                    f"shard {shards.own[i]} of {shards.count}: {error}; with fewer shards batches fall more "
                    "evenly"
                ) from error
            start, row = shards.starts[i], shards.row_starts[i]
            target[here] = part.target + row
            parts.append(part)
            changes.append((part.slots + row, part.incoming + start, part.evicted + start))
        slots, incoming, evicted = (np.concatenate(each) for each in zip(*changes, strict=True))
        return Plan(target, slots, incoming, evicted, parts)

    def awaits(self, plan: Plan) -> bool:
        """Whether the plan can be committed, and was not yet. A commit that was cut off is completed."""
        if self._committing is not None and self._committing[0] is plan:
            self._complete()
            return False
        return all(each.awaits(part) for each, part in zip(self._sets, plan.parts, strict=True))

    def commit(self, plan: Plan, protect: bool = True) -> None:
        """Make it so; with `protect`, the batch's rows are not evicted before a release."""
        if not self.awaits(plan):
            raise RuntimeError("the active set has changed since this plan was made, or it is another's")
        self._committing = plan, protect
        self._complete()

    def _complete(self) -> None:
        assert self._committing is not None
        plan, protect = self._committing
        for each, part in zip(self._sets, plan.parts, strict=True):
            if each.awaits(part):
                each.commit(part, protect)
        self._committing = None

    def release(self) -> None:
        """Unprotect all rows."""
        for each in self._sets:
            each.release()

    def state(self) -> list[dict[str, Any]]:
        """Of each shard."""
        return [each.state() for each in self._sets]

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Become that of the states of all shards."""
        for each, state in zip(self._sets, states, strict=True):
            each.load(state)
