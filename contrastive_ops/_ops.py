"""The operators: schema, shapes, autograd. What computes them is `_backends.py`'s choice.

`co2` is a whole loss: normalisation, both softmaxes, the row losses and, when the query needs it, their
gradient. A row's loss depends on that row's query alone, so the gradient is finished in forward and backward
only scales its rows. That is exact for every reduction, and stays right when the caller overwrites the queue
between loss and backward, as a momentum-contrast training loop does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backends

_library = torch.library.Library("contrastive_ops", "DEF")

_library.define(
    "co2(Tensor query, Tensor key, Tensor queue, float temperature, float consistency_temperature, "
    "float instance_weight, float consistency_weight, bool include_positive, bool normalize, "
    "bool compute_gradient, str? backend) "
    "-> (Tensor loss, Tensor instance_loss, Tensor consistency_loss, Tensor positive_rank, Tensor gradient)"
)
_library.define("scale_gradient(Tensor gradient, Tensor grad_loss, Tensor query) -> Tensor")


def _co2(query: Tensor, key: Tensor, queue: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *settings, backend = arguments
    return _backends.select(backend, query).co2(query, key, queue, *settings)


def _co2_fake(query: Tensor, key: Tensor, queue: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    compute_gradient = arguments[-2]
    rows, dim = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    loss, instance, consistency = (query.new_empty(rows, dtype=dtype) for _ in range(3))
    rank = query.new_empty(rows, dtype=torch.int64)
    gradient = query.new_empty((rows if compute_gradient else 0, dim), dtype=dtype)
    return loss, instance, consistency, rank, gradient


def _co2_without_autograd(query: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return co2(query, *arguments)


def _co2_autograd(query: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    recorded = torch.is_grad_enabled() and query.requires_grad
    return (_CO2.apply if recorded else _co2_without_autograd)(query, *arguments)


class _CO2(torch.autograd.Function):
    """`co2` with the backward that its gradient output allows.

    Registered as the autograd kernel itself: torch.library.register_autograd would do the same, but spends
    50 µs a call on filling in defaults, of which the schema has none.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        compute_gradient = arguments[-2]
        if not compute_gradient:
            raise RuntimeError(
                "contrastive_ops::co2: compute_gradient is false, but query requires a gradient"
            )
        output = _co2_without_autograd(query, *arguments)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[-1], query)
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradient, query = ctx.saved_tensors
        scaled = None
        if grad_loss is not None:
            scaled = torch.ops.contrastive_ops.scale_gradient(gradient, grad_loss, query)
        return scaled, *(None,) * 10


def _scale_gradient(gradient: Tensor, grad_loss: Tensor, query: Tensor) -> Tensor:
    scaled = torch.empty_like(gradient, dtype=query.dtype)
    return torch.mul(gradient, grad_loss.unsqueeze(1), out=scaled)  # rounds once, to the query's dtype


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError("contrastive_ops: double backward is not supported")


_library.impl("co2", _co2, "CompositeExplicitAutograd")
_library.impl("scale_gradient", _scale_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("contrastive_ops::co2", _co2_fake, lib=_library)
torch.library.register_fake("contrastive_ops::scale_gradient", _scale_gradient, lib=_library)
_library.impl("co2", _co2_autograd, "Autograd")
# `query` stands in the signature so that a graph of the backward exists and refuses to be differentiated:
# without it, create_graph=True would silently leave the second derivative out.
torch.library.register_autograd("contrastive_ops::scale_gradient", _no_double_backward, lib=_library)

# Specified by `reference.co2`, with the name of a backend as its last argument. Only the first output, the
# row losses, is differentiable, and only in the query.
co2 = torch.ops.contrastive_ops.co2
