"""The losses as functions: check the arguments, call one operator, reduce."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from . import _ops, distributed
from ._calls import once_a_kind
from ._checks import check_device, check_filled, check_flag, check_number, check_tensor
from ._contract import CO2Settings, ConICSettings, NTXentSettings, PendingStep
from ._ranks import check_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduction = Literal["mean", "sum", "none"]

# What a temperature may be, and the most that a weight may. Beyond, a rounding of a similarity decides
# between 0 and infinity, or float32 cannot hold the loss.
_TEMPERATURES = (1e-6, 1e6)
_MOST_WEIGHT = 1e6


class LossMetrics(NamedTuple):
    """What a contrastive loss knows about its B rows, all detached; NT-Xent has a row for each of two views.

    Attributes:
        instance_loss: (B,) the contrast before weighting; zeros where that term was not asked for.
        consistency_loss: (B,) the consistency term before weighting; zeros where it was not asked for.
        positive_rank: (B,) int64, how many negatives are more similar to the row than its positive. Top-n
            contrast accuracy is ``(positive_rank < n).float().mean()``.
    """

    instance_loss: Tensor
    consistency_loss: Tensor
    positive_rank: Tensor


class _QueueOptions(TypedDict, total=False):
    """The keyword arguments that the losses over a queue share, for the types of their results alone."""

    temperature: float
    normalize: bool
    reduction: Reduction
    group: ProcessGroup | None
    backend: str | None


class _CO2Options(_QueueOptions, total=False):
    consistency_temperature: float
    consistency_weight: float
    include_positive: bool


class _ConsistencyOptions(_QueueOptions, total=False):
    include_positive: bool


class _NTXentOptions(_QueueOptions, total=False):
    consistency_temperature: float
    consistency_weight: float


@overload
def co2_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[_CO2Options],
) -> Tensor: ...
@overload
def co2_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[_CO2Options],
) -> tuple[Tensor, LossMetrics]: ...
@overload
def co2_loss(
    query: Tensor, key: Tensor, queue: Tensor, *, return_metrics: bool, **options: Unpack[_CO2Options]
) -> Tensor | tuple[Tensor, LossMetrics]: ...
def co2_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float = 0.2,
    consistency_temperature: float = 0.05,
    consistency_weight: float = 0.3,
    include_positive: bool = False,
    normalize: bool = True,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LossMetrics]:
    """InfoNCE plus CO2's consistency term, over a queue of negatives (Wei et al., ICLR 2021).

    With s_j = q̂·n_j, y_j = k̂·n_j over the K rows n_j of the queue and s_+ = q̂·k̂:

        L     = L_ins + α L_con
        L_ins = −s_+/τ + log(e^{s_+/τ} + Σ_j e^{s_j/τ})
        L_con = ½ KL(P‖Q) + ½ KL(Q‖P),   Q = softmax_j(s_j/τc),  P = softmax_j(y_j/τc)

    P is a pseudo-label: no gradient passes through it. The defaults are the paper's for MoCo v2; for MoCo
    they are τ = 0.07, τc = 0.04, α = 10.

    Matrices are multiplied in the query's dtype, all else is in float32 or wider. So under autocast, where
    networks give half precision, this computes as eager PyTorch does there: products in half precision, the
    loss in float32.

    Args:
        query: (B, D), float16, bfloat16, float32 or float64, any strides. The only input with a gradient,
            which comes in its dtype.
        key: (B, D): row i is the positive of query row i. Of the query's dtype; under autocast, where
            `torch.nn.functional.normalize` may give float32, of any of those, and taken as it is.
        queue: (K, D) negatives, of any of those dtypes, taken as stored: keep its rows normalised. Under
            queries in half precision a queue of their dtype is fastest; another is rounded to it on the way
            to the products. Any strides: MoCo's (D, K) buffer goes in as ``queue.T`` without a copy; where
            D = K nothing but the numbers tells the two apart, and on a CPU a queue whose columns are unit
            vectors and whose rows are not raises a warning. It may be overwritten in place as soon as the
            call returns; the gradient stays right.
        temperature: τ, from 1e-6 to 1e6.
        consistency_temperature: τc, from 1e-6 to 1e6.
        consistency_weight: α, from 0 to 1e6; with 0 the consistency term is not computed.
        include_positive: prepend s_+ to both lists of the consistency term. That gives the value of the
            public ports that do so, but not their gradient: they let it pass through s_+ in P as well, which
            adds ½ [P_+ (1 + E_P[d] − d_+) − Q_+] / τc to ∂L_con/∂s_+, with d = log Q − log P. Here P stays
            a pseudo-label.
        normalize: L2-normalise query and key, in at least float32.
        reduction: "mean" or "sum" over the batch, or "none".
        return_metrics: also return a `LossMetrics`.
        group: a `torch.distributed.ProcessGroup`: as if one process had all of it. Each rank passes its own
            queries and keys, whose number may differ and be 0, and its shard of the queue (a
            `KeyQueue(…, group=…)` has it); the loss of its rows is over all shards. Backward gives a rank the
            derivative, in its own queries, of the sum of all ranks' losses, and with "mean" these are such
            that their mean over the ranks, of which DistributedDataParallel has the gradient, is the mean of
            all rows. All ranks make the same calls in the same order.
        backend: name of the implementation to use; by default the fastest that serves the device.

    Returns:
        The loss: a scalar, or (B,) with ``reduction="none"``; float64 if the query is, float32 otherwise.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: the backend asked for cannot serve, or another rank of the group has died.

    Example:
        >>> import torch
        >>> from contrastive_ops import co2_loss
        >>> query = torch.randn(4, 128, requires_grad=True)
        >>> key = torch.randn(4, 128)
        >>> queue = torch.nn.functional.normalize(torch.randn(1024, 128), dim=1)
        >>> loss, metrics = co2_loss(query, key, queue, return_metrics=True)
        >>> loss.backward()
        >>> top1 = (metrics.positive_rank == 0).float().mean()
    """
    return _queue_loss(
        query, key, queue, temperature=temperature, consistency_temperature=consistency_temperature,
        instance_weight=1.0, consistency_weight=consistency_weight, include_positive=include_positive,
        normalize=normalize, reduction=reduction, return_metrics=return_metrics, group=group, backend=backend,
    )  # fmt: skip


@overload
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[_QueueOptions],
) -> Tensor: ...
@overload
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[_QueueOptions],
) -> tuple[Tensor, LossMetrics]: ...
@overload
def info_nce_loss(
    query: Tensor, key: Tensor, queue: Tensor, *, return_metrics: bool, **options: Unpack[_QueueOptions]
) -> Tensor | tuple[Tensor, LossMetrics]: ...
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float = 0.2,
    normalize: bool = True,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LossMetrics]:
    """InfoNCE over a queue of negatives, the loss of MoCo (He et al., CVPR 2020).

        L = −s_+/τ + log(e^{s_+/τ} + Σ_j e^{s_j/τ}),   s_j = q̂·n_j,  s_+ = q̂·k̂

    This is `co2_loss` with a consistency weight of 0; arguments, returns and errors are the same. MoCo uses
    τ = 0.07, MoCo v2 τ = 0.2.

    Example:
        >>> import torch
        >>> from contrastive_ops import info_nce_loss
        >>> query = torch.randn(4, 128, requires_grad=True)
        >>> info_nce_loss(query, torch.randn(4, 128), torch.randn(1024, 128), temperature=0.07).backward()
    """
    return _queue_loss(
        query, key, queue, temperature=temperature, consistency_temperature=1.0, instance_weight=1.0,
        consistency_weight=0.0, include_positive=False, normalize=normalize, reduction=reduction,
        return_metrics=return_metrics, group=group, backend=backend,
    )  # fmt: skip


@overload
def consistency_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[_ConsistencyOptions],
) -> Tensor: ...
@overload
def consistency_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[_ConsistencyOptions],
) -> tuple[Tensor, LossMetrics]: ...
@overload
def consistency_loss(
    query: Tensor, key: Tensor, queue: Tensor, *, return_metrics: bool, **options: Unpack[_ConsistencyOptions]
) -> Tensor | tuple[Tensor, LossMetrics]: ...
def consistency_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float = 0.05,
    include_positive: bool = False,
    normalize: bool = True,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LossMetrics]:
    """CO2's consistency term alone (Wei et al., ICLR 2021).

        L = ½ KL(P‖Q) + ½ KL(Q‖P),   Q = softmax_j(q̂·n_j/τ),  P = softmax_j(k̂·n_j/τ)

    P is a pseudo-label: no gradient passes through it. Arguments, returns and errors are those of
    `co2_loss`, but that `temperature` is the τc there.

    Example:
        >>> import torch
        >>> from contrastive_ops import consistency_loss
        >>> view = torch.randn(4, 128)
        >>> consistency_loss(view, view, torch.randn(1024, 128)).item()  # a view agrees with itself
        0.0
    """
    return _queue_loss(
        query, key, queue, temperature=1.0, consistency_temperature=temperature, instance_weight=0.0,
        consistency_weight=1.0, include_positive=include_positive, normalize=normalize, reduction=reduction,
        return_metrics=return_metrics, group=group, backend=backend,
        consistency_temperature_name="temperature",
    )  # fmt: skip


@overload
def nt_xent_loss(
    view1: Tensor, view2: Tensor, *, return_metrics: Literal[False] = False, **options: Unpack[_NTXentOptions]
) -> Tensor: ...
@overload
def nt_xent_loss(
    view1: Tensor, view2: Tensor, *, return_metrics: Literal[True], **options: Unpack[_NTXentOptions]
) -> tuple[Tensor, LossMetrics]: ...
@overload
def nt_xent_loss(
    view1: Tensor, view2: Tensor, *, return_metrics: bool, **options: Unpack[_NTXentOptions]
) -> Tensor | tuple[Tensor, LossMetrics]: ...
def nt_xent_loss(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: float = 0.5,
    consistency_weight: float = 0.0,
    consistency_temperature: float = 0.05,
    normalize: bool = True,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LossMetrics]:
    """NT-Xent, the loss of SimCLR (Chen et al., ICML 2020), with CO2's consistency term if asked for.

    The 2 B rows z_i are the L2-normalised rows of both views. Row i's positive is its other view p(i), its
    negatives are the views of all other instances. With s_ij = z_i·z_j and sums over negatives j:

        L     = L_ins + α L_con
        L_ins = −s_ip(i)/τ + log(e^{s_ip(i)/τ} + Σ_j e^{s_ij/τ})
        L_con = ½ KL(P‖Q) + ½ KL(Q‖P),   Q_j ∝ e^{s_ij/τc},  P_j ∝ e^{s_p(i)j/τc}

    P is a pseudo-label: no gradient passes through it. (L_con is symmetric in an instance's two rows, so a
    gradient through P as well would be the same as twice the weight.)

    Args:
        view1: (B, D), float16, bfloat16, float32 or float64, any strides. Matrices are multiplied in this
            dtype, as autocast would.
        view2: (B, D): row i is the other view of row i of `view1`. Of its dtype; under autocast views of two
            dtypes are computed in the wider one. Both get gradients, as queries and as keys, in their own
            dtypes.
        temperature: τ, from 1e-6 to 1e6.
        consistency_weight: α, from 0 to 1e6; with 0 the consistency term is not computed.
        consistency_temperature: τc, from 1e-6 to 1e6.
        normalize: L2-normalise the rows, in float32 or wider; without, they are taken as they are.
        reduction: "mean" or "sum" over the 2 B rows, or "none".
        return_metrics: also return a `LossMetrics` of the 2 B rows, those of `view1` first.
        group: a `torch.distributed.ProcessGroup`, of whose ranks each passes its own instances, any number of
            them: the views of all ranks are each other's negatives. A rank computes its own rows against all.
            "mean" and gradients are as in `co2_loss`. One call does what gathering views with their gradients
            does; do not gather before.
        backend: name of the implementation to use; by default the fastest that serves the device.

    Returns:
        The loss: a scalar, or (2 B,) with ``reduction="none"``; float64 if the views are, float32 otherwise.
        A batch of one instance has no negatives: its loss is 0.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: the backend asked for cannot serve.

    Example:
        >>> import torch
        >>> from contrastive_ops import nt_xent_loss
        >>> view1, view2 = (torch.randn(4, 128, requires_grad=True) for _ in range(2))
        >>> loss, metrics = nt_xent_loss(view1, view2, return_metrics=True)
        >>> loss.backward()
        >>> top1 = (metrics.positive_rank == 0).float().mean()
    """
    settings = _check_nt_xent(
        view1, view2, temperature, consistency_weight, consistency_temperature, normalize, reduction,
        return_metrics, group, backend,
    )  # fmt: skip
    dtype = torch.promote_types(view1.dtype, view2.dtype)
    with _without_autocast(view1):
        views = torch.stack([view1.to(dtype), view2.to(dtype)])
        if group is None:
            loss, *metrics, _ = _ops.nt_xent(views, *settings, backend)
        else:
            loss, *metrics, share, _ = distributed.nt_xent(views, *settings, backend, group.group_name)
    loss = _reduce(loss, reduction, None if group is None else share)
    return (loss, LossMetrics(*metrics)) if return_metrics else loss


@once_a_kind
def _check_nt_xent(
    view1: Tensor,
    view2: Tensor,
    temperature: float,
    consistency_weight: float,
    consistency_temperature: float,
    normalize: bool,
    reduction: Reduction,
    return_metrics: bool,
    group: ProcessGroup | None,
    backend: str | None,
) -> NTXentSettings:
    """Refuses what is wrong; returns the settings that the arguments make."""
    check_group(group)
    with distributed.telling(group, "nt_xent_loss"):
        _check_rows("view1", view1, "(B, D)", "view1", view1, group)
        _check_rows("view2", view2, "(B, D)", "view1", view1, group)
        _check_alike("view2", view2, "view1", view1)
        _check_weight("consistency_weight", consistency_weight)
        temperatures = {"temperature": temperature, "consistency_temperature": consistency_temperature}
        _check_settings(temperatures, reduction, return_metrics, backend, normalize=normalize)
    return NTXentSettings(
        temperature=float(temperature),
        consistency_temperature=float(consistency_temperature),
        consistency_weight=float(consistency_weight),
        normalize=normalize,
    )


class ConICMetrics(NamedTuple):
    """What `conic_loss` knows about its views and instances, all detached.

    Attributes:
        classification_loss: (V, B) ℓ_s of each view.
        consistency_loss: (B,) ℓ_c of each instance, before weighting.
        positive_rank: (V, B) int64, how many other rows of the weight are more similar to the view than its
            own. Top-n accuracy is ``(positive_rank < n).float().mean()``.
    """

    classification_loss: Tensor
    consistency_loss: Tensor
    positive_rank: Tensor


class _ConICOptions(TypedDict, total=False):
    num_instances: int | None
    temperature: float
    consistency_weight: float
    reduction: Reduction
    update: PendingStep | None
    group: ProcessGroup | None
    backend: str | None


@overload
def conic_loss(
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[_ConICOptions],
) -> Tensor: ...
@overload
def conic_loss(
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[_ConICOptions],
) -> tuple[Tensor, ConICMetrics]: ...
@overload
def conic_loss(
    views: Tensor, weight: Tensor, target: Tensor, *, return_metrics: bool, **options: Unpack[_ConICOptions]
) -> Tensor | tuple[Tensor, ConICMetrics]: ...
def conic_loss(
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    num_instances: int | None = None,
    temperature: float = 0.1,
    consistency_weight: float = 2.5,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
    update: PendingStep | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ConICMetrics]:
    """Consistent instance classification, ConIC: every instance a class of its own.

    With views x^v of an instance whose row of the classifier is w_n, and the A rows w_j in its denominator:

        L      = Σ_v ℓ_s(x^v) + α Σ_{i≠j} (1 − x̂^i·x̂^j)²            (over ordered pairs of views)
        ℓ_s(x) = −log  e^{ŵ_n·x̂/τ} / (e^{ŵ_n·x̂/τ} + β Σ_{j≠n} e^{ŵ_j·x̂/τ})

    Hats are L2-normalised rows. If only A of N instances are in the denominator, β = (N − 1)/(A − 1) makes
    up for the rest. The whole classifier (A = N, β = 1) with α = 0 is Exemplar-CNN; a weight that holds
    averages of past features (`MemoryBank`) is InstDisc. A weight whose rows are another network's features
    of the same batch is the loss of two towers, with gradients to both, as CLIP and MoCo v3 have it; see the
    second example.

    Args:
        views: (V, B, D) features of V views of each of B instances, V ≥ 1, any strides; float16, bfloat16,
            float32 or float64. Matrices are multiplied in this dtype, as autocast would.
        weight: (A, D) rows of the classifier, not normalised, of any of those dtypes.
        target: (B,) int64, the row of `weight` that each instance owns. Instances may repeat.
        num_instances: N ≥ A, all that the rows of `weight` were sampled from; None for β = 1.
        temperature: τ, from 1e-6 to 1e6; a number, which gets no gradient.
        consistency_weight: α, from 0 to 1e6.
        reduction: "mean" or "sum" over the B instances, or "none".
        return_metrics: also return a `ConICMetrics`.
        update: let backward take a step of SGD on `weight`, tile by tile, in place of storing its gradient;
            from `DelayedSGD.in_backward`. `weight` then gets no ``grad``. Not under torch.compile.
        group: a `torch.distributed.ProcessGroup`, of whose ranks each passes its own instances, any number of
            them, and its shard of the weight: some of its rows, those of the ranks one after the other.
            `target` are rows of the whole. "mean" and the gradients of views are as in `co2_loss`. A weight
            that is a leaf, as a parameter is, gets the mean over the ranks, as DistributedDataParallel gives
            a parameter (keep it out of its module); one that was computed gets the sum, as views do.
        backend: name of the implementation to use; by default the fastest that serves the device.

    Returns:
        The loss: a scalar, or (B,) with ``reduction="none"``; float64 if the views are, float32 otherwise.
        Views and weight get gradients in their own dtypes. Do not overwrite either before backward, which
        computes the similarities again; PyTorch notices and raises.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it. On a GPU, where looking at the
            values of `target` would wait for it, a row outside the weight makes that instance's loss NaN.
        RuntimeError: the backend asked for cannot serve.

    Example:
        >>> import torch
        >>> from contrastive_ops import conic_loss
        >>> views = torch.randn(2, 4, 128, requires_grad=True)
        >>> weight = torch.randn(1024, 128, requires_grad=True)
        >>> loss = conic_loss(views, weight, torch.tensor([3, 0, 7, 5]), num_instances=1_000_000)
        >>> loss.backward()

        Two towers: each image's own text against all texts of the batch, and the reverse.

        >>> image, text = (torch.randn(4, 128, requires_grad=True) for _ in range(2))
        >>> own, settings = torch.arange(4), {"temperature": 0.07, "consistency_weight": 0.0}
        >>> to_text = conic_loss(image[None], text, own, **settings)
        >>> to_image = conic_loss(text[None], image, own, **settings)
        >>> ((to_text + to_image) / 2).backward()
    """
    settings = _check_conic(
        views, weight, target, num_instances, temperature, consistency_weight, reduction, return_metrics,
        update, group, backend,
    )  # fmt: skip
    with _without_autocast(views):
        if group is not None:
            across = (
                settings.temperature, num_instances, settings.consistency_weight, backend, weight.is_leaf,
                group.group_name,
            )  # fmt: skip
            if update is None:
                loss, *metrics, share, _ = distributed.conic(views, weight, target, *across)
            else:
                loss, *metrics, share, _ = distributed.conic_with_update(
                    views, weight, target, update, *across
                )
        else:
            alone = settings.temperature, settings.compensation, settings.consistency_weight, backend
            if update is None:
                loss, *metrics, _ = _ops.conic(views, weight, target, *alone)
            else:
                loss, *metrics, _ = _ops.conic_with_update(views, weight, target, update, *alone)
    loss = _reduce(loss, reduction, None if group is None else share)
    return (loss, ConICMetrics(*metrics)) if return_metrics else loss


@once_a_kind
def _check_conic(
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    num_instances: int | None,
    temperature: float,
    consistency_weight: float,
    reduction: Reduction,
    return_metrics: bool,
    update: PendingStep | None,
    group: ProcessGroup | None,
    backend: str | None,
) -> ConICSettings:
    """Refuses what is wrong; returns the settings that the arguments make, those for one process."""
    check_group(group)
    with distributed.telling(group, "conic_loss"):
        _check_rows("views", views, "(V, B, D)", "views", views, group)
        _check_rows("weight", weight, "(A, D)", "views", views, group)
        if weight.shape[1] != views.shape[2]:
            raise ValueError(
                f"weight must be (A, D) with D = {views.shape[2]} as in views, got {_shape(weight)}"
            )
        check_tensor("target", target, (torch.int64,))
        check_device("target", target, "views", views)
        if target.shape != views.shape[1:2]:
            raise ValueError(
                f"target must be (B,) with B = {views.shape[1]} as in views, got {_shape(target)}"
            )
        rows = weight.shape[0]
        if num_instances is not None:
            if isinstance(num_instances, bool) or not isinstance(num_instances, (int, np.integer)):
                raise TypeError(
                    f"num_instances must be an integer or None, got {type(num_instances).__name__}"
                )
            if num_instances < rows:
                raise ValueError(
                    f"num_instances must be at least the {rows} rows of weight, got {num_instances}"
                )
            if num_instances >= 2**63:
                raise ValueError(f"num_instances must be an int64, got {num_instances}")
        _check_weight("consistency_weight", consistency_weight)
        _check_settings({"temperature": temperature}, reduction, return_metrics, backend)
        if update is not None:
            if not isinstance(update, PendingStep):
                raise TypeError(
                    f"update must come from DelayedSGD.in_backward(), got {type(update).__name__}"
                )
            if update.weight is not None and update.weight is not weight:
                raise ValueError(
                    "update is a step on the weight of its optimizer's classifier, which weight must be, got "
                    "another tensor"
                )
    compensation = 1.0
    if group is None and num_instances is not None and rows > 1:
        compensation = (num_instances - 1) / (rows - 1)
    return ConICSettings(
        temperature=float(temperature),
        consistency_weight=float(consistency_weight),
        compensation=compensation,
    )


def _queue_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    consistency_temperature: float,
    instance_weight: float,
    consistency_weight: float,
    include_positive: bool,
    normalize: bool,
    reduction: Reduction,
    return_metrics: bool,
    group: ProcessGroup | None,
    backend: str | None,
    consistency_temperature_name: str = "consistency_temperature",
) -> Tensor | tuple[Tensor, LossMetrics]:
    settings = _check_queue_loss(
        query, key, queue, temperature, consistency_temperature, instance_weight, consistency_weight,
        include_positive, normalize, reduction, return_metrics, group, backend, consistency_temperature_name,
    )  # fmt: skip
    if queue.shape[0] == queue.shape[1]:
        _warn_if_transposed(queue)
    with _without_autocast(query):
        needs_gradient = query.requires_grad and torch.is_grad_enabled()
        given = (query, key, queue, *settings, needs_gradient, backend)
        if group is None:
            loss, *metrics, _gradient = _ops.co2(*given)
        else:
            loss, *metrics, share, _gradient = distributed.co2(*given, group.group_name)
    loss = _reduce(loss, reduction, None if group is None else share)
    return (loss, LossMetrics(*metrics)) if return_metrics else loss


@once_a_kind
def _check_queue_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    consistency_temperature: float,
    instance_weight: float,
    consistency_weight: float,
    include_positive: bool,
    normalize: bool,
    reduction: Reduction,
    return_metrics: bool,
    group: ProcessGroup | None,
    backend: str | None,
    consistency_temperature_name: str,
) -> CO2Settings:
    """Refuses what is wrong; returns the settings that the arguments make."""
    check_group(group)
    with distributed.telling(group, "co2_loss"):
        _check_rows("query", query, "(B, D)", "query", query, group)
        _check_rows("key", key, "(B, D)", "query", query, group)
        _check_rows("queue", queue, "(K, D)", "query", query, group)
        _check_alike("key", key, "query", query)
        if queue.shape[1] != query.shape[1]:
            raise ValueError(
                f"queue must be (K, D) with D = {query.shape[1]} as in query, got {_shape(queue)}"
                + ("; pass queue.T" if queue.shape[0] == query.shape[1] else "")
            )
        for name, tensor in (("key", key), ("queue", queue)):
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name} gets no gradient from this loss, but requires one; pass {name}.detach()"
                )
        _check_weight("consistency_weight", consistency_weight)
        temperatures = {"temperature": temperature, consistency_temperature_name: consistency_temperature}
        _check_settings(
            temperatures, reduction, return_metrics, backend,
            include_positive=include_positive, normalize=normalize,
        )  # fmt: skip
    return CO2Settings(
        temperature=float(temperature),
        consistency_temperature=float(consistency_temperature),
        instance_weight=instance_weight,
        consistency_weight=float(consistency_weight),
        include_positive=include_positive,
        normalize=normalize,
    )


def _reduce(loss: Tensor, reduction: Reduction, share: Tensor | None = None) -> Tensor:
    """`share` makes of a rank's sum what has the mean of all rows for its mean over the ranks."""
    if reduction == "mean":
        return loss.mean() if share is None else loss.sum() * share
    return loss.sum() if reduction == "sum" else loss


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_rows(
    name: str, tensor: Any, shape: str, first_name: str, first: Any, group: ProcessGroup | None
) -> None:
    """A matrix, or several, with numbers in them, on the device of the first argument. In a group other ranks
    may have what this one lacks, but rows have numbers."""
    check_tensor(name, tensor)
    dimensions = shape.count(",") + 1
    if tensor.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions {shape}, got shape {_shape(tensor)}")
    if group is None or not tensor.shape[-1]:
        check_filled(name, tensor)
    check_device(name, tensor, first_name, first)


