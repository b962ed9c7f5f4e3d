"""Rows of instance classification in files: up to a billion of them, and checkpoints by undo.

What is in the folder:

    meta.json              what the rows are, and the generations that can be gone back to
    rows.NNNNN             a record (2, dim) for each row: its weight and its momentum
    steps.NNNNN            an entry of 8 bytes for each row: the step that its record belongs to, and the
                           generation that wrote it; generation 0: nobody did, the row has its initial value
    journal.<generation>   of each row written in that generation, what it was before
    lock                   held by the process that has the folder open

A generation begins with a checkpoint and bears its number; the first is 1, and no number is used twice, so a
number saved elsewhere never comes to mean other rows.

**Why a process may die between any two system calls.** ``keep`` writes (1) the journal, (2) the entries, (3)
the records. So at any moment of generation g,

- a row whose entry says g has its old entry and record, those of checkpoint g, in journal.g, because (1) came
  before (2). Its record may be torn;
- a row whose entry says anything else still has the entry and record of checkpoint g, because (2) came before
  (3). An entry is never torn: it is 8 aligned bytes.

Hence writing journal.g back restores checkpoint g, at any moment, in any order, however often it is begun
anew; and while the journal is not empty, that is all that a folder just opened will do. A block cut off at
the journal's end is of a ``keep`` that had not come to (2), and is passed over. A row is journaled twice only
if (2) did not reach it the first time, so both say the same.

``checkpoint`` creates the new journal, replaces meta.json, and deletes the journal before last. The second of
these makes the checkpoint; what the others leave behind is removed when the folder is opened. ``roll_back``
over two generations undoes the newer, replaces meta.json by one that has forgotten it, and undoes the older:
nobody can go back to a generation that is half gone.

What was written outlives the process, in the system's page cache. It need not outlive the machine: nothing
here waits for the disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import sys
import threading
import weakref
import zlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from contrastive_ops._rows import RecordFiles, initial_rows

FORMAT = "contrastive_ops.DiskRows"
VERSION = 1
ENTRY = np.dtype([("step", np.uint32), ("generation", np.uint32)])
CHUNK_BYTES = 16 << 20  # of records at a time in memory, beside the caller's

Rows = tuple[
    NDArray[np.int64], NDArray[np.void], np.ndarray
]  # instances, entries, records of the first of them


class DiskRows:
    """The rows of `num_instances` instances, each a weight and a momentum, in files under `path`.

    A row that was never written takes no space. Its weight is a random unit vector, a function of `seed` and
    instance, and its momentum zero. Calls from several threads wait for one another.

    A folder whose rows were written after its newest checkpoint, by a process that ended since, is `dirty`
    when opened, and must be rolled back before anything else.

    Args:
        path: folder; created if it is absent, and continued if it holds such rows.
        num_instances: number N of rows.
        dim: dimension D of a weight.
        dtype: np.float32 or np.float64.
        seed: in [0, 2**64).

    Raises:
        ValueError: the folder holds something else, other rows than were asked for, or damaged ones.
        BlockingIOError: another process, or another DiskRows, has the folder open.

    Example:
        >>> rows = DiskRows("/mnt/rows", 10**9, 128, np.float32, seed=0)
        >>> records, steps = rows.fetch(np.array([5, 7]))       # (2, 2, 128), (2,)
        >>> rows.keep(np.array([5, 7]), records, step=1)
        >>> rows.checkpoint()
        2
    """

    _generations: list[tuple[int, int | None]]  # available, each with its journal's size if that is full
    _last: int  # generation that was ever begun
    _journal: _Journal
    _settled: bool  # whether training can go on from the rows as they are

    def __init__(
        self, path: str | os.PathLike[str], num_instances: int, dim: int, dtype: DTypeLike, seed: int
    ) -> None:
        dtype = np.dtype(dtype)
        if dtype not in (np.float32, np.float64):
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        self.path = os.path.abspath(path)
        self._num_instances, self._dim, self._seed = int(num_instances), int(dim), int(seed)
        self._dtype = dtype
        self._holds: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "num_instances": self._num_instances,
            "dim": self._dim,
            "dtype": dtype.name,
            "seed": self._seed,
            "byte_order": sys.byteorder,
        }
        self._mutex = threading.RLock()
        self._unfinished: set[int] = set()  # rows that a keep which failed may have left torn
        self._closed = False
        record_bytes = 2 * dim * dtype.itemsize
        self._chunk = max(1, CHUNK_BYTES // record_bytes)
        self._records = RecordFiles(self.path, "rows", record_bytes, num_instances)
        self._steps = RecordFiles(self.path, "steps", ENTRY.itemsize, num_instances)

        os.makedirs(self.path, exist_ok=True)
        self._read_meta()  # a folder that is not ours is left as it is, without so much as a lock
        self._lock = _lock(self.path)
        try:
            if self._read_meta() is None:
                _Journal(self.path, 1, create=True).close()
                self._write_meta([(1, None)], last=1)
            self._open_generation()
        except BaseException:
            self._lock.close()
            raise
        _opened.add(self)

    @property
    def generation(self) -> int:
        """The checkpoint that the rows written now come after."""
        return self.generations[-1]

    @property
    def generations(self) -> list[int]:
        """The checkpoints that `roll_back` can go back to, oldest first."""
        return [generation for generation, _ in self._generations]

    @property
    def dirty(self) -> bool:
        """Whether rows were written since the newest checkpoint."""
        return not self._journal.empty

    def fetch(self, instances: NDArray[np.int64]) -> tuple[np.ndarray, NDArray[np.int64]]:
        """The records (n, 2, D) of the instances (n,), and the steps (n,) that they belong to."""
        with self._mutex:
            self._check_usable()
            self._check_finished(instances.tolist())
            entries = self._read_entries(instances)
            written = entries["generation"] != 0
            records = np.zeros((len(instances), 2, self._dim), self._dtype)
            records[written] = self._read_records(instances[written])
            if not written.all():
                weight = np.empty((len(instances) - written.sum(), self._dim), self._dtype)
                initial_rows(self._seed, instances[~written], weight)
                records[~written, 0] = weight
            return records, entries["step"].astype(np.int64)

    def keep(self, instances: NDArray[np.int64], records: np.ndarray, step: int) -> None:
        """Overwrite the rows of the distinct instances (n,) by records (n, 2, D) that belong to `step`.

        Raises:
            OSError: with its file's name, for example because the disk is full. Call it again with the same
                rows, or roll back; until then, these rows cannot be fetched, nor a checkpoint made.
        """
        shape = (len(instances), 2, self._dim)
        if records.shape != shape or records.dtype != self._dtype:
            raise ValueError(
                f"records must be {shape} of {self._dtype}, got {records.shape} of {records.dtype}"
            )
        if not 0 <= step < 2**32:
            raise ValueError(f"step must be in [0, 2**32), got {step}")
        if len(np.unique(instances)) != len(instances):
            raise ValueError("instances must be distinct")
        if len(instances) and not 0 <= instances.min() <= instances.max() < self._num_instances:
            raise ValueError(f"instances must be in [0, {self._num_instances})")
        with self._mutex:
            self._check_usable()
            for first in range(0, len(instances), self._chunk):
                part = slice(first, first + self._chunk)
                self._keep(np.ascontiguousarray(instances[part]), np.ascontiguousarray(records[part]), step)

    def checkpoint(self) -> int:
        """Begin a generation, and return its number: the rows can be brought back to what they are now.

        They can also be brought back to the checkpoint before, and to none that is older. If nothing was
        written since the newest checkpoint, that is the one.
        """
        with self._mutex:
            self._check_usable()
            self._check_finished(self._unfinished)
            if self.dirty:
                generation = self._last + 1
                _Journal(self.path, generation, create=True).close()
                sealed = (self.generation, self._journal.size)
                self._settled = False  # an interrupt may come before meta.json is replaced, or after
                try:
                    self._write_meta([sealed, (generation, None)], last=generation)
                except OSError:
                    self._settled = True  # it came before
                    raise
                self._open_generation()
            return self.generation

    def roll_back(self, generation: int) -> None:
        """Bring all rows back to a checkpoint and continue there; newer ones are forgotten.

        Raises:
            ValueError: that checkpoint is not available, or its journal is damaged.
        """
        with self._mutex:
            self._check_open()
            if not self._settled:
                self._open_generation()
            if generation not in self.generations:
                raise ValueError(
                    f"{self.path} can be rolled back to generations {self.generations}, not to {generation}"
                )
            older, sealed = self._generations[0]
            if generation == older and sealed is not None:
                _Journal(self.path, older).check(sealed)
            self._settled = False
            while True:
                for instances, entries, records in self._journal.blocks(self._dtype, self._dim):
                    self._steps.write(instances, entries)
                    self._records.write(instances[: len(records)], records)
                if self.generation == generation:
                    break
                self._write_meta([(older, None)], last=self._last)
                self._open_generation()
            self._journal.clear()
            self._unfinished.clear()
            self._settled = True

    def close(self) -> None:
        """Close the files and let others open the folder."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            self._records.close()
            self._steps.close()
            self._journal.close()
            self._lock.close()

    def __enter__(self) -> DiskRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _keep(self, instances: NDArray[np.int64], records: np.ndarray, step: int) -> None:
        entries = self._read_entries(instances)
        unsaved = entries["generation"] != self.generation
        if unsaved.any():
            # Written ones first: the others have no record to save.
            rows = np.flatnonzero(unsaved)
            rows = rows[np.argsort(entries["generation"][rows] == 0, kind="stable")]
            written = np.count_nonzero(entries["generation"][rows])
            self._journal.append(
                instances[rows], entries[rows], self._read_records(instances[rows[:written]])
            )
        entries["step"], entries["generation"] = step, self.generation
        try:
            self._steps.write(instances, entries)
            self._records.write(instances, records)
        except BaseException:
            self._unfinished.update(instances.tolist())
            raise
        self._unfinished.difference_update(instances.tolist() if self._unfinished else ())

    def _read_entries(self, instances: NDArray[np.int64]) -> NDArray[np.void]:
        entries = np.empty(len(instances), ENTRY)
        self._steps.read(instances, entries)
        return entries

    def _read_records(self, instances: NDArray[np.int64]) -> np.ndarray:
        records = np.empty((len(instances), 2, self._dim), self._dtype)
        self._records.read(instances, records)
        return records

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self.path} was closed")

    def _check_usable(self) -> None:
        self._check_open()
        if not self._settled:
            raise RuntimeError(
                f"{self.path} was left in the middle of generation {self.generation}: roll it back first, to "
                f"one of {self.generations}"
            )

    def _check_finished(self, instances: Iterable[int]) -> None:
        if not self._unfinished.isdisjoint(instances):
            raise RuntimeError(
                f"{self.path}: {len(self._unfinished)} rows were being written when an error came: keep them "
                "again, or roll back"
            )

    def _read_meta(self) -> dict[str, Any] | None:
        """What meta.json says, if it is of rows as asked for; None where there is none yet."""
        file = os.path.join(self.path, "meta.json")
        try:
            with open(file, encoding="utf-8") as stream:
                meta = json.load(stream)
        except FileNotFoundError:
            # What may stand here before meta.json does, if the process was killed meanwhile.
            foreign = set(os.listdir(self.path)) - {"lock", "journal.1", "meta.json.new"}
            if foreign:
                raise ValueError(
                    f"{self.path} must be empty or hold rows of instances, but there is no meta.json, and "
                    f"there is {min(foreign)!r}"
                ) from None
            return None
        except ValueError as error:
            raise ValueError(f"{file} is damaged, or not of rows of instances: {error}") from None
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise ValueError(f"{file} is not of rows of instances (format {FORMAT!r})")
        differing = [name for name, wanted in self._holds.items() if meta.get(name) != wanted]
        if differing:
            held, asked = (
                ", ".join(f"{name}={meta.get(name)!r}" for name in differing) for meta in (meta, self._holds)
            )
            raise ValueError(f"{self.path} holds rows with {held}, but {asked} was asked for")
        return meta

    def _write_meta(self, generations: list[tuple[int, int | None]], last: int) -> None:
        """Make these the generations available, each with its journal's size if that is full."""
        file = os.path.join(self.path, "meta.json")
        try:
            with open(file + ".new", "w", encoding="utf-8") as stream:
                json.dump(self._holds | {"generations": generations, "last": last}, stream, indent=1)
            os.replace(file + ".new", file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, file) from error

    def _open_generation(self) -> None:
        """Continue as meta.json says."""
        meta = self._read_meta()
        try:
            assert meta is not None
            generations = [(int(generation), sealed) for generation, sealed in meta["generations"]]
            last = int(meta["last"])
            assert generations
        except (AssertionError, KeyError, TypeError, ValueError):
            raise ValueError(f"{os.path.join(self.path, 'meta.json')} is damaged") from None
        journal = _Journal(self.path, generations[-1][0])
        if hasattr(self, "_journal"):
            self._journal.close()
        self._generations, self._last, self._journal = generations, last, journal
        self._settled = journal.empty
        wanted = {f"journal.{generation}" for generation, _ in generations}
        for name in os.listdir(self.path):
            if name.startswith("journal.") and name not in wanted:
                os.unlink(os.path.join(self.path, name))


