"""Mistakes of the user, told apart from mistakes of the program."""

from __future__ import annotations

import sys


class UsageError(Exception):
    """What was asked for cannot be done, and the message says why: the command line shows it alone."""


def library_errors() -> tuple[type[Exception], ...]:
    """What Lightning raises for a mistake of the user; nothing, as long as nobody has imported it."""
    module = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return (module.MisconfigurationException,) if module else ()


def one_line(error: BaseException) -> str:
    """Its message; of one that a process of the data loader has raised, without the traceback it brings."""
    text = str(error)
    marker = f"{UsageError.__name__}: "
    if "Original Traceback" in text and marker in text:
        text = text.rpartition(marker)[2]
    return " ".join(text.split())
