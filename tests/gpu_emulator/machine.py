"""Runs a kernel: several blocks at once, whose threads take its instructions together where they can."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .flow import ranks
from .memory import Array, Bytes, GlobalMemory, SharedMemory
from .ptx import BYTES, Fault, Instruction, Kernel, UnknownInstruction

THREADS_AT_ONCE = 2048
PARAMETER = 20  # the bits of a parameter's address; those above are its number
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NUMPY: dict[str, Any] = {
    "u8": np.uint8, "b8": np.uint8, "s8": np.int8, "u16": np.uint16, "b16": np.uint16, "s16": np.int16,
    "u32": np.uint32, "b32": np.uint32, "s32": np.int32, "u64": np.uint64, "b64": np.uint64, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
Mask = Array | None  # of the threads that execute; None: all
Execute = Callable[["Blocks", Mask], None]
Read = Callable[["Blocks"], Array]


class Blocks:
    """The state of some blocks that run at once: a value a thread for each register."""

    def __init__(
        self, threads: int, indices: Array, memory: GlobalMemory, parameters: dict[str, Array], shared: int
    ) -> None:
        count = len(indices)
        self.count, self.threads = count * threads, threads
        self.block = np.repeat(np.arange(count), threads)
        thread = np.tile(np.arange(threads), count)
        self.warp = thread // 32  # within its block
        self.special = {
            "%tid.x": thread.astype(np.uint32),
            "%ntid.x": np.full(self.count, threads, np.uint32),
        }
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = np.repeat(indices[:, axis], threads).astype(np.uint32)
        self.registers: dict[str, Array] = {}
        self.memory, self.parameters = memory, parameters
        self.shared = SharedMemory(shared, count, threads // 32)
        # Not yet landed: group, threads, bytes, data.
        self.copies: list[tuple[Array, Array, Bytes, Array]] = []
        self.committed = np.zeros(self.count, np.int64)  # groups of copies, a thread
        self.products: list[tuple[int, int, Bytes]] = []  # in flight: group, first thread, bytes read
        self.committed_products = np.zeros(self.count // 128 + 1, np.int64)

    def all(self, mask: Mask) -> Array:
        return np.ones(self.count, bool) if mask is None else mask

    def active_warps(self, mask: Mask) -> Array:
        """The warps that execute an instruction which takes all of a warp's threads."""
        lanes = self.all(mask).reshape(-1, 32)
        if (lanes.any(1) != lanes.all(1)).any():
            raise Fault("an instruction of a whole warp is executed by a part of it")
        return np.flatnonzero(lanes[:, 0])


class Decoder:
    """Makes operands of a kernel's instructions into functions of the state."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def register_type(self, name: str) -> str:
        for key in (name, re.sub(r"\d+$", "", name)):
            if key in self.kernel.registers:
                return self.kernel.registers[key]
        raise UnknownInstruction(f"operand {name}")

    def read(self, operand: str, kind: str) -> Read:
        """An operand as numbers of a type; "bf16" as float32, "pred" as bool."""
        raw = self._raw(operand, kind)
        if kind == "pred":
            return lambda b: raw(b).astype(bool)
        if kind == "bf16":
            return lambda b: (raw(b).astype(np.uint32) << np.uint32(16)).view(np.float32)
        unsigned, numbers = UNSIGNED[BYTES[kind]], NUMPY[kind]

        def typed(b: Blocks) -> Array:
            return raw(b).astype(unsigned, copy=False).view(numbers)

        return typed

    def _raw(self, operand: str, kind: str) -> Read:
        special = ("%tid.x", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z")
        if operand in special:
            return lambda b: b.special[operand]
        if operand in self.kernel.parameters:
            return self._constant(
                UNSIGNED[BYTES[kind]](list(self.kernel.parameters).index(operand) << PARAMETER)
            )
        if operand in self.kernel.variables:
            return self._constant(UNSIGNED[BYTES[kind]](self.kernel.variables[operand]))
        if re.fullmatch(r"0[fd][0-9A-Fa-f]+", operand):
            wide = operand[1] == "d"
            value = int(operand[2:], 16)
            return self._constant((np.uint64 if wide else np.uint32)(value))
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
            width = 8 if kind == "pred" else BYTES[kind]
            return self._constant(UNSIGNED[width](int(operand.rstrip("U"), 0) & ((1 << (8 * width)) - 1)))
        self.register_type(operand)

        def register(b: Blocks) -> Array:
            try:
                return b.registers[operand]
            except KeyError:
                raise Fault(f"{operand} is read, and was never written") from None

        return register

    @staticmethod
    def _constant(value: Any) -> Read:
        return lambda b: np.full(b.count, value)

    def address(self, operand: str) -> Read:
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not match:
            raise UnknownInstruction(f"address {operand}")
        base, offset = self.read(match[1], "u64"), np.uint64(int(match[2] or 0) & ((1 << 64) - 1))
        return lambda b: base(b) + offset

    def write(self, operand: str) -> Callable[[Blocks, Mask, Array], None]:
        """Stores numbers as bits, extended to the register's width: by the sign, where the type has one."""
        if operand == "_":
            return lambda b, mask, value: None
        kind = self.register_type(operand)

        def put(b: Blocks, mask: Mask, value: Array) -> None:
            if kind == "pred":
                value = value.astype(bool)
            else:
                width = BYTES[kind]
                if value.dtype.itemsize != width:
                    value = value.view(UNSIGNED[value.dtype.itemsize]) if value.dtype.kind == "f" else value
                    value = value.astype(f"{value.dtype.kind}{width}")
                value = np.ascontiguousarray(value).view(UNSIGNED[width])
            if mask is not None:
                value = np.where(mask, value, b.registers.get(operand, np.zeros_like(value)))
            b.registers[operand] = value

        return put

    def braced(self, operand: str) -> list[str]:
        return [part.strip() for part in operand.strip("{} ").split(",")]


