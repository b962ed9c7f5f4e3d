"""Files that are replaced when the new ones are whole, and how it is known later that they still are."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which then takes the path's name: that is the old file's or the new one's, never
    half's.

    Where the file system can, the new file has no name before it is whole: a kill leaves nothing behind.
    Elsewhere it lies beside the path as ``<name>.partial``, which the next writer of the path removes.

    Raises:
        OSError: it cannot be written; the error names the path, and the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    nameless = _nameless(path.parent)
    try:
        with nameless or partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the bytes
            if nameless:
                partial.unlink(missing_ok=True)
                # Only with a folder's descriptor does Python's link follow the symbolic link that /proc has.
                os.link(f"/proc/self/fd/{file.fileno()}", partial, src_dir_fd=0, follow_symlinks=True)
        os.replace(partial, path)
        with suppress(OSError):  # not all file systems sync folders
            _sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _nameless(folder: Path) -> BinaryIO | None:
    """A new file without a name; None where there are none, or where they cannot be given one later."""
    if not (hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd")):
        return None
    try:
        return open(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")
    except OSError:
        return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Hashed:
    """A file to write to, and the SHA-256 of what was written.

    `error` is what the file's own write raised: torch.save tells of it as a page of C++ without its cause.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        return written

    def flush(self) -> None:
        self.file.flush()


def checksums_of(path: Path) -> Path:
    """The file beside it that has its SHA-256, as ``sha256sum --check`` reads it."""
    return path.with_name(path.name + ".sha256")


def recorded(path: Path) -> list[str]:
    """The SHA-256 sums that the file may have: one, or more where a kill came between it and its new sum."""
    try:
        lines = checksums_of(path).read_text(encoding="utf-8").splitlines()
        return [line.split()[0] for line in lines if line]
    except FileNotFoundError:
        return []


def record(path: Path, sums: list[str]) -> None:
    """Write beside a file which sums it may have."""
    write_text(checksums_of(path), "".join(f"{each}  {path.name}\n" for each in sums))


def sha256(path: Path) -> str:
    """The SHA-256 sum of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path) -> None:
    """Read a file whose sum was recorded, and raise UsageError where it is another than what was written."""
    if not (sums := recorded(path)):
        return
    if sha256(path) not in sums:
        raise UsageError(
            f"{path} is damaged: its SHA-256 is not that in {checksums_of(path).name}, as it was written"
        )


def verified_sha256(path: Path) -> str:
    """The sum of a file that `verify` has passed: the recorded one where there is one only."""
    sums = recorded(path)
    return sums[0] if len(sums) == 1 else sha256(path)


def locked(path: Path) -> BinaryIO:
    """A file, made where there is none, that no other process gets before it is closed or this one ends.

    Such a lock is its process's alone: those of a data loader, which outlive a kill, do not share it.

    Raises:
        BlockingIOError: another process has it.
    """
    file = path.open("a+b")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # which of them, systems differ in
        file.close()
        raise BlockingIOError(error.errno, error.strerror, str(path)) from error
    return file


def write_text(path: Path, text: str) -> None:
    """Write a file, in UTF-8 whatever the locale, that is whole or the old one."""
    with replacing(path) as file:
        file.write(text.encode())


def writable(path: str | Path, option: str = "output") -> Path:
    """The path of a file that can be written; that it cannot is better known before the work than after.

    Args:
        path: of the file.
        option: of the user's, that says where it is.

    Raises:
        UsageError: names the option.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option}: {path} cannot be written: {error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{option}: {path} is a folder, or in one that cannot be written to")
    return path
