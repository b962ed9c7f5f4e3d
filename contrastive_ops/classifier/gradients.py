"""The gradient of a classifier's rows between a backward and the step, while rows come and go."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .indices import Indices, on_device

if TYPE_CHECKING:
    from .shards import AnyPlan


@dataclass(frozen=True)
class GradientVersion:
    """A gradient as it was at a moment, without keeping it alive.

    Attributes:
        tensor: a weak reference to it.
        version: how often it had been written.
    """

    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def of(cls, gradient: Tensor) -> GradientVersion:
        return cls(weakref.ref(gradient), gradient._version)

    def is_still(self, gradient: Tensor | None) -> bool:
        return gradient is not None and self.tensor() is gradient and self.version == gradient._version


@dataclass
class Carried:
    """Rows that were evicted while they had a gradient.

    Attributes:
        instances: (n,) whose they are.
        parameter: (n, D), whose ``grad`` is theirs.
        part_of: the weight's gradient that it is a part of.
        spent: whether a step has been taken on it, and nothing been added since.
    """

    instances: Indices
    parameter: nn.Parameter
    part_of: weakref.ref[Tensor]
    spent: bool

    @property
    def gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return self.parameter.grad


@dataclass(frozen=True)
class GradientExchange:
    """What happens to the gradient when rows are exchanged, and what takes it back.

    Attributes:
        slots: (n,) the rows of the weight that change hands, on its device.
        leaving, arriving: (n, D) their gradients before and after.
        spent: whether a step had been taken on the weight's gradient.
        carried_before, carried: the gradient of evicted rows before and after.
    """

    slots: Tensor
    leaving: Tensor
    arriving: Tensor
    spent: bool
    carried_before: Carried | None
    carried: Carried


class Gradients:
    """The gradient of the active rows, which the weight has, and that of rows evicted with one.

    Args:
        parameters: the classifier's, by name; evicted rows' is published there as "carried".
        trained: the list of parameters that optimisers hold: the weight, and the one of evicted rows while
            there is one.
        added: whether a backward has added to the gradient since rows could last be evicted.

    Attributes:
        carried: the gradient of evicted rows.
        spent: the weight's gradient as the last step left it.
        stepping: that of a step() that has not returned.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter | None], trained: list[nn.Parameter], added: bool = False
    ) -> None:
        self._parameters, self.trained = parameters, trained
        self._hook: RemovableHandle | None = None
        self.carried: Carried | None = None
        self.spent: GradientVersion | None = None
        self.stepping: GradientVersion | None = None
        self.added = added

    @property
    def whole(self) -> Tensor | None:
        """The weight's gradient."""
        return self.trained[0].grad

    @property
    def was_dropped(self) -> bool:
        """Whether a gradient that there was is no more: it was thrown away, by the optimiser or others."""
        return self.whole is None and self.added

    def replace(self, weight: nn.Parameter) -> None:
        """The weight is another parameter from now on."""
        self.trained[0], self._hook = weight, None

    def watch(self) -> None:
        """See every backward that adds to the weight's gradient, from now on."""
        weight = self.trained[0]
        if self._hook is None and weight.requires_grad:
            hook = partial(_has_accumulated, weakref.ref(self))
            self._hook = weight.register_post_accumulate_grad_hook(hook)

    def settle(self) -> None:
        """Forget evicted rows' part in a gradient that was thrown away or replaced."""
        if self.carried is not None:
            whole = self.whole
            if whole is None or not self._has_part_in(whole):
                self.publish(None)
            else:
                self.carried.part_of = weakref.ref(whole)

    def publish(self, carried: Carried | None) -> None:
        """Show evicted rows' gradient to loss scalers, clipping and `zero_grad`, which look for parameters,
        until a step has spent it: averages of a model, which go through parameters then, have no use for it.
        """
        parameter = None if carried is None or carried.spent else carried.parameter
        self._parameters["carried"] = parameter
        self.trained[1:] = [] if parameter is None else [parameter]
        self.carried = carried  # last: if an interrupt comes before, all of it is done again

    def spend(self, gradient: GradientVersion) -> None:
        """A step was taken on all there is."""
        self.spent = gradient
        if self.carried is not None:
            self.carried.spent = True
            self.publish(self.carried)

    def plan(self, plan: AnyPlan) -> GradientExchange | None:
        """What an exchange of rows does to the gradient; None where there is none. Changes nothing."""
        whole = self.whole
        if whole is None:
            return None
        slots = on_device(plan.slots, whole.device)
        leaving, spent = whole.detach()[slots], self._is_spent(whole)
        arriving = torch.zeros_like(leaving)
        instances, gradients = plan.evicted, leaving
        if self.carried is not None:
            before = self.carried.gradient
            _, back, at = np.intersect1d(plan.incoming, self.carried.instances, return_indices=True)
            stay = np.setdiff1d(np.arange(len(self.carried.instances)), at)
            arriving[on_device(back, whole.device)] = before[on_device(at, whole.device)]
            instances = np.concatenate([self.carried.instances[stay], instances])
            gradients = torch.cat([before[on_device(stay, whole.device)], gradients])
        with torch.inference_mode(False):  # an evaluation between two batches may have switched it on
            parameter = nn.Parameter(torch.zeros_like(gradients), requires_grad=False)
            parameter.grad = gradients.clone() if gradients.is_inference() else gradients
        carried = Carried(instances, parameter, weakref.ref(whole), spent)
        return GradientExchange(slots, leaving, arriving, spent, self.carried, carried)

    def exchange(self, planned: GradientExchange) -> None:
        """Do what was planned."""
        self._overwrite(planned, planned.arriving)
        self.publish(planned.carried)

    def undo(self, planned: GradientExchange) -> None:
        """Take it back, whether it was done, in part or not at all."""
        self._overwrite(planned, planned.leaving)
        self.publish(planned.carried_before)

    def _overwrite(self, planned: GradientExchange, rows: Tensor) -> None:
        """Give the slots that change hands these rows of gradient. One that was spent stays so."""
        if (whole := self.whole) is not None:
            whole.detach()[planned.slots] = rows
            self.spent = GradientVersion.of(whole) if planned.spent else None

    def _is_spent(self, gradient: Tensor) -> bool:
        """Whether it is as the last step left it."""
        return self.spent is not None and self.spent.is_still(gradient)

    def _has_part_in(self, whole: Tensor) -> bool:
        """Whether the weight's gradient is the one that evicted rows have a part in. If it waits for a step,
        another tensor in its place is a sum with it; if spent, whatever is written to it begins anew."""
        carried = self.carried
        assert carried is not None
        return carried.parameter.grad is not None and (not carried.spent or self._is_spent(whole))


def _has_accumulated(of: weakref.ref[Gradients], weight: Tensor) -> None:
    """Runs when a backward has added to the weight's gradient. If that is not what evicted rows have a part
    in, or was written to since it was spent, then theirs was thrown away in between."""
    gradients, whole = of(), weight.grad
    if gradients is None or whole is None:
        return
    gradients.added = True
    carried, spent = gradients.carried, gradients.spent
    if carried is None:
        return
    if torch.is_grad_enabled():  # create_graph=True: the sum is another tensor
        carried.part_of = weakref.ref(whole)
    elif carried.part_of() is not whole or (carried.spent and spent and whole._version != spent.version + 1):
        carried.parameter.grad = None
        return
    carried.spent = False
    gradients.publish(carried)
