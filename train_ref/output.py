"""Standard output and standard error that no text, and no reader who leaves, can stop the work with."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Lasting(io.FileIO):
    """A stream's file, which takes what is written to it even when nobody reads it any more.

    Attributes:
        failure: why it could not be written to: from then on, nothing is. A reader who leaves, as ``head``
            does, is no failure.
    """

    failure: OSError | None = None
    left = False

    def write(self, data: Any) -> int | None:
        if not (self.left or self.failure):
            try:
                return super().write(data)
            except BrokenPipeError:
                self.left = True
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


@contextmanager
def lasting_output() -> Iterator[None]:
    """Standard output and error that write a ``?`` for what their encoding lacks, and outlive their readers.

    What is printed tells of the work and is not its result, which is in files: no work ends, hours before its
    end, because a terminal knows no τ or because ``head`` has seen enough.

    Raises:
        SystemExit: when all is done, where standard output could not be written, to a full disk for example.
    """
    given = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = outlasting = [_lasting(stream) for stream in given]
    try:
        yield
    finally:
        for stream in outlasting:
            stream.flush()
        sys.stdout, sys.stderr = given
    raw = getattr(outlasting[0].buffer, "raw", None) if outlasting[0] is not given[0] else None
    if isinstance(raw, Lasting) and raw.failure:
        sys.exit(f"error: standard output could not be written: {raw.failure.strerror}")


def _lasting(stream: TextIO | None) -> TextIO:
    if stream is None:  # as Python has it where the shell has closed it
        return open(os.devnull, "w", encoding="utf-8")
    try:
        number = stream.fileno()
    except (AttributeError, OSError):  # not a file: somebody has put another object in its place
        return stream
    stream.flush()
    file = io.BufferedWriter(Lasting(number, "w", closefd=False))
    # Standard error escapes what it lacks, and that is kept.
    errors = stream.errors if stream.errors == "backslashreplace" else "replace"
    return io.TextIOWrapper(
        file,
        stream.encoding,
        errors,
        line_buffering=stream.line_buffering or stream.write_through,
        write_through=stream.write_through,
    )
