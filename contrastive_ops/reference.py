"""The losses in plain PyTorch: the specification that every other backend is held to.

Each function is its formula, written over the whole B×K matrix of similarities. It serves as the oracle of
the tests (in float64), as the eager peer of the benchmarks, and where no fused kernel can run.

Notation: hats are L2-normalised rows, n_j the K rows of the queue, and

    s_j = q̂·n_j     y_j = k̂·n_j     s_+ = q̂·k̂

Gradients are written out rather than left to autograd, because an operator's implementation runs below
autograd; the tests check them against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM_EPSILON = 1e-12  # a row shorter than this is divided by this, as in torch.nn.functional.normalize


def co2(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    consistency_temperature: float,
    instance_weight: float,
    consistency_weight: float,
    include_positive: bool,
    normalize: bool,
    compute_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """L = instance_weight · L_ins + consistency_weight · L_con of every row, with its gradient.

        L_ins = −s_+/τ + log(e^{s_+/τ} + Σ_j e^{s_j/τ})                                    (InfoNCE)
        L_con = ½ KL(P‖Q) + ½ KL(Q‖P),   Q = softmax(s/τc),  P = softmax(y/τc)             (CO2)

    P is a pseudo-label: no gradient passes through it. `include_positive` prepends s_+ to both lists of
    the consistency term. A term of weight 0 is not computed, and its loss is returned as 0.

    Args:
        query, key: (B, D). queue: (K, D). Any floating dtype; computed in float64 if the query is float64,
            otherwise in float32.

    Returns:
        loss (B,), instance loss (B,), consistency loss (B,), rank of the positive (B,) int64, and
        d loss / d query (B, D), which has no rows when `compute_gradient` is false.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key, queue = query.to(dtype), key.to(dtype), queue.to(dtype)
    unit_query, unit_key = (_unit(query), _unit(key)) if normalize else (query, key)

    similarity = unit_query @ queue.T  # s: (B, K)
    positive = (unit_query * unit_key).sum(1, keepdim=True)  # s_+: (B, 1)
    rank = (similarity > positive).sum(1)

    instance = consistency = query.new_zeros(len(query))
    # d loss / d s and d loss / d s_+, gathered from both terms
    grad_similarity, grad_positive = torch.zeros_like(similarity), torch.zeros_like(positive)

    if instance_weight:
        logits, positive_logit = similarity / temperature, positive / temperature
        # L_ins = log(1 + e^gap), in a form that keeps its digits when the positive dominates
        gap = torch.logsumexp(logits, 1, keepdim=True) - positive_logit
        instance = torch.logaddexp(gap, torch.zeros_like(gap)).squeeze(1)
        scale = instance_weight / temperature
        grad_similarity += scale * (logits - positive_logit - instance.unsqueeze(1)).exp()  # p_j/τ
        grad_positive -= scale * torch.sigmoid(gap)  # (p_+ − 1)/τ

    if consistency_weight:
        key_similarity = unit_key @ queue.T  # y: (B, K)
        prefix = [positive] if include_positive else []
        log_q = torch.log_softmax(torch.cat([*prefix, similarity], 1) / consistency_temperature, dim=1)
        log_p = torch.log_softmax(torch.cat([*prefix, key_similarity], 1) / consistency_temperature, dim=1)
        q, p, difference = log_q.exp(), log_p.exp(), log_q - log_p
        consistency = 0.5 * ((q - p) * difference).sum(1)  # ½ KL(Q‖P) + ½ KL(P‖Q)
        # ∂L_con/∂(s_j/τc) = ½ [Q_j (d_j − E_Q[d] + 1) − P_j] with d = log Q − log P. Without E_Q[d] the
        # bracket adds up to E_Q[d]; subtracting its own sum keeps the gradient free of a common error.
        grad = q * (difference + 1) - p
        grad = consistency_weight / (2 * consistency_temperature) * (grad - q * grad.sum(1, keepdim=True))
        if include_positive:
            grad_positive += grad[:, :1]
        grad_similarity += grad[:, len(prefix) :]

    loss = instance_weight * instance + consistency_weight * consistency
    if not compute_gradient:
        return loss, instance, consistency, rank, query.new_empty((0, query.shape[1]))
    gradient = grad_similarity @ queue + grad_positive * unit_key
    if normalize:
        gradient = _unit_backward(gradient, query, unit_query)
    return loss, instance, consistency, rank, gradient


def _norm(x: Tensor) -> Tensor:
    """‖x‖₂ of each row: (B, 1). Squares are taken after a division by a power of two, which rounds nothing,
    so that they neither overflow nor vanish."""
    scale = torch.exp2(torch.frexp(x.abs().amax(1, keepdim=True)).exponent - 1).to(x.dtype)
    return scale * torch.linalg.vector_norm(x / scale, dim=1, keepdim=True)


def _unit(x: Tensor) -> Tensor:
    """x̂ = x / max(‖x‖₂, 1e-12), row by row."""
    return x / _norm(x).clamp_min(NORM_EPSILON)


def _unit_backward(grad: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    """dx = (dx̂ − x̂ (x̂·dx̂)) / ‖x‖; a row below the epsilon was only scaled, so it has no projection."""
    norm = _norm(x)
    radial = torch.where(norm < NORM_EPSILON, 0, (unit * grad).sum(1, keepdim=True))
    return (grad - unit * radial) / norm.clamp_min(NORM_EPSILON)