class _Journal:
    """What rows were at the checkpoint that a generation began with, in blocks: one for each `append`.

    A block is a head, then the instances, then their entries, then the records of the first of them, those
    that had been written before.
    """

    HEAD = struct.Struct("=8sQ")  # mark, generation
    BLOCK = struct.Struct("=IIII")  # instances, records, crc32 of what follows, crc32 of the three

    def __init__(self, folder: str, generation: int, create: bool = False) -> None:
        self.path = os.path.join(folder, f"journal.{generation}")
        head = self.HEAD.pack(b"rows.jnl", generation)
        try:
            self._file = open(self.path, "wb+" if create else "rb+", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            raise ValueError(f"{self.path} is missing: {folder} cannot be rolled back") from None
        if create:
            self._write(head, 0)
        if os.pread(self._file.fileno(), len(head), 0) != head:
            self.close()
            raise ValueError(f"{self.path} is damaged: it does not begin as a journal does")
        self.size = os.fstat(self._file.fileno()).st_size

    @property
    def empty(self) -> bool:
        return self.size == self.HEAD.size

    def append(self, instances: NDArray[np.int64], entries: NDArray[np.void], records: np.ndarray) -> None:
        body = instances.tobytes() + entries.tobytes() + records.tobytes()
        head = struct.pack("=III", len(instances), len(records), zlib.crc32(body))
        self._trim()
        self.size = self._write(head + struct.pack("=I", zlib.crc32(head)) + body, self.size)

    def clear(self) -> None:
        self.size = self.HEAD.size
        self._trim()

    def _trim(self) -> None:
        """Cut off what an `append` that failed has left."""
        if os.fstat(self._file.fileno()).st_size != self.size:
            os.ftruncate(self._file.fileno(), self.size)

    def check(self, sealed: int) -> None:
        self.close()
        if self.size < sealed:
            raise ValueError(f"{self.path} is damaged: {self.size} bytes are left of {sealed}")

    def blocks(self, dtype: np.dtype, dim: int) -> Iterator[Rows]:
        """One block after another; the last is left out if it was cut off."""
        with open(self.path, "rb") as stream:
            stream.seek(self.HEAD.size)
            while len(head := stream.read(self.BLOCK.size)) == self.BLOCK.size:
                rows, written, crc, head_crc = self.BLOCK.unpack(head)
                if zlib.crc32(head[:-4]) != head_crc:
                    raise ValueError(f"{self.path} is damaged before byte {stream.tell()}")
                entries_at, records_at = 8 * rows, (8 + ENTRY.itemsize) * rows
                size = records_at + written * 2 * dim * dtype.itemsize
                body = stream.read(size)
                if len(body) < size:
                    return
                if zlib.crc32(body) != crc:
                    raise ValueError(f"{self.path} is damaged before byte {stream.tell()}")
                yield (
                    np.frombuffer(body, np.int64, rows),
                    np.frombuffer(body, ENTRY, rows, entries_at),
                    np.frombuffer(body, dtype, written * 2 * dim, records_at).reshape(written, 2, dim),
                )

    def close(self) -> None:
        self._file.close()

    def _write(self, data: bytes, at: int) -> int:
        left = memoryview(data)
        try:
            while left:
                done = os.pwrite(self._file.fileno(), left, at)
                at, left = at + done, left[done:]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error
        return at


def _lock(folder: str) -> BinaryIO:
    """Hold the folder until the file that is returned, or the process, ends."""
    file = open(os.path.join(folder, "lock"), "ab")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise BlockingIOError(error.errno, "these rows are open elsewhere", folder) from None
        raise OSError(error.errno, error.strerror, file.name) from error
    return file


_opened: weakref.WeakSet[DiskRows] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked process: do not hold a lock that should end with the parent. (Data loaders' workers outlive
    by seconds a trainer that was killed.)"""
    for rows in _opened:
        rows._lock.close()


os.register_at_fork(after_in_child=_let_go)
