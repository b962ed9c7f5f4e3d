"""The operators' manners in PyTorch: schema, fake kernels, autograd, compilation."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from contrastive_ops import co2_loss, conic_loss, info_nce_loss, nt_xent_loss, use_backend
from tests.cases import Case, require


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend: str, dtype: torch.dtype, requires_grad: bool) -> None:
    require(backend, dtype)
    query, key, queue = Case(dtype=dtype).tensors()
    query.requires_grad_(requires_grad)
    arguments = (query, key, queue, 0.2, 0.05, 1.0, 0.3, True, True, requires_grad, backend)
    opcheck(torch.ops.contrastive_ops.co2.default, arguments)


def test_opcheck_of_backward() -> None:
    opcheck(
        torch.ops.contrastive_ops.scale_gradient.default,
        (torch.randn(4, 3), torch.randn(4), torch.randn(4, 3, dtype=torch.bfloat16)),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(backend: str, dynamic: bool) -> None:
    @torch.compile(fullgraph=True, dynamic=dynamic)
    def step(
        query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, metrics = co2_loss(2 * query, key, queue, return_metrics=True, backend=backend)
        return loss * 3, metrics.positive_rank

    for batch in (6, 9):
        query, key, queue = Case(batch=batch).tensors()
        query.requires_grad_()
        loss, rank = step(query, key, queue)
        (gradient,) = torch.autograd.grad(loss, query)
        expected, metrics = co2_loss(2 * query, key, queue, return_metrics=True, backend=backend)
        (expected_gradient,) = torch.autograd.grad(expected * 3, query)
        torch.testing.assert_close(loss, expected * 3)
        torch.testing.assert_close(gradient, expected_gradient)
        assert torch.equal(rank, metrics.positive_rank)


def test_a_compiled_loss_follows_the_backend_in_force(backend: str) -> None:
    """The choice is made when the operator runs, not when it was compiled."""
    query, key, queue = Case().tensors()
    compiled = torch.compile(lambda: info_nce_loss(query, key, queue), fullgraph=True)
    compiled()
    with use_backend(backend):
        torch.testing.assert_close(compiled(), info_nce_loss(query, key, queue))


def test_double_backward_says_so(backend: str) -> None:
    query, key, queue = Case().tensors()
    query.requires_grad_()
    (gradient,) = torch.autograd.grad(co2_loss(query, key, queue, backend=backend), query, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_operator_refuses_a_gradient_it_was_told_not_to_compute() -> None:
    query, key, queue = Case().tensors()
    with pytest.raises(RuntimeError, match="compute_gradient is false"):
        torch.ops.contrastive_ops.co2(
            query.requires_grad_(), key, queue, 0.2, 0.05, 1.0, 0.3, False, True, False, None
        )


def test_autocast_leaves_the_loss_in_float32(backend: str) -> None:
    query, key, queue = Case(dim=8).tensors()
    layer = torch.nn.Linear(8, 8)
    with torch.autocast(query.device.type, dtype=torch.float16):
        output = layer(query)
        loss = co2_loss(output, key.half(), queue, backend=backend)
    assert output.dtype == torch.float16
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad is not None
    assert torch.isfinite(layer.weight.grad).all()


def arguments_of(name: str) -> list[object]:
    """A small call of each operator."""
    query, key, queue = Case(batch=4, keys=6, dim=3).tensors()
    views, weight, target = torch.stack([query, key]), queue.clone(), torch.arange(4)
    *_, statistics = torch.ops.contrastive_ops.conic(views, weight, target, 0.1, 1.0, 2.5, None)
    *_, pairs = torch.ops.contrastive_ops.nt_xent(views, 0.5, 0.05, 0.3, True, None)
    step = (0.1, 0.9, 1e-4, False)
    slots = torch.arange(2)
    return {
        "co2": [query, key, queue, 0.2, 0.05, 1.0, 0.3, False, True, True],
        "scale_gradient": [query, torch.ones(4), key],
        "nt_xent": [views, 0.5, 0.05, 0.3, True],
        "nt_xent_backward": [torch.ones(8), views, pairs, 0.5, 0.05, 0.3, True],
        "conic": [views, weight, target, 0.1, 1.0, 2.5],
        "conic_backward": [torch.ones(4), views, weight, target, statistics, 0.1, 2.5, True, True],
        "conic_backward_sgd_": [
            torch.ones(4), views, weight, torch.zeros_like(weight), target, statistics, 0.1, 2.5, *step
        ],
        "sgd_": [weight, torch.zeros_like(weight), torch.ones_like(weight), *step],
        "exchange_rows_": [
            weight, torch.zeros_like(weight), slots, torch.zeros(2, 2, 3), slots,
            torch.eye(2, dtype=torch.float64).repeat(2, 1, 1), torch.zeros(2, 2, 3), slots,
        ],
    }[name] + ([] if name == "scale_gradient" else [None])  # fmt: skip


OPERATORS = [
    (name, place)
    for name, places in {
        "co2": (0, 1, 2), "scale_gradient": (0, 1, 2), "nt_xent": (0,), "nt_xent_backward": (0, 1, 2),
        "conic": (0, 1), "conic_backward": (0, 1, 2, 4), "conic_backward_sgd_": (0, 1, 2, 3, 5),
        "sgd_": (0, 1, 2), "exchange_rows_": (0, 1, 3, 5, 6),
    }.items()
    for place in places
]  # fmt: skip


ARGUMENTS = {name: arguments_of(name) for name, _ in OPERATORS}


def test_all_operators_are_called_below() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("contrastive_ops::")}  # fmt: skip
    alone = {
        name for name in names if "_across_ranks" not in name
    }  # others need a group: test_distributed.py
    assert alone == {name for name, _ in OPERATORS}
    for name in alone:
        getattr(torch.ops.contrastive_ops, name)(*arguments_of(name))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("name", "place"), OPERATORS)
def test_forward_mode_is_refused_in_every_argument(name: str, place: int, requires_grad: bool) -> None:
    """PyTorch would take an operator without a rule for a constant, whose derivative is 0."""
    operator, arguments = getattr(torch.ops.contrastive_ops, name), arguments_of(name)
    plain = arguments[place].clone().requires_grad_(requires_grad)

    def call(argument: torch.Tensor) -> object:
        return operator(*arguments[:place], argument, *arguments[place + 1 :])

    refused = pytest.raises(RuntimeError, match=f"contrastive_ops::{name}: forward-mode")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(plain, torch.ones_like(plain))
        with refused:
            call(dual)
        with refused, torch.no_grad():
            call(dual)
    with refused:
        torch.func.jvp(call, (plain,), (torch.ones_like(plain),))


@pytest.mark.parametrize("loss", ["co2", "nt_xent", "conic"])
def test_what_torch_func_does(loss: str) -> None:
    """Its derivatives are refused by name; vmap calls the operator for each row."""
    query, key, queue = Case(batch=4, keys=6, dim=3).tensors()

    def function(rows: torch.Tensor) -> torch.Tensor:
        if loss == "co2":
            return co2_loss(rows, key, queue)
        if loss == "nt_xent":
            return nt_xent_loss(rows, key)
        return conic_loss(rows[None], queue, torch.arange(4))

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with pytest.raises(RuntimeError, match=rf"contrastive_ops::{loss}: the derivatives of torch.func"):
            transform(function)(query)
    with pytest.raises(RuntimeError, match=rf"contrastive_ops::{loss}: forward-mode"):
        torch.func.jacfwd(function)(query)
    several = torch.stack([query, 2 * query, -query])
    torch.testing.assert_close(
        torch.func.vmap(function)(several), torch.stack([function(rows) for rows in several])
    )


def call_with(name: str, changes: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], Any]]:
    """A small call of an operator with other arguments, which may be made of its own."""
    operator = getattr(torch.ops.contrastive_ops, name)
    names = [argument.name for argument in operator.default._schema.arguments]
    arguments = dict(zip(names, arguments_of(name), strict=True))
    arguments |= {key: value(arguments) if callable(value) else value for key, value in changes.items()}
    return arguments, lambda: operator(*arguments.values())


def of(name: str) -> Callable[[dict[str, Any]], Any]:
    """Another argument of the call."""
    return lambda arguments: arguments[name]


def zeros(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, **options)


# An argument, what it is instead, and what is said of it.
WRONG: dict[str, list[tuple[str, Any, type[Exception], str]]] = {
    "co2": [
        ("key", zeros(4, 2), ValueError, r"must be \(B, D\) with B = 4 and D = 3, got shape \(4, 2\)"),
        ("key", zeros(4, 3).int(), TypeError, "must be of dtype float16, bfloat16, .*, got torch.int32"),
        ("queue", zeros(6, 3).to_sparse(), TypeError, "must be a dense tensor, got layout torch.sparse_coo"),
        ("queue", zeros(0, 3), ValueError, r"must not be empty, got shape \(0, 3\)"),
        ("queue", zeros(6, 3, device="meta"), ValueError, "must be on the device of query, cpu, got meta"),
        ("temperature", 0.0, ValueError, "must be finite and > 0, got 0.0"),
        ("consistency_weight", math.nan, ValueError, "must be finite and >= 0, got nan"),
        ("backend", "gpu", ValueError, "unknown backend 'gpu'"),
    ],
    "scale_gradient": [("grad_loss", zeros(1), ValueError, r"must be \(B,\) with B = 4, got shape \(1,\)")],
    "nt_xent": [
        ("views", zeros(3, 4, 3), ValueError, r"must be \(2, B, D\), got shape \(3, 4, 3\)"),
        ("views", zeros(2, 4, 0), ValueError, "must not be empty"),
        ("temperature", math.inf, ValueError, "must be finite and > 0, got inf"),
    ],
    "nt_xent_backward": [
        ("statistics", zeros(2, 5).double(), ValueError, r"must be \(2B, 5\) with 2B = 8, got"),
        ("grad_loss", zeros(4), ValueError, r"must be \(2B,\) with 2B = 8, got"),
    ],
    "conic": [
        (
            "target",
            torch.tensor([0, 1, 2, 6]),
            ValueError,
            "must be rows of weight, from 0 to 5, got .* to 6",
        ),
        ("target", torch.tensor([0, -1, 2, 3]), ValueError, "must be rows of weight, .* got values from -1"),
        ("target", torch.arange(4).int(), TypeError, "must be of dtype int64, got torch.int32"),
        ("compensation", 0.0, ValueError, "must be finite and > 0"),
    ],
    "conic_backward": [
        ("target", torch.full((4,), 9), ValueError, "must be rows of weight"),
        ("grad_loss", zeros(1), ValueError, r"must be \(B,\) with B = 4, got"),
        ("grad_loss", zeros(4).long(), TypeError, "must be of dtype float32, that of a loss of views, got"),
        ("grad_loss", zeros(4, device="meta"), ValueError, "must be on the device of views"),
        ("statistics", zeros(1, 3).double(), ValueError, r"must be \(V, B, 3\)"),
        ("statistics", zeros(2, 4, 3), TypeError, "must be of dtype float64"),
        ("statistics", None, TypeError, "must be a torch.Tensor, got None"),
    ],
    "conic_backward_sgd_": [
        ("grad_loss", zeros(0), ValueError, "must be"),
        ("momentum_buffer", zeros(1, 3), ValueError, r"must be \(A, D\) with A = 6 and D = 3"),
        ("momentum_buffer", of("weight"), ValueError, "weight must share no memory with momentum_buffer"),
        ("views", lambda x: x["weight"][:4].expand(2, 4, 3), ValueError, "weight must share no memory with"),
        ("lr", math.nan, ValueError, "must be finite and >= 0, got nan"),
    ],
    "sgd_": [
        ("momentum_buffer", of("weight"), ValueError, "weight must share no memory with momentum_buffer"),
        ("grad", of("momentum_buffer"), ValueError, "momentum_buffer must share no memory with grad"),
        ("weight", zeros(1, 3).expand(6, 3), ValueError, r"must not overlap itself, got strides \(0, 1\)"),
    ],
    "exchange_rows_": [
        ("momentum_buffer", zeros(1, 3), ValueError, r"must be \(A, D\) with A = 6 and D = 3"),
        ("momentum_buffer", zeros(6, 3).double(), TypeError, "must be of dtype float32, that of weight"),
        ("slots", torch.tensor([0, 6]), ValueError, "must be rows of weight, from 0 to 5, got"),
        ("slots", torch.tensor([1, 1]), ValueError, "must be distinct, got 1 more than once"),
        ("incoming", zeros(0, 2, 3), ValueError, "incoming_rows must be rows of incoming"),
        ("incoming", zeros(2, 2, 3, device="meta"), ValueError, "must be on the device of weight"),
        ("incoming_rows", torch.tensor([0, -1]), ValueError, "must be rows of incoming"),
        ("coefficients", zeros(2, 2, 2), TypeError, "must be of dtype float64"),
        ("outgoing", of("incoming"), ValueError, "outgoing_rows must be other rows than incoming_rows"),
        ("outgoing", zeros(2, 1, 3).expand(2, 2, 3), ValueError, "must not overlap itself"),
        ("outgoing_rows", torch.tensor([0, 2]), ValueError, "must be rows of outgoing"),
        ("outgoing_rows", torch.tensor([1, 1]), ValueError, "must be distinct"),
    ],
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("name", "argument", "value", "error", "message"),
    [(name, *wrong) for name, several in WRONG.items() for wrong in several],
)
def test_wrong_arguments_are_refused_by_name(
    backend: str, name: str, argument: str, value: Any, error: type[Exception], message: str
) -> None:
    """By the operator, whoever serves, with nothing written."""
    own = {} if name == "scale_gradient" else {"backend": backend}
    arguments, call = call_with(name, own | {argument: value})
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    tensors = [x for x in tensors if x.device.type == "cpu" and x.layout == torch.strided]
    before = [x.clone() for x in tensors]
    with pytest.raises(error, match=message) as caught:
        call()
    assert argument in str(caught.value)
    assert argument == "backend" or f"contrastive_ops::{name}: " in str(caught.value)
    assert all(torch.equal(x, then) for x, then in zip(tensors, before, strict=True))


def test_a_negated_view_is_not_written() -> None:
    positive = torch.ones(6, 3)
    _, call = call_with("sgd_", {"weight": torch._neg_view(positive)})
    with pytest.raises(ValueError, match=r"contrastive_ops::sgd_: tensors must not be negated views"):
        call()
    assert torch.equal(positive, torch.ones(6, 3))


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("name", dict(OPERATORS))
def test_all_tensors_are_on_one_device(name: str, device: str) -> None:
    """A pointer of a GPU is never followed on the host, nor is a tensor without memory passed over."""
    fake = FakeTensorMode()  # which has GPUs where there are none
    with fake if device == "cuda" else nullcontext():
        arguments = arguments_of(name) if device == "meta" else [
            fake.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in ARGUMENTS[name]
        ]  # fmt: skip
        places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
        for place in places if len(places) > 1 else ():
            wrong = list(arguments)
            wrong[place] = torch.empty_like(wrong[place], device=device)
            with pytest.raises(ValueError, match=f"contrastive_ops::{name}: .* must be on the device of"):
                getattr(torch.ops.contrastive_ops, name)(*wrong)


@pytest.mark.parametrize("name", dict(OPERATORS))
def test_without_memory_there_are_shapes_alone(name: str) -> None:
    arguments = arguments_of(name)
    operator = getattr(torch.ops.contrastive_ops, name)
    expected = operator(*arguments)
    without = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    actual = operator(*without)
    if expected is None:
        assert actual is None
        return
    several = (expected, actual) if isinstance(expected, tuple) else ((expected,), (actual,))
    for e, a in zip(*several, strict=True):
        assert a.is_meta
        assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


@pytest.mark.parametrize("name", ["conic_backward_sgd_", "sgd_", "exchange_rows_"])
def test_what_writes_has_no_derivative(name: str) -> None:
    arguments, call = call_with(name, {"weight": torch.ones(6, 3, requires_grad=True)})
    with pytest.raises(RuntimeError, match=f"contrastive_ops::{name} writes in place and has no derivative"):
        call()
    assert torch.equal(arguments["weight"], torch.ones(6, 3))
    with torch.no_grad():
        call()
    assert not torch.equal(arguments["weight"], torch.ones(6, 3))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("beside", [0, 1, 2])
def test_weight_and_momentum_may_lie_beside_each_other(backend: str, beside: int) -> None:
    """In one tensor, by halves, rows or columns: what they span overlaps, they do not."""
    for name in ("conic_backward_sgd_", "sgd_", "exchange_rows_"):
        plain, call = call_with(name, {"backend": backend})
        names = ("weight", "momentum_buffer")
        parts = torch.stack([plain[name] for name in names], beside).unbind(beside)
        call_with(name, {"backend": backend, **dict(zip(names, parts, strict=True))})[1]()
        call()
        for part, each in zip(parts, names, strict=True):
            torch.testing.assert_close(part, plain[each])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("active", "dim", "moved"), [(0, 3, 0), (4, 0, 0), (4, 0, 2), (4, 3, 0)])
def test_where_there_is_nothing_nothing_is_done(backend: str, active: int, dim: int, moved: int) -> None:
    weight, buffer, grad = (torch.ones(active, dim) for _ in range(3))
    torch.ops.contrastive_ops.sgd_(weight, buffer, grad, 0.1, 0.9, 0.0, False, backend)
    assert torch.equal(weight, torch.full((active, dim), 1 - 0.1 * 1.9))
    records, every = torch.zeros(moved, 2, dim), torch.arange(moved)
    unit = torch.eye(2, dtype=torch.float64).repeat(moved, 1, 1)
    torch.ops.contrastive_ops.exchange_rows_(
        weight, buffer, every, records, every, unit, records.clone(), every, backend
    )
    assert torch.equal(buffer, torch.full((active, dim), 1.9))


def test_a_step_in_a_backward_that_records_itself_is_refused_before_it_is_taken() -> None:
    from contrastive_ops._contract import PendingStep, SGDSettings

    views, weight = torch.randn(2, 4, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    update, before = (
        PendingStep(torch.zeros(6, 3), SGDSettings(0.1, 0.9, 0.0, False)),
        weight.detach().clone(),
    )
    loss = conic_loss(views, weight, torch.arange(4), update=update)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        loss.backward(create_graph=True)
    assert not update.taken
    assert torch.equal(weight.detach(), before)
