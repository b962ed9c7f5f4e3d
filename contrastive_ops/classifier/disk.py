"""Rows of instance classification on disk: a RocksDB at work, and generations that are checkpoints of it.

What is in the folder (`folder.py` keeps it):

    rows.json              what the rows are, and an identity that every checkpoint file bears
    kept.json              the generations that are known to be in a saved checkpoint: confirmed, loaded
    generations/<number>/  a checkpoint of RocksDB, never written again, and files.json: its files' checksums
    working/<number>/      the database that is written; worth nothing once its process has ended
    lock                   held by the process that has the folder open

**Why a process or a machine may stop at any moment.** Only generations count. One is made under another name,
with hard links to the tables of the database at work; it gets its own name when all of it is on the disk, and
its number is told when that name is. A generation that is loaded, or nothing, is what the database at work is
made anew from, whenever the folder is opened. So there is no log of writes to keep, and nothing to repair.

**Why nothing that is damaged is taken for rows.** RocksDB has a checksum for every block that it reads. What
else it reads (manifest, options) is compared with files.json when a generation is loaded, and `verify`
compares all of it. Our own JSON files bear their checksums.

**Who waits for what.** `commit` copies its records into a table in memory. A full table is written by another
thread while the next one fills, and serves its rows until it is on the disk: a write that fails, because the
disk is full, is done again. RocksDB's own state after such an error is thrown away by opening it anew. What
`prefetch` announces is read by a third thread.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._store import initial_rows
from . import database
from .database import Database, import_rocksdict
from .folder import SHARD, Folder
from .indices import Indices
from .records import Records
from .storage import _same, find, overlap


class DiskStore:
    """`Storage` of rows in a folder; see the head of this file.

    Args:
        path: folder; created if it is absent.
        num_instances, dim, dtype, seed: of the classifier.
        generations: how many of those taken last are kept, beside the confirmed one.
        names: the instances that have these local numbers, which their first values are drawn by.
        shard: which of how many shards the rows are; None where there is one.
        stores: how many the classifier has open; they share what memory one would take.

    Raises:
        ImportError: rocksdict is not installed.
        ValueError: the folder holds something else, other rows than were asked for, or a damaged description.
        BlockingIOError: another process, or another classifier, has the folder open.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_instances: int,
        dim: int,
        dtype: torch.dtype,
        seed: int,
        generations: int = 3,
        names: Callable[[Indices], Indices] = _same,
        shard: tuple[int, int] | None = None,
        stores: int = 1,
    ) -> None:
        number = np.dtype(str(dtype).removeprefix("torch."))
        self._row = np.dtype([("step", "<i8"), ("record", number.newbyteorder("<"), (2, dim))])
        self._dtype, self._seed, self._names = dtype, seed, names
        self._rocksdict, self._process = import_rocksdict(), _process_of_rocksdb()
        self._device = torch.device("cpu")
        self._reserved = torch.empty(0, 2, dim, dtype=dtype, device="cpu")
        self._stores = stores
        self._folder = Folder(
            path,
            {"num_instances": num_instances, "dim": dim, "dtype": number.name, "seed": seed}
            | ({} if shard is None else {"shard": shard[0], "shards": shard[1]}),
            generations,
        )
        try:
            self._working = _Working(self._rocksdict, self._folder.new_working(), self._row, stores)
        except BaseException:
            self._folder.close()
            raise
        self._base: int | None = None  # the generation whose rows these are, if none was committed since
        self._step = 0  # the last as of which a row was committed
        known = self._folder.known
        self._barred = any(number is not None for number in known.values())
        self._warned = self._barred or not self._folder.generations
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="contrastive_ops-prefetch")
        self._ahead: tuple[Indices, Future[tuple[Tensor, Indices]]] | None = None
        _opened.add(self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"a classifier with storage='disk' cannot be copied or pickled: its rows are the files in "
            f"{self._folder.path}, which one classifier at a time writes; its state_dict() can be saved"
        )

    def move(self, device: torch.device, function: Callable[[Tensor], Tensor]) -> None:
        if device != self._device:
            self._ahead = None  # was read to where another device may not reach it
        self._device = device

    def fetch(self, instances: Indices) -> tuple[Records, Indices]:
        self._require_rows()
        if self._ahead is not None:
            (ahead, future), self._ahead = self._ahead, None
            records, steps = future.result()
            if (at := find(ahead, instances)) is not None:  # else others were announced
                return Records(records, at), steps[at]
        records, steps = self._read(instances)
        return Records(records, np.arange(len(instances))), steps

    def peek(self, instances: Indices) -> tuple[Tensor, Indices]:
        self._require_rows()
        return self._read(instances)

    def prefetch(self, instances: Indices) -> None:
        self._require_open()
        if len(instances) and not self._barred:
            instances = np.sort(instances)
            self._ahead = instances, self._reader.submit(self._read, instances)

    def reserve(self, instances: Indices) -> Records:
        """Waits if writing is behind, and raises what it met with, before anything is exchanged."""
        self._require_rows()
        self._working.make_room()
        self._reserved = self._empty(len(instances))
        return Records(self._reserved, np.arange(len(instances)))

    def commit(self, instances: Indices, step: int) -> None:
        self._require_rows()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        rows = np.empty(len(instances), self._row)
        rows["step"], rows["record"] = step, self._reserved.numpy()
        self._base, self._step = None, max(self._step, step)
        if self._ahead is not None and overlap(self._ahead[0], instances):
            self._ahead = None  # was read too early
        self._working.append(instances, rows)

    def check(self, state: Mapping[str, Any], steps: int) -> None:
        self._require_open()
        generation = self._folder.checked(state)
        if (step := self._folder.checked_contents(generation).step) > steps:
            raise ValueError(
                f"generation {generation} of {self._folder.path} has rows as of step {step}, and the "
                f"checkpoint's history has {steps} steps"
            )

    def state_dict(self) -> dict[str, Any]:
        """Makes a generation, on the disk when this returns, unless the newest one holds these rows."""
        self._require_open()
        if self._base is None or self._base != max(self._folder.generations, default=0):
            self._working.write_out()
            self._base = self._folder.make(self._working.checkpoint, self._step)
        return {"generation": self._base, "rows": self._folder.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the rows those of a generation; if it fails, they stay what they are."""
        self._require_open()
        generation = self._folder.checked(state)
        path = self._folder.new_working()
        try:
            step = self._folder.copy(generation, path)
            working = _Working(self._rocksdict, path, self._row, self._stores)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        try:
            self._folder.know(loaded=generation)
        except BaseException:
            working.close()
            raise
        self._ahead = None
        former, self._working, self._base, self._step = self._working, working, generation, step
        self._barred, self._warned = False, True
        former.close()

    def confirm(self, state: Mapping[str, Any]) -> None:
        """The state is in a file that is safely saved: keep its generation until another one is confirmed."""
        self._require_open()
        self._folder.know(confirmed=self._folder.checked(state), loaded=None)
        self._folder.prune()

    def verify(self) -> list[str]:
        """What is damaged, of all generations and of the rows at work; reads everything."""
        self._require_open()
        return [*self._folder.damages(), *self._working.damages()]

    def close(self) -> None:
        """Let others open the folder. Rows that were committed since the last `state_dict()` are gone."""
        if os.getpid() == self._process and not self._folder.closed:
            self._reader.shutdown()
            self._working.close()
            self._folder.close()

    def _require_open(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self._folder.path} is open in process {self._process}, and this one, {os.getpid()}, is a "
                "fork of it: rows with storage='disk' belong to the process that opened them"
            )
        if self._folder.closed:
            raise ValueError(f"{self._folder.path} was closed")

    def _require_rows(self) -> None:
        self._require_open()
        if self._barred:
            raise RuntimeError(
                f"{self._folder.path} holds the rows of an earlier training, which were saved: load its "
                "checkpoint first, or choose another path for a new one, or remove the folder to start over"
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._folder.path} holds generations {self._folder.generations} of an earlier training, "
                "none of which was confirmed or loaded: without load_state_dict(), training starts over",
                stacklevel=4,
            )

    def _read(self, instances: Indices) -> tuple[Tensor, Indices]:
        """Records (n, 2, D) and steps (n,), wherever they are by now."""
        records, steps = self._empty(len(instances)), np.zeros(len(instances), np.int64)
        array = records.numpy()
        found, rows = self._working.read(instances)
        array[found], steps[found] = rows["record"], rows["step"]
        if not found.all():  # never committed
            weight = np.empty((len(instances) - len(rows), array.shape[2]), array.dtype)
            initial_rows(self._seed, self._names(np.ascontiguousarray(instances[~found])), weight)
            array[~found, 0], array[~found, 1] = weight, 0
        return records, steps

    def _empty(self, count: int) -> Tensor:
        """Records (count, 2, D) that the classifier's device can read and write by itself."""
        shape, pinned = (count, *self._reserved.shape[1:]), self._device.type == "cuda"
        return torch.empty(shape, dtype=self._dtype, device="cpu", pin_memory=pinned)


def folders_of_shards(path: str | os.PathLike[str], count: int) -> list[str]:
    """The folder of each of so many shards.

    Raises:
        ValueError: there are folders of another number of shards, or rows without any.
    """
    names = [f"shard-{shard:04d}-of-{count:04d}" for shard in range(count)]
    foreign = sorted({*os.listdir(path)} - {*names}) if os.path.isdir(path) else []
    if others := [name for name in foreign if SHARD.fullmatch(name) or name == "rows.json"]:
        raise ValueError(
            f"{os.path.abspath(path)} holds {others[0]}, but rows in {count} shards were asked for: open "
            "it with the shards that it has, or choose another path"
        )
    return [os.path.join(path, name) for name in names]


class DiskShards:
    """`Storage` of several shards' rows, each in a folder of its own, which any process may open next.

    Args:
        stores: one for each shard.
        starts: the first local number of each, and the number of all.
    """

    def __init__(self, stores: Sequence[DiskStore], starts: Indices) -> None:
        self._stores, self._starts = stores, starts
        self._reserved: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self._stores[0].__getstate__()

    def _parts(self, instances: Indices) -> Iterator[tuple[DiskStore, Indices, Indices]]:
        """Each store of which there are instances, which of them these are, and their numbers there."""
        own = np.searchsorted(self._starts, instances, side="right") - 1
        for i, store in enumerate(self._stores):
            (here,) = np.nonzero(own == i)
            if len(here):
                yield store, here, instances[here] - self._starts[i]

    def _empty(self, count: int) -> Tensor:
        return self._stores[0]._empty(count)

    def move(self, device: torch.device, function: Callable[[Tensor], Tensor]) -> None:
        for store in self._stores:
            store.move(device, function)

    def fetch(self, instances: Indices) -> tuple[Records, Indices]:
        records, steps = self._empty(len(instances)), np.zeros(len(instances), np.int64)
        for store, here, there in self._parts(instances):
            found, steps[here] = store.fetch(there)
            records[torch.from_numpy(here)] = found.values[torch.from_numpy(found.at)]
        return Records(records, np.arange(len(instances))), steps

    def peek(self, instances: Indices) -> tuple[Tensor, Indices]:
        records, steps = self._empty(len(instances)), np.zeros(len(instances), np.int64)
        for store, here, there in self._parts(instances):
            found, steps[here] = store.peek(there)
            records[torch.from_numpy(here)] = found
        return records, steps

    def reserve(self, instances: Indices) -> Records:
        """Every store that is to be written has room, before anything is exchanged."""
        for store, _, there in self._parts(instances):
            store.reserve(there)
        self._reserved = self._empty(len(instances))
        return Records(self._reserved, np.arange(len(instances)))

    def commit(self, instances: Indices, step: int) -> None:
        assert self._reserved is not None
        if (device := self._stores[0]._device).type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        for store, here, there in self._parts(instances):
            store._reserved.copy_(self._reserved[torch.from_numpy(here)])
            store.commit(there, step)

    def prefetch(self, instances: Indices) -> None:
        for store, _, there in self._parts(instances):
            store.prefetch(there)

    def check(self, state: Sequence[Mapping[str, Any]], steps: int) -> None:
        for store, each in zip(self._stores, state, strict=True):
            store.check(each, steps)

    def state_dict(self) -> list[dict[str, Any]]:
        return [store.state_dict() for store in self._stores]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        for store, each in zip(self._stores, state, strict=True):
            store.load_state_dict(each)

    def confirm(self, state: Sequence[Mapping[str, Any]]) -> None:
        for store, each in zip(self._stores, state, strict=True):
            store.confirm(each)

    def verify(self) -> list[str]:
        return [damage for store in self._stores for damage in store.verify()]

    def close(self) -> None:
        for store in self._stores:
            store.close()


class _Working:
    """The database that is written, and the rows in memory that it does not hold yet."""

    def __init__(self, rocksdict: Any, path: str, row: np.dtype, stores: int = 1) -> None:
        self._path, self._row = path, row
        self._database = Database(rocksdict, path, row, stores)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="contrastive_ops-write")
        self._capacity = max(1, database.TABLE_BYTES // stores // row.itemsize)
        # The table that fills, and the one that is being written: in one, as a reader takes both at once.
        self._tables: tuple[_Table, _Table | None] = _Table(row, self._capacity), None
        self._writing: Future[None] | None = None

    def read(self, instances: Indices) -> tuple[NDArray[np.bool_], np.ndarray]:
        """Tell which of the instances were ever committed, and their rows."""
        rows, found = np.empty(len(instances), self._row), np.zeros(len(instances), bool)
        for table in self._tables:  # the newer first
            if table is not None:
                (missing,) = np.nonzero(~found)
                table.read(instances, missing, rows, found)
        (missing,) = np.nonzero(~found)
        if len(missing):
            stored, values = self._database.read(instances[missing])
            rows[missing[stored]], found[missing[stored]] = values, True
        return found, rows[found]

    def make_room(self) -> None:
        """Where the table is full, have it written. Raises what the writing of the one before met with."""
        filling, _ = self._tables
        if self._writing is not None and self._writing.done():
            self._settle()
        if len(filling) >= self._capacity:
            self._settle()
            self._tables = _Table(self._row, self._capacity), filling
            self._writing = self._writer.submit(self._write, filling)

    def append(self, instances: Indices, rows: np.ndarray) -> None:
        self._tables[0].append(instances, rows)

    def write_out(self) -> None:
        """Everything is in the database's files when this returns."""
        self._settle()
        filling, _ = self._tables
        if len(filling):
            self._tables = _Table(self._row, self._capacity), filling
            self._settle()

    def _settle(self) -> None:
        """Wait until the table that is being written is. What fails is done once more, here."""
        _, table = self._tables
        if table is None:
            return
        if self._writing is None or self._writing.exception() is not None:
            self._write(table)
        self._writing, self._tables = None, (self._tables[0], None)

    def _write(self, table: _Table) -> None:
        self._database.write(*table.sorted())

    def checkpoint(self, path: str) -> None:
        self._database.checkpoint(path)

    def damages(self) -> Iterator[str]:
        try:
            self._database.read_through()
        except OSError as error:
            yield str(error)

    def leak(self) -> None:
        """In a forked process: never let the database be closed."""
        self._database.leak()

    def close(self) -> None:
        self._writer.shutdown()
        self._database.close()
        shutil.rmtree(self._path, ignore_errors=True)


class _Table:
    """Rows in memory, the newest of an instance last. What a thread reads while another appends is whole: the
    rows are there before the map tells of them."""

    def __init__(self, row: np.dtype, capacity: int) -> None:
        self._rows = np.empty(capacity, row)
        self._size = 0
        self._where: dict[int, int] = {}

    def __len__(self) -> int:
        return self._size

    def append(self, instances: Indices, rows: np.ndarray) -> None:
        end = self._size + len(rows)
        if end > len(self._rows):
            larger = np.empty(end, self._rows.dtype)
            larger[: self._size] = self._rows[: self._size]
            self._rows = larger
        self._rows[self._size : end] = rows
        self._where.update(zip(instances.tolist(), range(self._size, end), strict=True))
        self._size = end

    def read(self, instances: Indices, wanted: Indices, rows: np.ndarray, found: NDArray[np.bool_]) -> None:
        """Fill in the wanted ones that are here."""
        where = self._where.get
        at = np.array([where(instance, -1) for instance in instances[wanted].tolist()], np.int64)
        here = wanted[at >= 0]
        rows[here], found[here] = self._rows[at[at >= 0]], True

    def sorted(self) -> tuple[Indices, np.ndarray, Indices]:
        """Instances in order, all rows, and which of the rows are these instances'."""
        count = len(self._where)
        instances = np.fromiter(self._where.keys(), np.int64, count)
        order = np.argsort(instances)
        return instances[order], self._rows, np.fromiter(self._where.values(), np.int64, count)[order]


def _process_of_rocksdb() -> int:
    """This process, if RocksDB can work in it: in a fork of one where it did, its threads are missing."""
    global _first_process
    _first_process = _first_process or os.getpid()
    if _first_process != os.getpid():
        raise RuntimeError(
            f"rows with storage='disk' cannot be opened in process {os.getpid()}, a fork of {_first_process} "
            "that has had some open: start it by spawn or forkserver"
        )
    return _first_process


_first_process: int | None = None

_opened: weakref.WeakSet[DiskStore] = weakref.WeakSet()


def _let_go() -> None:
    """Leave the parent's folders alone, in a forked process. The threads of their databases are the parent's
    too. RocksDB would wait for them when the process exits, and crash: so it exits before RocksDB's part."""
    if _first_process is None:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        libc.on_exit(libc._exit, None)  # with the status that it exits with
        libc.__cxa_atexit(libc.fflush, None, None)  # registered last, run first
    for store in _opened:
        store._folder.close()  # a data loader's worker may outlive a killed trainer: not with its lock
        store._working.leak()


os.register_at_fork(after_in_child=_let_go)
