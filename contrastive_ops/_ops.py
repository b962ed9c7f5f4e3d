"""The operators: schema, shapes, autograd. What computes them is `_backends.py`'s choice.

They may be called as torch.ops.contrastive_ops.*, with any arguments: `_checks.py` refuses what is wrong
before a backend sees it. A loss needs a row of everything; `sgd_` and `exchange_rows_` do nothing without.

A loss is one operator: normalisation, softmax, the row losses. A backend makes it of three steps
(`_contract.py`); `…_backward` is the third of them, over all keys.

`co2` also has the gradient, when the query needs it. A row's loss depends on that row's query alone, so the
gradient is finished in forward and backward only scales its rows. That is exact for every reduction, and
stays right when the caller overwrites the queue between loss and backward, as a momentum-contrast training
loop does.

`nt_xent` has a gradient in its keys, which are its queries, and `conic` one in its classifier's weight. To
these all rows contribute, each scaled by its incoming gradient: their backward is an operator too, and
computes the similarities again.

Autograd kernels are registered directly: torch.library.register_autograd would do the same, but spends 50 µs
a call on filling in defaults, of which these schemas have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _backends
from ._calls import Known, signature_unobserved
from ._checks import Checks
from ._contract import (
    CO2Settings,
    ConICCoefficients,
    ConICSettings,
    NTXentCoefficients,
    NTXentSettings,
    PendingStep,
    SGDSettings,
    computed_in,
)
from ._eager import eager

_library = torch.library.Library("contrastive_ops", "DEF")
define = _library.define

define(
    "co2(Tensor query, Tensor key, Tensor queue, float temperature, float consistency_temperature, "
    "float instance_weight, float consistency_weight, bool include_positive, bool normalize, "
    "bool compute_gradient, str? backend) "
    "-> (Tensor loss, Tensor instance_loss, Tensor consistency_loss, Tensor positive_rank, Tensor gradient)"
)
define("scale_gradient(Tensor gradient, Tensor grad_loss, Tensor query) -> Tensor")
define(
    "nt_xent(Tensor views, float temperature, float consistency_temperature, float consistency_weight, "
    "bool normalize, str? backend) -> (Tensor loss, Tensor instance_loss, Tensor consistency_loss, "
    "Tensor positive_rank, Tensor statistics)"
)
define(
    "nt_xent_backward(Tensor grad_loss, Tensor views, Tensor statistics, float temperature, "
    "float consistency_temperature, float consistency_weight, bool normalize, str? backend) -> Tensor"
)
define(
    "conic(Tensor views, Tensor weight, Tensor target, float temperature, float compensation, "
    "float consistency_weight, str? backend) -> (Tensor loss, Tensor classification_loss, "
    "Tensor consistency_loss, Tensor positive_rank, Tensor statistics)"
)
define(
    "conic_backward(Tensor grad_loss, Tensor views, Tensor weight, Tensor target, Tensor statistics, "
    "float temperature, float consistency_weight, bool views_need_grad, bool weight_needs_grad, "
    "str? backend) -> (Tensor grad_views, Tensor grad_weight)"
)
define(
    "conic_backward_sgd_(Tensor grad_loss, Tensor views, Tensor(a!) weight, Tensor(b!) momentum_buffer, "
    "Tensor target, Tensor statistics, float temperature, float consistency_weight, float lr, "
    "float momentum, float weight_decay, bool nesterov, str? backend) -> Tensor grad_views"
)
define(
    "sgd_(Tensor(a!) weight, Tensor(b!) momentum_buffer, Tensor grad, float lr, float momentum, "
    "float weight_decay, bool nesterov, str? backend) -> ()"
)
define(
    "exchange_rows_(Tensor(a!) weight, Tensor(b!) momentum_buffer, Tensor slots, Tensor incoming, "
    "Tensor incoming_rows, Tensor coefficients, Tensor(c!) outgoing, Tensor outgoing_rows, "
    "str? backend) -> ()"
)


def _co2(query: Tensor, key: Tensor, queue: Tensor, *settings_and_more: Any) -> tuple[Tensor, ...]:
    *settings, compute_gradient, backend = settings_and_more
    kernels = _backends.select(backend, "co2", query)
    return kernels.co2(query, key, queue, CO2Settings(*settings), compute_gradient)


def co2_fake(query: Tensor, key: Tensor, queue: Tensor, *settings_and_more: Any) -> tuple[Tensor, ...]:
    *_, compute_gradient, _ = settings_and_more
    rows, dim = query.shape
    dtype = computed_in(query)
    loss, instance, consistency = (query.new_empty(rows, dtype=dtype) for _ in range(3))
    rank = query.new_empty(rows, dtype=torch.int64)
    gradient = query.new_empty((rows if compute_gradient else 0, dim), dtype=dtype)
    return loss, instance, consistency, rank, gradient


def _gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a backward returns: gradients of the first arguments, and None for those that have none."""
    return *gradients, *(None,) * (len(ctx.needs_input_grad) - len(gradients))


