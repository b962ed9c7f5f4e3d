"""MoCo (He et al., CVPR 2020), MoCo v2 (Chen et al., 2020) and CO2 (Wei et al., ICLR 2021) on either."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from contrastive_ops import KeyQueue, co2_loss

from .errors import UsageError
from .networks import FEATURES, Architecture, Head, Stem, projection_head, resnet
from .runs import log_values


class MoCo(LightningModule):
    """Momentum contrast: queries against keys from a slowly moving encoder and a queue of earlier keys.

    MoCo v1 has a linear head, temperature 0.07 and steps in the learning rate; v2 an MLP head, temperature
    0.2 and a cosine. CO2 adds its consistency term: weight 10 at temperature 0.04 for v1, 0.3 at 0.05 for v2.
    The defaults are those of MoCo v2 + CO2. The views differ too: see the data's ``augmentation``.

    Args:
        arch: the encoders' network.
        stem: how the network starts: "small" suits images of 64 pixels and fewer.
        head: projection from features to queries and keys: "linear" (v1) or "mlp" (v2).
        dim: dimension D of queries and keys.
        queue_size: number K of negative keys.
        momentum: m in key encoder ← m · key encoder + (1 − m) · query encoder.
        temperature: τ of the contrast.
        consistency_temperature: τc of CO2's consistency term.
        consistency_weight: α of CO2's consistency term; 0 is MoCo without CO2.
        learning_rate: of SGD with momentum 0.9, at its start; 0.03 suits a batch of 256.
        weight_decay: of SGD.
        schedule: of the learning rate, over all steps: "cosine" down to 0 (v2), or "step": a tenth after 60 %
            and a hundredth after 80 % of them (v1).
    """

    def __init__(
        self,
        arch: Architecture = "resnet50",
        stem: Stem = "imagenet",
        head: Head = "mlp",
        dim: PositiveInt = 128,
        queue_size: PositiveInt = 65536,
        momentum: ClosedUnitInterval = 0.999,
        temperature: PositiveFloat = 0.2,
        consistency_temperature: PositiveFloat = 0.05,
        consistency_weight: NonNegativeFloat = 0.3,
        learning_rate: PositiveFloat = 0.03,
        weight_decay: NonNegativeFloat = 1e-4,
        schedule: Literal["cosine", "step"] = "cosine",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        backbone = resnet(arch, stem)
        self.query_encoder = nn.Sequential(backbone, projection_head(head, FEATURES[arch], dim))
        # On CPUs as on GPUs in mixed precision, convolutions are fastest in this order.
        self.query_encoder.to(memory_format=torch.channels_last)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.queue = KeyQueue(queue_size, dim)

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            raise UsageError(f"MoCo trains in one process so far, not in {self.trainer.world_size}")

    @property
    def backbone(self) -> nn.Module:
        """The query encoder without its head: what the training is for, (B, 3, H, W) to (B, features)."""
        return self.query_encoder[0]

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """θ_k ← m θ_k + (1 − m) θ_q. Batch statistics are not averaged: the key encoder keeps its own."""
        for key, query in zip(self.key_encoder.parameters(), self.query_encoder.parameters(), strict=True):
            key.lerp_(query, 1 - self.hparams.momentum)

    def training_step(self, batch: tuple[list[Tensor], Tensor, Tensor], batch_idx: int) -> Tensor:
        (query_view, key_view), *_ = batch  # 2 × (B, 3, H, W), and what only others look at

        query = self.query_encoder(query_view)  # (B, D)
        with torch.no_grad():
            self.update_key_encoder()
            # For one process. With several, MoCo shuffles the keys' views across them here, so that batch
            # statistics betray no positives, and gathers all keys for the queue: both are still to come.
            key = self.key_encoder(key_view)  # (B, D)

        loss, metrics = co2_loss(
            query,
            key,
            self.queue.keys,  # (K, D)
            temperature=self.hparams.temperature,
            consistency_temperature=self.hparams.consistency_temperature,
            consistency_weight=self.hparams.consistency_weight,
            return_metrics=True,
        )  # (), each metric (B,)
        self.queue.enqueue(F.normalize(key.to(self.queue.keys.dtype), dim=1))

        log_values(
            self,
            loss=loss.detach(),
            instance_loss=metrics.instance_loss.mean(),
            consistency_loss=metrics.consistency_loss.mean(),
            # The contrast as a classification: is the positive among the most similar of the K + 1 keys?
            top1=(metrics.positive_rank < 1).float().mean(),
            top5=(metrics.positive_rank < 5).float().mean(),
        )
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(
            self.query_encoder.parameters(),
            lr=self.hparams.learning_rate,
            momentum=0.9,
            weight_decay=self.hparams.weight_decay,
        )
        # MoCo's code changes the rate once an epoch; once a step is the same curve, and serves runs that are
        # shorter than an epoch.
        steps = int(self.trainer.estimated_stepping_batches)
        if self.hparams.schedule == "cosine":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        else:
            milestones = [round(0.6 * steps), round(0.8 * steps)]
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
