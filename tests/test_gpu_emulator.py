"""The emulator of GPUs: its instructions against numpy, faults that it must catch, and the kernels in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from contrastive_ops import kernels, reference
from contrastive_ops._contract import CO2Settings, ConICSettings, NTXentSettings, SGDSettings
from tests.cases import Case, ConICCase, NTXentCase
from tests.elsewhere import pass_elsewhere
from tests.gpu_emulator.driver import REQUESTED
from tests.gpu_emulator.flow import ranks
from tests.gpu_emulator.machine import Program
from tests.gpu_emulator.memory import GlobalMemory
from tests.gpu_emulator.ptx import Fault, UnknownInstruction, parse

emulated = pytest.mark.skipif(not REQUESTED, reason="runs in a process with GPU_EMULATOR=sm_80 or sm_90")


def execute(
    body: str, *arrays: np.ndarray[Any, Any], threads: int = 32, shared: int = 0, grid: int = 1
) -> None:
    """Run PTX in which %rd1, %rd2, … point to the arrays, %r0 is the thread and %rd0 four times that."""
    names = [f"p{i}" for i in range(len(arrays))]
    head = ", ".join(f".param .u64 {name}" for name in names)
    load = "\n".join(f"ld.param.b64 %rd{i + 1}, [p{i}];" for i in range(len(arrays)))
    ptx = f""".visible .entry kernel({head})
