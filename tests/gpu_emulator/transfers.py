"""Instructions that move data: loads, stores, shuffles, asynchronous copies, and barriers."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .machine import NUMPY, PARAMETER, Blocks, Decoder, Execute, Mask
from .memory import Array, Bytes
from .ptx import BYTES, Fault, UnknownInstruction

Match = re.Match[str]
Operands = tuple[str, ...]


def _load_parameter(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    kind, address = match["type"], decoder.address(operands[1])
    puts, names = (
        [decoder.write(part) for part in decoder.braced(operands[0])],
        list(decoder.kernel.parameters),
    )
    width = len(puts) * BYTES[kind]
    if len(puts) != int(match["vector"] or 1):
        raise UnknownInstruction(f"{len(puts)} registers")

    def execute(b: Blocks, mask: Mask) -> None:
        """All threads read the same."""
        at = np.unique(address(b)[b.all(mask)]).tolist()
        parameter, first = at[0] >> PARAMETER, at[0] & ((1 << PARAMETER) - 1)
        if len(at) > 1 or parameter >= len(names) or first + width > b.parameters[names[parameter]].size:
            raise Fault("an access outside of the parameters, or by threads one by one")
        numbers = b.parameters[names[parameter]][first : first + width].view(NUMPY[kind])
        for put, number in zip(puts, numbers, strict=True):
            put(b, mask, np.full(b.count, number))

    return execute


def _load(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    vector, kind, shared = int(match["vector"] or 1), match["type"], match["space"] != "global"
    puts = [decoder.write(name) for name in decoder.braced(operands[0])]
    address, width, is_constant = decoder.address(operands[1]), vector * BYTES[kind], ".nc" in match[0]
    if len(puts) != vector:
        raise UnknownInstruction(f"{len(puts)} registers")

    def execute(b: Blocks, mask: Mask) -> None:
        at, block, warp = address(b), b.block, b.warp
        if mask is not None:
            at, block, warp = at[mask], block[mask], warp[mask]
        if shared:
            data = b.shared.load(b.shared.bytes_of(at, block, width), block, warp)
        else:
            data = b.memory.load(at, width, is_constant)
        if mask is not None:
            every = np.zeros((b.count, width), np.uint8)
            every[mask] = data
            data = every
        numbers = data.view(NUMPY[kind])
        for i, put in enumerate(puts):
            put(b, mask, np.ascontiguousarray(numbers[:, i]))

    return execute


def _store(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    vector, kind, shared = int(match["vector"] or 1), match["type"], match["space"] != "global"
    sources = [decoder.read(name, kind) for name in decoder.braced(operands[1])]
    address, width = decoder.address(operands[0]), vector * BYTES[kind]
    if len(sources) != vector:
        raise UnknownInstruction(f"{len(sources)} registers")

    def execute(b: Blocks, mask: Mask) -> None:
        data = np.stack([source(b) for source in sources], 1).view(np.uint8).reshape(b.count, width)
        at, block, warp = address(b), b.block, b.warp
        if mask is not None:
            data, at, block, warp = data[mask], at[mask], block[mask], warp[mask]
        if shared:
            b.shared.store(b.shared.bytes_of(at, block, width), block, warp, data)
        else:
            b.memory.store(at, data)

    return execute


def _copy(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    """Reads at once, but lands at the wait for its group. Of `size` bytes those past the last are zeros."""
    target, source, size = decoder.address(operands[0]), decoder.address(operands[1]), int(operands[2], 0)
    if size not in ((16,) if match["cache"] == "cg" else (4, 8, 16)):
        raise UnknownInstruction(f"a copy of {size} bytes")
    count = decoder.read(operands[3] if len(operands) > 3 else operands[2], "u32")

    def execute(b: Blocks, mask: Mask) -> None:
        threads = np.flatnonzero(b.all(mask))
        valid = count(b)[threads]
        if ((valid != 0) & (valid != size)).any():
            raise Fault("a copy of a part of its bytes")
        data = np.zeros((threads.size, size), np.uint8)
        data[valid > 0] = b.memory.load(source(b)[threads][valid > 0], size)
        into = b.shared.bytes_of(target(b)[threads], b.block[threads], size)
        b.shared.copy_begins(into, b.block[threads], b.warp[threads])
        b.copies.append((b.committed[threads], threads, into, data))

    return execute


def _commit_copies(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    def execute(b: Blocks, mask: Mask) -> None:
        b.committed[b.all(mask)] += 1

    return execute


def _wait_copies(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    left = int(operands[0], 0)

    def execute(b: Blocks, mask: Mask) -> None:
        waits, rest = b.all(mask), []
        for group, threads, into, data in b.copies:
            lands = waits[threads] & (group < b.committed[threads] - left)
            some = threads[lands]
            b.shared.copy_lands(into.of(lands), b.block[some], b.warp[some], data[lands])
            if not lands.all():
                rest.append((group[~lands], threads[~lands], into.of(~lands), data[~lands]))
        b.copies = rest

    return execute


def _barrier(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    if operands != ("0",):
        raise UnknownInstruction("a barrier of some of a block's threads")

    def execute(b: Blocks, mask: Mask) -> None:
        here = b.all(mask).reshape(-1, b.threads)
        if (here.any(1) != here.all(1)).any():
            raise Fault("some threads of a block are not at its barrier")
        b.shared.epoch[here[:, 0]] += 1

    return execute


def _vote_of_block(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    """A barrier that tells all threads of a block whether one, or each, of them says so."""
    meet, put = _barrier(decoder, match, operands[1:2]), decoder.write(operands[0])
    source, combine = decoder.read(operands[2], "pred"), {"or": np.any, "and": np.all}[match["by"]]

    def execute(b: Blocks, mask: Mask) -> None:
        meet(b, mask)
        put(b, mask, np.repeat(combine(source(b).reshape(-1, b.threads), axis=1), b.threads))

    return execute


def nothing(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    return lambda b, mask: None


def _shuffle(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    """Of a whole warp, so that all of it is in bounds: that is what the second result tells."""
    to, _, is_inside = operands[0].partition("|")
    source, lane, *limits = (decoder.read(operand, "u32") for operand in operands[1:])
    put, butterfly = decoder.write(to), match["mode"] == "bfly"
    tell = decoder.write(is_inside or "_")

    def execute(b: Blocks, mask: Mask) -> None:
        warps = b.active_warps(mask)
        for limit, whole in zip(limits, (31, 0xFFFFFFFF), strict=True):
            if (limit(b).reshape(-1, 32)[warps] != whole).any():
                raise UnknownInstruction("a shuffle within a part of a warp")
        tell(b, mask, np.ones(b.count, bool))
        by = lane(b).reshape(-1, 32).astype(np.int64)
        other = (np.arange(32) ^ by) if butterfly else by
        put(b, mask, np.take_along_axis(source(b).reshape(-1, 32), other % 32, 1).reshape(-1))

    return execute


def _vote(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    """Of a whole warp; the third operand is the mask of its threads."""
    ask, members = decoder.read(operands[1], "pred"), decoder.read(operands[2], "b32")
    put, combine = decoder.write(operands[0]), {"all": np.all, "any": np.any}[match["by"]]

    def execute(b: Blocks, mask: Mask) -> None:
        warps = b.active_warps(mask)
        if (members(b).reshape(-1, 32)[warps] != 0xFFFFFFFF).any():
            raise UnknownInstruction("a vote of a part of a warp")
        put(b, mask, np.repeat(combine(ask(b).reshape(-1, 32), axis=1), 32))

    return execute


def _reduce(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    """Of a whole warp; the third operand is the mask of its threads."""
    source, members = decoder.read(operands[1], match["kind"]), decoder.read(operands[2], "b32")
    put, combine = decoder.write(operands[0]), {"min": np.min, "max": np.max, "add": np.sum}[match["by"]]

    def execute(b: Blocks, mask: Mask) -> None:
        warps = b.active_warps(mask)
        if (members(b).reshape(-1, 32)[warps] != 0xFFFFFFFF).any():
            raise UnknownInstruction("a reduction of a part of a warp")
        numbers = source(b).reshape(-1, 32)
        put(b, mask, np.repeat(combine(numbers, axis=1).astype(numbers.dtype), 32))

    return execute


def _rows_of_matrix(b: Blocks, address: Array, warps: Array, i: int) -> tuple[Bytes, Array, Array]:
    """Where the 8 rows of the i-th 8 × 8 matrix of each warp lie, by the addresses of its threads."""
    threads = (warps[:, None] * 32 + 8 * i + np.arange(8)).reshape(-1)
    block, warp = b.block[threads], b.warp[threads]
    return b.shared.bytes_of(address[threads], block, 16), block, warp


def _load_matrices(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    puts, address = [decoder.write(x) for x in decoder.braced(operands[0])], decoder.address(operands[1])
    transposed = match["trans"] is not None
    if len(puts) != int(match["count"]):
        raise UnknownInstruction(f"{len(puts)} registers")

    def execute(b: Blocks, mask: Mask) -> None:
        warps, at = b.active_warps(mask), address(b)
        for i, put in enumerate(puts):
            matrix = b.shared.load(*_rows_of_matrix(b, at, warps, i)).view(np.uint16).reshape(-1, 8, 8)
            matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1) if transposed else matrix)
            every = np.zeros((b.count // 32, 32), np.uint32)
            every[warps] = matrix.reshape(-1, 64).view(np.uint32)
            put(b, mask, every.reshape(-1))

    return execute


def _store_matrices(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    address, sources = (
        decoder.address(operands[0]),
        [decoder.read(x, "b32") for x in decoder.braced(operands[1])],
    )
    transposed = match["trans"] is not None
    if len(sources) != int(match["count"]):
        raise UnknownInstruction(f"{len(sources)} registers")

    def execute(b: Blocks, mask: Mask) -> None:
        warps, at = b.active_warps(mask), address(b)
        for i, source in enumerate(sources):
            matrix = np.ascontiguousarray(source(b).reshape(-1, 32)[warps]).view(np.uint16).reshape(-1, 8, 8)
            matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1) if transposed else matrix)
            b.shared.store(*_rows_of_matrix(b, at, warps, i), matrix.view(np.uint8).reshape(-1, 16))

    return execute


_SPACE, _VECTOR = r"\.(?P<space>global|shared(::cta)?)", r"(\.v(?P<vector>[24]))?"
_NUMBER = r"[bu](8|16|32|64)|[sf](32|64)"
_MATRICES = r"\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared\.b16"
TABLE: list[tuple[str, Callable[[Decoder, Match, Operands], Execute]]] = [
    (rf"ld\.param{_VECTOR}\.(?P<type>[busf](8|16|32|64))", _load_parameter),
    (rf"ld{_SPACE}{_VECTOR}\.(?P<type>{_NUMBER})", _load),
    (rf"ld\.(?P<space>global)\.nc{_VECTOR}\.(?P<type>{_NUMBER})", _load),
    (rf"st{_SPACE}{_VECTOR}\.(?P<type>{_NUMBER})", _store),
    (r"cp\.async\.(?P<cache>ca|cg)\.shared\.global", _copy),
    (r"cp\.async\.commit_group", _commit_copies),
    (r"cp\.async\.wait_group", _wait_copies),
    (r"bar\.sync", _barrier),
    (r"bar\.red\.(?P<by>or|and)\.pred", _vote_of_block),
    # Threads of a warp are in step here, and accesses of all kinds reach memory in their order.
    (r"bar\.warp\.sync|fence\.proxy\.async\.shared::cta", nothing),
    (r"redux\.sync\.(?P<by>min|max|add)\.(?P<kind>[us]32)", _reduce),
    (r"vote\.sync\.(?P<by>all|any)\.pred", _vote),
    (r"shfl\.sync\.(?P<mode>bfly|idx)\.b32", _shuffle),
    (rf"ldmatrix{_MATRICES}", _load_matrices),
    (rf"stmatrix{_MATRICES}", _store_matrices),
]
