"""The operators' manners in PyTorch: schema, fake kernels, autograd, compilation."""

from __future__ import annotations

import pytest
import torch
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


def test_all_operators_are_called_below() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("contrastive_ops::")}  # fmt: skip
    assert names == {name for name, _ in OPERATORS}
    for name in names:
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