def _check_settings(
    temperatures: Mapping[str, Any], reduction: Any, return_metrics: Any, backend: Any, **flags: Any
) -> None:
    """What the settings of all losses have in common."""
    for name, value in temperatures.items():
        check_temperature(name, value)
    for name, value in flags.items():
        check_flag(name, value)
    check_flag("return_metrics", return_metrics)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    check_backend(backend)


def under_autocast(tensor: Tensor) -> bool:
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """An operator decides itself what it computes in; autocast would reach the reference's own products."""
    return torch.autocast(tensor.device.type, enabled=False) if under_autocast(tensor) else nullcontext()


def _check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors of different shapes or dtypes. Under autocast dtypes may differ: there PyTorch's own
    losses take what is wide beside what is not."""
    if tensor.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {_shape(other)}, got {_shape(tensor)}")
    if tensor.dtype != other.dtype and not under_autocast(other):
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}; pass "
            f"{name}.to({other_name}.dtype), or compute the loss under torch.autocast, where they may differ"
        )


def check_temperature(name: str, value: Any) -> None:
    check_number(name, value, above=0)
    least, most = _TEMPERATURES
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least:g} to {most:g}, got {value}")


def _check_weight(name: str, value: Any) -> None:
    check_number(name, value, minimum=0)
    if not value <= _MOST_WEIGHT:
        raise ValueError(f"{name} must be at most {_MOST_WEIGHT:g}, got {value}")


def _warn_if_transposed(queue: Tensor) -> None:
    """Warn of a square queue that seems transposed: only its numbers tell. A few of either are looked at,
    where that waits for no device and no program is being traced."""
    if (
        torch.compiler.is_compiling()
        or type(queue) not in (Tensor, torch.nn.Parameter)
        or queue.device.type != "cpu"
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    ):
        return
    rows, tolerance = queue.detach(), max(1e-4, torch.finfo(queue.dtype).eps)  # of a unit vector, rounded

    def unit(vectors: Iterable[Tensor]) -> bool:
        return all(abs(math.hypot(*vector.tolist()) - 1) <= tolerance for vector in vectors)

    few = range(min(8, len(rows)))  # of an upright queue, mostly one: its first column is no unit vector
    if unit(rows[:, i] for i in few) and not unit(rows[i] for i in few):
        warnings.warn(
            f"queue, {_shape(queue)}, must hold a key in each row, but its columns are unit vectors and its "
            "rows are not: MoCo's (D, K) buffer is passed as queue.T",
            stacklevel=4,
        )


def check_backend(backend: Any) -> None:
    """Whether it can be a name at all; which names there are is known where the call is served."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a name or None, got {backend!r}")
