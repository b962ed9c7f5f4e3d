"""What a disk may hold after a power cut, told from a log of writes and syncs (see disk_shim.c)."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np

BLOCK = 4096
SHIM = Path(__file__).with_name("disk_shim.c")


def compiled_shim(folder: Path) -> Path:
    library = folder / "shim.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return library


class Change(StrEnum):
    """What a record of the log tells, by its letter."""

    CREATED = "C"
    FOLDER_CREATED = "D"
    WRITTEN = "W"
    TRUNCATED = "T"
    SYNCED = "S"
    LINKED = "L"
    RENAMED = "R"
    REMOVED = "U"
    MARKED = "M"  # by the program itself


@dataclass
class Record:
    """A change of a file or a folder.

    Attributes:
        inode: its number.
        number: the offset of what was written, or the size that was truncated to.
        first: a path, the old one of what was renamed; what was written; or the mark's text.
        second: the new path of what was renamed.
    """

    change: Change
    inode: int
    number: int
    first: bytes
    second: bytes


def read_log(path: Path) -> Iterator[Record]:
    data, at = path.read_bytes(), 0
    while at < len(data):
        inode, number, _, first, second = struct.unpack_from("=qqqqq", data, at + 1)
        start = at + 41
        middle, end = start + first, start + first + second
        yield Record(Change(chr(data[at])), inode, number, data[start:middle], data[middle:end])
        at = end


@dataclass
class File:
    content: bytearray = field(default_factory=bytearray)  # what is on the disk for sure
    pending: list[Record] = field(default_factory=list)  # since the last sync

    def sync(self) -> None:
        self.content, self.pending = self.crashed(None), []

    def crashed(self, random: np.random.Generator | None, chance: float = 1) -> bytearray:
        """Each block of a pending write is there or not, and so is each truncation; all without `random`."""
        content = bytearray(self.content)
        for record in self.pending:
            at, data = record.number, record.first
            if record.change == Change.TRUNCATED:
                if random is None or random.random() < chance:
                    del content[at:]
                    content.extend(bytes(at - len(content)))
                continue
            first = at
            while first < at + len(data):
                last = min(at + len(data), (first // BLOCK + 1) * BLOCK)
                if random is None or random.random() < chance:
                    content.extend(bytes(max(0, last - len(content))))
                    content[first:last] = data[first - at : last - at]
                first = last
        return content


@dataclass
class Folder:
    durable: dict[str, File | Folder] = field(default_factory=dict)
    now: dict[str, File | Folder] = field(default_factory=dict)
    # Names that were removed and given since the last sync, and what they were given to.
    pending: list[tuple[str, str, File | Folder | None]] = field(default_factory=list)

    def change(self, old: str, new: str = "", target: File | Folder | None = None) -> None:
        """Remove the old name, give the new one, or both at once."""
        self.pending.append((old, new, target))
        self._apply(self.now, *self.pending[-1])

    @staticmethod
    def _apply(names: dict[str, File | Folder], old: str, new: str, target: File | Folder | None) -> None:
        names.pop(old, None)
        if target is not None:
            names[new] = target

    def sync(self) -> None:
        self.durable, self.pending = dict(self.now), []

    def crashed(self, random: np.random.Generator, chance: float) -> dict[str, File | Folder]:
        names = dict(self.durable)
        for change in self.pending:
            if random.random() < chance:
                self._apply(names, *change)
        return names


class Disk:
    """What a process has done to the files under a root, up to some record of its log."""

    def __init__(self, root: Path) -> None:
        self.root, self.tree = root, Folder()
        self.by_inode: dict[int, File | Folder] = {}

    def apply(self, record: Record) -> None:
        change = record.change
        if change in (Change.WRITTEN, Change.TRUNCATED):
            file = self.by_inode[record.inode]
            assert isinstance(file, File)
            file.pending.append(record)
        elif change == Change.SYNCED:
            self.by_inode[record.inode].sync()
        elif change in (Change.CREATED, Change.FOLDER_CREATED, Change.LINKED):
            if change != Change.LINKED:  # an inode's number may have been another's
                self.by_inode[record.inode] = File() if change == Change.CREATED else Folder()
            parent, name = self._find(record.first)
            if parent is None:
                self.by_inode[record.inode] = self.tree
            else:
                parent.change("", name, self.by_inode[record.inode])
        elif change == Change.REMOVED:
            parent, name = self._find(record.first)
            if parent is not None:
                parent.change(name)
        elif change == Change.RENAMED:
            (parent, old), (other, new) = self._find(record.first), self._find(record.second)
            assert parent is not None
            assert parent is other
            parent.change(old, new, parent.now[old])

    def _find(self, path: bytes) -> tuple[Folder | None, str]:
        parts = Path(path.decode()).relative_to(self.root).parts
        if not parts:
            return None, ""
        folder = self.tree
        for part in parts[:-1]:
            inner = folder.now[part]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, parts[-1]

    def crash(self, target: Path, random: np.random.Generator) -> None:
        """Write down what may be there after a power cut now."""
        chance = random.choice([0, 0.2, 0.5, 0.8, 1])
        files: dict[int, bytes] = {}  # a file with two names has one content

        def put(folder: Folder, path: Path) -> None:
            path.mkdir()
            for name, entry in folder.crashed(random, chance).items():
                if isinstance(entry, Folder):
                    put(entry, path / name)
                else:
                    if id(entry) not in files:
                        files[id(entry)] = bytes(entry.crashed(random, chance))
                    (path / name).write_bytes(files[id(entry)])

        put(self.tree, target)
