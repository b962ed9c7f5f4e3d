"""Mistakes of the user, told apart from mistakes of the program."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UsageError(Exception):
    """What was asked for cannot be done, and the message says why: the command line shows it alone."""


def library_errors() -> tuple[type[Exception], ...]:
    """What Lightning raises for a mistake of the user; nothing, as long as nobody has imported it."""
    module = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return (module.MisconfigurationException,) if module else ()


def named_file(error: OSError) -> str:
    """The file that an operation of the system failed at; "" where the error does not say: such a one may be
    the program's mistake."""
    if error.filename is None or error.strerror is None:
        return ""
    return os.fsdecode(error.filename) if not isinstance(error.filename, int) else ""


def name_file(error: OSError, path: str | Path) -> None:
    """Let an error tell that file or folder, if it tells none: Python's own do not, where a disk is full."""
    if error.filename is None:
        error.filename = str(path)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Within this, errors of the operating system name that file."""
    try:
        yield
    except OSError as error:
        name_file(error, path)
        raise


def one_line(error: BaseException) -> str:
    """Its message; of one that a process of the data loader has raised, without the traceback it brings."""
    text = str(error)
    marker = f"{UsageError.__name__}: "
    if "Original Traceback" in text and marker in text:
        text = text.rpartition(marker)[2]
    text = " ".join(text.split())
    # jsonargparse lists all types that an option may have before it says what is wrong.
    return re.sub(r"Does not validate against any of the Union subtypes Subtypes: .*?\] Errors: - ", "", text)
