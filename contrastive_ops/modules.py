"""The losses as modules that hold their settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import functional


class _Loss(nn.Module):
    """Holds the keyword arguments of a loss as attributes, with the loss's own defaults."""

    _loss: Callable[..., Any]
    __signature__: inspect.Signature

    def __init_subclass__(cls) -> None:
        parameters = inspect.signature(cls._loss).parameters.values()
        cls.__signature__ = inspect.Signature([p for p in parameters if p.kind is p.KEYWORD_ONLY])

    def __init__(self, *positional: Any, **settings: Any) -> None:
        super().__init__()
        name, known = type(self).__name__, self.__signature__.parameters
        if positional:
            meant = ", ".join(f"{each}={value!r}" for each, value in zip(known, positional, strict=False))
            raise TypeError(f"{name} takes its settings by keyword: {meant}")
        for unknown in settings.keys() - known.keys():
            raise TypeError(
                f"{name}() got an unexpected keyword argument {unknown!r}; there are {', '.join(known)}"
            )
        bound = self.__signature__.bind(**settings)
        bound.apply_defaults()
        for setting, value in bound.arguments.items():
            setattr(self, setting, value)

    def settings(self) -> dict[str, Any]:
        """The loss's keyword arguments as they stand; each is an attribute, and may be changed."""
        return {name: getattr(self, name) for name in self.__signature__.parameters}

    def forward(self, *tensors: Tensor, **settings: Any) -> Any:
        """The loss of its tensors; `settings` take the place of the module's own in this call."""
        return type(self)._loss(*tensors, **(self.settings() | settings))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


class CO2Loss(_Loss):
    """`co2_loss` with its settings; the defaults are the paper's for MoCo v2.

    Args:
        **settings: the keyword arguments of `co2_loss`.

    Example:
        >>> import torch
        >>> from contrastive_ops import CO2Loss
        >>> criterion = CO2Loss(temperature=0.07, consistency_temperature=0.04, consistency_weight=10.0)
        >>> loss = criterion(torch.randn(4, 8), torch.randn(4, 8), torch.randn(16, 8))
    """

    _loss = staticmethod(functional.co2_loss)


class InfoNCELoss(_Loss):
    """`info_nce_loss` with its settings.

    Args:
        **settings: the keyword arguments of `info_nce_loss`.

    Example:
        >>> import torch
        >>> from contrastive_ops import InfoNCELoss
        >>> loss = InfoNCELoss(temperature=0.07)(torch.randn(4, 8), torch.randn(4, 8), torch.randn(16, 8))
    """

    _loss = staticmethod(functional.info_nce_loss)


class ConsistencyLoss(_Loss):
    """`consistency_loss` with its settings.

    Args:
        **settings: the keyword arguments of `consistency_loss`.

    Example:
        >>> import torch
        >>> from contrastive_ops import ConsistencyLoss
        >>> loss = ConsistencyLoss()(torch.randn(4, 8), torch.randn(4, 8), torch.randn(16, 8))
    """

    _loss = staticmethod(functional.consistency_loss)


class NTXentLoss(_Loss):
    """`nt_xent_loss` with its settings.

    Args:
        **settings: the keyword arguments of `nt_xent_loss`.

    Example:
        >>> import torch
        >>> from contrastive_ops import NTXentLoss
        >>> loss = NTXentLoss(temperature=0.1)(torch.randn(4, 8), torch.randn(4, 8))
    """

    _loss = staticmethod(functional.nt_xent_loss)


class ConICLoss(_Loss):
    """`conic_loss` with its settings; the defaults are the paper's.

    Args:
        **settings: the keyword arguments of `conic_loss`.

    Example:
        >>> import torch
        >>> from contrastive_ops import ConICLoss
        >>> criterion = ConICLoss(num_instances=1_000_000, consistency_weight=0.5)
        >>> loss = criterion(torch.randn(2, 4, 8), torch.randn(16, 8), torch.tensor([3, 0, 7, 5]))
    """

    _loss = staticmethod(functional.conic_loss)
