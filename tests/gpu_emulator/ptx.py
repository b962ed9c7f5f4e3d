"""Reads PTX: a kernel of a module, its instructions, its labels, and its variables in shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

BYTES = {
    "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8,
}  # fmt: skip


class UnknownInstruction(Exception):
    """PTX that the emulator was not taught, with its line."""


class Fault(Exception):
    """What a GPU would not do as meant: an access out of bounds, a race, a barrier that some threads miss."""


@dataclass(frozen=True)
class Instruction:
    """An instruction; `operands` are as written, those in braces are one."""

    line: int
    text: str
    predicate: str | None
    negated: bool
    opcode: str
    operands: tuple[str, ...]


@dataclass
class Kernel:
    """A kernel as it was parsed.

    Attributes:
        parameters: how many bytes each has.
        threads: of a block, or how many it may have at most.
        variables: where those in shared memory begin. What a launch reserves comes after them.
        static_shared: how many bytes they take.
        registers: from prefixes of names to types.
        labels: to indices of instructions.
    """

    name: str
    parameters: dict[str, int]
    threads: int
    variables: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)


_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*((?:\.\w+ [\d, ]+\s*)*)\{", re.DOTALL)
_PARAMETER = re.compile(
    r"\.param(?: \.align \d+)? \.(\w+)(?: \.ptr \.global \.align \d+)? (\w+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"(\.extern )?\.shared \.align (\d+) \.(\w+) ([\w$]+)\[(\d*)\]")
_IGNORED = (".loc", ".file", ".pragma")


def parse(ptx: str) -> Kernel:
    """The only kernel of a module."""
    text = re.sub(r"//[^\n]*", "", ptx)
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1 or re.search(r"^\s*(\.\w+ )*\.func\b", text, re.MULTILINE):
        raise UnknownInstruction(
            f"a module of one kernel and no functions is needed, got {len(entries)} kernels"
        )
    entry = entries[0]
    parameters = {}
    for parameter in filter(str.strip, entry[2].split(",")):
        match = _PARAMETER.fullmatch(" ".join(parameter.split()))
        if not match or match[1] not in BYTES:
            raise UnknownInstruction(f"parameter {parameter.strip()}")
        parameters[match[2]] = BYTES[match[1]] * int(match[3] or 1)
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", entry[3])
    if not threads:
        raise UnknownInstruction("the kernel does not tell how many threads a block has")
    kernel = Kernel(entry[1], parameters, int(threads[1]))
    reserved = [_share(kernel, match) for match in _SHARED.finditer(text)]
    for name in filter(None, reserved):
        kernel.variables[name] = kernel.static_shared
    line = text.count("\n", 0, entry.end()) + 1
    depth, statement = 1, ""
    for row in text[entry.end() :].split("\n"):
        stripped = row.strip()
        if stripped.startswith(_IGNORED):
            line += 1
            continue
        for piece in re.split(r"(;)", stripped):
            if piece == ";":
                _add(kernel, statement.strip(), line)
                statement = ""
                continue
            rest = piece.strip()
            while label := re.match(r"([$\w]+):(?!:)\s*", rest):
                kernel.labels[label[1]] = len(kernel.instructions)
                rest = rest[label.end() :]
            if not statement and rest in ("{", "}"):
                depth += 1 if rest == "{" else -1
            elif not statement and rest.startswith("{"):
                depth, statement = depth + 1, rest[1:] + " "
            elif rest:
                statement += rest + " "
        if depth == 0:
            return kernel
        line += 1
    raise UnknownInstruction("the kernel does not end")


def _share(kernel: Kernel, match: re.Match[str]) -> str | None:
    """Gives a variable its place in shared memory; the name of one whose size a launch tells is returned."""
    is_extern, alignment, kind, name, count = match.groups()
    kernel.static_shared = -(-kernel.static_shared // int(alignment)) * int(alignment)
    if is_extern:
        return name
    kernel.variables[name] = kernel.static_shared
    kernel.static_shared += BYTES[kind] * int(count)
    return None


def _add(kernel: Kernel, statement: str, line: int) -> None:
    if _SHARED.fullmatch(statement):
        return
    if declared := re.fullmatch(r"\.reg \.(\w+)\s+(.*)", statement):
        for name in declared[2].split(","):
            kernel.registers[re.sub(r"<\d+>$", "", name.strip())] = declared[1]
        return
    match = re.fullmatch(r"(?:@(!?)(%\w+|\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL)
    if not match or statement.startswith("."):
        raise UnknownInstruction(f"line {line}: {statement}")
    operands = re.split(r",(?![^{\[]*[}\]])", match[4]) if match[4] else []
    kernel.instructions.append(
        Instruction(
            line, statement, match[2], match[1] == "!", match[3], tuple(" ".join(x.split()) for x in operands)
        )
    )
