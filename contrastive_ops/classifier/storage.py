"""Where the rows of a classifier live while they are not active: in memory, or on disk (`disk.py`).

A record is (2, D): a weight and its momentum. Every tier keeps with it how many steps of the optimiser it has
taken. A row that was never committed is a random unit vector, a function of seed and instance, without
momentum: it takes no space until then.

Activation exchanges rows by one kernel that reads the records that `fetch` returns and writes those that
`reserve` returns; then `commit` makes these the rows' state.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .._state import tensor
from .._store import initial_rows
from .indices import Indices
from .records import Records

_ROWS_AT_A_TIME = 1 << 16  # that are copied from a device


class Storage(Protocol):
    """What a tier does. Arrays are the host's."""

    def fetch(self, instances: Indices) -> tuple[Records, Indices]:
        """The instances' records, to be read, and the steps (n,) that these have taken."""

    def peek(self, instances: Indices) -> tuple[Tensor, Indices]:
        """A copy (n, 2, D) of the instances' records, and their steps; nothing is changed."""

    def reserve(self, instances: Indices) -> Records:
        """Records for the instances, to be written."""

    def commit(self, instances: Indices, step: int) -> None:
        """Commit the records written to `reserve()` as the rows' state after `step` steps."""

    def prefetch(self, instances: Indices) -> None:
        """Start to bring near the records that `fetch` will be asked for next; instances are distinct."""

    def move(self, device: torch.device, function: Callable[[Tensor], Tensor]) -> None:
        """Follow the classifier to a device; `function` brings a tensor there."""

    def check(self, state: Any, steps: int) -> None:
        """Raise ValueError where `load_state_dict` would, and for rows that have taken more than `steps`."""

    def state_dict(self) -> Any:
        """The rows as they are now, whatever happens to them afterwards."""

    def load_state_dict(self, state: Any) -> None:
        """Make the rows those of a `state_dict` that `check` has let pass."""

    def confirm(self, state: Any) -> None:
        """Keep what `state_dict` returned: it is in a file that is safely saved."""

    def verify(self) -> list[str]:
        """Say what is damaged; [] where nothing is."""

    def close(self) -> None:
        """Let go of what others may want."""


def _same(instances: Indices) -> Indices:
    return instances


