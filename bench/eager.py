"""CO2 and InfoNCE as users write them: the code the fused losses replace.

Every step is the torch function one reaches for first, so this is the peer of the benchmarks and, in float64,
an oracle of the tests that shares nothing with the package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_co2(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float = 0.2,
    consistency_temperature: float = 0.05,
    instance_weight: float = 1.0,
    consistency_weight: float = 0.3,
    include_positive: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """`contrastive_ops.co2_loss` in eager PyTorch, computed in the dtype of its input."""
    if normalize:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    positive = (query * key).sum(dim=1, keepdim=True)  # (B, 1)
    negatives = query @ queue.T  # (B, K)
    loss = query.new_zeros(len(query))
    if instance_weight:
        logits = torch.cat([positive, negatives], dim=1) / temperature
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = loss + instance_weight * F.cross_entropy(logits, labels, reduction="none")
    if consistency_weight:
        key_negatives = key @ queue.T
        if include_positive:
            negatives = torch.cat([positive, negatives], dim=1)
            key_negatives = torch.cat([positive, key_negatives], dim=1)
        log_q = F.log_softmax(negatives / consistency_temperature, dim=1)
        log_p = F.log_softmax(key_negatives / consistency_temperature, dim=1).detach()
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        divergence = divergence + F.kl_div(log_p, log_q, reduction="none", log_target=True)
        loss = loss + consistency_weight * 0.5 * divergence.sum(dim=1)
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()
