"""Compiled kernels on disk, so that a kernel is compiled once a machine and not once a process.

An entry is a file, named after all that its content depends on: nothing is ever changed, and an entry of
other sources is never found. It is written under another name and then renamed, so processes see it whole or
not at all. A checksum finds what was damaged, and that is compiled again. A folder that cannot be written is
no error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "CONTRASTIVE_OPS_CACHE"


class NotKept(RuntimeWarning):
    """A compiled kernel could not be written to the cache."""


def folder() -> Path:
    """Where entries lie: in the folder that CONTRASTIVE_OPS_CACHE names, or else in the user's cache."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "contrastive_ops"


def _path(key: str) -> Path:
    return folder() / f"{key}.kernel"


def load(key: str) -> tuple[dict[str, Any], bytes] | None:
    """What is known of a kernel and its code, or None where there is no entry, or a damaged one."""
    try:
        content = _path(key).read_bytes()
    except (OSError, RuntimeError):  # the latter where a user has no home
        return None
    checksum, _, rest = content.partition(b"\n")
    if checksum != _checksum(rest):
        return None
    about, _, code = rest.partition(b"\n")
    return json.loads(about), code


def store(key: str, about: dict[str, Any], code: bytes) -> None:
    """Writes an entry, or warns once that it cannot."""
    rest = json.dumps(about).encode() + b"\n" + code
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{key}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_checksum(rest) + b"\n" + rest)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except (OSError, RuntimeError) as error:
        _warn_once(
            f"contrastive_ops cannot keep compiled kernels ({error}), and compiles them again in every "
            f"process; {FOLDER_VARIABLE} can name another folder"
        )


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, NotKept, stacklevel=2)
