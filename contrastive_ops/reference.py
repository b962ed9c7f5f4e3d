"""The operators in plain PyTorch: the specification that every other backend is held to.

A loss is its formula in three steps, written over the whole matrix of similarities to some of the keys: the
statistics of the rows over these keys, their merge into losses, and the gradient (`_contract.py`). They serve
as the oracle of the tests (in float64), and where no fused kernel can run.

Products are in float64 if the rows are, otherwise in float32; what follows them is in float64. Hats are
L2-normalised rows. Gradients are written out rather than left to autograd, because an operator's
implementation runs below autograd; the tests check them against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._contract import (
    CO2Partial,
    CO2Row,
    CO2Settings,
    ConICCoefficients,
    ConICPartial,
    ConICPositives,
    ConICSettings,
    Losses,
    NTXentCoefficients,
    NTXentKeys,
    NTXentPartial,
    NTXentSettings,
    SGDSettings,
    computed_in,
)

NORM_EPSILON = 1e-12  # a row shorter than this is divided by this, as in torch.nn.functional.normalize
LOWEST = -1e38  # the maximum of no similarities: below all, yet a difference of two is no NaN

PREFERRED_ON = ()  # it serves where nothing else can


def unavailable() -> str | None:
    """Why this backend cannot serve on this machine: it always can."""
    return None


def refuses(operator: str, rows: Tensor) -> str | None:
    """Why this backend does not serve a call of these rows: it serves all."""
    return None


def co2(
    query: Tensor, key: Tensor, queue: Tensor, settings: CO2Settings, compute_gradient: bool
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
    partial, rows = co2_statistics(query, key, queue, settings)
    *losses, rank, rows = co2_merge(partial, rows, settings)
    gradient = query.new_empty((0, query.shape[1]), dtype=computed_in(query))
    if compute_gradient:
        gradient = co2_gradient(query, key, queue, rows, settings)
    loss, instance, consistency = (each.to(computed_in(query)) for each in losses)
    return loss, instance, consistency, rank, gradient


def co2_statistics(query: Tensor, key: Tensor, queue: Tensor, settings: CO2Settings) -> tuple[Tensor, Tensor]:
    """The `CO2Partial` (1, B, 8) of a part of the queue, and as much of each `CO2Row` (B, 11) as is known."""
    tau, tau_c = settings.temperature, settings.consistency_temperature
    unit_query, norm_query = _rows(query, settings.normalize)
    unit_key, norm_key = _rows(key.to(unit_query.dtype), settings.normalize)
    s, y = _similarities(unit_query, queue), _similarities(unit_key, queue)
    rank = (s > (unit_query * unit_key).sum(1, keepdim=True)).sum(1)
    max_s, max_y = s.amax(1, keepdim=True), y.amax(1, keepdim=True)
    a, b = s - max_s, y - max_y
    d, e_query, e_key = a - b, (a / tau_c).exp(), (b / tau_c).exp()
    partial = CO2Partial(
        max_s.squeeze(1), max_y.squeeze(1), (a / tau).exp().sum(1), e_query.sum(1), e_key.sum(1),
        (d * e_query).sum(1), (d * e_key).sum(1), rank.double(),
    )  # fmt: skip
    positive = (unit_query.double() * unit_key.double()).sum(1)
    unknown = torch.full_like(positive, torch.nan)
    known = (norm_query.squeeze(1).double(), norm_key.squeeze(1).double(), positive)
    rows = CO2Row(*known, *[unknown] * (len(CO2Row._fields) - len(known)))
    return torch.stack(partial, -1)[None], torch.stack(rows, -1)


def co2_merge(partial: Tensor, rows: Tensor, settings: CO2Settings) -> Losses:
    """The losses of all parts of the queue (parts, B, 8), and each row's complete `CO2Row` (B, 11)."""
    tau, tau_c = settings.temperature, settings.consistency_temperature
    row, parts = CO2Row(*rows.double().unbind(-1)), CO2Partial(*partial.double().unbind(-1))
    positive = row.positive
    max_s, max_y = parts.max_s.amax(0), parts.max_y.amax(0)
    moved_s, moved_y = parts.max_s - max_s, parts.max_y - max_y
    shift = moved_s - moved_y  # of every d of a part
    from_s, from_y = (moved_s / tau_c).exp(), (moved_y / tau_c).exp()
    zero = positive.new_zeros(len(positive))
    instance, consistency = zero.clone(), zero.clone()
    grad_positive = mean = weight_instance = weight_query = weight_key = zero

    if settings.instance_weight:
        z_instance = (parts.z_instance * (moved_s / tau).exp()).sum(0)
        instance, weight_instance, grad_positive = _contrast(z_instance, max_s, positive, tau)
        weight_instance = settings.instance_weight * weight_instance
        grad_positive = settings.instance_weight * grad_positive

    if settings.consistency_weight:
        z_query, z_key = (parts.z_query * from_s).sum(0), (parts.z_key * from_y).sum(0)
        d_query = ((parts.d_query + shift * parts.z_query) * from_s).sum(0)
        d_key = ((parts.d_key + shift * parts.z_key) * from_y).sum(0)
        scale_query = scale_key = zero + 1
        e_query = e_key = zero
        d_positive = max_y - max_s  # (s_+ − m) − (s_+ − m')
        if settings.include_positive:  # s_+ joins both lists, where it may be the largest entry
            top_query, top_key = torch.maximum(max_s, positive), torch.maximum(max_y, positive)
            scale_query, scale_key = ((max_s - top_query) / tau_c).exp(), ((max_y - top_key) / tau_c).exp()
            e_query, e_key = ((positive - top_query) / tau_c).exp(), ((positive - top_key) / tau_c).exp()
            z_query, z_key = z_query * scale_query + e_query, z_key * scale_key + e_key
            d_query = d_query * scale_query + d_positive * e_query
            d_key = d_key * scale_key + d_positive * e_key
        mean, mean_of_key = d_query / z_query, d_key / z_key  # E_Q[d], E_P[d]
        # ½ KL(P‖Q) + ½ KL(Q‖P): as log Q − log P is d/τc and a constant, which the two cancel.
        consistency = 0.5 * (-mean_of_key / tau_c) + 0.5 * (mean / tau_c)
        weight = settings.consistency_weight / (2 * tau_c)
        weight_query, weight_key = weight * scale_query / z_query, weight * scale_key / z_key
        pull = e_query / z_query * ((d_positive - mean) / tau_c + 1) - e_key / z_key
        grad_positive = grad_positive + weight * pull

    loss = settings.instance_weight * instance + settings.consistency_weight * consistency
    complete = CO2Row(
        row.norm_query, row.norm_key, positive, max_s, max_y, mean,
        weight_instance, weight_query, weight_key, zero + 1, grad_positive,
    )  # fmt: skip
    return Losses(loss, instance, consistency, parts.rank.sum(0).long(), torch.stack(complete, -1))


