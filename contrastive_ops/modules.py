"""The losses as modules that hold their settings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import functional
from .functional import Reduction


class _QueueLoss(nn.Module):
    """Holds a loss's keyword arguments as attributes, and shows them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._settings}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


class CO2Loss(_QueueLoss):
    """`co2_loss` with its settings; the defaults are the paper's for MoCo v2.

    Example:
        >>> import torch
        >>> from contrastive_ops import CO2Loss
        >>> criterion = CO2Loss(temperature=0.07, consistency_temperature=0.04, consistency_weight=10.0)
        >>> loss = criterion(torch.randn(4, 8), torch.randn(4, 8), torch.randn(16, 8))
    """

    def __init__(
        self,
        *,
        temperature: float = 0.2,
        consistency_temperature: float = 0.05,
        consistency_weight: float = 0.3,
        include_positive: bool = False,
        normalize: bool = True,
        reduction: Reduction = "mean",
        return_metrics: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            consistency_temperature=consistency_temperature,
            consistency_weight=consistency_weight,
            include_positive=include_positive,
            normalize=normalize,
            reduction=reduction,
            return_metrics=return_metrics,
            backend=backend,
        )

    def forward(self, query: Tensor, key: Tensor, queue: Tensor) -> Any:
        return functional.co2_loss(query, key, queue, **self.settings())


class InfoNCELoss(_QueueLoss):
    """`info_nce_loss` with its settings.

    Example:
        >>> import torch
        >>> from contrastive_ops import InfoNCELoss
        >>> loss = InfoNCELoss(temperature=0.07)(torch.randn(4, 8), torch.randn(4, 8), torch.randn(16, 8))
    """

    def __init__(
        self,
        *,
        temperature: float = 0.2,
        normalize: bool = True,
        reduction: Reduction = "mean",
        return_metrics: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
            return_metrics=return_metrics,
            backend=backend,
        )

    def forward(self, query: Tensor, key: Tensor, queue: Tensor) -> Any:
        return functional.info_nce_loss(query, key, queue, **self.settings())


class ConsistencyLoss(_QueueLoss):
    """`consistency_loss` with its settings.

    Example:
        >>> import torch
        >>> from contrastive_ops import ConsistencyLoss
        >>> loss = ConsistencyLoss()(torch.randn(4, 8), torch.randn(4, 8), torch.randn(16, 8))
    """

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        include_positive: bool = False,
        normalize: bool = True,
        reduction: Reduction = "mean",
        return_metrics: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            include_positive=include_positive,
            normalize=normalize,
            reduction=reduction,
            return_metrics=return_metrics,
            backend=backend,
        )

    def forward(self, query: Tensor, key: Tensor, queue: Tensor) -> Any:
        return functional.consistency_loss(query, key, queue, **self.settings())
