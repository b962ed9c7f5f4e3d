"""MoCo (He et al., CVPR 2020), MoCo v2 (Chen et al., 2020) and CO2 (Wei et al., ICLR 2021) on either."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor

from contrastive_ops import CO2Loss, KeyQueue

from ..distributed import gather, group, own_rows
from ..networks import has_batch_norm, normalize_in_groups
from ..parsing import LossWeight, Temperature
from ..sending import sent
from .method import Batch, Method


class MoCo(Method):
    """Momentum contrast: queries against keys from a slowly moving encoder and a queue of earlier keys.

    MoCo v1 has a linear head, temperature 0.07 and steps in the learning rate; v2 an MLP head, temperature
    0.2 and a cosine. CO2 adds its consistency term: weight 10 at temperature 0.04 for v1, 0.3 at 0.05 for v2.
    The defaults are those of MoCo v2 + CO2; 0.03 is the learning rate for batches of 256. The views differ
    too: see the data's ``augmentation``.

    Args:
        queue_size: number K of negative keys.
        momentum: m in key encoder ← m · key encoder + (1 − m) · query encoder.
        momentum_schedule: "constant", or "cosine": from m at the first step up to 1 at the last, as in BYOL
            and MoCo v3.
        temperature: τ of the contrast.
        consistency_temperature: τc of CO2's consistency term.
        consistency_weight: α of CO2's consistency term; 0 is MoCo without CO2.
        **network: arguments of every method.
    """

    name = "moco"
    views_at_once = 1

    def __init__(
        self,
        queue_size: PositiveInt = 65536,
        momentum: ClosedUnitInterval = 0.999,
        momentum_schedule: Literal["constant", "cosine"] = "constant",
        temperature: Temperature = 0.2,
        consistency_temperature: Temperature = 0.05,
        consistency_weight: LossWeight = 0.3,
        **network: Any,
    ) -> None:
        super().__init__(**network)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.shuffles_keys = self.hparams.norm_groups > 1 and has_batch_norm(self.encoder)
        self.queue = KeyQueue(queue_size, self.hparams.dim)
        self.criterion = CO2Loss(
            temperature=temperature,
            consistency_temperature=consistency_temperature,
            consistency_weight=consistency_weight,
            return_metrics=True,
        )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        normalize_in_groups(self.key_encoder, self.hparams.norm_groups)
        if group() is not None and self.queue.group is None:
            # Each process keeps its rows of the queue that one would begin with.
            with torch.random.fork_rng(devices=[]):
                shared = KeyQueue(self.hparams.queue_size, self.hparams.dim, group=group())
            shared.load_state_dict(self.queue.state_dict())
            self.queue = shared.to(self.queue.keys)
        # What queries are multiplied in under mixed precision: so the queue is not rounded at every step.
        if dtype := {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.trainer.precision):
            self.queue.to(dtype)

    def momentum(self) -> float:
        """m of this step."""
        start = self.hparams.momentum
        if self.hparams.momentum_schedule == "constant":
            return start
        part = min(1.0, self.trainer.global_step / self.trainer.estimated_stepping_batches)
        return 1 - (1 - start) * (1 + math.cos(math.pi * part)) / 2

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """θ_k ← m θ_k + (1 − m) θ_q. Batch statistics are not averaged: the key encoder keeps its own."""
        momentum = self.momentum()
        for key, query in zip(self.key_encoder.parameters(), self.encoder.parameters(), strict=True):
            key.lerp_(query, 1 - momentum)

    @torch.no_grad()
    def encode_keys(self, views: Tensor, batch_idx: int) -> Tensor:
        """The keys (B, D) of this process's views (B, 3, H, W).

        Where batch statistics are those of parts of a batch, a query and its key must not share theirs: they
        would tell the positive. So keys' views are dealt out at random to the parts of all processes, and
        their keys brought back into order: MoCo's shuffling batch norm.
        """
        if not self.shuffles_keys:
            return self.key_encoder(views)
        views = gather(views)  # (P·B, 3, H, W)
        step = (self.hparams.seed, self.trainer.current_epoch, batch_idx)
        (order,) = sent([np.random.default_rng(step).permutation(len(views))], views.device)
        return own_rows(gather(self.key_encoder(own_rows(views[order])))[order.argsort()])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        (query_view, key_view), *_ = batch  # (B, 3, H, W) each

        query = self.encoder(query_view)  # (B, D)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.update_key_encoder()
        keys = self.encode_keys(key_view, batch_idx)  # (B, D)

        loss, metrics = self.criterion(query, keys, self.queue.keys)  # (), each metric (B,)
        # In half precision a norm would be off by more than the queue's own rounding.
        self.queue.enqueue(F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=1))

        self.report(loss, metrics)
        return loss
