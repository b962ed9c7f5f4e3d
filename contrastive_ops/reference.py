"""The operators in plain PyTorch: the specification that every other backend is held to.

Each function is its formula, a loss written over the whole matrix of similarities. It serves as the oracle
of the tests (in float64), as the eager peer of the benchmarks, and where no fused kernel can run.

Hats are L2-normalised rows.

Gradients are written out rather than left to autograd, because an operator's implementation runs below
autograd; the tests check them against it.
"""

from __future__ import annotations

import math

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

    With s_j = q̂·n_j and y_j = k̂·n_j over the K rows n_j of the queue, and s_+ = q̂·k̂:

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
    dtype = computed_in(query)
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


def nt_xent(
    views: Tensor,
    temperature: float,
    consistency_temperature: float,
    consistency_weight: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """L = L_ins + consistency_weight · L_con of both views of every instance, against all other instances.

    The M = 2 B rows z_i are both views' hats. Row i's positive is its other view p(i); its negatives are the
    M − 2 rows that remain, which are its positive's negatives too. With s_ij = z_i·z_j, over negatives j:

        L_ins = −s_ip(i)/τ + log(e^{s_ip(i)/τ} + Σ_j e^{s_ij/τ})                          (NT-Xent)
        L_con = ½ KL(P‖Q) + ½ KL(Q‖P),   Q_j ∝ e^{s_ij/τc},  P_j ∝ e^{s_p(i)j/τc}          (CO2)

    P is a pseudo-label: no gradient passes through it. A consistency term of weight 0 is returned as 0.

    Args:
        views: (2, B, D). Any floating dtype; computed in float64 if they are float64, otherwise in float32.

    Returns:
        loss (M,), instance loss (M,), consistency loss (M,), rank of the positive (M,) int64, and
        `statistics` (M, 5) float64, what backward needs to know of a row: m, the largest s_ij; c with
        ∂L_ins/∂s_ij = c e^{(s_ij − m)/τ}; q with consistency_weight · Q_j / (2 τc) = q e^{(s_ij − m)/τc}; the
        mean under Q of d_j = (s_ij − m) − (s_p(i)j − its m); and ∂L/∂s_ip(i). In a batch of one, m = s_ip(i).
    """
    batch = views.shape[1]
    similarity, unit, excluded, _ = _pair_similarities(views, normalize)
    positive = (unit * unit.roll(batch, 0)).sum(1)  # s_ip(i)
    negatives = similarity.masked_fill(excluded, -torch.inf)
    rank = (negatives > positive[:, None]).sum(1)

    # L_ins = log(1 + e^gap), in a form that keeps its digits when the positive dominates
    gap = torch.logsumexp(negatives / temperature, 1) - positive / temperature
    instance = torch.logaddexp(gap, torch.zeros_like(gap))
    largest = negatives.amax(1) if batch > 1 else positive
    has_negatives = float(batch > 1)
    of_instance = has_negatives * ((largest - positive) / temperature - instance).exp() / temperature

    consistency = of_consistency = mean = torch.zeros_like(positive)
    if consistency_weight and batch > 1:
        log_q = torch.log_softmax(negatives / consistency_temperature, 1)
        q, log_p = log_q.exp(), log_q.roll(batch, 0)
        consistency = 0.5 * ((q - log_p.exp()) * (log_q - log_p).masked_fill(excluded, 0)).sum(1)
        of_consistency = consistency_weight / (2 * consistency_temperature) * q.amax(1)
        mean = (q * _lead(similarity, largest).masked_fill(excluded, 0)).sum(1)

    loss = instance + consistency_weight * consistency
    fields = (largest, of_instance, of_consistency, mean, -torch.sigmoid(gap) / temperature)
    return loss, instance, consistency, rank, torch.stack(fields, 1).double()


def nt_xent_backward(
    grad_loss: Tensor,
    views: Tensor,
    statistics: Tensor,
    temperature: float,
    consistency_temperature: float,
    consistency_weight: float,
    normalize: bool,
) -> Tensor:
    """The gradient of Σ_i grad_loss_i L_i in the views (2, B, D), in their dtype: grad_loss (M,), and the
    `statistics` of `nt_xent`. Every row is also a negative of others, and pulled by their losses too."""
    batch = views.shape[1]
    similarity, unit, excluded, rows = _pair_similarities(views, normalize)
    fields = statistics.to(similarity.dtype)
    largest, of_instance, of_consistency, mean, of_positive = fields.split(1, 1)  # (M, 1) each

    grad = of_instance * ((similarity - largest) / temperature).exp()  # ∂L/∂s
    if consistency_weight:
        q = of_consistency * ((similarity - largest) / consistency_temperature).exp()
        lead = (_lead(similarity, largest.squeeze(1)) - mean) / consistency_temperature
        grad += q * (lead + 1) - q.roll(batch, 0)
    grad = grad.masked_fill(excluded, 0)
    index = torch.arange(len(grad), device=grad.device)
    grad[index, index.roll(batch)] = of_positive.squeeze(1)
    grad *= grad_loss[:, None]

    gradient = (grad + grad.T) @ unit
    if normalize:
        gradient = _unit_backward(gradient, rows, unit)
    return gradient.view_as(views).to(views.dtype)


def conic(
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    compensation: float,
    consistency_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ConIC of every instance: L = Σ_v ℓ_s(x^v) + α ℓ_c, with α = consistency_weight.

    With s_j = ŵ_j·x̂ over the A rows w_j of the classifier, of which n is the view's own:

        ℓ_s(x) = −s_n/τ + log(e^{s_n/τ} + β Σ_{j≠n} e^{s_j/τ}),   β = compensation
        ℓ_c    = Σ_{i≠j} (1 − x̂^i·x̂^j)²                             over ordered pairs of an instance's views

    Args:
        views: (V, B, D). weight: (A, D). target: (B,) int64, the row of `weight` that each instance owns. Any
            floating dtype; computed in float64 if the views are float64, otherwise in float32.

    On a GPU, where nobody looks at the values of `target` first, an instance that owns no row has a loss and
    gradients of NaN.

    Returns:
        loss (B,), classification loss (V, B), consistency loss (B,), rank of the view's own row (V, B) int64,
        and `statistics` (V, B, 3) float64, what backward needs to know of a view: m, the largest of its s_j,
        c with ∂ℓ_s/∂s_j = c e^{(s_j − m)/τ}, and ∂ℓ_s/∂s_n.
    """
    shape = views.shape[:2]
    similarity, unit_views, unit_weight, own = _conic_similarities(views, weight, target)
    positive = (unit_views.flatten(0, 1) * unit_weight[own]).sum(1)  # s_n
    negatives = similarity.scatter(1, own[:, None], -torch.inf)
    rank = (negatives > positive[:, None]).sum(1)

    # ℓ_s = log(1 + e^gap), in a form that keeps its digits when the positive dominates
    gap = torch.logsumexp(negatives / temperature, 1) + math.log(compensation) - positive / temperature
    classification = torch.logaddexp(gap, torch.zeros_like(gap)).view(shape)
    consistency = _disagreement(unit_views).square().sum((0, 1))
    loss = classification.sum(0) + consistency_weight * consistency

    largest = negatives.amax(1)
    largest = torch.where(largest == -torch.inf, positive, largest)  # the only row has no negatives
    logit = (largest - positive) / temperature + math.log(compensation)
    has_negatives = weight.shape[0] > 1
    negative = has_negatives * (logit - classification.flatten()).exp() / temperature
    statistics = torch.stack([largest, negative, -torch.sigmoid(gap) / temperature], 1)
    return loss, classification, consistency, rank.view(shape), statistics.double().view(*shape, 3)


def conic_backward(
    grad_loss: Tensor,
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    statistics: Tensor,
    temperature: float,
    consistency_weight: float,
    views_need_grad: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of Σ_b grad_loss_b L_b in the views (V, B, D) and in the weight (A, D), in their dtypes;
    one that is not needed has no rows. `statistics` are those of `conic`."""
    similarity, unit_views, unit_weight, own = _conic_similarities(views, weight, target)
    largest, negative, positive = statistics.flatten(0, 1).to(similarity.dtype).split(1, 1)  # (V·B, 1) each
    grad = negative * ((similarity - largest) / temperature).exp()  # ∂ℓ_s/∂s
    grad.scatter_(1, own[:, None], positive)
    grad *= grad_loss.repeat(len(views))[:, None]

    grad_views, grad_weight = views.new_empty((0, *views.shape[1:])), weight.new_empty((0, weight.shape[1]))
    if views_need_grad:
        of_consistency = torch.einsum("ijb,jbd->ibd", -4 * _disagreement(unit_views), unit_views)
        of_consistency *= consistency_weight * grad_loss[:, None]
        of_unit = grad @ unit_weight + of_consistency.flatten(0, 1)
        flat_views = views.flatten(0, 1).to(grad.dtype)
        grad_views = _unit_backward(of_unit, flat_views, unit_views.flatten(0, 1)).view_as(views)
    if weight_needs_grad:
        of_unit = grad.T @ unit_views.flatten(0, 1)
        grad_weight = _unit_backward(of_unit, weight.to(grad.dtype), unit_weight)
    return grad_views.to(views.dtype), grad_weight.to(weight.dtype)


def conic_backward_sgd_(
    grad_loss: Tensor,
    views: Tensor,
    weight: Tensor,
    momentum_buffer: Tensor,
    target: Tensor,
    statistics: Tensor,
    temperature: float,
    consistency_weight: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> Tensor:
    """`conic_backward`, then `sgd_` with the weight's gradient; returns that of the views (V, B, D)."""
    settings = (temperature, consistency_weight)
    grad_views, grad_weight = conic_backward(
        grad_loss, views, weight, target, statistics, *settings, True, True
    )
    sgd_(weight, momentum_buffer, grad_weight, lr, momentum, weight_decay, nesterov)
    return grad_views


def sgd_(
    weight: Tensor,
    momentum_buffer: Tensor,
    grad: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """One step of SGD in place, in the convention of torch.optim.SGD: g = grad + λ w, then

    v ← m v + g        w ← w − η v,  or with `nesterov`  w ← w − η (g + m v)
    """
    grad = grad + weight_decay * weight
    momentum_buffer.mul_(momentum).add_(grad)
    weight.sub_(lr * (grad + momentum * momentum_buffer if nesterov else momentum_buffer))


def exchange_rows_(
    weight: Tensor,
    momentum_buffer: Tensor,
    slots: Tensor,
    incoming: Tensor,
    incoming_rows: Tensor,
    coefficients: Tensor,
    outgoing: Tensor,
    outgoing_rows: Tensor,
) -> None:
    """Writes out the rows in `slots`, then fills these slots with others, caught up.

    A record is [w; v]: outgoing[outgoing_rows[i]] ← that of slot i, slot i ← C_i incoming[incoming_rows[i]].

    Args:
        weight, momentum_buffer: (A, D). incoming, outgoing: (·, 2, D) of the same dtype; they may be the same
            tensor where no row of it both comes and goes. slots, incoming_rows, outgoing_rows: (n,) int64;
            no slot and no outgoing row twice. coefficients: (n, 2, 2) float64, the C_i; computed in float64.

    On a GPU, where nobody looks at the rows' numbers first, a row outside is read as NaN and not written; of
    two that are written to one place, or of one that comes and goes, either may be the first.
    """
    # The records may be in the host's memory while the slots are on a GPU.
    arriving = incoming[incoming_rows.to(incoming.device)].to(weight.device)
    arriving = (coefficients @ arriving.double()).to(weight.dtype)
    leaving = torch.stack([weight[slots], momentum_buffer[slots]], 1)
    outgoing[outgoing_rows.to(outgoing.device)] = leaving.to(outgoing.device)
    weights, buffers = arriving.unbind(1)
    momentum_buffer[slots] = buffers
    weight[slots] = weights


def _pair_similarities(views: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s (M, M), z (M, D), which pairs are no negatives of each other (M, M), and the rows z was made of."""
    batch = views.shape[1]
    rows = views.flatten(0, 1).to(computed_in(views))
    unit = _unit(rows) if normalize else rows
    excluded = torch.eye(batch, dtype=torch.bool, device=views.device).repeat(2, 2)
    return unit @ unit.T, unit, excluded, rows


def _lead(similarity: Tensor, largest: Tensor) -> Tensor:
    """d of `nt_xent`, every row's similarities beyond those of its positive, (M, M)."""
    relative = similarity - largest[:, None]
    return relative - relative.roll(len(similarity) // 2, 0)


def _conic_similarities(
    views: Tensor, weight: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s (V·B, A), x̂ (V, B, D), ŵ (A, D), and the row of `weight` that each view owns (V·B,)."""
    dtype = computed_in(views)
    unit_weight, unit_views = _unit(weight.to(dtype)), _unit(views.flatten(0, 1).to(dtype))
    return unit_views @ unit_weight.T, unit_views.view(views.shape), unit_weight, target.repeat(len(views))


def _disagreement(unit_views: Tensor) -> Tensor:
    """1 − x̂^i·x̂^j of each instance's pairs of views, 0 where i = j: (V, V, B)."""
    disagreement = 1 - torch.einsum("ibd,jbd->ijb", unit_views, unit_views)
    disagreement.diagonal().zero_()
    return disagreement


def computed_in(x: Tensor) -> torch.dtype:
    """What a loss of these queries or views is computed in, and comes in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