def co2_gradient(query: Tensor, key: Tensor, queue: Tensor, rows: Tensor, settings: CO2Settings) -> Tensor:
    """d loss / d query (B, D), as far as it comes from a part of the queue, and from the positive."""
    unit_query, norm = _rows(query, settings.normalize)
    unit_key, _ = _rows(key.to(unit_query.dtype), settings.normalize)
    row = CO2Row(*rows[:, None].unbind(-1))  # (B, 1) each
    a = _similarities(unit_query, queue) - row.max_s
    grad = torch.zeros_like(a)  # ∂L/∂s
    if settings.instance_weight:
        grad += row.instance * (a / settings.temperature).exp()
    if settings.consistency_weight:
        # ∂L_con/∂(s_j/τc) = ½ [Q_j (1 + (d_j − E_Q[d])/τc) − P_j]
        b, tau_c = _similarities(unit_key, queue) - row.max_y, settings.consistency_temperature
        q, p = row.query * (a / tau_c).exp(), row.key * (b / tau_c).exp()
        grad += q - p + q * ((a - b - row.mean) / tau_c)
    grad = grad.to(unit_query.dtype) @ queue.to(unit_query.dtype)
    grad = grad + row.grad_positive.to(grad.dtype) * unit_key
    return _unit_backward(grad, unit_query, norm) if settings.normalize else grad


