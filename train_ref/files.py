"""Files that are replaced when the new ones are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside the path to write to, which then takes its name: that is the old file's or the new one's,
    never half's. What was written until an exception is removed."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
