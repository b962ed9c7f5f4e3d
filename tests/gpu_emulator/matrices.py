"""Products of tensor cores: mma.sync of a warp, and wgmma of four, which reads shared memory by itself.

Products are exact and added up in float64, and rounded to float32 once an instruction.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np

from .machine import Blocks, Decoder, Execute, Mask
from .memory import Array
from .ptx import Fault, UnknownInstruction
from .transfers import nothing

Match = re.Match[str]
Operands = tuple[str, ...]
_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE >> 2, _LANE & 3


def _numbers(bits: Array, kind: str) -> Array:
    """As tensor cores read them: of a float32, TF32 takes the upper 19 bits."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


@functools.cache
def _order(registers: int, each: int, rows: int) -> Array:
    """Which number of a warp's (registers, 32, each) has each place of a matrix."""
    depth, columns = 4 * each, 4 * each * registers * 8 // rows
    order = np.empty((rows, columns), np.int64)
    for i in range(registers):
        row, first = 8 * (i % (rows // 8)) + _GROUP, depth * (i // (rows // 8)) + each * _IN_GROUP
        for j in range(each):
            order[row, first + j] = (32 * i + _LANE) * each + j
    return order


def _fragment(registers: list[Array], kind: str, rows: int) -> Array:
    """(warps, rows, depth) of registers of (warps, 32): each has one number of TF32, or two of a half.

    Registers go through the rows by eights first, then through the depth.
    """
    each = 1 if kind == "tf32" else 2
    bits = np.stack(registers, 1).view(np.uint32 if each == 1 else np.uint16)
    numbers = bits.reshape(len(bits), -1)[:, _order(len(registers), each, rows)]
    return _numbers(numbers, kind)


def _mma(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    """Of 16 rows and 8 columns; a depth of 32 bytes takes 4 and 2 registers, one of 16 half as many."""
    kind = match["kind"]
    names = [decoder.braced(operand) for operand in operands]
    each = 1 if (kind, match["depth"]) == ("f16", "8") else 2
    if [len(x) for x in names] != [4, 2 * each, each, 4]:
        raise UnknownInstruction("registers of a product")
    puts = [decoder.write(x) for x in names[0]]
    a, b_, c = ([decoder.read(x, "b32") for x in some] for some in names[1:])

    def execute(b: Blocks, mask: Mask) -> None:
        b.active_warps(mask)
        left = _fragment([x(b).reshape(-1, 32) for x in a], kind, 16)
        right = _fragment([x(b).reshape(-1, 32) for x in b_], kind, 8)
        product = left @ right.transpose(0, 2, 1)
        for i, (put, total) in enumerate(zip(puts, c, strict=True)):
            part = product[:, _GROUP + 8 * (i // 2), 2 * _IN_GROUP + i % 2].reshape(-1)
            put(b, mask, (part + total(b).view(np.float32)).astype(np.float32))

    return execute


# Of the 8 threads of a quad pair, four and the four 16 further on, each has a row of A and a column of B.
_PAIR, _OF_PAIR = _LANE >> 2 & 3, (_LANE & 3) + 4 * (_LANE >> 4)


def _quad_pairs(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    """Four products of 8 rows, 8 columns and a depth of 4: one of each quad pair of a warp."""
    names = [decoder.braced(operand) for operand in operands]
    if [len(x) for x in names] != [8, 2, 2, 8]:
        raise UnknownInstruction("registers of a product")
    puts = [decoder.write(x) for x in names[0]]
    a, b_, c = ([decoder.read(x, "b32") for x in some] for some in names[1:])

    def four_halves(registers: list[Array]) -> Array:
        """(warps, quad pairs, threads of each, 4)."""
        bits = np.stack(registers, 1).view(np.float16).astype(np.float64).reshape(-1, 32, 4)
        fragment = np.empty((bits.shape[0], 4, 8, 4))
        fragment[:, _PAIR, _OF_PAIR] = bits
        return fragment

    def execute(b: Blocks, mask: Mask) -> None:
        b.active_warps(mask)
        left, right = four_halves([x(b) for x in a]), four_halves([x(b) for x in b_])
        if match["layout"] == "col":
            right = right.transpose(0, 1, 3, 2)
        else:  # a thread has four columns of a row: the first four threads the left half
            right = right.reshape(-1, 4, 2, 4, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4, 8)
        product = left @ right
        for i, (put, total) in enumerate(zip(puts, c, strict=True)):
            row, column = (_LANE & 1) + (i & 2) + 4 * (_LANE >> 4), (i & 4) + (_LANE & 2) + (i & 1)
            part = product[:, _PAIR, row, column].reshape(-1)
            put(b, mask, (part + total(b).view(np.float32)).astype(np.float32))

    return execute


@functools.lru_cache(1 << 12)
def _tile(descriptor: int, rows: int, depth: int, size: int, transposed: bool) -> tuple[Array, Array]:
    """`tile_bytes`, and the chunks of 16 bytes that they lie in, which are the tile's own."""
    at = tile_bytes(descriptor, rows, depth, size, transposed)
    chunks = np.unique(at // 16) * 16
    if 16 * chunks.size != size * np.unique(at).size:
        raise UnknownInstruction("a tile that shares chunks of 16 bytes with another")
    return at, chunks


def tile_bytes(descriptor: int, rows: int, depth: int, size: int, transposed: bool) -> Array:
    """(rows, depth) offsets of the first bytes of an operand in shared memory, by its descriptor.

    The operand consists of 8 rows of up to 128 bytes, of which the chunks of 16 are swizzled: the bits of the
    address that count rows are added, without carry, to those that count chunks.

    Args:
        size: bytes of a number.
        transposed: whether the numbers of a column lie together, and not those of a row.
    """
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62]
    chunk, row, column = 16 // size, np.arange(rows)[:, None], np.arange(depth)[None, :]
    if transposed:
        width = chunk << swizzle
        over, down = (leading, stride) if swizzle else (stride, leading)
        offset = (row % width) * size + (row // width) * over
        offset = offset + (column % 8) * (16 << swizzle) + (column // 8) * down
    else:
        offset = (row % 8) * (16 << swizzle) + (row // 8) * stride
        offset = offset + (column // chunk) * (16 if swizzle else leading) + (column % chunk) * size
    address = start + offset
    swizzled: Array = address ^ (((address >> 7) & ((1 << swizzle) - 1)) << 4)
    return swizzled


def _wgmma(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    kind, columns, depth = match["kind"], int(match["n"]), int(match["k"])
    size = 4 if kind == "tf32" else 2
    if depth * size != 32:
        raise UnknownInstruction("shape of a product")
    names, of_registers = decoder.braced(operands[0]), operands[1].startswith("{")
    if len(names) != columns // 2:
        raise UnknownInstruction(f"{len(names)} registers")
    puts, totals = [decoder.write(x) for x in names], [decoder.read(x, "b32") for x in names]
    a = [decoder.read(x, "b32" if of_registers else "u64") for x in decoder.braced(operands[1])]
    b_, adds = decoder.read(operands[2], "u64"), decoder.read(operands[3], "pred")
    tail = [int(x, 0) for x in operands[4:]]
    if tail[:2] != [1, 1] or len(tail) != 2 + (0 if kind == "tf32" else 1 if of_registers else 2):
        raise UnknownInstruction("immediates of a product")
    transposed_a, transposed_b = ([0, 0, *tail[2:]])[-2:] if len(tail) > 2 else (0, 0)

    def from_shared(b: Blocks, descriptor: int, group: int, rows: int, transposed: int) -> Array:
        block = int(b.block[128 * group])
        at, chunks = _tile(descriptor, rows, depth, size, bool(transposed))
        read = b.shared.bytes_of(chunks, block, 16)
        b.shared.product_begins(read, block)
        b.products.append((int(b.committed_products[group]), group, read))
        memory = b.shared.data.view(np.uint32 if size == 4 else np.uint16)
        return _numbers(memory[(at + block * b.shared.size) // size], kind)

    def execute(b: Blocks, mask: Mask) -> None:
        active = b.active_warps(mask)
        groups = np.unique(active // 4)
        if active.size != 4 * groups.size:
            raise Fault("a product of four warps is executed by fewer")
        left_values, right_values, add = [x(b) for x in a], b_(b), adds(b)
        product = np.zeros((b.count // 128, 64, columns))
        for group in groups:
            first = 128 * int(group)
            if of_registers:
                parts = [x[first : first + 128].reshape(4, 32) for x in left_values]
                left = _fragment(parts, kind, 16).reshape(64, depth)
            else:
                left = from_shared(b, int(left_values[0][first]), int(group), 64, transposed_a)
            right = from_shared(b, int(right_values[first]), int(group), columns, transposed_b)
            product[group] = left @ right.T
        # The registers of a warp's 16 rows: (warps, halves, 8, columns / 8, 4, 2) in that order.
        product = product.reshape(-1, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
        product = product.reshape(columns // 2, -1)
        of_active = add if mask is None else add[mask]
        adds_some, adds_all = of_active.any(), add.all()
        for put, total, part in zip(puts, totals, product, strict=True):
            if adds_some:
                before = total(b).view(np.float32)
                part = part + (before if adds_all else np.where(add, before, np.float32(0)))
            put(b, mask, part.astype(np.float32))

    return execute


def _commit_products(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    def execute(b: Blocks, mask: Mask) -> None:
        b.committed_products[np.unique(b.active_warps(mask) // 4)] += 1

    return execute


def _wait_products(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    left = int(operands[0], 0)

    def execute(b: Blocks, mask: Mask) -> None:
        waiting, rest = set((b.active_warps(mask) // 4).tolist()), []
        for number, group, read in b.products:
            if group in waiting and number < b.committed_products[group] - left:
                b.shared.product_ends(read)
            else:
                rest.append((number, group, read))
        b.products = rest

    return execute


TABLE: list[tuple[str, Callable[[Decoder, Match, Operands], Execute]]] = [
    (r"mma\.sync\.aligned\.m16n8k(?P<depth>16)\.row\.col\.f32\.(?P<kind>f16|bf16)\.(?P=kind)\.f32", _mma),
    (r"mma\.sync\.aligned\.m16n8k(?P<depth>8)\.row\.col\.f32\.(?P<kind>tf32|f16)\.(?P=kind)\.f32", _mma),
    (r"mma\.sync\.aligned\.m8n8k4\.row\.(?P<layout>row|col)\.f32\.f16\.f16\.f32", _quad_pairs),
    (r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k(?P<k>16|8)\.f32\.(?P<kind>f16|bf16|tf32)\.(?P=kind)",
     _wgmma),
    (r"wgmma\.fence\.sync\.aligned", nothing),
    (r"wgmma\.commit_group\.sync\.aligned", _commit_products),
    (r"wgmma\.wait_group\.sync\.aligned", _wait_products),
]  # fmt: skip
