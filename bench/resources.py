"""What the compiler makes of the GPU kernels, for GPUs that may be absent: `python -m bench.resources`.

Every entry of a table of tiles is compiled for its architecture. The compiler tells registers, spilled
bytes and shared memory, from which follows how many programs a multiprocessor holds. The machine code of the
loop over the keys tells how many instructions, and how many exponentials, a pair of row and key costs. Beside
what tensor cores need for the products, that says what bounds a kernel: at best all go on at once.

ConIC's rows are the views, and its keys the rows of the weight, in float32 whatever the views are. NT-Xent's
are both the rows of both views; its gradient without the consistency term goes by the name "plain".
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.compilers import COMPILERS, TRITON, Capability, Compiler
from contrastive_ops._contract import CO2Settings, ConICSettings, NTXentSettings, SGDSettings
from contrastive_ops.gpu.launch import Call, Chip, recording
from contrastive_ops.gpu.tiles import Tiling
from train_ref.markdown import table

# Of a program, at most.
SHARED_KIB = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
REGISTERS = 65536  # of a multiprocessor
TENSOR_COLUMNS = 512  # of its tensor memory, where it has one
# What a multiprocessor does in a clock, by the vendor's data sheets: instructions of a thread, of which so
# many in float32, exponentials, bytes to and from shared memory, and operations of tensor cores in half
# precision.
ISSUED, EXPONENTIALS = 128, 16
FLOAT32 = {(7, 0): 64, (7, 5): 64, (8, 0): 64, (8, 9): 128, (9, 0): 128, (10, 0): 128, (12, 0): 128}
SHARED_BYTES = {(7, 0): 128, (7, 5): 64, (8, 0): 128, (8, 9): 128, (9, 0): 128, (10, 0): 128, (12, 0): 128}
OPERATIONS = {
    (7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 9): 512, (9, 0): 4096, (10, 0): 8192, (12, 0): 512
}  # fmt: skip
UNITS = ("instructions", "float32", "exponentials", "products", "shared memory")


class GPU(NamedTuple):
    """A chip that bounds are told for."""

    name: str
    multiprocessors: int
    gigahertz: float  # the highest clock


CHIPS = {
    (7, 0): GPU("V100", 80, 1.53),
    (7, 5): GPU("T4", 40, 1.59),
    (8, 0): GPU("A100", 108, 1.41),
    (8, 9): GPU("RTX 4090", 128, 2.52),
    (9, 0): GPU("H100", 132, 1.98),
    (10, 0): GPU("B200", 148, 1.97),
}

# The kernels that walk: how many products of D operations a pair takes for similarities, and for a gradient.
WALKING = {
    "co2.statistics": (2, 0),
    "co2.gradient": (2, 1),
    "conic.statistics": (1, 0),
    "conic.weight": (1, 1),
    "conic.views": (1, 1),
    "nt_xent.statistics": (1, 0),
    "nt_xent.gradient": (1, 1),
    "nt_xent.plain": (1, 1),
}
SMALL = (
    "co2.round", "co2.prepare", "co2.merge", "co2.finish", "conic.prepare", "conic.merge", "conic.unit",
    "conic.finish",
    "nt_xent.prepare", "nt_xent.merge", "nt_xent.finish",
)  # fmt: skip
PAIRS = {"co2": 256 << 16, "conic": 1024 << 16, "nt_xent": 8192**2}
MULTIPROCESSORS = 132  # of the chip that calls are planned for


def dtype_of(precision: str, capability: Capability, compiler: Compiler = TRITON) -> torch.dtype:
    """Of the rows that are multiplied so."""
    return compiler.half(capability) if precision == "half" else torch.float32


def operations(precision: str, capability: Capability) -> float:
    """How many a multiprocessor multiplies and adds in a clock."""
    if capability < (8, 0) and precision != "half":
        return 2 * FLOAT32[capability]  # by multiply-adds
    # TF32 goes at half the rate, and exact float32 is three products of it.
    return OPERATIONS[capability] / {"half": 1, "tf32": 2, "tf32x3": 6}[precision]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes. `loop` counts the instructions of its loop over the keys, by name, per
    pair of row and key, and `shared_traffic` the bytes that it moves to and from shared memory."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_columns: int
    ptx: str
    loop: dict[str, float]
    shared_traffic: float

    def programs(self, tiles: Tiling, capability: Capability) -> int:
        """How many fit on a multiprocessor, whose registers go out by eights a thread."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * tiles.warps)
        systems = 1024 if capability >= (8, 0) else 0
        by_shared = SHARED_KIB[capability] * 1024 // (self.shared_bytes + systems)
        return min(by_registers, by_shared, TENSOR_COLUMNS // max(1, self.tensor_columns))


def clocks(
    made: Resources,
    name: str,
    capability: Capability,
    precision: str,
    dim: int,
    compiler: Compiler = TRITON,
) -> dict[str, float]:
    """Clocks of a multiprocessor that a pair of row and key takes of each of its units."""
    tiles = compiler.tiling(name, capability, precision, dim)
    chunks = -(-dim // tiles.width) if tiles.width and dim > tiles.depth else 1
    of_similarities, of_gradient = WALKING[name]
    products = of_similarities * chunks + of_gradient
    taken = {
        "exponentials": chunks * made.loop.get("MUFU", 0) / EXPONENTIALS,
        "products": products * 2 * dim / operations(precision, capability),
    }
    if dim <= tiles.depth:
        # Rows that go through in chunks have a loop within the loop, which the code holds once.
        taken["instructions"] = sum(made.loop.values()) / ISSUED
        taken["float32"] = (
            sum(made.loop.get(each, 0) for each in ("FADD", "FMUL", "FFMA")) / FLOAT32[capability]
        )
        taken["shared memory"] = made.shared_traffic / SHARED_BYTES[capability]
    return taken


def record(
    loss: str,
    capability: Capability,
    precision: str,
    dim: int,
    *,
    compiler: Compiler = TRITON,
    columns: bool = False,
    dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype = torch.float32,
    queue_dtype: torch.dtype | None = None,
    keys: int = 65536,
    consistency: bool = True,
    temperature: float = 0.2,
    relative: bool = False,
) -> dict[str, list[Call]]:
    """The calls of a loss's kernels, forward and backward, by name and in their order.

    Args:
        loss: "co2", of 256 rows; "conic", of two views of 512 instances, with a gradient of the weight, and
            then with a step of SGD; or "nt_xent", of 4096 instances.
        columns: whether the keys are in (D, K) order.
        consistency: without, CO2 is InfoNCE, and NT-Xent's gradient is "plain".
        temperature: of CO2, whose other one is 0.05.
        relative: whether NT-Xent's rows are not normalised.
    """
    dtype, kernels = dtype or dtype_of(precision, capability, compiler), compiler.kernels

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def matrix(dtype: torch.dtype) -> Tensor:
        return empty(dim, keys, dtype=dtype).T if columns else empty(keys, dim, dtype=dtype)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with recording(Chip(capability, MULTIPROCESSORS)) as calls:
            if loss == "co2":
                queue = matrix(queue_dtype or dtype)
                weight = 0.3 if consistency else 0.0
                kernels.co2(
                    empty(256, dim),
                    empty(256, dim),
                    queue,
                    CO2Settings(temperature, 0.05, 1.0, weight, True, True),
                    True,
                )
            elif loss == "conic":
                views, weights, settings = empty(2, 512, dim), matrix(weight_dtype), ConICSettings(0.1, 2.5)
                target, buffer = empty(512, dtype=torch.int64), matrix(weight_dtype)
                *_, coefficients = kernels.conic(views, weights, target, settings)
                grad_loss = empty(512, dtype=torch.float32)
                known = views, weights, target, coefficients, settings
                kernels.conic_gradient(grad_loss, *known, True, True)
                known = views, weights, buffer, target, coefficients, settings
                kernels.conic_gradient_sgd_(grad_loss, *known, SGDSettings(0.1, 0.9, 1e-4, False))
            else:
                settings = NTXentSettings(0.5, 0.05, 1.0 if consistency else 0.0, not relative)
                *_, coefficients = kernels.nt_xent(empty(2, 4096, dim), settings)
                grad_loss = empty(8192, dtype=torch.float32)
                kernels.nt_xent_gradient(grad_loss, empty(2, 4096, dim), coefficients, settings)
    finally:
        torch.set_float32_matmul_precision(before)
    by_name: dict[str, list[Call]] = {}
    for call in calls:
        by_name.setdefault(call.launch.name, []).append(call)
    return by_name


def compile_kernel(
    name: str,
    capability: Capability,
    precision: str,
    dim: int,
    *,
    step: bool = True,
    compiler: Compiler = TRITON,
    **problem: Any,
) -> Resources:
    """One of the kernels, such as "co2.merge".

    Args:
        step: without, ConIC stores the weight's gradient in place of a step of SGD, and a `prepare` is that
            of forward.
        compiler: of which backend.
        problem: see `record`.
    """
    loss = name.split(".")[0]
    if name == "nt_xent.plain":
        problem["consistency"] = False
    if name == "co2.round":
        problem.setdefault("queue_dtype", torch.float32)
    calls = record(loss, capability, precision, dim, compiler=compiler, **problem)[name]
    call = calls[-1 if step else 0]
    compiled = compiler.compile(call, capability)
    instructions = loop_instructions(compiled.code)
    loop = Counter(instruction.split()[0].split(".")[0] for instruction in instructions)
    arguments = call.arguments
    tile = arguments.get("TILE")
    pairs = (tile.rows * tile.keys if tile else 1) / compiled.threads
    exponentials = 3 - bool(compiler.power(arguments)) if loss == "co2" else 1
    if loss == "nt_xent":
        pairs *= 2  # of each instance's two views
        exponentials = (1 + arguments.get("CONSISTENCY", True)) * (1 + arguments.get("RELATIVE", False))
    # The loop may be unrolled: a pair takes so many exponentials, and a fraction for its lane.
    pairs *= max(1, loop["MUFU"] // (exponentials * pairs))
    per_pair = {instruction: count / pairs for instruction, count in loop.items()}
    ptx = compiled.ptx
    tensor_columns = sum(map(int, re.findall(r"^\s*(?:@\S+ )?tcgen05\.alloc.*, (\d+);", ptx, re.MULTILINE)))
    shared_traffic = sum(map(bytes_of_a_warp, instructions)) / (32 * pairs)
    if tile and tensor_columns:
        shared_traffic += bytes_of_blackwell(name, tile)
    return Resources(
        compiled.registers, compiled.spilled_bytes, compiled.shared_bytes, tensor_columns, ptx, per_pair,
        shared_traffic,
    )  # fmt: skip


def loop_instructions(code: str) -> list[str]:
    """Instructions of the loop that walks, the innermost with the exponentials, without those that few of its
    passes take; none without machine code."""
    labels, instructions = {}, []
    for line in map(str.strip, code.splitlines()):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    predicated = re.compile(r"^@!?U?P\w+\s+")
    instructions = [predicated.sub("", instruction) for instruction in instructions]
    names = [instruction.split()[0] for instruction in instructions]
    jumps = {
        index: labels.get(target[1], len(names))
        for index, instruction in enumerate(instructions)
        if (target := re.search(r"\bBRA\b.*?(\.L_\w+)", instruction))
    }
    # What masks a tile is jumped over for most of them.
    masks = [
        range(index + 1, to)
        for index, to in jumps.items()
        if index < to and names[index + 1 : to].count("FSEL") > (to - index) / 4
    ]
    masked = set().union(*masks)
    loops = [
        [i for i in range(begin, end + 1) if i not in masked or end in masked]
        for end, begin in jumps.items()
        if begin <= end
    ]
    counted = [(loop, sum(names[i] == "MUFU.EX2" for i in loop)) for loop in loops]
    innermost = [
        (loop, count)
        for loop, count in counted
        if count and not any(4 * inner >= count and set(each) < set(loop) for each, inner in counted)
    ]
    most = max((count for _, count in innermost), default=0)
    walks = [loop for loop, count in innermost if 2 * count >= most]
    return [instructions[i] for i in min(walks, key=len, default=[])]


def bytes_of_a_warp(instruction: str) -> float:
    """Bytes to and from shared memory that an instruction of machine code moves for a warp, without what
    banks in conflict would add."""
    name, *_ = instruction.split()
    kind, *modifiers = name.split(".")
    width = next((int(m) // 8 for m in modifiers if m in ("64", "128")), 4)
    if kind in ("LDSM", "STSM"):  # matrices of 8 × 8 numbers of two bytes
        return 128 * (int(modifiers[-1]) if modifiers[-1].isdigit() else 1)
    if kind in ("LDS", "STS", "LDGSTS"):
        return 32 * width
    if kind in (
        "HGMMA",
        "QGMMA",
    ):  # of a group of four warps: 32 bytes of each column, and row if it is there
        rows, columns, _ = map(int, modifiers[0].split("x"))
        from_shared = instruction.count("gdesc") - 1
        return 32 * (columns + rows * from_shared) / 4
    return 0


def bytes_of_blackwell(name: str, tile: Any) -> float:
    """Bytes of shared memory that products of the fifth generation read a pair: both operands of each, once.
    What is multiplied into a gradient comes from tensor memory."""
    size = tile.dtype.primitive_bitwidth // 8
    of_similarities, of_gradient = WALKING[name]
    keys, rows = tile.keys * tile.depth * size, tile.rows * tile.depth * size
    return (of_similarities * (rows + keys) + of_gradient * keys) / (tile.rows * tile.keys)


def entries(name: str, capability: Capability, compiler: Compiler = TRITON) -> list[tuple[str, int]]:
    """Precision and the D at which each line of a kernel's table is asked for."""
    return [
        (precision, largest if precision == "half" else 128)
        for precision, largest in compiler.entries(name, capability)
    ]


def report(capability: Capability, compiler: Compiler = TRITON) -> str:
    chip = CHIPS[capability]
    header = [
        "kernel", "precision", "D", "tile", "warps", "registers", "spilled", "shared KiB", "programs",
        "instructions", "exponentials", *(f"clocks: {unit}" for unit in UNITS), f"µs at least, {chip.name}",
        "bound by",
    ]  # fmt: skip
    rows = []
    for name in WALKING:
        for precision, dim in entries(name, capability, compiler):
            tiles = compiler.tiling(name, capability, precision, dim)
            made = compile_kernel(name, capability, precision, dim, compiler=compiler)
            taken = clocks(made, name, capability, precision, dim, compiler)
            unchunked = "instructions" in taken
            row = [
                name, precision, dim, f"{tiles.held} × {tiles.walked}", tiles.warps, made.registers,
                made.spilled_bytes, f"{made.shared_bytes / 1024:.0f}", made.programs(tiles, capability),
                f"{sum(made.loop.values()):.1f}" if unchunked else "–", f"{made.loop.get('MUFU', 0):.2f}",
                *(f"{taken[unit]:.3f}" if unit in taken else "–" for unit in UNITS),
            ]  # fmt: skip
            binding = max(taken, key=lambda unit: taken[unit])
            clocks_in_all = taken[binding] * PAIRS[name.split(".")[0]] / chip.multiprocessors
            rows.append([*row, f"{clocks_in_all / chip.gigahertz / 1e3:.1f}", binding])
    title = f"## Compute capability {capability[0]}.{capability[1]}"
    return f"{title}\n\n{table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    parser.add_argument("--backend", choices=tuple(COMPILERS), default="triton", help="whose kernels")
    parser.add_argument("capabilities", nargs="*", metavar="CAPABILITY", help="such as 8.0")
    arguments = parser.parse_args()
    compiler = COMPILERS[arguments.backend]
    asked = [tuple(map(int, each.split("."))) for each in arguments.capabilities]
    print(
        f"# {compiler.title}\n\n"
        "Instructions, exponentials and clocks of a multiprocessor are those of a pair of row and key. The\n"
        "times are for 65536 keys, and 256 rows of CO2 or 1024 of ConIC, or for 4096 instances of\n"
        "NT-Xent, at the highest clock, were the busiest unit never idle: a bound worked out from the\n"
        "compiler's output and the vendor's rates, not a measurement. Instructions and shared memory of\n"
        "rows that go through in chunks are not counted, nor are conflicts of shared memory's banks."
    )
    for major, minor in asked or compiler.capabilities:
        print(f"\n{report((major, minor), compiler)}", flush=True)


if __name__ == "__main__":
    main()
