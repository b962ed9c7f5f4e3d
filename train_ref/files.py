"""Files that are replaced when the new ones are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import UsageError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the operating system name that file: Python's own do not, where a disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside the path to write to, which then takes its name: that is the old file's or the new one's,
    never half's. What was written until an exception is removed."""
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
