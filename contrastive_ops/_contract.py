"""What operators and backends hand to each other: settings, and the records of the three steps of a loss.

    statistics(rows, keys)              -> partial        a few numbers a row, over some of the keys
    merge(partials)                     -> losses, rank, and the coefficients of each row's gradient
    gradient(rows, keys, coefficients)  -> gradient       over some of the keys

A thread's share of the keys, a program's range of them and another process's shard are the same thing: a
part. Partials of several parts, one after the other, are merged in that order, in float64; gradients of
several parts are added. So every loss over all keys is a composition of these three, and that is what a
backend makes of it.

A record is a tensor whose last dimension is its fields. Their names stand here, once for all backends: a
class below names what `record.unbind(-1)` gives, and `csrc/records.h` repeats the order for C++ (what was
compiled is compared with this when it is loaded). Partials and `CO2Row` are in the units in which the backend
that wrote them multiplies, and only that backend reads them; coefficients that operators return mean the same
in all.

Letters: s_j and y_j are the similarities of a row's query and key to the key j of a part, m and m' their
maxima, a_j = s_j − m, b_j = y_j − m', and d_j = a_j − b_j. A backend may take m and m' as 0 where it knows
that no exponential is too large for it; of several parts the largest m counts, whatever each has.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class CO2Settings(NamedTuple):
    """Settings of `co2`. A term of weight 0 is not computed."""

    temperature: float
    consistency_temperature: float
    instance_weight: float
    consistency_weight: float
    include_positive: bool
    normalize: bool


class NTXentSettings(NamedTuple):
    """Settings of `nt_xent`. A consistency term of weight 0 is not computed."""

    temperature: float
    consistency_temperature: float
    consistency_weight: float
    normalize: bool


class ConICSettings(NamedTuple):
    """Settings of `conic`. Its gradient needs no compensation β: the coefficients have it."""

    temperature: float
    consistency_weight: float
    compensation: float = 1.0


class SGDSettings(NamedTuple):
    """Settings of a step of SGD, as in torch.optim.SGD."""

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool


@dataclass
class PendingStep:
    """A step of SGD that the backward of `conic_loss` is to take; see `DelayedSGD.in_backward`.

    Attributes:
        momentum_buffer: (A, D) v, of the weight's dtype; overwritten with the weight.
        settings: as it is to be taken.
        taken: whether backward has taken it. It does so once.
        withdrawn: whether it must not be taken any more.
        begun: versions of `momentum_buffer` and weight when backward began to take it.
        recorded: number of the steps before it, once the optimiser knows of it.
        weight: the only weight that it may be taken on; None for any.
        lock: held while it is taken.
    """

    momentum_buffer: Tensor
    settings: SGDSettings
    taken: bool = False
    withdrawn: bool = False
    begun: tuple[int, int] | None = None
    recorded: int | None = None
    weight: Tensor | None = None
    lock: AbstractContextManager[Any] = field(default_factory=nullcontext)


class Losses(NamedTuple):
    """What `co2_merge` and `nt_xent_merge` return, a number a row, in float64."""

    loss: Tensor
    instance_loss: Tensor
    consistency_loss: Tensor
    positive_rank: Tensor  # int64
    coefficients: Tensor  # (rows, fields)


class CO2Partial(NamedTuple):
    """(parts, B, 8): what a part of the queue knows of a row."""

    max_s: Tensor  # m
    max_y: Tensor  # m'
    z_instance: Tensor  # Σ e^{a/τ}
    z_query: Tensor  # Σ e^{a/τc}
    z_key: Tensor  # Σ e^{b/τc}
    d_query: Tensor  # Σ d e^{a/τc}
    d_key: Tensor  # Σ d e^{b/τc}
    rank: Tensor  # how many keys have s > s_+


class CO2Row(NamedTuple):
    """(B, 11) float64: what is known of a row. The statistics fill in the first three, which depend on query
    and key alone; the merge completes them to the coefficients of the gradient,

        ∂L/∂s_j = instance e^{a/τ} + Q − P + Q (d − mean)/τc,   Q = query e^{a/τc},   P = key e^{b/τc}.

    A gradient over several parts takes the row as it is for one of them, and `grad_positive` as 0 for others.
    """

    norm_query: Tensor  # 1 without normalisation
    norm_key: Tensor
    positive: Tensor  # s_+, before the division by norm_query where the backend multiplies rows as stored
    max_s: Tensor  # m over all parts
    max_y: Tensor  # m'
    mean: Tensor  # E_Q[d]
    instance: Tensor
    query: Tensor
    key: Tensor
    scale: Tensor  # what the three above are to be multiplied by: half precision holds them without it
    grad_positive: Tensor  # ∂L/∂s_+


class NTXentKeys(NamedTuple):
    """Some instances as keys of NT-Xent's rows, where these are not the rows themselves.

    The views of a row's own instance are no negatives: `target` says which of these instances that is, −1 for
    none of them. The last two are what the gradient needs of the keys as rows.
    """

    views: Tensor  # (2, K, D)
    target: Tensor  # (B,) int64
    grad_loss: Tensor | None = None  # (2 K,)
    coefficients: Tensor | None = None  # (2 K, 5)


class NTXentPartial(NamedTuple):
    """(parts, 2 B, 5): what a part of the keys knows of a row; y and b are its positive's."""

    max_s: Tensor  # m
    rank: Tensor  # how many negatives have s > s_ip(i)
    z_instance: Tensor  # Σ e^{a/τ}
    z_query: Tensor  # Σ e^{a/τc}; this and the next without meaning where there is no consistency term
    d_query: Tensor  # Σ d e^{a/τc}


class NTXentCoefficients(NamedTuple):
    """(2 B, 5) float64, of the gradient of a row's loss:

    ∂L/∂s_j = instance e^{a/τ} + Q − P + Q (d − mean)/τc,   Q = query e^{a/τc},   P = (its positive's Q)
    """

    max_s: Tensor  # m over all parts; s_ip(i) where there are no negatives
    instance: Tensor
    query: Tensor
    mean: Tensor  # E_Q[d]
    grad_positive: Tensor  # ∂L/∂s_ip(i)


class ConICPositives(NamedTuple):
    """(V·B, 2) float64: what a view has in common with its own row; NaN where it is elsewhere (target −1)."""

    positive: Tensor  # s_n
    threshold: Tensor  # s_n as the product that gives every s_j would have it, so that equal rows tie


class ConICPartial(NamedTuple):
    """(parts, V·B, 3): what a part of the weight knows of a view, its own row left out."""

    max_s: Tensor  # m
    z_instance: Tensor  # Σ e^{a/τ}
    rank: Tensor  # how many rows have s > s_n


class ConICCoefficients(NamedTuple):
    """(V, B, 3) float64, of the gradient of a view's loss: ∂ℓ_s/∂s_j = instance e^{a/τ}."""

    max_s: Tensor  # m over all parts; s_n where no other row exists
    instance: Tensor
    grad_positive: Tensor  # ∂ℓ_s/∂s_n


RECORDS = (
    CO2Partial, CO2Row, NTXentPartial, NTXentCoefficients, ConICPositives, ConICPartial, ConICCoefficients,
)  # fmt: skip


def computed_in(x: Tensor) -> torch.dtype:
    """What a loss of these queries or views is computed in, and comes in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