def nt_xent(views: Tensor, settings: NTXentSettings) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
        `statistics` (M, 5) float64, the `NTXentCoefficients` of each row.
    """
    *losses, rank, coefficients = nt_xent_merge(*nt_xent_statistics(views, settings), settings)
    loss, instance, consistency = (each.to(computed_in(views)) for each in losses)
    return loss, instance, consistency, rank, coefficients


def nt_xent_statistics(
    views: Tensor, settings: NTXentSettings, keys: NTXentKeys | None = None
) -> tuple[Tensor, Tensor]:
    """The `NTXentPartial` (1, 2 B, 5) over some keys, by default the rows themselves, and s_ip(i) (2 B,)."""
    tau, tau_c, batch = settings.temperature, settings.consistency_temperature, views.shape[1]
    rows, _ = _rows(views.flatten(0, 1), settings.normalize)
    s, excluded, _ = _pair_similarities(rows, keys, settings)
    positive = (rows * rows.roll(batch, 0)).sum(1)
    s = s.masked_fill(excluded, LOWEST)
    rank = (s > positive[:, None]).sum(1)
    max_s = s.amax(1, keepdim=True)
    a = s - max_s
    d = a - a.roll(batch, 0)  # beyond the positive's

    def total(terms: Tensor) -> Tensor:
        return terms.masked_fill(excluded, 0).sum(1)

    e_query = (a / tau_c).exp()
    partial = NTXentPartial(
        max_s.squeeze(1), rank.double(), total((a / tau).exp()), total(e_query), total(d * e_query)
    )
    return torch.stack(partial, -1)[None], (rows.double() * rows.double().roll(batch, 0)).sum(1)


def nt_xent_merge(partial: Tensor, positive: Tensor, settings: NTXentSettings) -> Losses:
    """The losses over all parts of the keys (parts, 2 B, 5), and the rows' `NTXentCoefficients` (2 B, 5)."""
    tau, tau_c, batch = settings.temperature, settings.consistency_temperature, len(positive) // 2
    parts = NTXentPartial(*partial.double().unbind(-1))
    max_s = parts.max_s.amax(0)
    moved = parts.max_s - max_s
    z_instance = (parts.z_instance * (moved / tau).exp()).sum(0)
    instance, weight_instance, grad_positive = _contrast(z_instance, max_s, positive, tau)
    consistency = weight_query = mean = torch.zeros_like(positive)
    has_negatives = z_instance != 0  # a batch of one has none
    if settings.consistency_weight:
        from_s, shift = (moved / tau_c).exp(), moved - moved.roll(batch, 1)
        z_query = torch.where(has_negatives, (parts.z_query * from_s).sum(0), 1)
        mean = ((parts.d_query + shift * parts.z_query) * from_s).sum(0) / z_query  # E_Q[d]
        # ½ KL(P‖Q) + ½ KL(Q‖P) as in `co2_merge`; E_P[d] is −E_Q[d] of the positive, whose d is −d
        consistency = 0.5 * (mean.roll(batch, 0) / tau_c) + 0.5 * (mean / tau_c)
        weight_query = torch.where(has_negatives, settings.consistency_weight / (2 * tau_c) / z_query, 0)
    loss = instance + settings.consistency_weight * consistency
    coefficients = NTXentCoefficients(
        torch.where(has_negatives, max_s, positive), weight_instance, weight_query, mean, grad_positive
    )
    return Losses(loss, instance, consistency, parts.rank.sum(0).long(), torch.stack(coefficients, -1))


