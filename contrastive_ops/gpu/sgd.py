"""A step of SGD on the classifier's weight, in one launch."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from .._contract import SGDSettings
from .arguments import matrix
from .launch import Kernels, Launch, ceil_div, current, plan

_BLOCK = 2048  # numbers of a program


@plan
def _plan(kernels: Kernels, count: int) -> Launch:
    return kernels.launch("sgd", (ceil_div(count, _BLOCK),), {"BLOCK": _BLOCK})


def sgd_(kernels: Kernels, weight: Tensor, momentum_buffer: Tensor, grad: Tensor, sgd: SGDSettings) -> None:
    """See `reference.sgd_`; computed in float32, and a float64 weight, which not every backend serves, in
    float64."""
    lr, momentum, weight_decay, nesterov = sgd
    contiguous = all(x.is_contiguous() for x in (weight, momentum_buffer, grad))
    with current(weight):
        _plan(kernels, weight.numel())(
            weight=matrix(weight),
            momentum_buffer=matrix(momentum_buffer),
            grad=matrix(grad),
            count=weight.numel(),
            dim=weight.shape[1],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            NESTEROV=nesterov,
            CONTIGUOUS=contiguous,
        )
    increment_version((momentum_buffer, weight))
