"""Memory with bounds: that of the tensors that a kernel was given, and shared memory, which finds races."""

from __future__ import annotations

import bisect
import ctypes
from typing import Any, NamedTuple

import numpy as np

from .ptx import Fault

Array = np.ndarray[Any, Any]


def _rows(data: Array, width: int) -> Array:
    """Memory as rows of `width` bytes."""
    count = data.size // width
    return data[: count * width].reshape(count, width)


class GlobalMemory:
    """The storages of tensors, in a launch. An access elsewhere is a fault, and so is a write of what is read
    as constant: from a cache that does not know of it."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._buffers: list[Array] = []
        # Bytes of a buffer that were read so, and that were written; by its number.
        self._constant: dict[int, Array] = {}
        self._written: dict[int, Array] = {}

    def add(self, pointer: int, size: int) -> None:
        if size == 0:
            return
        i = bisect.bisect_left(self._bases, pointer)
        if i < len(self._bases) and self._bases[i] == pointer:
            return
        if self._constant or self._written:
            raise ValueError("the tensors of a launch are added before it begins")
        self._bases.insert(i, pointer)
        self._buffers.insert(i, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer)))

    def _locate(self, address: Array, width: int) -> list[tuple[int, Any, Array]]:
        """The number of a buffer, which of the addresses lie in it, and the bytes of each."""
        if (address % np.uint64(width)).any():
            raise Fault(f"an access of {width} bytes is not aligned")
        which = np.searchsorted(np.array(self._bases, np.uint64), address, "right") - 1
        if not address.size:
            return []
        first = int(which[0])
        same = bool((which == first).all())
        parts = []
        for i in [first] if same else np.unique(which):
            chosen = slice(None) if same else which == i
            if i < 0:
                raise Fault(f"address {int(address.min()):#x} is before every tensor")
            buffer, offset = self._buffers[i], (address[chosen] - np.uint64(self._bases[i])).astype(np.int64)
            if int(offset.max()) + width > buffer.size:
                raise Fault(
                    f"global memory out of bounds: byte {int(offset.max())} and {width} more "
                    f"of a tensor's {buffer.size}"
                )
            parts.append((int(i), chosen, offset[:, None] + np.arange(width)))
        return parts

    def _note(self, notes: dict[int, Array], others: dict[int, Array], buffer: int, index: Array) -> None:
        if buffer in others and others[buffer][index].any():
            raise Fault("a write of what is read as constant")
        if buffer not in notes:
            notes[buffer] = np.zeros(self._buffers[buffer].size, bool)
        notes[buffer][index] = True

    def load(self, address: Array, width: int, is_constant: bool = False) -> Array:
        """(addresses, width) bytes."""
        data = np.empty((address.size, width), np.uint8)
        for buffer, chosen, index in self._locate(address, width):
            if is_constant:
                self._note(self._constant, self._written, buffer, index)
            data[chosen] = self._buffers[buffer][index]
        return data

    def store(self, address: Array, data: Array) -> None:
        for buffer, chosen, index in self._locate(address, data.shape[1]):
            self._note(self._written, self._constant, buffer, index)
            self._buffers[buffer][index] = data[chosen]


class Bytes(NamedTuple):
    """Bytes of shared memory, as those rows of it, if it is laid out in rows of `width` bytes."""

    rows: Array
    width: int

    def of(self, chosen: Array) -> Bytes:
        return Bytes(self.rows[chosen], self.width)


class SharedMemory:
    """The shared memory of blocks that run at once, one after the other in one array.

    Who touched a byte last is noted as a stamp of the epoch (a barrier begins one) and the warp.
    """

    def __init__(self, size: int, blocks: int, warps: int) -> None:
        self.size = (size + 127) // 128 * 128
        self._limit = size
        self.data = np.full(self.size * blocks, 0xFF, np.uint8)  # every float of these bytes is NaN
        self._writer = np.zeros(self.data.size, np.int32)
        self._reader = np.zeros(self.data.size, np.int32)
        self._copied = np.zeros(self.data.size, np.int16)  # into by how many copies in flight
        self._multiplied = np.zeros(self.data.size, np.int16)  # by how many products in flight
        self._copies = self._products = 0  # in flight, of all bytes
        self._warps = warps
        self.epoch = np.ones(blocks, np.int32)

    def bytes_of(self, address: Array, block: Array | int, width: int) -> Bytes:
        """Those of accesses, after a look at bounds and alignment."""
        offset = address.astype(np.int64)
        if offset.size and (int(offset.min()) < 0 or int(offset.max()) + width > self._limit):
            raise Fault(f"shared memory out of bounds: byte {int(offset.max())} of {self._limit}")
        if (offset & (width - 1)).any():
            raise Fault(f"an access of {width} bytes of shared memory is not aligned")
        return Bytes((offset + block * self.size) // width, width)

    def _stamps(self, block: Array, warp: Array) -> tuple[Array, Array]:
        first = self.epoch[block] * (self._warps + 1)
        return first[:, None], (first + warp)[:, None]

    def touch(self, which: Bytes, block: Array, warp: Array, write: bool) -> None:
        """Notes who touches bytes, and raises a fault where that is a race. `warp` counts within a block."""
        rows, width = which
        if self._copies and _rows(self._copied, width)[rows].any():
            raise Fault("race: shared memory is touched into which a copy is in flight")
        first, stamp = self._stamps(block, warp)
        writers, readers = _rows(self._writer, width), _rows(self._reader, width)
        writer = writers[rows]
        if ((writer >= first) & (writer != stamp)).any():
            raise Fault(
                f"race: {'a write' if write else 'a read'} of what another warp wrote, and no barrier"
            )
        reader = readers[rows]
        others = (reader >= first) & (reader != stamp)
        if not write:
            readers[rows] = np.where(others, first + self._warps, stamp)
            return
        if others.any():
            raise Fault("race: a write of what another warp read, and no barrier")
        if self._products and _rows(self._multiplied, width)[rows].any():
            raise Fault("race: a write of what a product in flight reads")
        writers[rows] = stamp

    def load(self, which: Bytes, block: Array, warp: Array) -> Array:
        self.touch(which, block, warp, False)
        return _rows(self.data, which.width)[which.rows]

    def store(self, which: Bytes, block: Array, warp: Array, data: Array) -> None:
        self.touch(which, block, warp, True)
        _rows(self.data, which.width)[which.rows] = data

    def copy_begins(self, which: Bytes, block: Array, warp: Array) -> None:
        self.touch(which, block, warp, True)
        _rows(self._copied, which.width)[which.rows] += 1
        self._copies += which.rows.size

    def copy_lands(self, which: Bytes, block: Array, warp: Array, data: Array) -> None:
        _rows(self._copied, which.width)[which.rows] -= 1
        self._copies -= which.rows.size
        self.store(which, block, warp, data)

    def product_begins(self, which: Bytes, block: int) -> None:
        """A product reads for four warps at once, so a write by any is a race."""
        rows, width = which
        if self._copies and _rows(self._copied, width)[rows].any():
            raise Fault("race: a product reads shared memory into which a copy is in flight")
        first = self.epoch[block] * (self._warps + 1)
        if (_rows(self._writer, width)[rows] >= first).any():
            raise Fault("race: a product reads what was written, and no barrier")
        _rows(self._reader, width)[rows] = first + self._warps
        _rows(self._multiplied, width)[rows] += 1
        self._products += rows.size

    def product_ends(self, which: Bytes) -> None:
        _rows(self._multiplied, which.width)[which.rows] -= 1
        self._products -= which.rows.size
