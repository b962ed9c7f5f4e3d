"""InstDisc (Wu et al., CVPR 2018): every image is a class, and its weight an average of past features."""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor

from contrastive_ops import ConICLoss, ConICMetrics, MemoryBank

from ..distributed import gather
from ..networks import Head
from ..parsing import Temperature
from .method import Batch, Method


class InstDisc(Method):
    """Instance discrimination: a view is classified as its image, by a memory of all images' past features.

    The softmax is over all N images, which the fused loss affords; the paper estimates it from 4096 of them,
    by noise contrast with a proximal term.

    Args:
        head: InstDisc's is "linear".
        temperature: τ of the softmax.
        bank_momentum: μ in w ← normalise(μ w + (1 − μ) x̂), of an image's row and its newest feature.
        views: how many of an image's two views are classified: 1 as in the paper, 2 as ConIC compares with.
        **network: arguments of every method.
    """

    name = "instdisc"
    shares_loss = False  # every process has the whole memory bank
    metrics = ConICMetrics

    def __init__(
        self,
        head: Head = "linear",
        temperature: Temperature = 0.07,
        bank_momentum: ClosedUnitInterval = 0.5,
        views: PositiveInt = 1,
        **network: Any,
    ) -> None:
        super().__init__(head=head, **network)
        self.views_at_once = min(views, 2)
        self.bank: MemoryBank | None = None  # as soon as the number of images is known
        self.criterion = ConICLoss(temperature=temperature, consistency_weight=0.0, return_metrics=True)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.bank is None:
            self._make_bank(self.trainer.datamodule.num_instances)

    def _make_bank(self, num_instances: int) -> None:
        settings = self.hparams
        self.bank = MemoryBank(num_instances, settings.dim, settings.bank_momentum, settings.seed)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.bank is None:  # loaded without a trainer, so without the images
            self._make_bank(len(checkpoint["state_dict"]["bank.rows"]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        views, _, instances = batch  # 2 × (B, 3, H, W), labels, (B,)
        views = views[: self.hparams.views]

        features = self.encoder(torch.cat(views)).unflatten(0, (len(views), -1))  # (V, B, D)

        loss, metrics = self.criterion(features, self.bank.rows, instances)  # (), metrics (V, B) or (B,)
        # Backward looks at the rows once more, so they are updated after it.
        self.seen = instances, features.detach()

        self.report(loss, metrics)
        return loss

    def on_after_backward(self) -> None:
        instances, features = self.seen
        features = gather(features.transpose(0, 1)).transpose(0, 1)  # (V, P·B, D)
        self.bank.update(gather(instances), features)
