"""What the compiler makes of the Triton kernels, for GPUs that may be absent: `python -m bench.resources`.

Every entry of the table of tiles is compiled for its architecture. The compiler tells registers, spilled
bytes and shared memory, from which follows how many programs a multiprocessor holds. The machine code of the
loop over the keys tells how many instructions, and how many exponentials, a pair of row and key costs. Beside
what tensor cores need for the products, that says what bounds a kernel: at best all three go on at once.

ConIC's rows are the views, and its keys the rows of the weight, in float32 whatever the views are. NT-Xent's
are both the rows of both views; its gradient without the consistency term goes by the name "plain".
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from contrastive_ops.kernels import _co2, _conic, _nt_xent, _rows, _walk
from contrastive_ops.kernels._tiles import (
    CONIC_OTHER,
    CONIC_TABLES,
    NT_XENT_OTHER,
    NT_XENT_TABLES,
    OTHER,
    TABLES,
    Tiles,
    select_conic_tiles,
    select_nt_xent_tiles,
    select_tiles,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from train_ref.markdown import table

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_KIB = {(8, 0): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}  # of a program, at most
REGISTERS = 65536  # of a multiprocessor
TENSOR_COLUMNS = 512  # of its tensor memory, where it has one
# What a multiprocessor does in a clock, by the vendor's data sheets: instructions of a thread, exponentials,
# and operations of tensor cores in half precision. TF32 goes at half that rate.
ISSUED, EXPONENTIALS = 128, 16
OPERATIONS = {(8, 0): 2048, (8, 9): 512, (9, 0): 4096, (10, 0): 8192, (12, 0): 512}
UNITS = ("instructions", "exponentials", "products")
UNSPECIALIZED = (
    "batch", "keys", "ranges", "count", "views_count", "rows", "padded_rows", "active", "coming", "going",
)  # fmt: skip
SLOWER = {"half": 1, "wide": 1, "tf32": 2, "tf32x3": 6}
CHIPS = {(8, 0): ("A100", 108, 1.41), (9, 0): ("H200", 132, 1.98)}  # multiprocessors, highest clock in GHz

MODULES = {"co2": _co2, "conic": _conic, "nt_xent": _nt_xent, "rows": _rows}
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
    "co2.merge", "co2.finish", "conic.prepare", "conic.merge", "conic.norms", "conic.finish",
    "nt_xent.prepare", "nt_xent.merge", "nt_xent.finish",
)  # fmt: skip
PAIRS = {"co2": 256 << 16, "conic": 1024 << 16, "nt_xent": 8192**2}
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
DTYPES = {"half": torch.bfloat16, "wide": torch.bfloat16, "tf32": torch.float32, "tf32x3": torch.float32}

# What the launchers pass, by name: Triton may take integers to be multiples of 16.
TYPES = {
    "partial": "*fp32", "merged": "*fp64", "parts": "*fp32", "gradient": "*fp32", "positive_rank": "*i64",
    "loss": "*fp32", "instance_loss": "*fp32", "consistency_loss": "*fp32", "scale": "fp32", "ratio": "fp32",
    "tau": "fp64", "tau_c": "fp64", "instance_weight": "fp64", "consistency_weight": "fp64",
    "record": "*fp32", "inverse": "*fp32", "norm": "*fp64", "positive": "*fp64", "statistics": "*fp64",
    "target": "*i64", "grad_loss": "*fp32", "classification_loss": "*fp32", "momentum_buffer": "*fp32",
    "log_compensation": "fp64", "lr": "fp32", "momentum": "fp32", "weight_decay": "fp32", "grad": "*fp32",
    "slots": "*i64", "incoming": "*fp32", "incoming_rows": "*i64", "coefficients": "*fp64",
    "outgoing": "*fp32", "outgoing_rows": "*i64", "size": "*fp32", "scale_c": "fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """Of a compiled kernel: `loop` counts the instructions of its loop over the keys, by name, per pair."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_columns: int
    ptx: str
    loop: dict[str, float]

    def programs(self, tiles: Tiles, shared_kib: int) -> int:
        """How many fit on a multiprocessor, whose registers go out by eights a thread."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * tiles.warps)
        by_shared = shared_kib * 1024 // (self.shared_bytes + 1024)  # 1 KiB is the system's
        return min(by_registers, by_shared, TENSOR_COLUMNS // max(1, self.tensor_columns))


def tiles_of(name: str, capability: tuple[int, int], precision: str, dim: int) -> Tiles:
    loss, kernel = name.split(".")
    if loss == "co2":
        return select_tiles(capability, precision, dim)[kernel == "gradient"]
    select = select_conic_tiles if loss == "conic" else select_nt_xent_tiles
    tiles: Tiles = getattr(select(capability, precision, dim), kernel)
    return tiles


def clocks(
    made: Resources, name: str, capability: tuple[int, int], precision: str, dim: int
) -> dict[str, float]:
    """Clocks of a multiprocessor that a pair of row and key takes of each of its units."""
    tiles = tiles_of(name, capability, precision, dim)
    chunks = -(-dim // _walk.tile_options(tiles, dim).get("WIDTH", dim))
    of_similarities, of_gradient = WALKING[name]
    products = of_similarities * chunks + of_gradient
    taken = {
        "exponentials": chunks * made.loop.get("MUFU", 0) / EXPONENTIALS,
        "products": products * 2 * dim * SLOWER[precision] / OPERATIONS[capability],
    }
    if dim <= tiles.depth:
        # Rows that go through in chunks have a loop within the loop, which the code holds once.
        taken["instructions"] = sum(made.loop.values()) / ISSUED
    return taken


def compile_kernel(
    name: str,
    capability: tuple[int, int],
    precision: str,
    dim: int,
    *,
    tiles: Tiles | None = None,
    columns: bool = False,
    dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype = torch.float32,
    keys: int = 65536,
    consistency: bool = True,
    step: bool = True,
    relative: bool = False,
) -> Resources:
    """One of the kernels, such as "co2.merge", as it is launched for `PAIRS` on a chip of 132
    multiprocessors; `columns` is the (D, K) order of keys; without `consistency` CO2 is InfoNCE; without
    `step` ConIC stores the weight's gradient, and NT-Xent prepares its forward; `relative` is NT-Xent's
    gradient of rows that are not normalised; `tiles` stand in for the table's."""
    loss, name = name.split(".")
    module, dtype = MODULES[loss], dtype or DTYPES[precision]
    if name == "plain":
        name, consistency = "gradient", False
    relative = relative or precision == "tf32x3"
    kernel = getattr(module, f"_{name}_kernel")
    constants: dict[str, object] = {}
    options: dict[str, object] = {}
    if loss == "co2":
        launch = getattr(_co2._plan(256, keys, dim, dtype, precision, (capability, 132)), name)
        options = dict(launch.options)
        if tiles:
            options |= _walk.walk(tiles, 256, keys, dim, 132).options
        constants = {
            "INSTANCE": True, "CONSISTENCY": consistency, "INCLUDE_POSITIVE": True, "NORMALIZE": True,
            "query_column": 1, "key_column": 1, "queue_row" if columns else "queue_column": 1,
        }  # fmt: skip
    elif loss == "conic":
        launch = getattr(_conic._plan(2, 512, keys, dim, dtype, precision, (capability, 132)), name)
        options = dict(launch.options)
        if tiles:
            options |= _walk.tile_options(tiles, dim) | {"WHOLE_KEYS": True}
            held, walked = ("BLOCK_B", "BLOCK_K") if name == "views" else ("BLOCK_K", "BLOCK_B")
            options |= {held: tiles.rows, walked: tiles.keys}
        step = step and options.get("WHOLE_ROWS", True)
        constants = {
            "BACKWARD": not step, "STEP": step, "NESTEROV": False,
            "view_column": 1, "momentum_column": 1, "weight_row" if columns else "weight_column": 1,
        }  # fmt: skip
        if name == "prepare":
            constants |= dict.fromkeys(("statistics", "grad_loss") if step else ("positive",))
        if name == "weight":
            constants["gradient" if step else "momentum_buffer"] = None
    elif loss == "nt_xent":
        plan = _nt_xent._plan(4096, dim, dtype, precision, consistency, (capability, 132))
        options = dict(getattr(plan, name).options)
        if tiles:
            walking = _walk.walk(tiles, 4096, 8192, dim, 132).options
            options |= {option: value for option, value in walking.items() if option in options}
            options["STACKED"] = tiles.stacked
        constants = {
            "BACKWARD": step, "NORMALIZE": True, "RELATIVE": relative, "CONSISTENCY": consistency,
            "view_column": 1, "grad_loss_stride": 1,
        }  # fmt: skip
        if name == "prepare":
            backwards = ("grad_loss", "statistics", "norm", "record", "size")
            constants |= dict.fromkeys(("positive",) if step else backwards)
    else:
        options = {"BLOCK": 128 if name == "exchange" else _rows._BLOCK}
        constants = {"NESTEROV": False, "CONTIGUOUS": True} | {
            f"{of}_column": 1 for of in ("weight", "buffer", "grad", "incoming", "outgoing")
        }
    warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
    constants |= options
    rows = _POINTERS[dtype]
    types = TYPES | dict.fromkeys(("query", "key", "queue", "views", "unit"), rows)
    if precision == "wide":
        types["queue"] = _POINTERS[torch.float32]
    types["weight"] = types["momentum_buffer"] = _POINTERS[weight_dtype]
    if loss != "co2" and name == "finish":
        types["gradient"] = rows
    if loss != "co2" and name in ("prepare", "merge"):
        types |= dict.fromkeys(("scale", "scale_c", "ratio"), "fp64")

    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        signature[argument] = "constexpr" if argument in constants else types.get(argument, "i32")
        if signature[argument][0] in "*i" and argument not in UNSPECIALIZED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(key),): value for key, value in constants.items() if key in signature},
        attributes,
    )
    major, minor = capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    registers, spilled, code = assemble(compiled.asm["ptx"], major)
    loop = loop_instructions(code)
    pairs = options.get("BLOCK_B", 1) * options.get("BLOCK_K", 1) / (32 * warps)
    exponentials = 3 if loss == "co2" else 1
    if loss == "nt_xent":
        pairs *= 2  # of each instance's two views
        exponentials = (1 + consistency) * (1 + (relative and name == "gradient"))
    # The loop may be unrolled: a pair takes so many exponentials, and a fraction for its lane.
    pairs *= max(1, loop["MUFU"] // (exponentials * pairs))
    per_pair = {instruction: count / pairs for instruction, count in loop.items()}
    ptx = compiled.asm["ptx"]
    tensor_columns = sum(map(int, re.findall(r"^\s*(?:@\S+ )?tcgen05\.alloc.*, (\d+);", ptx, re.MULTILINE)))
    return Resources(registers, spilled, compiled.metadata.shared, tensor_columns, ptx, per_pair)


def assemble(ptx: str, major: int) -> tuple[int, int, str]:
    """Registers, spilled bytes and machine code, from NVIDIA's assembler and disassembler beside Triton."""
    match = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert match
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        assembler = "ptxas-blackwell" if major >= 10 and (BINARIES / "ptxas-blackwell").exists() else "ptxas"
        command = [BINARIES / assembler, "-v", f"--gpu-name={match[1]}", source, "-o", binary]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        disassembler = BINARIES / "nvdisasm"
        code = ""
        if disassembler.exists():
            code = subprocess.run([disassembler, "-c", binary], capture_output=True, text=True).stdout
    registers, spilled = (
        re.search(r"Used (\d+) registers", said),
        re.search(r"(\d+) bytes spill stores", said),
    )
    assert registers
    assert spilled
    return int(registers[1]), int(spilled[1]), code


def loop_instructions(code: str) -> Counter[str]:
    """Instructions of the loop that walks, the innermost with the exponentials, without those that few of its
    passes take; none without machine code."""
    labels, instructions = {}, []
    for line in map(str.strip, code.splitlines()):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    names = [re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0] for instruction in instructions]
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
        [names[i] for i in range(begin, end + 1) if i not in masked or end in masked]
        for end, begin in jumps.items()
        if begin <= end
    ]
    most = max((loop.count("MUFU.EX2") for loop in loops), default=0)
    walks = [loop for loop in loops if loop.count("MUFU.EX2") >= max(1, most / 2)]
    return Counter(instruction.split(".")[0] for instruction in min(walks, key=len, default=[]))