def nt_xent_gradient(
    grad_loss: Tensor,
    views: Tensor,
    coefficients: Tensor,
    settings: NTXentSettings,
    keys: NTXentKeys | None = None,
) -> Tensor:
    """The gradient of Σ_i grad_loss_i L_i in the views (2, B, D), in their dtype: grad_loss (M,), and the
    coefficients of `nt_xent`. Every row is also a negative of others, and pulled by their losses too. With
    `keys`, as far as it comes from these."""
    batch = views.shape[1]
    rows, norm = _rows(views.flatten(0, 1), settings.normalize)
    s, excluded, others = _pair_similarities(rows, keys, settings)
    grad = _pull(s, grad_loss, coefficients, settings)
    if keys is None:
        grad = grad + grad.T
    else:
        assert keys.grad_loss is not None
        assert keys.coefficients is not None
        grad = grad + _pull(s.T, keys.grad_loss, keys.coefficients, settings).T
    grad = grad.masked_fill(excluded, 0).to(rows.dtype) @ others
    # s_ip(i) is in the loss of both, and counts with the keys that have the row's own instance.
    pull = grad_loss.double() * NTXentCoefficients(*coefficients.unbind(-1)).grad_positive
    pull = (pull + pull.roll(batch)).to(rows.dtype)[:, None] * rows.roll(batch, 0)
    if keys is not None:
        pull = torch.where((keys.target >= 0).repeat(2)[:, None], pull, 0)
    grad = grad + pull
    if settings.normalize:
        grad = _unit_backward(grad, rows, norm)
    return grad.view_as(views).to(views.dtype)


def _pull(s: Tensor, grad_loss: Tensor, coefficients: Tensor, settings: NTXentSettings) -> Tensor:
    """grad_loss_i ∂L_i/∂s_ij of rows whose similarities to negatives j are s (2 B, ·)."""
    tau_c, batch = settings.consistency_temperature, len(s) // 2
    row = NTXentCoefficients(*coefficients[:, None].unbind(-1))  # (2 B, 1) each
    a = s - row.max_s
    grad = row.instance * (a / settings.temperature).exp()
    if settings.consistency_weight:
        q = row.query * (a / tau_c).exp()
        grad += q * (1 + (a - a.roll(batch, 0) - row.mean) / tau_c) - q.roll(batch, 0)
    return grad_loss[:, None] * grad


