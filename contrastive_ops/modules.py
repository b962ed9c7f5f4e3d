"""The losses as modules that hold their settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, dataclass_transform

from torch import Tensor, nn

from . import functional
from ._ranks import copied
from .functional import Reduction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass_transform(kw_only_default=True)
class _Loss(nn.Module):
    """Holds the keyword arguments of a loss, with the loss's own defaults, as fields of a dataclass."""

    _loss: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        if "_loss" in cls.__dict__:  # a user's subclass has the settings of its parent
            dataclass(kw_only=True, eq=False, repr=False)(cls)
            cls.__init__ = _by_keyword(cls.__init__)  # type: ignore[method-assign]

    def settings(self) -> dict[str, Any]:
        """The loss's keyword arguments as they stand; each is an attribute, and may be changed."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def forward(self, *tensors: Tensor, **settings: Any) -> Any:
        """The loss of its tensors; `settings` take the place of the module's own in this call."""
        return type(self)._loss(*tensors, **(self.settings() | settings))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Loss:
        return copied(self, memo)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


def _by_keyword(init: Callable[..., None]) -> Callable[..., None]:
    """The `__init__` of a loss's module, which says what settings there are where they are given wrongly."""

    @functools.wraps(init)
    def checked(self: _Loss, *positional: Any, **settings: Any) -> None:
        name, known = type(self).__name__, [field.name for field in fields(self)]  # type: ignore[arg-type]
        if positional:
            meant = ", ".join(f"{each}={value!r}" for each, value in zip(known, positional, strict=False))
            raise TypeError(f"{name} takes its settings by keyword: {meant}")
        for unknown in settings.keys() - set(known):
            raise TypeError(
                f"{name}() got an unexpected keyword argument {unknown!r}; there are {', '.join(known)}"
            )
        nn.Module.__init__(self)
        init(self, **settings)

    return checked


class CO2Loss(_Loss):
    """`co2_loss` with its settings; the defaults are the paper's for MoCo v2.

    Its settings are the keyword arguments of `co2_loss`, and its attributes.

    Example:
        >>> import torch
        >>> from contrastive_ops import CO2Loss
        >>> criterion = CO2Loss(temperature=0.07, consistency_temperature=0.04, consistency_weight=10.0)
        >>> loss = criterion(torch.randn(4, 8), torch.randn(4, 8), torch.randn(16, 8))
    """

    _loss = staticmethod(functional.co2_loss)

    temperature: float = 0.2
    consistency_temperature: float = 0.05
    consistency_weight: float = 0.3
    include_positive: bool = False
    normalize: bool = True
    reduction: Reduction = "mean"
    return_metrics: bool = False
    group: ProcessGroup | None = None
    backend: str | None = None


class InfoNCELoss(_Loss):
    """`info_nce_loss` with its settings.

    Its settings are the keyword arguments of `info_nce_loss`, and its attributes.

    Example:
        >>> import torch
        >>> from contrastive_ops import InfoNCELoss
        >>> loss = InfoNCELoss(temperature=0.07)(torch.randn(4, 8), torch.randn(4, 8), torch.randn(16, 8))
    """

    _loss = staticmethod(functional.info_nce_loss)

    temperature: float = 0.2
    normalize: bool = True
    reduction: Reduction = "mean"
    return_metrics: bool = False
    group: ProcessGroup | None = None
    backend: str | None = None


class ConsistencyLoss(_Loss):
    """`consistency_loss` with its settings.

    Its settings are the keyword arguments of `consistency_loss`, and its attributes.

    Example:
        >>> import torch
        >>> from contrastive_ops import ConsistencyLoss
        >>> loss = ConsistencyLoss()(torch.randn(4, 8), torch.randn(4, 8), torch.randn(16, 8))
    """

    _loss = staticmethod(functional.consistency_loss)

    temperature: float = 0.05
    include_positive: bool = False
    normalize: bool = True
    reduction: Reduction = "mean"
    return_metrics: bool = False
    group: ProcessGroup | None = None
    backend: str | None = None


class NTXentLoss(_Loss):
    """`nt_xent_loss` with its settings.

    Its settings are the keyword arguments of `nt_xent_loss`, and its attributes.

    Example:
        >>> import torch
        >>> from contrastive_ops import NTXentLoss
        >>> loss = NTXentLoss(temperature=0.1)(torch.randn(4, 8), torch.randn(4, 8))
    """

    _loss = staticmethod(functional.nt_xent_loss)

    temperature: float = 0.5
    consistency_weight: float = 0.0
    consistency_temperature: float = 0.05
    normalize: bool = True
    reduction: Reduction = "mean"
    return_metrics: bool = False
    group: ProcessGroup | None = None
    backend: str | None = None


class ConICLoss(_Loss):
    """`conic_loss` with its settings; the defaults are the paper's.

    Its settings are the keyword arguments of `conic_loss`, and its attributes. A step of SGD (`update`) is
    taken once, and so is given to the call: ``criterion(views, weight, target, update=step)``.

    Example:
        >>> import torch
        >>> from contrastive_ops import ConICLoss
        >>> criterion = ConICLoss(num_instances=1_000_000, consistency_weight=0.5)
        >>> loss = criterion(torch.randn(2, 4, 8), torch.randn(16, 8), torch.tensor([3, 0, 7, 5]))
    """

    _loss = staticmethod(functional.conic_loss)

    num_instances: int | None = None
    temperature: float = 0.1
    consistency_weight: float = 2.5
    reduction: Reduction = "mean"
    return_metrics: bool = False
    group: ProcessGroup | None = None
    backend: str | None = None
