"""Instructions that compute in registers. Every modifier is part of a pattern; another is unknown."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import NUMPY, Blocks, Decoder, Execute, Mask
from .memory import Array
from .ptx import BYTES

Match = re.Match[str]
Operands = tuple[str, ...]
_SMALLEST = np.float32(2.0**-126)  # with all of its bits


def _flush(x: Array) -> Array:
    return np.where(np.abs(x) < _SMALLEST, np.copysign(np.float32(0), x), x)


def _bfloat16(x: Array) -> Array:
    """The bits of the nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _apply(function: Callable[..., Array]) -> Callable[[Decoder, Match, Operands], Execute]:
    """An instruction whose operands all have the type of the group "type"."""

    def build(decoder: Decoder, match: Match, operands: Operands) -> Execute:
        kind = match["type"]
        sources, put = [decoder.read(x, kind) for x in operands[1:]], decoder.write(operands[0])
        flush = "ftz" in match[0].split(".") and kind == "f32"

        def execute(b: Blocks, mask: Mask) -> None:
            values = [source(b) for source in sources]
            if flush:
                values = [_flush(x) for x in values]
            result = function(*values)
            put(b, mask, _flush(result) if flush else result)

        return execute

    return build


def _divide(x: Array, y: Array) -> Array:
    """Of integers, towards zero; by 0, whatever a GPU makes of it, 0."""
    if x.dtype.kind == "f":
        return x / y
    quotient: Array = (x - _remainder(x, y)) // np.where(y == 0, y.dtype.type(1), y)
    return quotient


def _remainder(x: Array, y: Array) -> Array:
    remainder: Array = np.fmod(x, np.where(y == 0, y.dtype.type(1), y))
    return remainder


def _fused(x: Array, y: Array, z: Array) -> Array:
    """With one rounding, but for the rare case that the wider sum is just between two."""
    wide: Any = np.float64 if x.dtype == np.float32 else np.longdouble
    return (x.astype(wide) * y.astype(wide) + z.astype(wide)).astype(x.dtype)


def _by_size(choose: Callable[..., Array]) -> Callable[[Array, Array], Array]:
    """Of the absolute values, with the sign of the product."""

    def chosen(x: Array, y: Array) -> Array:
        sign = np.where(np.signbit(x) ^ np.signbit(y), x.dtype.type(-1), x.dtype.type(1))
        return np.copysign(choose(np.abs(x), np.abs(y)), sign)

    return chosen


def _exp2(x: Array) -> Array:
    return np.exp2(x.astype(np.float64)).astype(np.float32)


def _log2(x: Array) -> Array:
    return np.log2(x.astype(np.float64)).astype(np.float32)


def _shift(left: bool) -> Callable[[Decoder, Match, Operands], Execute]:
    def build(decoder: Decoder, match: Match, operands: Operands) -> Execute:
        kind = match["type"]
        width = 8 * BYTES[kind]
        value, by, put = (
            decoder.read(operands[1], kind), decoder.read(operands[2], "u32"), decoder.write(operands[0]),
        )  # fmt: skip

        def execute(b: Blocks, mask: Mask) -> None:
            x, n = value(b), by(b)
            far = n >= width
            within = np.where(far, 0, n).astype(x.dtype)
            beyond = x >> x.dtype.type(width - 1) if x.dtype.kind == "i" else x.dtype.type(0)
            put(b, mask, np.where(far, beyond, x << within if left else x >> within))

        return execute

    return build


def _wide(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    kind = match["type"]
    double = f"{kind[0]}{16 * BYTES[kind]}"
    x, y = decoder.read(operands[1], kind), decoder.read(operands[2], kind)
    z = decoder.read(operands[3], double) if match[0].startswith("mad") else None
    put, to = decoder.write(operands[0]), NUMPY[double]

    def execute(b: Blocks, mask: Mask) -> None:
        result = x(b).astype(to) * y(b).astype(to)
        put(b, mask, result if z is None else result + z(b))

    return execute


_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: (x < y) | (x > y) if x.dtype.kind == "f" else x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "equ": lambda x, y: ~((x < y) | (x > y)),
    "neu": lambda x, y: x != y,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}


