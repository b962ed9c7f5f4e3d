"""CO2, InfoNCE, NT-Xent and ConIC as users write them: the code the fused losses replace.

Every step is the torch function one reaches for first, so this is the peer of the benchmarks and, in float64,
an oracle of the tests that shares nothing with the package.
"""

from __future__ import annotations

import math

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


def eager_nt_xent(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: float = 0.5,
    consistency_weight: float = 0.0,
    consistency_temperature: float = 0.05,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """`contrastive_ops.nt_xent_loss` in eager PyTorch, computed in the dtype of its input."""
    batch = len(view1)
    rows = torch.cat([view1, view2])
    if normalize:
        rows = F.normalize(rows, dim=1)
    similarity = rows @ rows.T  # (2 B, 2 B)
    own = torch.eye(2 * batch, dtype=torch.bool, device=rows.device)
    labels = torch.arange(2 * batch, device=rows.device).roll(batch)
    logits = similarity.masked_fill(own, -torch.inf) / temperature
    loss = F.cross_entropy(logits, labels, reduction="none")
    if consistency_weight and batch > 1:
        negatives = similarity[~own.roll(batch, 0) & ~own].view(2 * batch, 2 * batch - 2)
        log_q = F.log_softmax(negatives / consistency_temperature, dim=1)
        log_p = log_q.detach().roll(batch, 0)  # both views of an instance have the same negatives
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        divergence = divergence + F.kl_div(log_p, log_q, reduction="none", log_target=True)
        loss = loss + consistency_weight * 0.5 * divergence.sum(dim=1)
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()


def eager_conic(
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    num_instances: int | None = None,
    temperature: float = 0.1,
    consistency_weight: float = 2.5,
    reduction: str = "mean",
) -> Tensor:
    """`contrastive_ops.conic_loss` in eager PyTorch, computed in the dtype of its input."""
    views, weight = F.normalize(views, dim=2), F.normalize(weight, dim=1)
    logits = views.flatten(0, 1) @ weight.T / temperature
    own = target.repeat(len(views))
    if num_instances is not None and len(weight) > 1:
        # β multiplies the negatives: log β is added to every logit but the view's own
        log_compensation = math.log((num_instances - 1) / (len(weight) - 1))
        positive = logits.gather(1, own[:, None])
        logits = (logits + log_compensation).scatter(1, own[:, None], positive)
    classification = F.cross_entropy(logits, own, reduction="none").view(views.shape[:2]).sum(0)

    consistency = torch.zeros_like(classification)
    for i in range(len(views)):
        for j in range(len(views)):
            if i != j:
                consistency = consistency + (1 - (views[i] * views[j]).sum(1)) ** 2
    loss = classification + consistency_weight * consistency
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()