class Program:
    """A kernel, decoded: every instruction is known before the first is executed."""

    def __init__(self, kernel: Kernel) -> None:
        from . import arithmetic, matrices, transfers

        self.kernel = kernel
        decoder = Decoder(kernel)
        tables = arithmetic.TABLE + transfers.TABLE + matrices.TABLE
        self._steps: list[tuple[Instruction, Read | None, Execute | int | None]] = []
        for instruction in kernel.instructions:
            predicate = decoder.read(instruction.predicate, "pred") if instruction.predicate else None
            step: Execute | int | None
            if instruction.opcode in ("bra", "bra.uni"):
                if instruction.operands[0] not in kernel.labels:
                    raise UnknownInstruction(f"line {instruction.line}: {instruction.text}")
                step = kernel.labels[instruction.operands[0]]
            elif instruction.opcode == "ret":
                step = len(kernel.instructions)
            else:
                known = (
                    (build, match)
                    for pattern, build in tables
                    if (match := re.fullmatch(pattern, instruction.opcode))
                )
                build, match = next(known, (None, None))
                if build is None:
                    raise UnknownInstruction(f"line {instruction.line}: {instruction.opcode}")
                try:
                    step = build(decoder, match, instruction.operands)
                except UnknownInstruction as error:
                    raise UnknownInstruction(
                        f"line {instruction.line}: {instruction.text}: {error}"
                    ) from None
            self._steps.append((instruction, predicate, step))
        self._ranks = np.array([*ranks([*map(self._successors, range(len(self._steps)))]), len(self._steps)])

    def _successors(self, at: int) -> list[int]:
        _, predicate, step = self._steps[at]
        after = [step] if isinstance(step, int) else [at + 1]
        return after if predicate is None or not isinstance(step, int) else [*after, at + 1]

    def run(
        self,
        grid: tuple[int, int, int],
        memory: GlobalMemory,
        parameters: dict[str, Array],
        shared: int,
        threads: int | None = None,
    ) -> None:
        """A launch with that many bytes of shared memory, and threads a block; None for as many as may be."""
        threads = threads or self.kernel.threads
        if threads > self.kernel.threads or threads % 32:
            raise Fault(f"{threads} threads a block, where {self.kernel.threads} may be, and whole warps")
        shared += self.kernel.static_shared
        indices = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
        at_once = max(1, THREADS_AT_ONCE // threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(indices), at_once):
                some = indices[first : first + at_once]
                self._run(Blocks(threads, some, memory, parameters, shared))

    def _run(self, b: Blocks) -> None:
        """Threads that are at different instructions execute that of the lowest rank first, so those that
        branched apart meet again where their ways do."""
        end, at, each = len(self._steps), 0, None
        while True:
            mask: Mask = None
            if each is not None:
                at = int(each[self._ranks[each].argmin()])
                mask = each == at
                if mask.all():
                    each = mask = None
            if at >= end:
                if b.copies or b.products:
                    raise Fault(f"{self.kernel.name} ends while copies or products are in flight")
                return
            instruction, predicate, step = self._steps[at]
            chosen = mask
            if predicate is not None:
                taken = predicate(b) != instruction.negated
                chosen = taken if mask is None else taken & mask
                if chosen.all():
                    chosen = None
            if isinstance(step, int):
                if chosen is None:
                    at, each = step, None
                else:
                    each = np.full(b.count, at) if each is None else each
                    executing = b.all(mask)
                    each = np.where(executing, np.where(chosen, step, at + 1), each)
                continue
            assert step is not None
            if chosen is None or chosen.any():
                try:
                    step(b, chosen)
                except Fault as error:
                    where = f"{self.kernel.name}, line {instruction.line}: {instruction.text}"
                    raise Fault(f"{error} ({where})") from None
            if each is None:
                at += 1
            else:
                each = np.where(mask, at + 1, each)