.reqntid {threads}
{{
.reg .pred %p<99>;
.reg .b16 %rs<99>;
.reg .b32 %r<99>;
.reg .b64 %rd<99>;
{load}
mov.u32 %r0, %tid.x;
mul.wide.u32 %rd0, %r0, 4;
{body}
ret;
}}
"""
    memory = GlobalMemory()
    for array in arrays:
        memory.add(array.ctypes.data, array.nbytes)
    parameters = {
        name: np.array([array.ctypes.data], np.uint64).view(np.uint8)
        for name, array in zip(names, arrays, strict=True)
    }
    Program(parse(ptx)).run((grid, 1, 1), memory, parameters, shared)


def bits(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(x).view(np.uint32)


def numbers(seed: int, count: int = 32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


INTEGERS = np.random.default_rng(3).integers(-(2**31), 2**31, 32).astype(np.int32)


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("add.f32", lambda x, y: x + y),
        ("sub.f32", lambda x, y: x - y),
        ("mul.f32", lambda x, y: x * y),
        ("div.full.f32", lambda x, y: x / y),
        ("min.f32", np.minimum),
        ("max.f32", np.maximum),
    ],
)
def test_float_instructions(opcode: str, expected: Callable[..., Any]) -> None:
    x, y, out = numbers(0), numbers(1), np.zeros(32, np.float32)
    execute(
        f"""add.s64 %rd4, %rd1, %rd0; add.s64 %rd5, %rd2, %rd0; add.s64 %rd6, %rd3, %rd0;
        ld.global.b32 %r1, [%rd4]; ld.global.b32 %r2, [%rd5];
        {opcode} %r3, %r1, %r2; st.global.b32 [%rd6], %r3;""",
        x, y, out,
    )  # fmt: skip
    np.testing.assert_array_equal(out, expected(x, y))


@pytest.mark.parametrize(
    ("opcode", "operand", "expected"),
    [
        ("shr.s32", "5", lambda x: x >> 5),
        ("shr.s32", "40", lambda x: x >> 31),
        ("shr.u32", "5", lambda x: x.view(np.uint32) >> 5),
        ("shl.b32", "32", lambda x: x * 0),
        ("bfe.u32", "3, 5", lambda x: (x >> 3) & 31),
        ("bfe.s32", "3, 5", lambda x: (x << 24) >> 27),
        ("prmt.b32", "0, 0x0123", lambda x: x.byteswap()),
        ("and.b32", "-128", lambda x: x & -128),
        ("div.s32", "-7", lambda x: np.trunc(x.astype(np.float64) / -7).astype(np.int32)),
        ("rem.s32", "-7", lambda x: np.fmod(x, -7)),
        ("max.s32", "-1", lambda x: np.maximum(x, -1)),
        ("bfi.b32", "77, 3, 5", lambda x: (x & 31) << 3 | 77 & ~(31 << 3)),
    ],
)
def test_integer_instructions(opcode: str, operand: str, expected: Callable[..., Any]) -> None:
    out = np.zeros(32, np.int32)
    execute(
        f"""add.s64 %rd4, %rd1, %rd0; add.s64 %rd5, %rd2, %rd0; ld.global.b32 %r1, [%rd4];
        {opcode} %r2, %r1, {operand}; st.global.b32 [%rd5], %r2;""",
        INTEGERS, out,
    )  # fmt: skip
    np.testing.assert_array_equal(bits(out), bits(expected(INTEGERS)))


@pytest.mark.parametrize(("by", "expected"), [("min", np.min), ("max", np.max), ("add", np.sum)])
def test_reductions_of_a_warp(by: str, expected: Callable[[NDArray[np.int32]], np.int32]) -> None:
    numbers, out = np.arange(32, dtype=np.int32) * 7 % 32 - 9, np.zeros(32, np.int32)
    execute(
        f"""mov.b32 %r3, -1; add.s64 %rd4, %rd1, %rd0; add.s64 %rd5, %rd2, %rd0; ld.global.b32 %r1, [%rd4];
        redux.sync.{by}.s32 %r2, %r1, %r3; st.global.b32 [%rd5], %r2;""",
        numbers, out,
    )  # fmt: skip
    np.testing.assert_array_equal(out, expected(numbers))


@pytest.mark.parametrize(
    ("by", "least", "expected"), [("all", 1, 0), ("all", 0, 1), ("any", 31, 1), ("any", 32, 0)]
)
def test_votes_of_a_warp(by: str, least: int, expected: int) -> None:
    out = np.full(32, -1, np.int32)
    execute(
        f"""mov.b32 %r3, -1; shr.u64 %rd5, %rd0, 2; cvt.u32.u64 %r1, %rd5; setp.ge.s32 %p1, %r1, {least};
        vote.sync.{by}.pred %p2, %p1, %r3; selp.b32 %r2, 1, 0, %p2;
        add.s64 %rd4, %rd1, %rd0; st.global.b32 [%rd4], %r2;""",
        out,
    )  # fmt: skip
    np.testing.assert_array_equal(out, expected)


def test_reciprocals_and_doubles() -> None:
    x, out = numbers(0).astype(np.float64), np.zeros(32)
    execute(
        """shl.b64 %rd3, %rd0, 1; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
        cvta.to.global.u64 %rd6, %rd4;
        ld.global.f64 %rd7, [%rd6]; rcp.rn.f64 %rd8, %rd7; st.global.f64 [%rd5], %rd8;""",
        x, out,
    )  # fmt: skip
    np.testing.assert_array_equal(out, 1 / x)


def test_branches_meet_again() -> None:
    """Each thread counts to its own number."""
    out = np.zeros(32, np.int32)
    execute(
        """mov.b32 %r1, 0;
        $loop: setp.ge.s32 %p1, %r1, %r0; @%p1 bra $done; add.s32 %r1, %r1, 1; bra.uni $loop;
        $done: shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; add.s64 %rd4, %rd1, %rd0;
        st.global.b32 [%rd4], %r2;""",
        out,
    )
    np.testing.assert_array_equal(out, np.arange(32) ^ 1)


def test_branches_meet_again_where_a_compiler_placed_rare_blocks_first() -> None:
    """Three rounds of a loop whose end, and a way to it that one thread takes, stand before its beginning."""
    out = np.zeros(32, np.int32)
    execute(
        """mov.b32 %r1, 0; mov.b32 %r2, 0; bra.uni $begin;
        $rare: add.s32 %r2, %r2, 100;
        $end: add.s32 %r1, %r1, 1; setp.ge.s32 %p1, %r1, 3; @%p1 bra $done;
        $begin: shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1; add.s32 %r2, %r2, %r3;
        setp.eq.s32 %p2, %r0, 5; @%p2 bra $rare; add.s32 %r2, %r2, 1000; bra.uni $end;
        $done: shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1; add.s32 %r2, %r2, %r3;
        add.s64 %rd4, %rd1, %rd0; st.global.b32 [%rd4], %r2;""",
        out,
    )
    thread = np.arange(32)
    np.testing.assert_array_equal(out, 4 * (thread ^ 1) + 3 * np.where(thread == 5, 100, 1000))


@pytest.mark.parametrize(
    ("successors", "expected"),
    [
        ([[2], [3], [3, 1], []], [0, 2, 1, 3]),  # a way apart, placed before the branch to it
        ([[1], [2, 4], [3], [1], []], [0, 1, 2, 3, 4]),  # a loop before what follows it
        ([[3], [4], [3], [1, 2], []], [0, 3, 2, 1, 4]),  # also where what follows is placed first
        ([[1], [2], [3, 2], [4, 1], []], [0, 1, 2, 3, 4]),  # a loop in a loop
        ([[2], [], [0, 3], [1]], [0, 3, 1, 2]),  # one that begins with the first instruction
    ],
)
def test_ranks_follow_the_ways_of_threads(successors: list[list[int]], expected: list[int]) -> None:
    assert ranks(successors) == expected


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(transposed: bool) -> None:
    """A matrix that is loaded and stored, one of the two transposed, comes out transposed."""
    matrix, out = np.arange(64, dtype=np.uint16), np.zeros(64, np.uint16)
    execute(
        f"""cvt.u32.u64 %r9, %rd0; add.s64 %rd4, %rd1, %rd0; add.s64 %rd5, %rd2, %rd0;
        ld.global.b32 %r1, [%rd4]; st.shared.b32 [%r9], %r1; bar.sync 0; and.b32 %r2, %r0, 7;
        shl.b32 %r2, %r2, 4;
        ldmatrix.sync.aligned.m8n8.x1{".trans" if transposed else ""}.shared.b16 {{%r3}}, [%r2]; bar.sync 0;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {{%r3}}; bar.sync 0;
        ld.shared.b32 %r4, [%r9]; st.global.b32 [%rd5], %r4;""",
        matrix, out, shared=128,
    )  # fmt: skip
    expected = matrix.reshape(8, 8).T if transposed else matrix.reshape(8, 8)
    np.testing.assert_array_equal(out.reshape(8, 8), expected)


def test_mma() -> None:
    """m16n8k16 with the registers as the PTX manual lays them out, loaded number by number."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((8, 16)).astype(np.float16)
    lane = np.arange(32)
    row, pair = lane // 4, 2 * (lane % 4)
    left = np.stack([a[row + 8 * (i % 2), pair + 8 * (i // 2) + j]
                     for i in range(4) for j in range(2)], 1)  # fmt: skip
    right = np.stack([b[row, pair + 8 * i + j] for i in range(2) for j in range(2)], 1)
    left, right, out = np.ascontiguousarray(left), np.ascontiguousarray(right), np.zeros((32, 4), np.float32)
    execute(
        """mul.wide.u32 %rd4, %r0, 16; mul.wide.u32 %rd5, %r0, 8; add.s64 %rd6, %rd1, %rd4;
        add.s64 %rd7, %rd2, %rd5;
        add.s64 %rd8, %rd3, %rd4; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd6];
        ld.global.v2.b32 {%r5, %r6}, [%rd7];
        mov.b32 %r7, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
            {%r8, %r9, %r10, %r11}, {%r1, %r2, %r3, %r4}, {%r5, %r6},
            {%r7, %r7, %r7, %r7};
        st.global.v4.b32 [%rd8], {%r8, %r9, %r10, %r11};""",
        left, right, out,
    )  # fmt: skip
    product = a.astype(np.float64) @ b.astype(np.float64).T
    expected = np.stack([product[row + 8 * (i // 2), pair + i % 2] for i in range(4)], 1)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def words(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(32, n) halves, or floats, as a thread's registers."""
    return np.ascontiguousarray(x).view(np.uint32)


def test_mma_of_a_depth_of_eight() -> None:
    """m16n8k8 of half precision, which takes half of the registers that TF32 does in this shape."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 8)).astype(np.float16), rng.standard_normal((8, 8)).astype(np.float16)
    lane = np.arange(32)
    row, pair = lane // 4, 2 * (lane % 4)
    left = np.stack([a[row + 8 * i, pair + j] for i in range(2) for j in range(2)], 1)
    right = np.stack([b[row, pair + j] for j in range(2)], 1)
    total, out = rng.standard_normal((32, 4)).astype(np.float32), np.zeros((32, 4), np.float32)
    execute(
        """mul.wide.u32 %rd5, %r0, 8; mul.wide.u32 %rd6, %r0, 16; add.s64 %rd7, %rd1, %rd5;
        add.s64 %rd8, %rd2, %rd0;
        add.s64 %rd9, %rd3, %rd6; add.s64 %rd10, %rd4, %rd6; ld.global.v2.u32 {%r1, %r2}, [%rd7];
        ld.global.nc.u32 %r3, [%rd8]; ld.global.nc.v4.f32 {%r4, %r5, %r6, %r7}, [%rd9];
        mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32
            {%r4, %r5, %r6, %r7}, {%r1, %r2}, {%r3}, {%r4, %r5, %r6, %r7};
        st.global.v4.f32 [%rd10], {%r4, %r5, %r6, %r7};""",
        words(left), words(right), total, out,
    )  # fmt: skip
    product = a.astype(np.float64) @ b.astype(np.float64).T
    expected = total + np.stack([product[row + 8 * (i // 2), pair + i % 2] for i in range(4)], 1)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["col", "row"])
def test_mma_of_quad_pairs(layout: str) -> None:
    """m8n8k4, of which a warp has four: a quad pair is lanes 4 q to 4 q + 3 and those 16 further on."""
    rng = np.random.default_rng(0)
    a, b = (
        rng.standard_normal((4, 8, 4)).astype(np.float16),
        rng.standard_normal((4, 4, 8)).astype(np.float16),
    )
    left, right = np.zeros((32, 4), np.float16), np.zeros((32, 4), np.float16)
    total, expected = rng.standard_normal((32, 8)).astype(np.float32), np.zeros((32, 8))
    product = a.astype(np.float64) @ b.astype(np.float64)
    for lane in range(32):
        pair, upper = lane % 16 // 4, lane // 16
        for i in range(4):
            left[lane, i] = a[pair, lane % 4 + 4 * upper, i]
            by_columns, by_rows = b[pair, i, lane % 4 + 4 * upper], b[pair, lane % 4, i + 4 * upper]
            right[lane, i] = by_columns if layout == "col" else by_rows
        for i in range(8):
            row, column = (lane & 1) + (i & 2) + 4 * upper, (i & 4) + (lane & 2) + (i & 1)
            expected[lane, i] = total[lane, i] + product[pair, row, column]
    out = np.zeros((32, 8), np.float32)
    sums = ", ".join(f"%r{i}" for i in range(10, 18))
    execute(
        f"""mul.wide.u32 %rd5, %r0, 8; mul.wide.u32 %rd6, %r0, 32; add.s64 %rd7, %rd1, %rd5;
        add.s64 %rd8, %rd2, %rd5;
        add.s64 %rd9, %rd3, %rd6; add.s64 %rd10, %rd4, %rd6; ld.global.v2.u32 {{%r1, %r2}}, [%rd7];
        ld.global.v2.u32 {{%r3, %r4}}, [%rd8]; ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%rd9];
        ld.global.v4.u32 {{%r14, %r15, %r16, %r17}}, [%rd9+16];
        mma.sync.aligned.m8n8k4.row.{layout}.f32.f16.f16.f32
            {{{sums}}}, {{%r1, %r2}}, {{%r3, %r4}}, {{{sums}}};
        st.global.v4.u32 [%rd10], {{%r10, %r11, %r12, %r13}};
        st.global.v4.u32 [%rd10+16], {{%r14, %r15, %r16, %r17}};""",
        words(left), words(right), total, out,
    )  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def multiply(
    descriptor_swizzle: int, barrier: str = "bar.sync 0;", wait: str = "wgmma.wait_group.sync.aligned 0;"
) -> Any:
    """A product of (64, 16) and (8, 16) matrices whose rows of 32 bytes are swizzled: what wgmma makes of it,
    and what it should."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 16)).astype(np.float16), rng.standard_normal((8, 16)).astype(np.float16)
    memory = np.zeros((72, 2, 8), np.float16)  # rows of A, then of B, of two chunks of 16 bytes
    for r, values in enumerate(np.concatenate([a, b])):
        for chunk in range(2):
            memory[r, chunk ^ ((r >> 2) & 1)] = values[8 * chunk : 8 * chunk + 8]
    out = np.zeros((128, 4), np.float32)
    descriptor = (descriptor_swizzle << 62) | ((256 >> 4) << 32) | (1 << 16)
    execute(
        f"""mul.wide.u32 %rd4, %r0, 16; cvt.u32.u64 %r9, %rd4; add.s64 %rd5, %rd1, %rd4;
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd5]; st.shared::cta.v4.b32 [%r9], {{%r1, %r2, %r3, %r4}};
        setp.lt.s32 %p1, %r0, 16; @%p1 ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd5+2048];
        @%p1 st.shared::cta.v4.b32 [%r9+2048], {{%r1, %r2, %r3, %r4}};
        fence.proxy.async.shared::cta; {barrier} setp.ne.b32 %p2, %r0, %r0;
        wgmma.fence.sync.aligned; mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0;
        mov.b64 %rd6, {descriptor}; mov.b64 %rd7, {descriptor | (2048 >> 4)};
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
            {{%r10, %r11, %r12, %r13}}, %rd6, %rd7, %p2, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned; {wait} st.shared.b32 [%r9], %r10; wgmma.wait_group.sync.aligned 0;
        add.s64 %rd8, %rd2, %rd4; st.global.v4.b32 [%rd8], {{%r10, %r11, %r12, %r13}};""",
        memory, out, threads=128, shared=2304,
    )  # fmt: skip
    product = a.astype(np.float64) @ b.astype(np.float64).T
    lane = np.arange(128)
    row, pair = 16 * (lane // 32) + lane % 32 // 4, 2 * (lane % 4)
    return out, np.stack([product[row + 8 * (i // 2), pair + i % 2] for i in range(4)], 1)


def test_wgmma_and_its_faults() -> None:
    barrier = "bar.sync 0;"
    with pytest.raises(Fault, match="what another warp read"):  # other warps may not have read it yet
        multiply(3)
    with pytest.raises(Fault, match=r"product in flight|another warp read"):
        multiply(3, wait="wgmma.wait_group.sync.aligned 1; bar.sync 0;")
    with pytest.raises(Fault, match="a product reads what was written"):
        multiply(3, barrier="")
    done = f"wgmma.wait_group.sync.aligned 0; {barrier}"
    out, expected = multiply(3, wait=done)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    out, expected = multiply(0, wait=done)  # the wrong swizzle
    assert not np.allclose(out, expected, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_a_missing_barrier_is_a_race(barrier: str) -> None:
    body = f"""cvt.u32.u64 %r1, %rd0; st.shared.b32 [%r1], %r0; {barrier} xor.b32 %r2, %r1, 128;
        ld.shared.b32 %r3, [%r2]; add.s64 %rd4, %rd1, %rd0; st.global.b32 [%rd4], %r3;"""
    out = np.zeros(64, np.int32)
    if barrier:
        execute(body, out, threads=64, shared=256)
        np.testing.assert_array_equal(out, np.arange(64) ^ 32)
    else:
        with pytest.raises(Fault, match="race"):
            execute(body, out, threads=64, shared=256)


@pytest.mark.parametrize(("by", "expected"), [("or", [1, 0]), ("and", [0, 0])])
def test_a_vote_is_a_barrier(by: str, expected: list[int]) -> None:
    """What one thread of the first of two blocks says; and what was written before it is there for all."""
    out = np.zeros((2, 64, 2), np.int32)
    body = f"""mov.u32 %r5, %ctaid.x; shl.b32 %r6, %r5, 6; add.s32 %r6, %r6, %r0; setp.eq.s32 %p1, %r6, 37;
        shl.b32 %r1, %r0, 2; st.shared.b32 [%r1], %r0; bar.red.{by}.pred %p2, 0, %p1; xor.b32 %r2, %r1, 128;
        ld.shared.b32 %r3, [%r2]; selp.b32 %r4, 1, 0, %p2; mul.wide.u32 %rd2, %r6, 8;
        add.s64 %rd3, %rd1, %rd2;
        st.global.v2.b32 [%rd3], {{%r4, %r3}};"""
    execute(body, out, threads=64, shared=256, grid=2)
    np.testing.assert_array_equal(out[:, :, 0], np.repeat([expected], 64, 0).T)
    np.testing.assert_array_equal(out[:, :, 1], np.repeat([np.arange(64) ^ 32], 2, 0))


def test_threads_that_miss_a_vote() -> None:
    with pytest.raises(Fault, match="not at its barrier"):
        execute("setp.lt.s32 %p1, %r0, 20; @%p1 bar.red.or.pred %p2, 0, %p1;")


@pytest.mark.parametrize("limits", ["%r2, %r3", "31, -1"])
def test_a_shuffle_tells_that_its_lane_is_in_the_warp(limits: str) -> None:
    out = np.zeros((32, 2), np.int32)
    execute(
        f"""mov.b32 %r2, 31; mov.b32 %r3, -1; shfl.sync.bfly.b32 %r4|%p1, %r0, 2, {limits};
        selp.b32 %r5, 1, 0, %p1;
        shl.b64 %rd2, %rd0, 1; add.s64 %rd3, %rd1, %rd2; st.global.v2.b32 [%rd3], {{%r4, %r5}};""",
        out,
    )
    np.testing.assert_array_equal(out, np.stack([np.arange(32) ^ 2, np.ones(32)], 1))


def test_a_shuffle_of_a_part_of_a_warp_is_unknown() -> None:
    with pytest.raises(UnknownInstruction, match="a shuffle within a part of a warp"):
        execute("mov.b32 %r2, 7199; shfl.sync.bfly.b32 %r4|%p1, %r0, 2, %r2, -1;")


def run_with_variables(
    body: str, parameter: bytes, out: np.ndarray[Any, Any], shared: int, threads: int
) -> None:
    """A kernel of a struct and a pointer, which has variables in shared memory."""
    ptx = f""".extern .shared .align 16 .b8 reserved[];
.visible .entry kernel(
    .param .align 8 .b8 numbers[{len(parameter)}],
    .param .u64 .ptr .global .align 1 out
)
.maxntid 64, 1, 1
.minnctapersm 2
{{
.reg .pred %p<9>;
.reg .b32 %r<99>;
.reg .b64 %rd<99>;
.shared .align 4 .b8 first[132];
.shared .align 8 .b8 second[8];
ld.param.u64 %rd1, [out];
mov.u32 %r0, %tid.x;
mul.wide.u32 %rd0, %r0, 4;
add.s64 %rd2, %rd1, %rd0;
{body}
ret;
}}
"""
    memory = GlobalMemory()
    memory.add(out.ctypes.data, out.nbytes)
    parameters = {
        "numbers": np.frombuffer(parameter, np.uint8),
        "out": np.array([out.ctypes.data], np.uint64).view(np.uint8),
    }
    Program(parse(ptx)).run((1, 1, 1), memory, parameters, shared, threads)


def test_a_struct_among_the_parameters() -> None:
    """Read at a place of its own, or at one that a register has; and no further than it goes."""
    numbers, out = np.arange(4, dtype=np.int64) * 11, np.zeros(32, np.int32)
    body = """ld.param.u32 %r1, [numbers+8]; mov.b64 %rd3, numbers; ld.param.v2.u64 {%rd4, %rd5}, [%rd3+16];
        cvt.u32.u64 %r2, %rd5; add.s32 %r3, %r1, %r2; mov.u32 %r4, %ntid.x; add.s32 %r3, %r3, %r4;
        st.global.b32 [%rd2], %r3;"""
    run_with_variables(body, numbers.tobytes(), out, shared=0, threads=32)
    np.testing.assert_array_equal(out, np.full(32, 11 + 33 + 32))
    with pytest.raises(Fault, match="outside of the parameters"):
        run_with_variables(body, numbers[:3].tobytes(), out, shared=0, threads=32)


def test_variables_in_shared_memory_lie_before_what_a_launch_reserves() -> None:
    out = np.zeros(32, np.int32)
    body = """mov.u64 %rd3, first; mov.u64 %rd4, second; mov.u32 %r1, reserved; cvt.u32.u64 %r2, %rd3;
        cvt.u32.u64 %r3, %rd4; st.shared.b32 [first+128], %r1; st.shared.b32 [%r1+12], %r3; bar.sync 0;
        mad.lo.s32 %r4, %r3, 1000, %r2; mad.lo.s32 %r5, %r1, 1000000, %r4; st.global.b32 [%rd2], %r5;"""
    run_with_variables(body, b"", out, shared=16, threads=32)
    np.testing.assert_array_equal(out, np.full(32, 144 * 1_000_000 + 136 * 1000))
    with pytest.raises(Fault, match="shared memory out of bounds"):
        run_with_variables(body, b"", out, shared=15, threads=32)
    with pytest.raises(Fault, match="where 64 may be"):
        run_with_variables(body, b"", out, shared=16, threads=96)


@pytest.mark.parametrize("load", ["ld.global.b32", "ld.global.nc.f32"])
@pytest.mark.parametrize("compare", ["lt", "le"])
def test_a_mask_off_by_one_is_out_of_bounds(compare: str, load: str) -> None:
    x = np.ones(20, np.float32)
    body = f"setp.{compare}.s32 %p1, %r0, 20; add.s64 %rd4, %rd1, %rd0; @%p1 {load} %r1, [%rd4];"
    if compare == "lt":
        execute(body, x)
    else:
        with pytest.raises(Fault, match="out of bounds"):
            execute(body, x)


@pytest.mark.parametrize("is_constant", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_write_of_what_is_read_as_constant(is_first: bool, is_constant: bool) -> None:
    """Before it is read, or after; threads have eight bytes each."""
    x = np.zeros(64, np.float32)
    load = f"ld.global{'.nc' if is_constant else ''}.f32 %r1, [%rd3+4];"
    store = "st.global.f32 [%rd3+4], %r0;"
    body = f"shl.b64 %rd2, %rd0, 1; add.s64 %rd3, %rd1, %rd2; {load if is_first else store}"
    execute(body + " st.global.f32 [%rd3], %r0;", x)
    if is_constant:
        with pytest.raises(Fault, match="a write of what is read as constant"):
            execute(body + (store if is_first else load), x)
    else:
        execute(body + (store if is_first else load), x)


@pytest.mark.parametrize("left", [0, 1])
def test_a_wait_that_leaves_too_many_copies(left: int) -> None:
    x, out = numbers(0), np.zeros(32, np.float32)
    body = f"""cvt.u32.u64 %r1, %rd0; add.s64 %rd4, %rd1, %rd0; add.s64 %rd5, %rd2, %rd0;
        cp.async.ca.shared.global [%r1], [%rd4], 4; cp.async.commit_group; cp.async.wait_group {left};
        bar.sync 0;
        ld.shared.b32 %r2, [%r1]; st.global.b32 [%rd5], %r2;"""
    if left:
        with pytest.raises(Fault, match="a copy is in flight"):
            execute(body, x, out, shared=128)
    else:
        execute(body, x, out, shared=128)
        np.testing.assert_array_equal(out, x)


def test_bounds_and_alignment_of_shared_memory() -> None:
    with pytest.raises(Fault, match="out of bounds"):
        execute("cvt.u32.u64 %r1, %rd0; ld.shared.b32 %r2, [%r1+4];", shared=128)
    with pytest.raises(Fault, match="not aligned"):
        execute("mov.b32 %r1, 8; ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];", shared=128)


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.f32 %r1, %r0, %r0;",
        "add.sat.f32 %r1, %r0, %r0;",
        "add.f32 %r1, %r0, %nonsense;",
        "ld.weak.shared.b32 %r1, [%r0];",
    ],
)
def test_what_is_unknown_is_an_error(instruction: str) -> None:
    with pytest.raises(UnknownInstruction, match=r"line \d+: .*" + instruction.split()[0].split(".")[0]):
        execute(instruction)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Float32 is multiplied exactly, and half precision as it is rounded.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def compare(results: Any, expected: Any, dtype: torch.dtype) -> None:
    for x, y in zip(results, expected, strict=True):
        if x is not None:
            error = (x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30)
            assert error <= TOLERANCE[dtype]


# MoCo's, and MoCo v2's, of whose temperatures one is a multiple of the other; and InfoNCE alone.
MOCO = CO2Settings(0.07, 0.04, 1.0, 10.0, False, True)
MOCO_V2 = CO2Settings(0.2, 0.05, 1.0, 0.3, True, True)
INFO_NCE = CO2Settings(0.07, 1.0, 1.0, 0.0, False, True)


@emulated
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        *((dtype, MOCO) for dtype in DTYPES),
        *((dtype, MOCO_V2) for dtype in (torch.bfloat16, torch.float16)),
        (torch.bfloat16, INFO_NCE),
    ],
    ids=["moco-bfloat16", "moco-float16", "moco-float32", "v2-bfloat16", "v2-float16", "info_nce-bfloat16"],
)
def test_emulated_co2(dtype: torch.dtype, settings: CO2Settings) -> None:
    query, key, queue = Case(5, 130, 40, dtype, layout="strided", queue_layout="columns").tensors()
    expected = reference.co2(query.double(), key.double(), queue.double(), settings, True)
    compare(kernels.co2(query, key, queue, settings, True), expected, dtype)


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_conic(dtype: torch.dtype) -> None:
    case = ConICCase(2, 5, 130, 40, dtype, torch.float32, layout="strided", weight_layout="columns")
    views, weight, target = case.tensors()
    settings, step, grad = (
        ConICSettings(0.1, 2.5),
        SGDSettings(0.1, 0.9, 1e-4, False),
        torch.linspace(0.5, 1.5, 5),
    )
    exact = views.double(), weight.double(), target
    forward, expected = kernels.conic(views, weight, target, settings), reference.conic(*exact, settings)
    compare(forward[:-1], expected[:-1], dtype)  # coefficients may be relative to another maximum
    compare(
        kernels.conic_gradient(grad, views, weight, target, forward[-1], settings, True, True),
        reference.conic_gradient(grad.double(), *exact, expected[-1], settings, True, True),
        dtype,
    )
    stepped, buffer = weight.clone(), torch.ones_like(weight)
    exact_stepped, exact_buffer = stepped.double(), buffer.double()
    kernels.conic_gradient_sgd_(grad, views, stepped, buffer, target, forward[-1], settings, step)
    reference.conic_gradient_sgd_(
        grad.double(), exact[0], exact_stepped, exact_buffer, target, expected[-1], settings, step
    )
    compare((stepped, buffer), (exact_stepped, exact_buffer), dtype)


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_nt_xent(dtype: torch.dtype) -> None:
    views = torch.stack(NTXentCase(5, 40, dtype, layout="strided").tensors())
    settings, grad = NTXentSettings(0.5, 0.05, 1.0, True), torch.linspace(0.5, 1.5, 10)
    forward, expected = kernels.nt_xent(views, settings), reference.nt_xent(views.double(), settings)
    compare(forward[:-1], expected[:-1], dtype)  # coefficients may be relative to another maximum
    gradient = kernels.nt_xent_gradient(grad, views, forward[-1], settings)
    exact = reference.nt_xent_gradient(grad.double(), views.double(), expected[-1], settings)
    compare([gradient], [exact], dtype)


@pytest.mark.slow
@pytest.mark.skipif(REQUESTED is not None, reason="this is such a process")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_kernels_as_they_are_compiled(architecture: str) -> None:
    """All losses and operators, in three dtypes; `make emulate` runs the whole harness."""
    tests = [__file__, "tests/test_rows_ops.py"]
    pass_elsewhere(tests, "emulated or triton", {"GPU_EMULATOR": architecture})


@pytest.mark.slow
@pytest.mark.skipif(REQUESTED is not None, reason="this is such a process")
def test_rows_are_measured_first_where_float64_is_slow() -> None:
    pass_elsewhere([__file__], "emulated_co2 and bfloat16", {"GPU_EMULATOR": "sm_89"})