class _CO2(torch.autograd.Function):
    """The loss of `co2` with the backward that its gradient output allows.

    Here and in the functions below, only what has a derivative goes through autograd. `compute` is the
    operator below autograd, and puts its other outputs into the list `others`.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, compute: Callable[[], tuple[Tensor, ...]], others: list[Tensor]
    ) -> Tensor:
        loss, *others[:] = compute()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(others[-1], query)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return _gradients(ctx, None)
        gradient, query = ctx.saved_tensors
        # `query` stands in the signature so that a graph of the backward exists, and refuses. Where none is
        # made, there is nothing to check in a gradient of ours and a loss's that autograd has looked at.
        tensors = gradient, grad_loss, query
        unseen = not torch.is_grad_enabled() and signature_unobserved(tensors) is not None
        return _gradients(ctx, (_scale_gradient if unseen else scale_gradient)(*tensors))


def record_co2(
    below: Callable[..., Any], query: Tensor, key: Tensor, queue: Tensor, *settings_and_more: Any
) -> tuple[Tensor, ...]:
    if not settings_and_more[len(CO2Settings._fields)]:
        raise RuntimeError("contrastive_ops::co2: compute_gradient is false, but query requires a gradient")
    if key.requires_grad or queue.requires_grad:
        raise RuntimeError("contrastive_ops::co2: key and queue get no gradient, but one requires it")
    others: list[Tensor] = []
    loss = _CO2.apply(query, partial(below, query, key, queue, *settings_and_more), others)
    return loss, *others


def _scale_gradient(gradient: Tensor, grad_loss: Tensor, query: Tensor) -> Tensor:
    scaled = query.new_empty(query.shape)
    return torch.mul(gradient, grad_loss.unsqueeze(1), out=scaled)  # rounds once, to the query's dtype


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        views: Tensor,
        compute: Callable[[], tuple[Tensor, ...]],
        others: list[Tensor],
        settings_and_more: tuple[Any, ...],
        backward: Callable[..., Tensor],
    ) -> Tensor:
        loss, *others[:] = compute()
        ctx.settings_and_more, ctx.operator = settings_and_more, backward
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(views, others[-1])
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = None
        if grad_loss is not None:
            gradient = ctx.operator(grad_loss, *ctx.saved_tensors, *ctx.settings_and_more)
        return _gradients(ctx, gradient)


def record_nt_xent(
    backward: Callable[..., Tensor], below: Callable[..., Any], views: Tensor, *settings_and_more: Any
) -> tuple[Tensor, ...]:
    others: list[Tensor] = []
    compute = partial(below, views, *settings_and_more)
    loss = _NTXent.apply(views, compute, others, settings_and_more, backward)
    return loss, *others


def _nt_xent(views: Tensor, *settings_and_backend: Any) -> tuple[Tensor, ...]:
    *settings, backend = settings_and_backend
    return _backends.select(backend, "nt_xent", views).nt_xent(views, NTXentSettings(*settings))


def nt_xent_fake(views: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = 2 * views.shape[1]
    loss, instance, consistency = (views.new_empty(rows, dtype=computed_in(views)) for _ in range(3))
    rank = views.new_empty(rows, dtype=torch.int64)
    statistics = views.new_empty((rows, len(NTXentCoefficients._fields)), dtype=torch.float64)
    return loss, instance, consistency, rank, statistics


def _nt_xent_backward(
    grad_loss: Tensor, views: Tensor, statistics: Tensor, *settings_and_backend: Any
) -> Tensor:
    *settings, backend = settings_and_backend
    kernels = _backends.select(backend, "nt_xent_backward", views)
    return kernels.nt_xent_gradient(grad_loss, views, statistics, NTXentSettings(*settings))


class _ConIC(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        views: Tensor,
        weight: Tensor,
        target: Tensor,
        compute: Callable[[], tuple[Tensor, ...]],
        others: list[Tensor],
        settings_and_more: tuple[Any, ...],
        backward: Callable[..., Any],
    ) -> Tensor:
        loss, *others[:] = compute()
        temperature, _negatives, consistency_weight, *ctx.backend_and_group = settings_and_more
        ctx.settings, ctx.operator = (temperature, consistency_weight), backward
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(views, weight, target, others[-1])
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        need_views, need_weight, *_ = ctx.needs_input_grad
        grad_views = grad_weight = None
        if grad_loss is not None:
            grad_views, grad_weight = ctx.operator(
                grad_loss, *ctx.saved_tensors, *ctx.settings, need_views, need_weight, *ctx.backend_and_group
            )
        return _gradients(ctx, grad_views if need_views else None, grad_weight if need_weight else None)


def record_conic(
    backward: Callable[..., Any],
    below: Callable[..., Any],
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    *settings_and_more: Any,
) -> tuple[Tensor, ...]:
    others: list[Tensor] = []
    compute = partial(below, views, weight, target, *settings_and_more)
    loss = _ConIC.apply(views, weight, target, compute, others, settings_and_more, backward)
    return loss, *others


_steps = eager("the step that backward takes is recorded on the host")


class _ConICWithUpdate(torch.autograd.Function):
    """`conic` whose backward takes a step of SGD on the weight (`update`) and returns no gradient for it. The
    weight is an argument so that a backward exists where the views need none."""

    @staticmethod
    def forward(
        ctx: Any, views: Tensor, weight: Tensor, target: Tensor, update: PendingStep, *others_of_conic: Any
    ) -> Tensor:
        ctx.update = update
        return _ConIC.forward(ctx, views, weight, target, *others_of_conic)

    @staticmethod
    @_steps
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        update, grad_views = ctx.update, None
        if grad_loss is not None:
            with update.lock:
                grad_views = _backward_with_a_step(ctx, grad_loss)
        return _gradients(ctx, grad_views)


@_steps
def with_update(
    operator: Callable[..., Any],
    backward: Callable[..., Tensor],
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    update: PendingStep,
    *settings_and_more: Any,
) -> tuple[Tensor, ...]:
    """`operator`, a loss of ConIC, whose backward takes the step `update`."""
    others: list[Tensor] = []

    def compute() -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(views, weight, target, *settings_and_more)

    loss = _ConICWithUpdate.apply(views, weight, target, update, compute, others, settings_and_more, backward)
    return loss, *others


def _backward_with_a_step(ctx: Any, grad_loss: Tensor) -> Tensor:
    update: PendingStep = ctx.update
    if torch.is_grad_enabled():
        raise RuntimeError("contrastive_ops: double backward is not supported")
    if update.taken:
        raise RuntimeError(
            "contrastive_ops: this step of SGD has been taken by an earlier backward; "
            "ask the optimizer for one for each loss, and call its step() in between"
        )
    if update.withdrawn:
        raise RuntimeError(
            "contrastive_ops: this step of SGD was withdrawn: since its loss, the optimizer was asked for "
            "another one, or a checkpoint was loaded"
        )
    views, weight, target, statistics = ctx.saved_tensors
    # Until the operator has moved the versions on, the step is not taken, whatever it raises.
    update.begun = update.momentum_buffer._version, weight._version
    grad_views = ctx.operator(
        grad_loss, views, weight.detach(), update.momentum_buffer, target, statistics,
        *ctx.settings, *update.settings, *ctx.backend_and_group,
    )  # fmt: skip
    update.taken = True
    return grad_views


def _conic(
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    compensation: float,
    consistency_weight: float,
    backend: str | None,
) -> tuple[Tensor, ...]:
    settings = ConICSettings(temperature, consistency_weight, compensation)
    return _backends.select(backend, "conic", views).conic(views, weight, target, settings)


def conic_fake(views: Tensor, weight: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, ...]:
    count, batch, _dim = views.shape
    dtype = computed_in(views)
    loss, consistency = (views.new_empty(batch, dtype=dtype) for _ in range(2))
    classification = views.new_empty((count, batch), dtype=dtype)
    rank = views.new_empty((count, batch), dtype=torch.int64)
    statistics = views.new_empty((count, batch, len(ConICCoefficients._fields)), dtype=torch.float64)
    return loss, classification, consistency, rank, statistics


def _conic_backward(
    grad_loss: Tensor,
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    statistics: Tensor,
    temperature: float,
    consistency_weight: float,
    views_need_grad: bool,
    weight_needs_grad: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    settings = ConICSettings(temperature, consistency_weight)
    return _backends.select(backend, "conic_backward", views).conic_gradient(
        grad_loss, views, weight, target, statistics, settings, views_need_grad, weight_needs_grad
    )


def conic_backward_fake(
    grad_loss: Tensor, views: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *_, views_need_grad, weight_needs_grad, _ = arguments
    count, batch, dim = views.shape
    grad_views = views.new_empty((count if views_need_grad else 0, batch, dim))
    return grad_views, weight.new_empty((len(weight) if weight_needs_grad else 0, dim))


def _conic_backward_sgd_(
    grad_loss: Tensor,
    views: Tensor,
    weight: Tensor,
    momentum_buffer: Tensor,
    target: Tensor,
    statistics: Tensor,
    temperature: float,
    consistency_weight: float,
    *sgd_and_backend: Any,
) -> Tensor:
    *sgd, backend = sgd_and_backend
    settings = ConICSettings(temperature, consistency_weight)
    return _backends.select(backend, "conic_backward_sgd_", views).conic_gradient_sgd_(
        grad_loss, views, weight, momentum_buffer, target, statistics, settings, SGDSettings(*sgd)
    )


def _sgd_(weight: Tensor, momentum_buffer: Tensor, grad: Tensor, *sgd_and_backend: Any) -> None:
    *sgd, backend = sgd_and_backend
    kernels = _backends.select(backend, "sgd_", weight)
    if weight.numel():
        kernels.sgd_(weight, momentum_buffer, grad, SGDSettings(*sgd))


def _exchange_rows_(weight: Tensor, *arguments: Any) -> None:
    *tensors, outgoing_rows, backend = arguments
    kernels = _backends.select(backend, "exchange_rows_", weight)
    if weight.numel() and len(outgoing_rows):
        kernels.exchange_rows_(weight, *tensors, outgoing_rows)


class _NoDoubleBackward(torch.autograd.Function):
    """An operator of a backward. Recorded, so that create_graph=True makes a graph, and refuses to be
    differentiated; without it the second derivative would silently be left out."""

    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], *arguments: Any) -> Any:
        return below(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("contrastive_ops: double backward is not supported")


def _refuse_transforms(name: str, tensors: list[Tensor], needs_gradient: bool) -> None:
    """Derivatives that PyTorch would not take through an operator of ours, or would take to be 0.

    Forward mode sees an operator without a rule for it as a constant. torch.func differentiates functions of
    its own kind alone. (torch.func.vmap needs no derivative: it calls the operator once for each row.)
    """
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise RuntimeError(
            f"contrastive_ops::{name}: forward-mode derivatives (torch.func.jvp, jacfwd, dual tensors) are "
            "not supported; use torch.autograd.grad or backward()"
        )
    if needs_gradient and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"contrastive_ops::{name}: the derivatives of torch.func (grad, vjp, jacrev, hessian) are not "
            "supported; use torch.autograd.grad or backward()"
        )


def _fake_in_place(*_: Any) -> None:
    return None


# Of these PyTorch's dispatcher makes nothing else, as it makes a float of an integer.
_AS_IN_SCHEMA = (Tensor, float, bool, str, type(None))


def _needs_gradient(arguments: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(a.requires_grad for a in arguments if isinstance(a, Tensor))


def register(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    record: Callable[..., Any] | None = None,
    around_checks: Callable[[Sequence[Any]], AbstractContextManager[Any]] | None = None,
) -> Any:
    """The operator, with its arguments checked before `kernel` and `fake` see them. Where a tensor argument
    requires a gradient, `record` is called in its place, with the operator below autograd for its first
    argument. An operator without it has no derivative. `around_checks` of the arguments is entered while they
    are checked.

    What is returned calls the operator, or what PyTorch's dispatcher would come to: a way there and back
    takes the host as long as the launches of several kernels.
    """
    operator = getattr(torch.ops.contrastive_ops, name)
    check = Checks(name, operator.default._schema)

    def checked_kernel(*arguments: Any) -> Any:
        if around_checks is None:
            check(arguments)
        else:
            with around_checks(arguments):
                check(arguments)
        return kernel(*arguments)

    def checked_fake(*arguments: Any) -> Any:
        check.without_memory(arguments)
        return fake(*arguments)

    def negated(*_: Any) -> Any:
        raise ValueError(f"contrastive_ops::{name}: tensors must not be negated views; pass x.resolve_neg()")

    _library.impl(name, checked_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"contrastive_ops::{name}", checked_fake, lib=_library)
    if check.written:  # else PyTorch resolves them
        _library.impl(name, negated, "Negative")

    def below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    def autograd(*arguments: Any) -> Any:
        needs_gradient = _needs_gradient(arguments)
        _refuse_transforms(name, [a for a in arguments if isinstance(a, Tensor)], needs_gradient)
        if record is not None and needs_gradient:
            return record(below_autograd, *arguments)
        if check.written and needs_gradient:
            raise RuntimeError(
                f"contrastive_ops::{name} writes in place and has no derivative, but a tensor requires one; "
                "call it under torch.no_grad(), or with detached tensors"
            )
        return below_autograd(*arguments)

    def straight_below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return checked_kernel(*arguments)

    def way_of(arguments: Sequence[Any]) -> Callable[..., Any]:
        """What PyTorch's dispatcher would come to, or the operator where it has more to do or to say."""
        needs_gradient = _needs_gradient(arguments)
        is_as_in_schema = all(isinstance(each, _AS_IN_SCHEMA) for each in arguments)
        if not is_as_in_schema or (check.written and needs_gradient):
            return operator
        if record is not None and needs_gradient:
            return partial(record, straight_below_autograd)
        return straight_below_autograd

    known: Known[Callable[..., Any]] = Known()

    def call(*arguments: Any, **named: Any) -> Any:
        kind = None if named else signature_unobserved(arguments)
        if kind is None:
            return operator(*arguments, **named)
        way = known.get(kind) or known.remember(kind, way_of(arguments))
        return way(*arguments)

    _library.impl(name, autograd, "Autograd")
    return call


