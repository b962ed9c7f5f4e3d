"""Calls of the raw operators, right and wrong: each is refused with nothing written, or does what it should.

CONTRASTIVE_OPS_FUZZ_CALLS says how many there are of each backend, and CONTRASTIVE_OPS_FUZZ_SEED which; `make
asan` has every access to memory of 10,000 watched. Tensors lie alone in their memory, or with other numbers
around them that no call may read or change: those are NaN, or no index.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from contrastive_ops import _ops
from contrastive_ops._contract import computed_in
from tests.cases import DTYPES, refusal
from tests.conftest import ON_GPU

CALLS = int(os.environ.get("CONTRASTIVE_OPS_FUZZ_CALLS", "450"))
SEED = int(os.environ.get("CONTRASTIVE_OPS_FUZZ_SEED", "0"))

OPERATORS = (
    "co2", "scale_gradient", "nt_xent", "nt_xent_backward", "conic", "conic_backward", "conic_backward_sgd_",
    "sgd_", "exchange_rows_",
)  # fmt: skip
WRITTEN = {
    "conic_backward_sgd_": ("weight", "momentum_buffer"),
    "sgd_": ("weight", "momentum_buffer"),
    "exchange_rows_": ("weight", "momentum_buffer", "outgoing"),
}
ROWS = {"target": "weight", "slots": "weight", "incoming_rows": "incoming", "outgoing_rows": "outgoing"}
DISTINCT = ("slots", "outgoing_rows")
OF_ONE_DTYPE = (
    *ROWS, "momentum_buffer", "gradient", "grad_loss", "statistics", "coefficients", "incoming",
    "outgoing",
)  # fmt: skip
POSITIVE = ("temperature", "consistency_temperature", "compensation")
MAY_BE_ZERO = ("instance_weight", "consistency_weight", "lr", "momentum", "weight_decay")
REFUSALS = (TypeError, ValueError, RuntimeError)
# What a result may be off, relative to the largest number in it, by the coarsest dtype of the call.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 0.1, torch.bfloat16: 0.3}


class Drawn(random.Random):
    """Everything that is drawn for a call."""

    def size(self, most: int = 40) -> int:
        return self.choice((1, 2, 3, self.randint(1, most), self.randint(1, most)))

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(40))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def flag(self) -> bool:
        return self.random() < 0.5

    def rows(self, count: int, of: int, distinct: bool = False) -> Tensor:
        drawn = self.sample(range(of), count) if distinct else [self.randrange(of) for _ in range(count)]
        return torch.tensor(drawn, dtype=torch.int64)

    def laid_out(self, x: Tensor) -> Tensor:
        """The same numbers somewhere else: alone, or amid what must not be touched."""
        layout = self.choice(("alone", "amid", "transposed", "spaced"))
        if layout == "alone":
            return x.clone(memory_format=torch.contiguous_format)
        order = list(range(x.ndim))
        if layout == "transposed":
            self.shuffle(order)
        sizes = [x.shape[i] for i in order]
        around = float("nan") if x.is_floating_point() else -(10**15)
        if layout == "spaced":
            view = x.new_full([2 * size + 1 for size in sizes], around)[(slice(1, None, 2),) * x.ndim]
        else:
            view = x.new_full((x.numel() + 2,), around)[1:-1].view(sizes)
        return view.permute([order.index(i) for i in range(x.ndim)]).copy_(x)


@dataclass
class Call:
    operator: str
    arguments: dict[str, Any]
    what: str = "nothing"  # is wrong with it
    named: str = ""  # the argument that a refusal names
    refused: bool | None = False  # must it be? None: it may be, and else is right
    compared: bool = True  # with the reference, where it is not refused
    recorded: bool = False  # by autograd

    def __call__(self) -> Any:
        with torch.set_grad_enabled(self.recorded):
            return getattr(torch.ops.contrastive_ops, self.operator)(*self.arguments.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: each for name, each in self.arguments.items() if isinstance(each, Tensor)}

    def change(self, name: str, value: Any, what: str, refused: bool | None) -> None:
        self.arguments[name], self.what, self.named, self.refused = value, f"{name} {what}", name, refused
        # The statistics of other views or weights say nothing of these.
        self.compared = "statistics" not in self.arguments


def arguments_of(operator: str, draw: Drawn, dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    dtype, of_weight = (
        draw.choice(dtypes),
        draw.choice(dtypes if operator in ("sgd_", "exchange_rows_") else DTYPES),
    )
    batch, dim, views = draw.size(), draw.size(), draw.randint(1, 3)
    count = draw.choice((draw.size(), draw.size(300)))  # of keys, or of the rows of a weight
    temperatures = draw.uniform(0.2, 2), draw.uniform(0.2, 2)
    weight = draw.tensor(count, dim, dtype=of_weight)
    buffer = draw.tensor(count, dim, dtype=of_weight)
    step = draw.uniform(0, 1), draw.uniform(0, 1), draw.uniform(0, 0.1), draw.flag()  # of SGD
    consistency_weight = draw.uniform(0, 2) * draw.flag()

    if operator == "co2":
        query, key = (draw.tensor(batch, dim, dtype=each) for each in (dtype, draw.choice(dtypes)))
        weights = draw.uniform(0, 2) * draw.flag(), consistency_weight
        values = [query, key, weight, *temperatures, *weights, draw.flag(), draw.flag(), draw.flag()]
    elif operator == "scale_gradient":
        query = draw.tensor(batch, dim, dtype=dtype)
        loss = computed_in(query)
        values = [draw.tensor(batch, dim, dtype=loss), draw.tensor(batch, dtype=loss), query]
    elif operator.startswith("nt_xent"):
        x = draw.tensor(2, batch, dim, dtype=dtype)
        values = [x, *temperatures, consistency_weight, True]
        if operator == "nt_xent_backward":
            *_, statistics = _ops.nt_xent(x.double(), *values[1:], "reference")
            values = [draw.tensor(2 * batch, dtype=computed_in(x)), x, statistics, *values[1:]]
    elif operator.startswith("conic"):
        x, target = draw.tensor(views, batch, dim, dtype=dtype), draw.rows(batch, count)
        values = [x, weight, target, temperatures[0], draw.uniform(0.5, 20), consistency_weight]
        if operator != "conic":
            *_, statistics = _ops.conic(x.double(), *values[1:], "reference")
            grad_loss = draw.tensor(batch, dtype=computed_in(x))
            of_loss = target, statistics, temperatures[0], consistency_weight
            values = [grad_loss, x, weight, *of_loss, draw.flag(), draw.flag()]
            if operator == "conic_backward_sgd_":
                values = [grad_loss, x, weight, buffer, *of_loss, *step]
    elif operator == "sgd_":
        values = [weight, buffer, draw.tensor(count, dim, dtype=draw.choice(DTYPES)), *step]
    else:
        moved, total = draw.randint(0, count), 2 * count + draw.randint(0, 5)
        slots, apart = draw.rows(moved, count, True), draw.rows(2 * moved, total, True)
        incoming = draw.tensor(total, 2, dim, dtype=of_weight)
        outgoing = incoming if draw.flag() else draw.tensor(total, 2, dim, dtype=of_weight)
        matrices = draw.tensor(moved, 2, 2)
        values = [weight, buffer, slots, incoming, apart[:moved], matrices, outgoing, apart[moved:]]
    schema = getattr(torch.ops.contrastive_ops, operator).default._schema
    return dict(zip((each.name for each in schema.arguments), values, strict=False))


def valid_call(operator: str, draw: Drawn, backend: str) -> Call:
    served = [dtype for dtype in DTYPES if not refusal(backend, dtype)]
    arguments = arguments_of(operator, draw, served)
    places = {id(x): draw.laid_out(x) for x in arguments.values() if isinstance(x, Tensor)}
    arguments = {name: places.get(id(x), x) for name, x in arguments.items()}
    return Call(operator, arguments if operator == "scale_gradient" else arguments | {"backend": backend})


# What can be wrong with a call. Each changes it, where there is something to change.


def wrong_shape(call: Call, draw: Drawn) -> None:
    name, x = draw.choice(list(call.tensors.items()))
    how = draw.choice(("flat", "deeper", "longer", "shorter", "empty"))
    if how == "flat":
        y = x.flatten() if x.ndim > 1 else x.sum()
    elif how == "deeper":
        y = x.unsqueeze(draw.randint(0, x.ndim))
    else:
        dimension = draw.randrange(x.ndim)
        size = {"longer": x.shape[dimension] + 1, "shorter": x.shape[dimension] - 1, "empty": 0}[how]
        y = x.repeat_interleave(2, dimension).narrow(dimension, 0, min(max(size, 0), 2 * x.shape[dimension]))
    surely = y.ndim != x.ndim or (0 in y.shape and call.operator not in ("sgd_", "exchange_rows_"))
    call.change(name, draw.laid_out(y), f"is {how}", surely or None)
    call.named = name if surely else ""  # if not: it may be that others do not fit it


def wrong_dtype(call: Call, draw: Drawn) -> None:
    name, x = draw.choice(list(call.tensors.items()))
    dtype = draw.choice((*DTYPES, torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8))
    if dtype != x.dtype:
        refused = name in OF_ONE_DTYPE or dtype not in DTYPES
        call.change(name, x.to(dtype), f"is {dtype}", refused or None)


def without_memory(call: Call, draw: Drawn) -> None:
    names = draw.sample(list(call.tensors), draw.randint(1, len(call.tensors)))
    refused = len(names) < len(call.tensors)
    for name in names:
        call.change(name, call.arguments[name].to("meta"), "has no memory", refused)
    call.named = ""


def not_dense(call: Call, draw: Drawn) -> None:
    name, x = draw.choice(list(call.tensors.items()))
    call.change(name, x.to_sparse(), "is sparse", True)


def not_given(call: Call, draw: Drawn) -> None:
    name, before = draw.choice([(name, x) for name, x in call.arguments.items() if name != "backend"])
    call.change(name, None, "is None", True)
    if not isinstance(before, Tensor):  # PyTorch refuses it, or takes it for False
        call.named, call.refused = "", None


def negated(call: Call, draw: Drawn) -> None:
    name, x = draw.choice(list(call.tensors.items()))
    if x.is_floating_point():
        call.change(name, torch._neg_view(-x), "is a negated view", call.operator in WRITTEN)
        call.named, call.compared = "", True


def out_of_storage(call: Call, draw: Drawn) -> None:
    name, x = draw.choice(list(call.tensors.items()))
    if x.numel():
        x.untyped_storage().resize_(draw.choice((0, (x.storage_offset() + x.numel() - 1) * x.itemsize)))
        call.change(name, x, "has lost its storage", True)
        call.named = ""  # another may be the same tensor


def on_itself(call: Call, draw: Drawn) -> None:
    name = draw.choice(WRITTEN.get(call.operator, [""]))
    x = call.arguments.get(name)
    if x is not None and max(x.shape) > 1:
        longest = max(range(x.ndim), key=lambda i: x.shape[i])
        one_row = x.narrow(longest, 0, 1).expand(x.shape)
        diagonal = torch.zeros(sum(x.shape), dtype=x.dtype).as_strided(x.shape, (1,) * x.ndim)
        several = sum(size > 1 for size in x.shape) > 1
        call.change(name, diagonal if several and draw.flag() else one_row, "overlaps itself", True)


def on_another(call: Call, draw: Drawn) -> None:
    """A tensor that is written begins another's memory, or ends in it."""
    name = draw.choice(WRITTEN.get(call.operator, [""]))
    if not name:
        return
    x = call.arguments[name]
    other, y = draw.choice([(other, y) for other, y in call.tensors.items() if other != name])
    if x.numel() and y.numel():
        unit = max(x.itemsize, y.itemsize)
        begin = draw.choice((0, (x.nbytes - 1) // unit * unit))
        memory = torch.zeros(begin + x.nbytes + y.nbytes, dtype=torch.uint8)
        for each, at, of in ((name, 0, x), (other, begin, y)):
            place = memory[at : at + of.nbytes].view(of.dtype).view(of.shape)
            call.change(each, place.copy_(of), f"is in the memory of {name}", True)
        if {name, other} == {"incoming", "outgoing"} and begin == 0:
            call.refused = False  # they may be the same
        call.named = "share no memory"


def beside_another(call: Call, draw: Drawn) -> None:
    """Weight and momentum are parts of one tensor, whose rows or columns alternate."""
    if "momentum_buffer" in call.arguments:
        dimension, names = draw.randint(0, 2), ("weight", "momentum_buffer")
        parts = torch.stack([call.arguments[name] for name in names], dimension).unbind(dimension)
        call.arguments |= dict(zip(names, parts, strict=True))
        call.what = "weight and momentum_buffer lie beside each other"


def row_outside(call: Call, draw: Drawn) -> None:
    names = [name for name in ROWS if name in call.arguments and len(call.arguments[name])]
    if names:
        name = draw.choice(names)
        rows, count = call.arguments[name], len(call.arguments[ROWS[name]])
        row = draw.choice((-1, count, -count - 1, 2**62, -(2**63), 2**32))
        rows[draw.randrange(len(rows))] = row
        call.change(name, rows, f"has {row} of {count}", True)


def row_twice(call: Call, draw: Drawn) -> None:
    name = draw.choice(DISTINCT)
    rows = call.arguments.get(name, ())
    if len(rows) > 1:
        first, second = draw.sample(range(len(rows)), 2)
        rows[first] = rows[second]
        call.change(name, rows, "has a row twice", True)


def row_comes_and_goes(call: Call, draw: Drawn) -> None:
    if call.operator == "exchange_rows_" and len(call.arguments["slots"]):
        come, go = call.arguments["incoming_rows"], call.arguments["outgoing_rows"]
        come[draw.randrange(len(come))] = go[draw.randrange(len(go))]
        same = call.arguments["incoming"] is call.arguments["outgoing"]
        call.change("outgoing_rows", go, "has one of incoming_rows", same)


def wrong_number(call: Call, draw: Drawn) -> None:
    names = [name for name in (*POSITIVE, *MAY_BE_ZERO) if name in call.arguments]
    if names:
        name = draw.choice(names)
        value = draw.choice((0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e300, 1e-300))
        right = 0 < value < float("inf") or (value == 0 and name in MAY_BE_ZERO)
        call.change(name, value, f"is {value}", not right)
        call.compared = False


def wrong_backend(call: Call, draw: Drawn) -> None:
    if "backend" in call.arguments:
        call.change("backend", draw.choice(("", "gpu", "cuda", "CPU")), "is unknown, or not here", True)


def strange_values(call: Call, draw: Drawn) -> None:
    """Numbers of statistics too may be anything: memory stays whole."""
    name, x = draw.choice([(name, x) for name, x in call.tensors.items() if x.is_floating_point()])
    if x.numel():
        value = draw.choice((float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0))
        x[tuple(draw.randrange(size) for size in x.shape)] = value
        call.change(name, x, f"has {value}", False)
        call.compared = False


def expanded(call: Call, draw: Drawn) -> None:
    """What is only read may have one row many times."""
    written = (*WRITTEN.get(call.operator, ()), *DISTINCT, "incoming")
    names = [name for name, x in call.tensors.items() if x.numel() and name not in written]
    if names:
        name = draw.choice(names)
        x = call.arguments[name]
        dimension = draw.randrange(x.ndim)
        same = call.arguments.get("incoming") is call.arguments.get("outgoing", ())
        refused = None if name == "incoming_rows" and same else False
        call.change(name, x.narrow(dimension, 0, 1).expand(x.shape), "is expanded", refused)


def requires_gradient(call: Call, draw: Drawn) -> None:
    name, x = draw.choice([(name, x) for name, x in call.tensors.items() if x.is_floating_point()])
    without = call.operator == "co2" and not (name == "query" and call.arguments["compute_gradient"])
    call.change(name, x.requires_grad_(), "requires a gradient", call.operator in WRITTEN or without)
    call.named, call.recorded, call.compared = "", True, True


WRONG = (
    wrong_shape, wrong_dtype, without_memory, not_dense, not_given, negated, out_of_storage, on_itself,
    on_another, beside_another, row_outside, row_twice, row_comes_and_goes, wrong_number, wrong_backend,
    strange_values, expanded, requires_gradient,
)  # fmt: skip


def memory(x: Tensor) -> Tensor:
    """All bytes of the storage that a tensor is in, whatever the tensor says."""
    if x.is_meta or x.layout != torch.strided:
        return torch.empty(0, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def own_bytes(x: Tensor) -> Tensor:
    """Which bytes of its storage are the tensor's."""
    mine = torch.zeros(memory(x).numel() // x.itemsize, dtype=torch.bool)
    mine.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    return mine.repeat_interleave(x.itemsize)


def expected(call: Call) -> list[Tensor]:
    """Results, and what is written, of the reference in float64."""
    copies = {id(x): x.detach().double() if x.is_floating_point() else x for x in call.tensors.values()}
    copies = {key: x.clone() for key, x in copies.items()}
    arguments = {name: copies.get(id(x), x) for name, x in call.arguments.items()}
    if call.operator == "scale_gradient":
        result = arguments["gradient"] * arguments["grad_loss"][:, None]
    else:
        result = getattr(_ops, call.operator)(*(arguments | {"backend": "reference"}).values())
    return [*results(result), *(arguments[name] for name in WRITTEN.get(call.operator, ()))]


def results(result: Any) -> list[Tensor]:
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else list(result)


def comparable(call: Call, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The same results, coefficients relative to m = 0: what m is, is a backend's choice."""
    if call.operator not in ("nt_xent", "conic"):
        return list(outputs)
    *others, statistics = outputs
    m, instance, *rest = statistics.unbind(-1)
    relative = [torch.zeros_like(m), instance * (-m / call.arguments["temperature"]).exp(), *rest]
    if call.operator == "nt_xent" and call.arguments["consistency_weight"]:
        query, mean, grad_positive = rest
        query = query * (-m / call.arguments["consistency_temperature"]).exp()
        relative[2:] = query, mean + m - m.roll(len(m) // 2), grad_positive
    return [*others, torch.stack(relative, -1)]


def holds(condition: bool, otherwise: str) -> None:
    """An assertion that does not print tensors."""
    if not condition:
        raise AssertionError(otherwise)


def check_values(call: Call, actual: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    tolerance = max(TOLERANCE[x.dtype] for x in call.tensors.values() if x.is_floating_point())
    actual, wanted = comparable(call, actual), comparable(call, wanted)
    dim = next(iter(call.tensors.values())).shape[-1]
    for i, (a, e) in enumerate(zip(actual, wanted, strict=True)):
        holds(a.shape == e.shape, f"result {i} has shape {tuple(a.shape)}, expected {tuple(e.shape)}")
        # Ranks are exact where similarities are, and no two are equal but for their rounding.
        ranked = tolerance < 1e-6 and dim > 1 and "expanded" not in call.what
        if a.numel() and (a.is_floating_point() or ranked):
            off = (a.detach().double() - e.double()).abs().max().item()
            bound = tolerance * (1 + e.double().abs().max().item())
            holds(off <= bound, f"result {i} is off by {off}, allowed is {bound}")


def check_fake(call: Call, actual: Sequence[Tensor]) -> None:
    """What a compiler is told of the results is true."""
    arguments = {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        if isinstance(x, Tensor)
        else x
        for name, x in call.arguments.items()
    }
    for i, (a, f) in enumerate(zip(actual, results(Call(call.operator, arguments)()), strict=True)):
        real, fake = (a.shape, a.dtype, a.stride()), (f.shape, f.dtype, f.stride())
        holds(real == fake, f"result {i} is {real}, its fake {fake}")


def make(call: Call) -> None:
    """The call, and all that must hold of it."""
    before = [(x, memory(x), memory(x).clone()) for x in call.tensors.values()]
    wanted = None
    if call.compared and call.refused is not True:
        with contextlib.suppress(*REFUSALS, IndexError):
            wanted = expected(call)
    try:
        result = results(call())
    except REFUSALS as error:
        holds(call.refused is not False, f"it is refused: {error!r}")
        named = not call.named or (call.named in str(error) and call.operator in str(error))
        holds(named or call.named == "backend", f"the error names neither argument nor operator: {error!r}")
        holds(all(torch.equal(now, then) for _, now, then in before), f"memory has changed before {error!r}")
        return
    holds(not call.refused, "it is not refused")
    if all(x.is_meta for x in call.tensors.values()):
        return
    written = [call.arguments[name] for name in WRITTEN.get(call.operator, ())]
    for x, now, then in before:
        theirs = torch.zeros(now.numel(), dtype=torch.bool)
        for each in written:
            if each.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                theirs |= own_bytes(each)
        holds(torch.equal(now[~theirs], then[~theirs]), "memory has changed that is not to be written")
    if call.compared:
        holds(wanted is not None, "the reference refuses it")
        check_values(call, [*result, *written], wanted)
        check_fake(call, result)


@pytest.mark.parametrize("operator", OPERATORS)
def test_calls(backend: str, operator: str) -> None:
    if backend in ON_GPU:
        pytest.skip("the memory of the host is what this test looks at")
    count = CALLS // len(OPERATORS) // (10 if backend == "triton" else 1)  # which is interpreted
    refused = 0
    for number in range(count):
        draw = Drawn(f"{SEED} {backend} {operator} {number}")
        call = valid_call(operator, draw, backend)
        if draw.random() < 0.8:
            draw.choice(WRONG)(call, draw)
        refused += bool(call.refused)
        try:
            make(call)
        except Exception as error:
            shapes = {name: (tuple(x.shape), x.stride(), x.dtype) for name, x in call.tensors.items()
                      if x.layout == torch.strided}  # fmt: skip
            raise AssertionError(f"call {number}, in which {call.what}: {error}\n{shapes}") from error
    assert count < 40 or 0 < refused < count  # else there was little to see
