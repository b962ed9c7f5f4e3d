"""A RocksDB of rows by instance."""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .folder import write
from .indices import Indices

TABLE_BYTES = 32 << 20  # of rows in memory before they are written out; two tables at the most
CACHE_BYTES = 128 << 20  # of RocksDB's indices, filters and blocks, however many rows there are
OPEN_FILES = 512
LEVEL_0_FILES = 24  # more wait for compaction: each costs every read a look into its filter


class Database:
    """A RocksDB of rows by instance, without a log: what `write` has returned from is in its files."""

    def __init__(self, rocksdict: Any, path: str, row: np.dtype, databases: int = 1) -> None:
        self._rocksdict, self._path, self._row = rocksdict, path, row
        self._options = _options(rocksdict, databases)
        self._options.create_if_missing(not os.path.exists(path))
        self._access, self._writes = Lock(), Lock()  # of readers and who opens it anew; of writers
        self._failed = False  # RocksDB takes no more until it is opened anew
        self._rocks: Any = None
        with self._errors():
            self._open()
        self._options.create_if_missing(False)  # from now on what is not there was lost

    def read(self, instances: Indices) -> tuple[NDArray[np.bool_], np.ndarray]:
        """Which of the instances are stored, and their rows."""
        with self._access, self._errors():
            self._open()
            values = self._rocks.get(_keys(instances))
        stored = np.array([value is not None for value in values], bool)
        present = [value for value in values if value is not None]
        if any(len(value) != self._row.itemsize for value in present):
            raise OSError(errno.EIO, "damaged: a row is not of the size that rows have here", self._path)
        return stored, np.frombuffer(b"".join(present), self._row)

    def write(self, instances: Indices, rows: np.ndarray, at: Indices) -> None:
        """Store rows[at] of the instances, in order. Where it fails, all may be written once more."""
        with self._writes, self._errors():
            if self._failed:
                self._recover(len(at) * self._row.itemsize)
            self._failed = True
            self._wait_for_compaction()
            size, keys = self._row.itemsize, _keys(instances)
            for first in range(0, len(keys), 64):
                data = rows[at[first : first + 64]].tobytes()
                batch = self._rocksdict.WriteBatch(raw_mode=True)
                for i, key in enumerate(keys[first : first + 64]):
                    batch[key] = data[i * size : (i + 1) * size]
                self._rocks.write(batch)
                time.sleep(0)  # it held the interpreter's lock all the while, which the training waits for
            self._rocks.flush()
            self._failed = False

    def checkpoint(self, path: str) -> None:
        with self._writes, self._errors():
            if self._failed:
                self._recover(0)
            self._failed = True
            self._rocksdict.Checkpoint(self._rocks).create_checkpoint(path)
            self._failed = False

    def read_through(self) -> None:
        """Read every row, and so every block's checksum."""
        with self._access, self._errors():
            self._open()
            options = self._rocksdict.ReadOptions()
            options.fill_cache(False)
            iterator = self._rocks.iter(options)
            try:
                iterator.seek_to_first()
                while iterator.valid():
                    iterator.next()
                iterator.status()
            finally:
                del iterator  # which keeps the database open

    def leak(self) -> None:
        """In a forked process: never let it be closed, as the threads that it would wait for are missing."""
        if self._rocks is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._rocks))

    def close(self) -> None:
        with self._access:
            self._close()

    def _close(self) -> None:
        if self._rocks is not None:
            with suppress(Exception):  # what it could not write is not wanted any more
                self._rocks.close()
            self._rocks = None

    def _open(self) -> None:
        if self._rocks is None:
            self._rocks = self._rocksdict.Rdict(
                self._path, options=self._options, column_families={"default": self._options}
            )
            writing, reading = self._rocksdict.WriteOptions(), self._rocksdict.ReadOptions()
            writing.disable_wal = True
            # The system's page cache has the blocks; ours is for indices and filters.
            reading.fill_cache(False)
            self._rocks.set_write_options(writing)
            self._rocks.set_read_options(reading)

    def _recover(self, size: int) -> None:
        """Open it anew, once the disk takes as much as is to be written: until then it can still be read."""
        probe = self._path + ".probe"
        try:
            write(probe, bytes(size + (4 << 20)))
        finally:
            with suppress(OSError):
                os.unlink(probe)
        with self._access:
            self._close()
            self._open()

    def _wait_for_compaction(self) -> None:
        """Where reads would have too many files to look into, and where the disk keeps up no more."""
        rocks = self._rocks
        while (
            int(rocks.property_value("rocksdb.num-files-at-level0")) > LEVEL_0_FILES
            and rocks.property_int_value("rocksdb.background-errors") == 0
        ):
            time.sleep(0.005)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What comes from RocksDB as a text becomes an OSError with the number and the file's name."""
        try:
            yield
        except Exception as error:
            if type(error) not in (Exception, OSError) or getattr(error, "errno", None) is not None:
                raise  # which is none of rocksdict's: it has no class for them, nor numbers
            text = str(error)
            number = next((code for code in _NUMBERS if os.strerror(code) in text), errno.EIO)
            file = re.search(re.escape(self._path) + r"[^\s:]*", text)
            damaged = "damaged: " if text.startswith("Corruption") else ""
            raise OSError(number, damaged + text, file.group() if file else self._path) from error