# Each is specified by the function of its name in `reference.py`; the last argument names a backend. Of a
# loss only the first output, its rows, is differentiable: `co2` in the query, `nt_xent` in the views, `conic`
# in views and weight.
refuse_double_backward = _NoDoubleBackward.apply
co2 = register("co2", _co2, co2_fake, record_co2)
scale_gradient = register(
    "scale_gradient",
    _scale_gradient,
    lambda gradient, grad_loss, query: query.new_empty(query.shape),
    refuse_double_backward,
)
nt_xent_backward = register(
    "nt_xent_backward",
    _nt_xent_backward,
    lambda grad_loss, views, *_: views.new_empty(views.shape),
    refuse_double_backward,
)
nt_xent = register("nt_xent", _nt_xent, nt_xent_fake, partial(record_nt_xent, nt_xent_backward))
conic_backward = register("conic_backward", _conic_backward, conic_backward_fake, refuse_double_backward)
conic_backward_sgd_ = register(
    "conic_backward_sgd_", _conic_backward_sgd_, lambda grad_loss, views, *_: views.new_empty(views.shape)
)
conic = register("conic", _conic, conic_fake, partial(record_conic, conic_backward))
conic_with_update = partial(with_update, torch.ops.contrastive_ops.conic, conic_backward_sgd_)
sgd_ = register("sgd_", _sgd_, _fake_in_place)
exchange_rows_ = register("exchange_rows_", _exchange_rows_, _fake_in_place)
