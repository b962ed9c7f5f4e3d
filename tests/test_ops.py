"""The operators' manners in PyTorch: schema, fake kernels, autograd, compilation."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from contrastive_ops import co2_loss, info_nce_loss, use_backend
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