_NUMBERS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOENT,
)


def import_rocksdict() -> Any:
    try:
        return importlib.import_module("rocksdict")
    except ImportError as error:
        raise ImportError(
            "storage='disk' needs RocksDB through the package rocksdict, which the extra 'disk' installs: "
            f"pip install 'contrastive_ops[disk]' ({error})"
        ) from error


def _options(rocksdict: Any, databases: int) -> Any:
    """For reads of single rows from all over, in memory that does not grow with them, nor with the number of
    databases, which share it."""
    table = rocksdict.BlockBasedOptions()
    table.set_block_size(4096)
    table.set_checksum_type(rocksdict.ChecksumType.xxh3())
    table.set_format_version(5)
    table.set_bloom_filter(10, False)  # bits a key; of whole keys
    # Indices and filters in pieces, in a cache with a limit.
    table.set_block_cache(rocksdict.Cache(max(CACHE_BYTES // databases, 1 << 20)))
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    table.set_index_type(rocksdict.BlockBasedIndexType.two_level_index_search())
    table.set_partition_filters(True)
    table.set_metadata_block_size(4096)
    options = rocksdict.Options(raw_mode=True)
    options.set_block_based_table_factory(table)
    options.set_compression_type(rocksdict.DBCompressionType.none())  # rows do not compress
    options.set_paranoid_checks(True)
    options.set_max_open_files(max(OPEN_FILES // databases, 32))
    options.set_max_background_jobs(2)
    options.set_target_file_size_base(64 << 20)
    # A flush of ours writes a table, never RocksDB's own. Nothing has it wait, as it would with the lock of
    # the interpreter, so that `_wait_for_compaction` does.
    options.set_write_buffer_size(max(4 * TABLE_BYTES // databases, 64 << 10))
    options.set_max_write_buffer_number(4)
    options.set_level_zero_slowdown_writes_trigger(1 << 20)
    options.set_level_zero_stop_writes_trigger(1 << 20)
    options.set_soft_pending_compaction_bytes_limit(0)
    options.set_hard_pending_compaction_bytes_limit(0)
    options.set_max_manifest_file_size(1 << 20)  # it is copied into every generation
    options.set_manifest_preallocation_size(64 << 10)
    options.set_keep_log_file_num(1)
    options.set_stats_dump_period_sec(0)
    options.set_stats_persist_period_sec(0)
    return options


def _keys(instances: Indices) -> list[bytes]:
    return instances.astype(">u8").view("V8").tolist()