class MemoryStore:
    """Rows in one tensor: on the classifier's device, or in the host's memory, which a GPU reads through the
    bus. There `prefetch` copies the rows of the next batch to the device, on a stream of its own.

    Args:
        num_instances: number of rows; 0 for a classifier that never evicts any.
        dim, dtype, seed: of the classifier.
        on_host: whether the rows stay in the host's memory when the classifier moves.
        names: the instances that have these local numbers, which their first values are drawn by.
    """

    def __init__(
        self,
        num_instances: int,
        dim: int,
        dtype: torch.dtype,
        seed: int,
        on_host: bool,
        names: Callable[[Indices], Indices] = _same,
    ) -> None:
        self._seed, self._on_host, self._names = seed, on_host, names
        self._taken = np.zeros(num_instances, np.uint32)  # 1 + steps; 0 for a row that was never committed
        self._records = _untouched_zeros((num_instances, 2, dim), dtype)
        # Unpins the records, at the latest before they are freed.
        self._pinned: weakref.finalize | None = None
        # The rows that the device was told to write to the host's memory, and when it will have.
        self._writes: deque[tuple[torch.cuda.Event, Indices]] = deque()
        self._staged: tuple[Indices, Tensor, torch.cuda.Event] | None = None
        self._side: torch.cuda.Stream | None = None
        self._device = torch.device("cpu")

    def __getstate__(self) -> dict[str, Any]:
        count, _, dim = self._records.shape
        return {
            "arguments": (count, dim, self._records.dtype, self._seed, self._on_host, self._names),
            "device": self._device,
            "rows": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["arguments"])  # type: ignore[misc]
        self.load_state_dict(state["rows"])
        self.move(state["device"], lambda records: records.to(state["device"]))

    def move(self, device: torch.device, function: Callable[[Tensor], Tensor]) -> None:
        if not self._on_host:
            self._records = function(self._records)
        elif device != self._device:
            self._leave_device()
            if device.type == "cuda" and len(self._records):
                self._pinned = _pin(self, self._records, device)
        self._device = device

    def _leave_device(self) -> None:
        """Let go of what belongs to the device, which touches the records no more when this returns."""
        self._await_writes()
        self._staged = self._side = None
        if self._pinned is not None:
            self._pinned()
            self._pinned = None

    def fetch(self, instances: Indices) -> tuple[Records, Indices]:
        new = instances[self._taken[instances] == 0]
        if len(new):
            at = torch.from_numpy(new).to(self._records.device)
            self._records[at, 0], self._records[at, 1] = self._initial(new), 0
            self._taken[new] = 1
        steps = self._taken[instances].astype(np.int64) - 1
        if self._staged is not None:
            (staged, records, arrived), self._staged = self._staged, None
            found = find(staged, instances)
            if found is not None:
                torch.cuda.current_stream(self._device).wait_event(arrived)
                records.record_stream(torch.cuda.current_stream(self._device))
                return Records(records, found), steps
        return Records(self._records, instances), steps

    def peek(self, instances: Indices) -> tuple[Tensor, Indices]:
        self._await_writes(instances)
        records = self._records[torch.from_numpy(instances).to(self._records.device)]
        taken = self._taken[instances].astype(np.int64)
        if not taken.all():
            new = torch.from_numpy(taken == 0).to(records.device)
            records[new, 0], records[new, 1] = self._initial(instances[taken == 0]), 0
        return records, np.maximum(taken - 1, 0)

    def reserve(self, instances: Indices) -> Records:
        return Records(self._records, instances)

    def commit(self, instances: Indices, step: int) -> None:
        self._taken[instances] = step + 1
        if self._staged is not None and overlap(self._staged[0], instances):
            self._staged = None  # was read too early
        if self._on_host and self._device.type == "cuda":
            while self._writes and self._writes[0][0].query():
                self._writes.popleft()
            self._writes.append((torch.cuda.current_stream(self._device).record_event(), instances))

    def prefetch(self, instances: Indices) -> None:
        if not (self._on_host and self._device.type == "cuda" and len(instances)):
            return
        # The host gathers the rows when the device's writes to these have ended, which are seldom among the
        # last ones, and waits for nothing else; nor does the side stream. `fetch` makes the stream that reads
        # the copy wait for it, and tells the allocator, as the copy belongs to the side stream. The staging
        # buffer is the pinned allocator's, which lends it to nobody before the copy out of it has ended.
        instances = np.sort(instances)
        records, _ = self.peek(instances)
        with torch.cuda.device(self._device):
            self._side = self._side or torch.cuda.Stream()
            with torch.cuda.stream(self._side):
                on_device = records.pin_memory().to(self._device, non_blocking=True)
                self._staged = instances, on_device, self._side.record_event()

    def _initial(self, instances: Indices) -> Tensor:
        """The weights (n, D) of rows that were never committed, on the records' device."""
        weight = torch.empty(len(instances), self._records.shape[2], dtype=self._records.dtype, device="cpu")
        initial_rows(self._seed, self._names(instances), weight.numpy())
        return weight.to(self._records.device)

    def _await_writes(self, instances: Indices | None = None) -> None:
        """Wait until the device has written these instances' records, if it was told to, or everyone's."""
        for event, written in self._writes:
            if instances is None or overlap(written, instances):
                event.synchronize()
        if instances is None:
            self._writes.clear()

    def check(self, state: Mapping[str, Any], steps: int) -> None:
        self._check(state, steps, len(self._records))

    def _check(self, state: Mapping[str, Any], steps: int, count: int) -> None:
        if isinstance(state, Mapping) and "generation" in state:
            raise ValueError(
                "this is a checkpoint of a classifier with storage='disk', whose rows are in its files"
            )
        _, _, dim = self._records.shape
        instances = tensor(state, "instances", "storage", torch.int64, (None,))
        taken = tensor(state, "steps", "storage", torch.int64, instances.shape)
        tensor(state, "records", "storage", self._records.dtype, (len(instances), 2, dim), finite=False)
        for name, values, bound in (("instances", instances, count), ("steps", taken, steps + 1)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < bound:
                raise ValueError(
                    f"the checkpoint's storage: {name} must be in [0, {bound}), "
                    f"got values from {int(values.min())} to {int(values.max())}"
                )
        if not bool((instances.diff() > 0).all()):
            raise ValueError("the checkpoint's storage: instances must ascend")

    def state_dict(self) -> Any:
        """A copy of the rows that were ever committed, in the host's memory."""
        return self._state_of(0, len(self._taken))

    def _state_of(self, first: int, end: int) -> dict[str, Any]:
        """The state of some rows, which it numbers from 0."""
        self._await_writes()
        kept = torch.from_numpy(np.flatnonzero(self._taken[first:end])) + first
        records = torch.empty(len(kept), *self._records.shape[1:], dtype=self._records.dtype, device="cpu")
        for part in torch.arange(len(kept), device="cpu").split(_ROWS_AT_A_TIME):
            records[part] = self._records[kept[part].to(self._records.device)].cpu()
        steps = torch.from_numpy(self._taken[kept.numpy()].astype(np.int64) - 1)
        return {"instances": kept - first, "steps": steps, "records": records}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._await_writes()
        if self._pinned is not None:
            torch.cuda.synchronize(self._device)  # for an exchange that was interrupted before its `commit`
        self._staged = None
        instances = state["instances"].cpu()
        self._taken[:] = 0
        self._records[instances.to(self._records.device)] = state["records"].to(self._records.device)
        self._taken[instances.numpy()] = state["steps"].cpu().numpy() + 1

    def confirm(self, state: Mapping[str, Any]) -> None:
        pass  # all rows are in it

    def verify(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class MemoryShards(MemoryStore):
    """A `MemoryStore` of several shards' rows, whose states are lists of each shard's.

    Args:
        starts: the first local number of each shard, and the number of all.
        arguments: of `MemoryStore`.
    """

    def __init__(self, starts: Indices, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._starts = starts

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "starts": self._starts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["arguments"] = state.pop("starts"), *state["arguments"]
        super().__setstate__(state)

    def check(self, state: Any, steps: int) -> None:
        sizes = np.diff(self._starts) if len(self._records) else np.zeros(len(self._starts) - 1, np.int64)
        for each, size in zip(state, sizes, strict=True):
            self._check(each, steps, int(size))

    def state_dict(self) -> Any:
        return [self._state_of(*ends) for ends in itertools.pairwise(self._starts.tolist())]

    def load_state_dict(self, state: Any) -> None:
        moved = [
            {**each, "instances": each["instances"].cpu() + int(start)}
            for each, start in zip(state, self._starts, strict=False)
        ]
        super().load_state_dict(
            {name: torch.cat([each[name] for each in moved]) for name in ("instances", "steps", "records")}
        )


def find(announced: Indices, instances: Indices) -> Indices | None:
    """Where the instances are among those announced, which are sorted; None if not all of them are there."""
    at = np.minimum(np.searchsorted(announced, instances), len(announced) - 1)
    return at if np.array_equal(announced[at], instances) else None


def overlap(one: Indices, other: Indices) -> bool:
    """Whether an instance is in both."""
    return bool(np.isin(one, other).any())


def _pin(owner: object, records: Tensor, device: torch.device) -> weakref.finalize:
    """Pin memory where it is: the caching allocator of pinned memory would round up to a power of two.

    Returns what unpins it, when called or when `owner` is freed, and keeps it mapped until then: addresses
    that are unmapped while they are pinned stay so, for whichever tensor lands there next. When the
    interpreter exits, nothing is unpinned, for CUDA may be gone, and the process takes its pages along.

    Raises:
        RuntimeError: CUDA refuses.
    """
    unpin = weakref.finalize(owner, _unpin, records, device, os.getpid())
    unpin.atexit = False
    try:
        with torch.cuda.device(device):
            status = torch.cuda.cudart().cudaHostRegister(records.data_ptr(), records.nbytes, 0)
        _check_cuda("cudaHostRegister", status, records)
    except BaseException:
        unpin.detach()
        raise
    return unpin


def _unpin(records: Tensor, device: torch.device, process: int) -> None:
    if os.getpid() != process:
        return  # it is the parent's memory that is pinned, and a fork cannot call CUDA
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # it may have been told to read or write them
        status = torch.cuda.cudart().cudaHostUnregister(records.data_ptr())
    _check_cuda("cudaHostUnregister", status, records)


def _check_cuda(function: str, status: Any, records: Tensor) -> None:
    """Raise RuntimeError for an error of CUDA's runtime."""
    if int(status):
        name = torch.cuda.cudart().cudaGetErrorString(status)
        raise RuntimeError(
            f"storage='host': {function} failed for the rows' {records.nbytes} bytes: "
            f"error {int(status)}, {name}"
        )


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory when they are first written to, and no more than a small page at a time: in huge
    pages, a batch of rows from all over would have to clear a gigabyte."""
    if not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
