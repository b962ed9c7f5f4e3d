"""A criterion of contrastive_ops beside eager PyTorch, at the same weights in a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from contrastive_ops import CO2Loss, NTXentLoss

from .eager import eager_co2, eager_conic, eager_nt_xent
from .methods import Method


class Eager(nn.Module):
    """The loss of a criterion of contrastive_ops in eager PyTorch, differentiated by autograd.

    Args:
        criterion: whose settings are taken.
        order: if given, the seed of a permutation of the keys, which changes roundings alone.
    """

    def __init__(self, criterion: nn.Module, order: int | None = None) -> None:
        super().__init__()
        self.criterion, self.order = criterion, order

    def forward(self, *tensors: Tensor, **settings: Any) -> tuple[Tensor, None]:
        settings = self.criterion.settings() | settings
        for name in ("backend", "group", "return_metrics", "update"):
            settings.pop(name, None)
        if isinstance(self.criterion, CO2Loss):
            query, key, queue = tensors
            # A copy, as in MoCo's own code: the step overwrites the queue, which autograd needs in backward.
            queue = queue[self._permutation(queue)].clone()
            return eager_co2(query, key, queue, **settings), None
        if isinstance(self.criterion, NTXentLoss):
            view1, view2 = tensors
            order = self._permutation(view1)
            return eager_nt_xent(view1[order], view2[order], **settings), None
        views, weight, target = tensors
        order = self._permutation(weight)
        if self.order is not None:
            target = order.argsort()[target]
        return eager_conic(views, weight[order], target, **settings), None

    def _permutation(self, rows: Tensor) -> Any:
        if self.order is None:
            return slice(None)
        order = np.random.default_rng(self.order).permutation(len(rows))
        return torch.from_numpy(order).to(rows.device)


class Compared(nn.Module):
    """A criterion that also computes the eager loss of the same tensors, and its gradients.

    Attributes:
        losses: relative difference of each step's losses.
        gradients: of each step's gradients in all that is trained, taken together.
    """

    def __init__(self, criterion: nn.Module, trained: Callable[[], list[nn.Parameter]]) -> None:
        super().__init__()
        self.criterion, self.trained = criterion, trained
        self.losses: list[float] = []
        self.gradients: list[float] = []

    @classmethod
    def in_training(cls, module: Method) -> Compared:
        """Compares a method's criterion, and gradients of the parameters that its optimiser has by then."""

        def trained() -> list[nn.Parameter]:
            return [p for group in module.trainer.optimizers[0].param_groups for p in group["params"]]

        return cls(module.criterion, trained)

    def forward(self, *tensors: Tensor, **settings: Any) -> Any:
        output = self.criterion(*tensors, **settings)
        loss, _ = Eager(self.criterion)(*tensors, **settings)
        self.losses.append(relative(output[0].detach()[None], loss.detach()[None].to(output[0])))
        # While the graph from the tensors to the weights is whole: backward through the fused loss frees it.
        self.expected = torch.autograd.grad(loss, self.trained(), retain_graph=True)
        return output

    def compare(self, scale: float) -> None:
        """The gradients that backward left, of a loss multiplied by `scale`."""
        actual = torch.cat([p.grad.flatten() / scale for p in self.trained()])
        if scale != 1 and not torch.isfinite(actual).all():
            return  # too large a scale: it will be lowered, and the step left out
        self.gradients.append(relative(actual, torch.cat([grad.flatten() for grad in self.expected])))


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; of two zeros it is 0, and infinite where anything is not finite."""
    difference = (actual.double() - expected.double()).norm()
    if not torch.isfinite(difference):
        return math.inf
    return float(difference / expected.double().norm()) if difference else 0.0


class CompareGradients(Callback):
    """Has a `Compared` criterion compare gradients after each backward."""

    def on_after_backward(self, trainer: Trainer, module: Method) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        module.criterion.compare(1.0 if scaler is None else scaler.get_scale())