def entries(loss: str, capability: tuple[int, int]) -> list[tuple[str, int]]:
    """Precision and the D at which each entry of a loss's table is asked for."""
    keys: Iterable[tuple[str, int]] = TABLES.get(capability, OTHER)
    if loss == "conic":
        keys = CONIC_TABLES.get(capability, CONIC_OTHER)
    if loss == "nt_xent":
        keys = NT_XENT_TABLES.get(capability, NT_XENT_OTHER)
    return [
        (precision, largest if DTYPES[precision] == torch.bfloat16 else 128) for precision, largest in keys
    ]


def report(capability: tuple[int, int]) -> str:
    shared = SHARED_KIB[capability]
    chip, multiprocessors, gigahertz = CHIPS.get(capability, ("", 0, 0))
    header = [
        "kernel", "precision", "D", "tile", "warps", "registers", "spilled", "shared KiB", "programs",
        "instructions", "exponentials", *(f"clocks: {unit}" for unit in UNITS),
    ]  # fmt: skip
    if chip:
        header.append(f"µs at least, {chip}")
    rows = []
    for name in WALKING:
        loss = name.split(".")[0]
        for precision, dim in entries(loss, capability):
            tiles = tiles_of(name, capability, precision, dim)
            made = compile_kernel(name, capability, precision, dim)
            taken = clocks(made, name, capability, precision, dim)
            unchunked = "instructions" in taken
            row = [
                name, precision, dim, f"{tiles.rows} × {tiles.keys}", tiles.warps, made.registers,
                made.spilled_bytes, f"{made.shared_bytes / 1024:.0f}", made.programs(tiles, shared),
                f"{sum(made.loop.values()):.1f}" if unchunked else "–", f"{made.loop.get('MUFU', 0):.2f}",
                *(f"{taken[unit]:.3f}" if unit in taken else "–" for unit in UNITS),
            ]  # fmt: skip
            if chip:
                row.append(f"{max(taken.values()) * PAIRS[loss] / multiprocessors / gigahertz / 1e3:.1f}")
            rows.append(row)
    title = f"## Compute capability {capability[0]}.{capability[1]}"
    return f"{title}\n\n{table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    parser.add_argument(
        "capabilities", nargs="*", default=["8.0", "8.9", "9.0", "10.0"], metavar="CAPABILITY"
    )
    print(
        f"# The Triton kernels as Triton {triton.__version__} compiles them\n\n"
        "Instructions, exponentials and clocks of a multiprocessor are those of a pair of row and key. The\n"
        "last column is for 65536 keys, and 256 rows of CO2 or 1024 of ConIC, or for 4096 instances of\n"
        "NT-Xent, at the highest clock, were the busiest unit never idle: a bound worked out from the\n"
        "compiler's output and the vendor's rates, not a measurement."
    )
    for text in parser.parse_args().capabilities:
        major, minor = map(int, text.split("."))
        print(f"\n{report((major, minor))}", flush=True)


if __name__ == "__main__":
    main()
