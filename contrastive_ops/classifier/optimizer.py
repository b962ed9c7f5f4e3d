"""The optimiser that updates untouched rows late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .._checks import check_flag, check_number
from .._contract import PendingStep, SGDSettings
from .._eager import eager
from .classifier import InstanceClassifier
from .history import check_step
from .indices import STATEFUL


class DelayedSGD(Optimizer):
    """SGD with momentum and weight decay over all rows of an `InstanceClassifier`, at the cost of the active.

    In the convention of torch.optim.SGD, with g = grad + λ w:

        v ← m v + g        w ← w − η v,  or with `nesterov`  w ← w − η (g + m v)

    Rows that are not active have no gradient, and their steps are taken late and exactly, all at once, when
    they are activated or read. Learning rate, momentum, weight decay and nesterov may change with every step:
    schedulers work. A step that a loss scaler skips is none. Without momentum v is g, as the formula says;
    torch.optim.SGD then leaves its buffer alone, which tells only if momentum comes back later.

    Only an optimiser that moves each row linearly, whatever the others do, can be delayed. That rules out
    LARS, LAMB, Adam and clipping the weight's norm; clipping gradients is fine.

    Args:
        classifier: whose `weight` is optimised. The momentum is the classifier's too, and in its checkpoints.
        lr: η ≥ 0. The defaults are the ConIC paper's.
        momentum: m in [0, 1).
        weight_decay: λ ≥ 0.
        nesterov: as in torch.optim.SGD.

    Raises:
        TypeError, ValueError: an argument is wrong; also in `step`, of a group's values as they are then.

    Example:
        >>> import torch
        >>> from contrastive_ops import DelayedSGD, InstanceClassifier
        >>> optimizer = DelayedSGD(InstanceClassifier(1000, 8, active=16), lr=0.06)
        >>> schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    """

    updates_late = True  # so that it may hold a tensor that is `updated_late_by` it

    def __init__(
        self,
        classifier: InstanceClassifier,
        lr: float = 0.06,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
    ) -> None:
        if not isinstance(classifier, InstanceClassifier):
            raise TypeError(f"classifier must be an InstanceClassifier, got {type(classifier).__name__}")
        self.classifier = classifier
        defaults = SGDSettings(lr, momentum, weight_decay, nesterov)
        _checked(defaults)
        super().__init__([classifier.weight], defaults._asdict())
        self.param_groups[0]["params"] = classifier._gradients.trained
        self._initialized()

    def _initialized(self) -> None:
        """Have a state for the weight, though it is empty: from none at all, torch.distributed.checkpoint
        concludes that no step was taken yet, and takes one of learning rate 0, which moves the momentum."""
        self.state.setdefault(self.classifier.weight, {})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "classifier": self.classifier}

    def state_dict(self) -> dict[str, Any]:
        """The settings as of this moment; the momentum is in the classifier's state."""
        state = super().state_dict()
        (group,) = state["param_groups"]
        group["params"] = [0]
        group.update((name, value.clone()) for name, value in group.items() if isinstance(value, Tensor))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.param_groups[0]["params"] = [self.classifier.weight]
        try:
            super().load_state_dict(state_dict)
        finally:
            self.param_groups[0]["params"] = self.classifier._gradients.trained
            self._initialized()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError("DelayedSGD holds one weight; other parameters want an optimizer of their own")
        super().add_param_group(param_group)

    @eager(STATEFUL)
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the gradient there is; without one, none, as in torch.optim.

        If it raises, for example because it is interrupted, call it again or go on: the step is taken once.
        (A `closure` is called again too, and a hook that raises after the step comes too late.)
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        classifier = self.classifier
        with classifier._exclusively():
            grad, update = classifier.weight.grad, classifier._pending
            if update is not None and update.taken:
                if grad is not None:
                    raise RuntimeError("weight has a gradient beside the step that backward has taken")
                classifier._pending = None
            elif classifier._gradients.stepping is not None and classifier._gradients.stepping.is_still(grad):
                pass  # the step is taken, by a call that did not return
            elif grad is not None:
                classifier._take_step(self._settings())
            else:
                classifier._release()
        classifier._gradients.stepping = None
        return loss

    @eager(STATEFUL)
    def in_backward(self) -> PendingStep:
        """The step to come, for ``conic_loss(…, update=optimizer.in_backward())`` to take in its backward,
        where the weight's gradient is never stored. `step` then only closes it. One backward a step, of the
        loss that asked last; not with a loss scaler, nor with clipping.

        Raises:
            RuntimeError: backward has taken the step before, and `step` has not closed it.

        Example:
            >>> import torch
            >>> from contrastive_ops import DelayedSGD, InstanceClassifier, conic_loss
            >>> classifier = InstanceClassifier(1000, 8, active=16)
            >>> optimizer = DelayedSGD(classifier)
            >>> target = classifier.activate(torch.tensor([3, 999]))
            >>> views = torch.randn(2, 2, 8, requires_grad=True)
            >>> loss = conic_loss(views, classifier.weight, target, update=optimizer.in_backward())
            >>> loss.backward(); optimizer.step()
        """
        classifier = self.classifier
        with classifier._exclusively():
            if classifier._pending is not None and classifier._pending.taken:
                raise RuntimeError(
                    "backward has taken a step already: call step() before the next in_backward()"
                )
            classifier._withdraw()
            classifier._pending = PendingStep(
                classifier.momentum, self._settings(), weight=classifier.weight, lock=classifier._guard.lock
            )
            return classifier._pending

    @eager(STATEFUL)
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Throw the gradient away, as in torch.optim. Rows may be evicted again then: a loss scaler that
        skips many steps does not fill the active set."""
        classifier = self.classifier
        with classifier._exclusively():
            super().zero_grad(set_to_none)
            classifier._gradients.stepping = None
            classifier._gradients.publish(None)
            classifier._release()

    def _settings(self) -> SGDSettings:
        (group,) = self.param_groups
        return _checked(SGDSettings(*(group[name] for name in SGDSettings._fields)))


def _checked(settings: SGDSettings) -> SGDSettings:
    """Validate a step's settings and return them as numbers; a learning rate may be a tensor of one."""
    lr, momentum, weight_decay, nesterov = settings
    lr = check_number("lr", float(lr) if isinstance(lr, Tensor) else lr, minimum=0)
    momentum = check_number("momentum", momentum, minimum=0)
    weight_decay = check_number("weight_decay", weight_decay, minimum=0)
    check_flag("nesterov", nesterov)
    if momentum >= 1:
        raise ValueError(f"momentum must be less than 1, got {momentum}")
    settings = SGDSettings(lr, momentum, weight_decay, nesterov)
    check_step(settings)
    return settings