def conic(
    views: Tensor, weight: Tensor, target: Tensor, settings: ConICSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ConIC of every instance: L = Σ_v ℓ_s(x^v) + α ℓ_c, with α = consistency_weight.

    With s_j = ŵ_j·x̂ over the A rows w_j of the classifier, of which n is the view's own:

        ℓ_s(x) = −s_n/τ + log(e^{s_n/τ} + β Σ_{j≠n} e^{s_j/τ}),   β = compensation
        ℓ_c    = Σ_{i≠j} (1 − x̂^i·x̂^j)²                             over ordered pairs of an instance's views

    Args:
        views: (V, B, D). weight: (A, D). target: (B,) int64, the row of `weight` that each instance owns; an
            instance that owns none of them has a loss and gradients of NaN. Any floating dtype; computed in
            float64 if the views are float64, otherwise in float32.

    Returns:
        loss (B,), classification loss (V, B), consistency loss (B,), rank of the view's own row (V, B) int64,
        and `statistics` (V, B, 3) float64, the `ConICCoefficients` of each view.
    """
    positives = conic_positives(views, weight, target)
    partial = conic_statistics(views, weight, target, positives, settings)
    loss, classification, consistency, rank, coefficients = conic_merge(partial, positives, views, settings)
    dtype = computed_in(views)
    return loss.to(dtype), classification.to(dtype), consistency.to(dtype), rank, coefficients


def conic_positives(views: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The `ConICPositives` (V·B, 2) of views whose own rows are among those of a part of the weight."""
    unit_views, unit_weight, own = _conic_rows(views, weight, target)
    exists = (own >= 0) & (own < len(weight))
    own_rows = unit_weight[torch.where(exists, own, 0)]
    positive = (unit_views.double() * own_rows.double()).sum(1)
    threshold = (unit_views * own_rows).sum(1).double()
    return torch.stack(ConICPositives(positive, threshold), -1).masked_fill(~exists[:, None], torch.nan)


def conic_statistics(
    views: Tensor, weight: Tensor, target: Tensor, positives: Tensor, settings: ConICSettings
) -> Tensor:
    """The `ConICPartial` (1, V·B, 3) of a part of the weight. `target` is −1 where a view's own row is in
    another part; `positives` come from there."""
    unit_views, unit_weight, own = _conic_rows(views, weight, target)
    s = (unit_views @ unit_weight.T).double().masked_fill(_is_own(own, weight), LOWEST)
    rank = (s > ConICPositives(*positives[:, None].unbind(-1)).threshold).sum(1)
    max_s = s.amax(1)
    terms = ((s - max_s[:, None]) / settings.temperature).exp().masked_fill(_is_own(own, weight), 0)
    return torch.stack(ConICPartial(max_s, terms.sum(1), rank.double()), -1)[None]


def conic_merge(
    partial: Tensor, positives: Tensor, views: Tensor, settings: ConICSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses over all parts of the weight (parts, V·B, 3), and the `ConICCoefficients` (V, B, 3)."""
    tau, shape = settings.temperature, views.shape[:2]
    parts, positive = (
        ConICPartial(*partial.double().unbind(-1)),
        ConICPositives(*positives.unbind(-1)).positive,
    )
    max_s = parts.max_s.amax(0)
    z_instance = (parts.z_instance * ((parts.max_s - max_s) / tau).exp()).sum(0)
    classification, instance, grad_positive = _contrast(
        settings.compensation * z_instance, max_s, positive, tau
    )
    unit_views, _ = _rows(views.flatten(0, 1), True)
    consistency = _disagreement(unit_views.view(views.shape).double()).square().sum((0, 1))
    classification = classification.view(shape)
    loss = classification.sum(0) + settings.consistency_weight * consistency
    coefficients = ConICCoefficients(
        torch.where(z_instance == 0, positive, max_s),  # the only row has no negatives
        settings.compensation * instance,
        grad_positive,
    )
    rank = parts.rank.sum(0).long().view(shape)
    return loss, classification, consistency, rank, torch.stack(coefficients, -1).view(*shape, -1)


def conic_gradient(
    grad_loss: Tensor,
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficients: Tensor,
    settings: ConICSettings,
    views_need_grad: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of Σ_b grad_loss_b L_b in the views (V, B, D) and in the weight (A, D), in their dtypes;
    one that is not needed has no rows. The coefficients are those of `conic`. Where `weight` is a part of the
    whole, `target` is −1 for an instance whose own row is in another."""
    unit_views, unit_weight, own = _conic_rows(views, weight, target)
    row = ConICCoefficients(*coefficients.flatten(0, 1)[:, None].unbind(-1))  # (V·B, 1) each
    a = (unit_views @ unit_weight.T).double() - row.max_s
    grad = row.instance * (a / settings.temperature).exp()  # ∂ℓ_s/∂s
    grad = torch.where(_is_own(own, weight), row.grad_positive, grad)
    grad = (grad * grad_loss.repeat(len(views))[:, None]).to(unit_views.dtype)

    grad_views, grad_weight = views.new_empty((0, *views.shape[1:])), weight.new_empty((0, weight.shape[1]))
    if views_need_grad:
        by_view = unit_views.view(views.shape)
        of_consistency = torch.einsum("ijb,jbd->ibd", -4 * _disagreement(by_view), by_view)
        of_consistency *= settings.consistency_weight * grad_loss[:, None]
        norm = _norm(views.flatten(0, 1).to(grad.dtype))
        grad_views = _unit_backward(grad @ unit_weight + of_consistency.flatten(0, 1), unit_views, norm)
    if weight_needs_grad:
        grad_weight = _unit_backward(grad.T @ unit_views, unit_weight, _norm(weight.to(grad.dtype)))
    return grad_views.view(-1, *views.shape[1:]).to(views.dtype), grad_weight.to(weight.dtype)


def conic_gradient_sgd_(
    grad_loss: Tensor,
    views: Tensor,
    weight: Tensor,
    momentum_buffer: Tensor,
    target: Tensor,
    coefficients: Tensor,
    settings: ConICSettings,
    sgd: SGDSettings,
) -> Tensor:
    """`conic_gradient`, then `sgd_` with the weight's gradient; returns that of the views (V, B, D)."""
    grad_views, grad_weight = conic_gradient(
        grad_loss, views, weight, target, coefficients, settings, views_need_grad=True, weight_needs_grad=True
    )
    sgd_(weight, momentum_buffer, grad_weight, sgd)
    return grad_views


def sgd_(weight: Tensor, momentum_buffer: Tensor, grad: Tensor, sgd: SGDSettings) -> None:
    """One step of SGD in place, in the convention of torch.optim.SGD: g = grad + λ w, then

    v ← m v + g        w ← w − η v,  or with `nesterov`  w ← w − η (g + m v)
    """
    grad = grad + sgd.weight_decay * weight
    velocity = (sgd.momentum * momentum_buffer + grad).to(momentum_buffer.dtype)
    weight_after = weight - sgd.lr * (grad + sgd.momentum * velocity if sgd.nesterov else velocity)
    # Both are written by one call, which no interrupt from the keyboard divides.
    torch._foreach_copy_([momentum_buffer, weight], [velocity, weight_after])


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


def _contrast(
    z_negatives: Tensor, max_s: Tensor, positive: Tensor, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """−s_+/τ + log(e^{s_+/τ} + Σ) of negatives with Σ = z e^{m/τ}, the c with ∂/∂s_j = c e^{(s_j − m)/τ}, and
    ∂/∂s_+."""
    # log(1 + e^gap), in a form that keeps its digits when the positive dominates
    gap = z_negatives.log() + (max_s - positive) / tau
    value = torch.logaddexp(gap, torch.zeros_like(gap))
    coefficient = torch.where(z_negatives == 0, 0, ((max_s - positive) / tau - value).exp() / tau)
    return value, coefficient, -torch.sigmoid(gap) / tau


def _similarities(rows: Tensor, keys: Tensor) -> Tensor:
    """(rows, keys) in float64, multiplied in the rows' dtype."""
    return (rows @ keys.to(rows.dtype).T).double()


def _pair_similarities(
    rows: Tensor, keys: NTXentKeys | None, settings: NTXentSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """s (2 B, 2 K) to some keys, which of these are a row's own instance (2 B, 2 K), and their z (2 K, D)."""
    others, target = rows, torch.arange(len(rows) // 2, device=rows.device)
    if keys is not None:
        target = keys.target
        others, _ = _rows(keys.views.flatten(0, 1), settings.normalize)
    excluded = target[:, None] == torch.arange(len(others) // 2, device=rows.device)
    return _similarities(rows, others), excluded.repeat(2, 2), others


def _conic_rows(views: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x̂ (V·B, D), ŵ (A, D), and the row of `weight` that each view owns (V·B,)."""
    unit_views, _ = _rows(views.flatten(0, 1), True)
    unit_weight, _ = _rows(weight.to(unit_views.dtype), True)
    return unit_views, unit_weight, target.repeat(len(views))


def _is_own(own: Tensor, weight: Tensor) -> Tensor:
    """Which row of the weight each view owns, (V·B, A)."""
    return own[:, None] == torch.arange(len(weight), device=own.device)


def _disagreement(unit_views: Tensor) -> Tensor:
    """1 − x̂^i·x̂^j of each instance's pairs of views, 0 where i = j: (V, V, B)."""
    disagreement = 1 - torch.einsum("ibd,jbd->ijb", unit_views, unit_views)
    disagreement.diagonal().zero_()
    return disagreement


def _rows(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """x̂ = x / max(‖x‖₂, 1e-12), row by row, and ‖x‖₂ (B, 1); without `normalize` x and ones."""
    x = x.to(computed_in(x))
    if not normalize:
        return x, torch.ones_like(x[:, :1])
    norm = _norm(x)
    return x / norm.clamp_min(NORM_EPSILON), norm


def _norm(x: Tensor) -> Tensor:
    """‖x‖₂ of each row: (B, 1). Squares are taken after a division by a power of two, which rounds nothing,
    so that they neither overflow nor vanish."""
    scale = torch.exp2(torch.frexp(x.abs().amax(1, keepdim=True)).exponent - 1).to(x.dtype)
    return scale * torch.linalg.vector_norm(x / scale, dim=1, keepdim=True)


def _unit_backward(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """dx = (dx̂ − x̂ (x̂·dx̂)) / ‖x‖; a row below the epsilon was only scaled, so it has no projection."""
    radial = torch.where(norm < NORM_EPSILON, 0, (unit * grad).sum(1, keepdim=True))
    return (grad - unit * radial) / norm.clamp_min(NORM_EPSILON)