def _setp(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    x, y = (decoder.read(operand, match["type"]) for operand in operands[1:])
    compare, put = _COMPARE[match["compare"]], decoder.write(operands[0])
    return lambda b, mask: put(b, mask, compare(x(b), y(b)))


def _selp(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    x, y = (decoder.read(operand, match["type"]) for operand in operands[1:3])
    condition, put = decoder.read(operands[3], "pred"), decoder.write(operands[0])
    return lambda b, mask: put(b, mask, np.where(condition(b), x(b), y(b)))


def _convert(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    to, source, put = match["to"], decoder.read(operands[1], match["from"]), decoder.write(operands[0])
    rounding, flush = match["round"] or "", "ftz" in match[0].split(".")
    whole = {"rzi": np.trunc, "rpi": np.ceil, "rmi": np.floor, "rni": np.rint}.get(rounding)

    def execute(b: Blocks, mask: Mask) -> None:
        x = source(b)
        x = _flush(x) if flush else x
        x = whole(x) if whole else x
        if to == "bf16":
            put(b, mask, _bfloat16(x))
        elif x.dtype.kind == "f" and to[0] in "su":
            limits = np.iinfo(NUMPY[to])
            inside = np.clip(np.nan_to_num(x.astype(np.longdouble), nan=0.0), limits.min, limits.max)
            put(b, mask, inside.astype(NUMPY[to]))
        else:
            put(b, mask, x.astype(NUMPY[to]))

    return execute


def _convert_two(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    high, low = (decoder.read(operand, "f32") for operand in operands[1:])
    put = decoder.write(operands[0])

    def half(x: Array) -> Array:
        return _bfloat16(x) if match["to"] == "bf16x2" else x.astype(np.float16).view(np.uint16)

    def execute(b: Blocks, mask: Mask) -> None:
        put(b, mask, (half(high(b)).astype(np.uint32) << np.uint32(16)) | half(low(b)))

    return execute


def _move(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    kind = match["type"]
    if operands[0].startswith("{"):
        parts = [decoder.write(part) for part in decoder.braced(operands[0])]
        source = decoder.read(operands[1], kind)
        part_type = f"u{8 * BYTES[kind] // len(parts)}"

        def unpack(b: Blocks, mask: Mask) -> None:
            values = np.ascontiguousarray(source(b)).view(NUMPY[part_type]).reshape(b.count, -1)
            for i, put in enumerate(parts):
                put(b, mask, np.ascontiguousarray(values[:, i]))

        return unpack
    put = decoder.write(operands[0])
    if operands[1].startswith("{"):
        names = decoder.braced(operands[1])
        sources = [decoder.read(part, f"u{8 * BYTES[kind] // len(names)}") for part in names]

        def pack(b: Blocks, mask: Mask) -> None:
            put(b, mask, np.stack([x(b) for x in sources], 1).view(NUMPY[kind]).reshape(b.count))

        return pack
    whole = decoder.read(operands[1], kind)
    return lambda b, mask: put(b, mask, whole(b))


def _extract(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    kind = match["type"]
    value = decoder.read(operands[1], f"u{8 * BYTES[kind]}")
    begin, length = (decoder.read(operand, "u32") for operand in operands[2:])
    put = decoder.write(operands[0])

    def execute(b: Blocks, mask: Mask) -> None:
        one = np.uint64(1)
        ones = (one << length(b).astype(np.uint64)) - one
        x = (value(b).astype(np.uint64) >> begin(b).astype(np.uint64)) & ones
        if kind[0] == "s":
            negative = (x & ~(ones >> one)) != 0
            x = np.where(negative, x | ~ones, x)
        put(b, mask, x.astype(NUMPY[f"u{8 * BYTES[kind]}"]))

    return execute


def _insert(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    """The lower bits of the first operand in the place of some of the second."""
    kind = match["type"]
    bits, into = decoder.read(operands[1], kind), decoder.read(operands[2], kind)
    begin, length = (decoder.read(operand, "u32") for operand in operands[3:])
    put = decoder.write(operands[0])

    def execute(b: Blocks, mask: Mask) -> None:
        first = begin(b).astype(np.uint64)
        ones = ((np.uint64(1) << length(b).astype(np.uint64)) - np.uint64(1)) << first
        x = (into(b).astype(np.uint64) & ~ones) | ((bits(b).astype(np.uint64) << first) & ones)
        put(b, mask, x.astype(NUMPY[kind]))

    return execute


def _permute(decoder: Decoder, match: Match, operands: Operands) -> Execute:
    low, high, selector = (decoder.read(operand, "u32") for operand in operands[1:])
    put = decoder.write(operands[0])

    def execute(b: Blocks, mask: Mask) -> None:
        choices = np.stack([low(b), high(b)], 1).view(np.uint8)
        chosen = (selector(b)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
        taken = np.take_along_axis(choices, (chosen & 7).astype(np.int64), 1)
        taken = np.where(chosen & 8, np.where(taken & 128, 255, 0), taken).astype(np.uint8)
        put(b, mask, taken.view(np.uint32).reshape(b.count))

    return execute


_INT, _FLOAT = r"[us](?:16|32|64)", r"f(?:32|64)"
TABLE: list[tuple[str, Callable[[Decoder, Match, Operands], Execute]]] = []
for _name, _function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
    TABLE.append((rf"{_name}(\.rn)?(\.ftz)?\.(?P<type>{_FLOAT})", _apply(_function)))
    _low = r"\.lo" if _name == "mul" else ""
    TABLE.append((rf"{_name}{_low}\.(?P<type>{_INT})", _apply(_function)))
TABLE += [
    (rf"mad\.lo\.(?P<type>{_INT})", _apply(lambda x, y, z: x * y + z)),
    (r"(mul|mad)\.wide\.(?P<type>[us](16|32))", _wide),
    (rf"fma\.rn(\.ftz)?\.(?P<type>{_FLOAT})", _apply(_fused)),
    (r"div\.(full|rn)(\.ftz)?\.(?P<type>f32)", _apply(_divide)),
    (r"div\.rn\.(?P<type>f64)", _apply(_divide)),
    (r"div\.(?P<type>[us](32|64))", _apply(_divide)),
    (r"rem\.(?P<type>[us](32|64))", _apply(_remainder)),
    (rf"(neg)(\.ftz)?\.(?P<type>{_FLOAT}|s16|s32|s64)", _apply(np.negative)),
    (rf"abs(\.ftz)?\.(?P<type>{_FLOAT}|s32|s64)", _apply(np.abs)),
    (rf"min(\.ftz)?\.(?P<type>{_FLOAT})", _apply(np.fmin)),
    (rf"max(\.ftz)?\.(?P<type>{_FLOAT})", _apply(np.fmax)),
    (r"min(\.ftz)?\.NaN\.(?P<type>f32)", _apply(np.minimum)),
    (r"max(\.ftz)?\.NaN\.(?P<type>f32)", _apply(np.maximum)),
    (r"min(\.ftz)?\.xorsign\.abs\.(?P<type>f32)", _apply(_by_size(np.fmin))),
    (r"max(\.ftz)?\.xorsign\.abs\.(?P<type>f32)", _apply(_by_size(np.fmax))),
    (r"min(\.ftz)?\.NaN\.xorsign\.abs\.(?P<type>f32)", _apply(_by_size(np.minimum))),
    (r"max(\.ftz)?\.NaN\.xorsign\.abs\.(?P<type>f32)", _apply(_by_size(np.maximum))),
    (rf"min\.(?P<type>{_INT})", _apply(np.minimum)),
    (rf"max\.(?P<type>{_INT})", _apply(np.maximum)),
    (rf"sqrt\.rn\.(?P<type>{_FLOAT})", _apply(np.sqrt)),
    (r"rcp\.approx\.ftz\.(?P<type>f64|f32)", _apply(np.reciprocal)),
    (r"rcp\.rn\.(?P<type>f64|f32)", _apply(np.reciprocal)),
    (r"ex2\.approx(\.ftz)?\.(?P<type>f32)", _apply(_exp2)),
    (r"lg2\.approx(\.ftz)?\.(?P<type>f32)", _apply(_log2)),
    (r"and\.(?P<type>b16|b32|b64|pred)", _apply(np.bitwise_and)),
    (r"or\.(?P<type>b16|b32|b64|pred)", _apply(np.bitwise_or)),
    (r"xor\.(?P<type>b16|b32|b64|pred)", _apply(np.bitwise_xor)),
    (r"not\.(?P<type>b16|b32|b64|pred)", _apply(np.invert)),
    (r"shl\.(?P<type>b16|b32|b64)", _shift(True)),
    (rf"shr\.(?P<type>{_INT}|b32|b64)", _shift(False)),
    (r"setp\.(?P<compare>eq|ne|lt|le|gt|ge)\.(?P<type>[bus](16|32|64)|f32|f64)", _setp),
    (r"setp\.(?P<compare>equ|neu|ltu|leu|gtu|geu|num|nan)\.(?P<type>f32|f64)", _setp),
    (r"selp\.(?P<type>[bus](16|32|64)|f32|f64)", _selp),
    (r"cvt(?P<round>)\.(?P<to>[us](8|16|32|64))\.(?P<from>[us](8|16|32|64))", _convert),
    (r"cvt(?P<round>)\.(?P<to>f32|f64)\.(?P<from>f16|bf16|f32)", _convert),
    (r"cvt\.(?P<round>rn)(\.ftz)?\.(?P<to>f32|f64|f16|bf16)\.(?P<from>f32|f64|[us](32|64))", _convert),
    (r"cvt\.(?P<round>rzi|rpi|rmi|rni)(\.ftz)?\.(?P<to>f32|[us](32|64))\.(?P<from>f32)", _convert),
    (r"cvt\.(?P<round>rzi|rpi|rmi|rni)\.(?P<to>f64|[us](32|64))\.(?P<from>f64)", _convert),
    (r"cvt\.rn\.(?P<to>bf16x2|f16x2)\.f32", _convert_two),
    (r"mov\.(?P<type>[bus](16|32|64)|f32|f64|pred)", _move),
    (r"bfe\.(?P<type>[us](32|64))", _extract),
    (r"bfi\.(?P<type>b(32|64))", _insert),
    (r"prmt\.b32", _permute),
    # Addresses of all spaces are those of their own here.
    (r"cvta\.to\.(global|shared)\.(?P<type>u64)", _move),
]
