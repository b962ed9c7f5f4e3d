"""The folder of rows on disk: what it is of, who has it open, and its generations, whole or not there at all.

See `disk.py` for what is in it. Everything that counts is written under another name, brought to the disk,
and renamed; symbolic links are followed nowhere; whatever is read was written by anybody, until its checksum
and each of its fields say otherwise.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

FORMAT, VERSION = "contrastive_ops.rows", 2
JSON_BYTES = 16 << 20  # of ours at the most: a list of the files of 15 TB of rows
FILES = "files.json"
SHARD = re.compile(r"shard-\d{4,}-of-\d{4,}")  # the name of a shard's folder


def verify(path: str | os.PathLike[str]) -> list[str]:
    """What is damaged in a folder that is not open, or in those of its shards; reads everything."""
    if shards := [name for name in sorted(os.listdir(path)) if SHARD.fullmatch(name)]:
        count = int(shards[0].rpartition("-")[2])
        names = {*shards, *(f"shard-{shard:04d}-of-{count:04d}" for shard in range(count))}
        paths = [os.path.join(os.path.abspath(path), name) for name in sorted(names)]
        return [
            damage
            for each in paths
            for damage in (verify(each) if os.path.isdir(each) else [f"{each} is missing"])
        ]
    try:
        folder = Folder(path, None)
    except ValueError as error:
        return [str(error)]
    try:
        return list(folder.damages())
    finally:
        folder.close()


@dataclass(frozen=True)
class Contents:
    """What files.json tells of a generation.

    Attributes:
        step: the last as of which one of its rows was committed.
        files: size and checksum of each file.
    """

    step: int
    files: dict[str, tuple[int, int]]


class Folder:
    """Generations in a folder, and what they are of.

    Args:
        path: of the folder; created if it is absent.
        holds: what the rows are; None: whatever the folder says.
        keep: how many generations are kept of those made last.
    """

    def __init__(self, path: str | os.PathLike[str], holds: Mapping[str, Any] | None, keep: int = 3) -> None:
        self.path, self._keep = os.path.abspath(path), keep
        if holds is not None:
            os.makedirs(self.path, exist_ok=True)
        self._read_description(holds)  # a folder that is not ours is left as it is, without so much as a lock
        self._lock = _lock(self.path)
        # By name the stamp and the checksum of RocksDB's tables that are on the disk, and so never change.
        self._tables: dict[str, tuple[tuple[int, ...], int]] = {}
        self._workings = 0
        try:
            description = self._read_description(holds)
            if description is None:
                description = {
                    "format": FORMAT,
                    "version": VERSION,
                    **(holds or {}),
                    "identity": uuid.uuid4().hex,
                }
                _write_json(self._file("rows.json"), description)
                _sync(os.path.dirname(self.path))
            self.identity = description["identity"]
            self.known = self._read_known()
            self._tidy()
        except BaseException:
            self._lock.close()
            raise

    @property
    def generations(self) -> list[int]:
        """The numbers of the generations that are there, oldest first."""
        return sorted(int(name) for name in os.listdir(self._file("generations")) if _NUMBER.fullmatch(name))

    def checked(self, state: Mapping[str, Any]) -> int:
        """The generation that a `state_dict` names, if it is here."""
        if not isinstance(state, Mapping) or "generation" not in state:
            raise ValueError(
                "this is a checkpoint of a classifier with storage='device' or 'host', "
                "which a classifier with storage='disk' cannot load"
            )
        generation, identity = state["generation"], state.get("rows")
        if not isinstance(generation, int) or isinstance(generation, bool) or generation < 1:
            raise ValueError(
                f"the checkpoint's generation must be an integer of at least 1, got {generation!r}"
            )
        if identity != self.identity:
            raise ValueError(
                f"the checkpoint is of rows {identity!r}, and {self.path} holds {self.identity!r}: it is "
                "another folder's, or of one that was removed"
            )
        if generation not in self.generations:
            raise ValueError(
                f"{self.path} keeps generations {self.generations}, and the checkpoint is of {generation}: "
                f"the last {self._keep} are kept, and the one that was confirmed"
            )
        return generation

    def checked_contents(self, generation: int) -> Contents:
        """What a generation consists of. Its files are compared with that, tables of rows by size alone."""
        contents = self._read_contents(generation)
        for name, (size, checksum) in contents.files.items():
            damage = self._damage(generation, name, size, None if _TABLE.fullmatch(name) else checksum)
            if damage:
                raise ValueError(damage)
        return contents

    def copy(self, generation: int, path: str) -> int:
        """Make the folder `path` a database that begins as a generation, its tables by hard links, and
        return its step."""
        contents = self.checked_contents(generation)
        os.mkdir(path)
        for name, (_, checksum) in contents.files.items():
            source, target = os.path.join(self._generation(generation), name), os.path.join(path, name)
            if _TABLE.fullmatch(name):
                _link(source, target)
                self._tables[name] = _stamp(target), checksum
            else:
                _copy(source, target)
        return contents.step

    def make(self, checkpoint: Callable[[str], None], step: int) -> int:
        """Make a generation of what `checkpoint` writes into a folder, and return its number."""
        generation = max(self.generations, default=0) + 1
        path = self._generation(generation)
        new = path + ".new"
        try:
            shutil.rmtree(new, ignore_errors=True)  # what an attempt has left that failed
            shutil.rmtree(new + ".tmp", ignore_errors=True)
            checkpoint(new)
            files, tables = {}, {}
            for name in sorted(os.listdir(new)):
                file = os.path.join(new, name)
                stamp = _stamp(file)
                if (known := self._tables.get(name)) is None or known[0] != stamp:
                    _sync(file)
                    known = stamp, _checksum(file)
                files[name] = [os.stat(file).st_size, known[1]]
                if _TABLE.fullmatch(name):
                    tables[name] = known
            contents = {"identity": self.identity, "generation": generation, "step": step, "files": files}
            _write_json(os.path.join(new, FILES), contents)
            os.rename(new, path)
            _sync(os.path.dirname(path))
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        self._tables = tables
        self.prune()
        return generation

    def know(self, **known: int | None) -> None:
        """Write down which generation was confirmed, and which was loaded."""
        changed = self.known | known
        if changed != self.known:
            _write_json(self._file("kept.json"), changed)
            self.known = changed

    def prune(self) -> None:
        """Remove the generations that need not be kept."""
        generations = self.generations
        for generation in generations[: -self._keep]:
            if generation not in self.known.values():
                path = self._generation(generation)
                os.rename(path, path + ".gone")
                _sync(os.path.dirname(path))  # half of it must not come back under its name
                shutil.rmtree(path + ".gone", ignore_errors=True)

    def damages(self) -> Iterator[str]:
        """What is damaged. Reads everything."""
        for read in (lambda: self._read_description(None), self._read_known):
            try:
                read()
            except (ValueError, OSError) as error:
                yield str(error)
        generations = self.generations
        for generation in {number for number in self.known.values() if number is not None} - {*generations}:
            yield f"{self._generation(generation)} is missing"
        for generation in generations:
            try:
                files = self._read_contents(generation).files
                foreign = {*os.listdir(self._generation(generation))} - {*files, FILES}
            except (ValueError, OSError) as error:
                yield str(error)
                continue
            for name in sorted(foreign):
                yield f"{os.path.join(self._generation(generation), name)} is none of its files"
            for name, (size, checksum) in files.items():
                if damage := self._damage(generation, name, size, checksum):
                    yield damage

    def new_working(self) -> str:
        """The path of a database that is not there yet."""
        self._workings += 1
        return self._file("working", str(self._workings))

    def close(self) -> None:
        self._lock.close()

    @property
    def closed(self) -> bool:
        return self._lock.closed

    def _file(self, *names: str) -> str:
        return os.path.join(self.path, *names)

    def _generation(self, number: int) -> str:
        return self._file("generations", str(number))

    def _tidy(self) -> None:
        """Folders are there, and what an earlier process has left is not."""
        for name in ("generations", "working"):
            _require_plain(self._file(name), folder=True)
        shutil.rmtree(self._file("working"), ignore_errors=True)
        for name in ("generations", "working"):
            os.makedirs(self._file(name), exist_ok=True)
        _sync(self.path)
        for name in os.listdir(self._file("generations")):
            _require_plain(self._file("generations", name), folder=True)
            if _LEFT.fullmatch(name):
                shutil.rmtree(self._file("generations", name), ignore_errors=True)

    def _read_description(self, holds: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """What rows.json says, if it is as asked for; None where there is none yet."""
        file = self._file("rows.json")
        description = _read_json(file)
        if description is None:
            foreign = set(os.listdir(self.path)) - {"lock", "rows.json.new"}
            if "meta.json" in foreign:
                raise ValueError(
                    f"{self.path} holds rows in the format of an earlier version (meta.json), which this one "
                    "does not read: choose another path"
                )
            if foreign or holds is None:
                raise ValueError(
                    f"{self.path} must be empty or hold rows of instances, but there is no rows.json"
                    + (f", and there is {min(foreign)!r}" if foreign else "")
                )
            return None
        if description.get("format") != FORMAT:
            raise ValueError(f"{file} is not of rows of instances (format {FORMAT!r})")
        identity = description.get("identity")
        if not isinstance(identity, str) or not re.fullmatch("[0-9a-f]{32}", identity):
            raise ValueError(f"{file} is damaged: its identity is {identity!r}")
        asked = {"version": VERSION, **(holds or {})}
        differing = [
            name
            for name, wanted in asked.items()
            if type(description.get(name)) is not type(wanted) or description[name] != wanted
        ]
        if differing:
            held, wanted = (
                ", ".join(f"{name}={of.get(name)!r}" for name in differing) for of in (description, asked)
            )
            raise ValueError(f"{self.path} holds rows with {held}, but {wanted} was asked for")
        return description

    def _read_known(self) -> dict[str, int | None]:
        file = self._file("kept.json")
        known = _read_json(file)
        if known is None:
            return {"confirmed": None, "loaded": None}
        if set(known) != {"confirmed", "loaded"} or not all(
            number is None or (type(number) is int and number > 0) for number in known.values()
        ):
            raise ValueError(f"{file} is damaged: it tells {known}")
        return known

    def _read_contents(self, generation: int) -> Contents:
        file = os.path.join(self._generation(generation), FILES)
        _require_plain(self._generation(generation), folder=True)
        document = _read_json(file)
        if document is None:
            raise ValueError(f"{file} is missing")
        files, step = document.get("files"), document.get("step")
        if (
            document.get("identity") != self.identity
            or document.get("generation") != generation
            or type(step) is not int
            or not isinstance(files, dict)
            or not all(
                re.fullmatch(r"\w[\w.-]*", name)
                and isinstance(entry, list)
                and [type(number) for number in entry] == [int, int]
                for name, entry in files.items()
            )
        ):
            raise ValueError(f"{file} is damaged, or another folder's")
        return Contents(step, {name: (size, checksum) for name, (size, checksum) in files.items()})

    def _damage(self, generation: int, name: str, size: int, checksum: int | None) -> str | None:
        """What is wrong with a file of a generation. Without a checksum only its size is compared."""
        path = os.path.join(self._generation(generation), name)
        try:
            _require_plain(path)
            if (actual := os.stat(path).st_size) != size:
                return f"{path} is damaged: it has {actual} bytes of {size}"
            if checksum is not None and _checksum(path) != checksum:
                return f"{path} is damaged: its checksum is another"
        except FileNotFoundError:
            return f"{path} is missing"
        except (ValueError, OSError) as error:
            return str(error)
        return None


_NUMBER, _LEFT, _TABLE = (re.compile(p) for p in (r"[1-9]\d*", r"[1-9]\d*\.(new|new\.tmp|gone)", r"\d+\.sst"))


def _require_plain(path: str, folder: bool = False) -> None:
    """Raises ValueError for a symbolic link or whatever else should not lie there; nothing is fine."""
    with suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
            what = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
            raise ValueError(f"{path} must be a {'folder' if folder else 'file'}, and is {what}")


def _read_json(path: str) -> dict[str, Any] | None:
    """The object in a file that `_write_json` wrote; None where there is no file."""
    _require_plain(path)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            data = file.read(JSON_BYTES + 1)
    except FileNotFoundError:
        return None
    try:
        if len(data) > JSON_BYTES:
            raise ValueError("it is too large")
        content = b"{" + data[len(_json_head(b"")) :]
        if not data.startswith(_json_head(content)):
            raise ValueError("its checksum is not there, or another")
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or not of rows of instances: {error}") from None


def _write_json(path: str, value: Mapping[str, Any]) -> None:
    """Have the file hold the object and its checksum: from one moment to the next, and on the disk when this
    returns."""
    content = json.dumps(value, indent=1).encode()
    _require_plain(path + ".new")
    try:
        write(path + ".new", _json_head(content) + content[1:])
        os.replace(path + ".new", path)
    except BaseException:
        with suppress(OSError):
            os.unlink(path + ".new")
        raise
    _sync(os.path.dirname(path))


def _json_head(content: bytes) -> bytes:
    """How a file begins whose content, from the first brace on, is this."""
    return b'{\n "crc32": "%08x",' % zlib.crc32(content)


def write(path: str, data: bytes) -> None:
    """A new file, on the disk when this returns."""
    left = memoryview(data)
    with _naming(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        finally:
            os.close(file)


def _sync(path: str) -> None:
    """A file or folder is on the disk when this returns."""
    with _naming(path):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _copy(source: str, target: str) -> None:
    with _naming(target):
        shutil.copyfile(source, target, follow_symlinks=False)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:  # some file systems have none
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        _copy(source, target)


def _stamp(path: str) -> tuple[int, ...]:
    of = os.stat(path)
    return of.st_ino, of.st_size, of.st_mtime_ns


def _checksum(path: str) -> int:
    checksum = 0
    with _naming(path), open(path, "rb") as file:
        while data := file.read(1 << 20):
            checksum = zlib.crc32(data, checksum)
    return checksum


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors of a file that is open do not say which one it is."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, path) from error
        raise


def _lock(folder: str) -> Any:
    """Hold the folder until the file that is returned, or the process, ends."""
    path = os.path.join(folder, "lock")
    _require_plain(path)
    file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "rb+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise BlockingIOError(error.errno, "these rows are open elsewhere", folder) from None
        raise OSError(error.errno, error.strerror, path) from error
    return file
