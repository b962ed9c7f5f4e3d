"""SimCLR (Chen et al., ICML 2020), and CO2 (Wei et al., ICLR 2021) on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastive_ops import NTXentLoss

from ..networks import Head
from ..parsing import LossWeight, Temperature
from .method import Batch, Method


class SimCLR(Method):
    """Both views of every image against both views of all others in the batch.

    The contrast wants large batches: all processes' images are one batch. Gradients accumulated over several
    batches do not make them larger.

    Args:
        head: SimCLR's is "mlp_bn".
        temperature: τ of the contrast.
        consistency_temperature: τc of CO2's consistency term.
        consistency_weight: α of CO2's consistency term; 0 is SimCLR without CO2.
        **network: arguments of every method.
    """

    name = "simclr"

    def __init__(
        self,
        head: Head = "mlp_bn",
        temperature: Temperature = 0.1,
        consistency_temperature: Temperature = 0.05,
        consistency_weight: LossWeight = 0.0,
        **network: Any,
    ) -> None:
        super().__init__(head=head, **network)
        self.criterion = NTXentLoss(
            temperature=temperature,
            consistency_temperature=consistency_temperature,
            consistency_weight=consistency_weight,
            return_metrics=True,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        views, *_ = batch  # 2 × (B, 3, H, W)

        # Both views in one pass, as in SimCLR: batch statistics are those of 2 B images.
        rows = self.encoder(torch.cat(views)).unflatten(0, (2, -1))  # (2, B, D)
        loss, metrics = self.criterion(*rows)  # (), each metric (2 B,)

        self.report(loss, metrics)
        return loss
