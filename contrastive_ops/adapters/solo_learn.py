"""solo-learn's functions for SimCLR, MoCo v2+ and MoCo v3, with their arguments.

    from contrastive_ops.adapters.solo_learn import mocov2plus_loss_func, mocov3_loss_func, simclr_loss_func

As solo-learn's, they speak to all ranks where `torch.distributed` is initialised: do not gather before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_tensor
from ..functional import conic_loss, nt_xent_loss
from ._common import info_nce, multiplied, world


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """SimCLR's loss of two views of each image, by `nt_xent_loss`.

    Rows with the same index are the views of an image, in any order. Values and gradients are solo-learn's,
    and hold for temperatures whose exponentials would overflow there (below 0.0113 in float32).

    Args:
        z: (2 B, D) features of two views of each of B images, normalised here.
        indexes: (2 B,) integers, each of which is there twice. solo-learn serves any number of views, and
            labels, by the sum over all of a row's positives; the fused loss has one positive a row.
        temperature: τ, from 1e-6 to 1e6.

    Returns:
        The mean over the rows of this rank. The views of other ranks are negatives, so their indexes must be
        others.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it. On a GPU, where looking at the
            values of `indexes` would wait for it, the loss is NaN where they are not in pairs.

    Example:
        >>> import torch
        >>> from contrastive_ops.adapters.solo_learn import simclr_loss_func
        >>> z = torch.randn(8, 128, requires_grad=True)
        >>> simclr_loss_func(z, torch.arange(4).repeat(2), temperature=0.1).backward()
    """
    check_tensor("z", z)
    check_tensor("indexes", indexes, (torch.int64, torch.int32))
    if z.ndim != 2 or indexes.shape != z.shape[:1] or len(z) % 2:
        raise ValueError(
            "z must be (2 B, D) and indexes (2 B,), for two views of each image, got shapes "
            f"{tuple(z.shape)} and {tuple(indexes.shape)}{_OTHERWISE}"
        )
    in_order, order = indexes.sort(stable=True)
    first, second = in_order.view(-1, 2).unbind(dim=1)
    in_pairs = (first == second).all() & (first[1:] != first[:-1]).all()
    if indexes.is_cpu and not in_pairs:
        raise ValueError(f"indexes must hold each index twice, got {_odd_one(indexes)}{_OTHERWISE}")
    view1, view2 = z.index_select(0, order).view(-1, 2, z.shape[1]).unbind(dim=1)
    loss = nt_xent_loss(view1, view2, temperature=temperature, group=world())
    return loss if indexes.is_cpu else loss.where(in_pairs, torch.nan)


_OTHERWISE = "; for another number of views, or labels as indexes, use solo-learn's own function"


def _odd_one(indexes: Tensor) -> str:
    values, counts = indexes.unique(return_counts=True)
    odd = int((counts != 2).nonzero()[0])
    return f"{int(values[odd])} {int(counts[odd])} times"


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """MoCo v2's loss over a queue, by `info_nce_loss`.

    Values and gradients are solo-learn's, but that the queue gets none.

    Args:
        query: (B, D), taken as it is: normalise it, as solo-learn's method does.
        key: (B, D), taken as it is. It gets a gradient where it requires one.
        queue: (D, K), MoCo's buffer, which may be overwritten as soon as the call returns: it needs no copy.
        temperature: τ, from 1e-6 to 1e6.

    Returns:
        The mean over the rows.

    Raises:
        TypeError, ValueError: an argument is wrong, or `queue` requires a gradient; the message names it.

    Example:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from contrastive_ops.adapters.solo_learn import mocov2plus_loss_func
        >>> features = torch.randn(8, 128, requires_grad=True)
        >>> key, queue = normalize(torch.randn(8, 128)), normalize(torch.randn(128, 4096), dim=0)
        >>> mocov2plus_loss_func(normalize(features), key, queue, temperature=0.2).backward()
    """
    check_tensor("queue", queue)
    if queue.ndim != 2:
        raise ValueError(f"queue must be (D, K), got shape {tuple(queue.shape)}")
    check_tensor("query", query)
    check_tensor("key", key)
    return info_nce(multiplied(query), multiplied(key), queue.T, temperature=temperature, normalize=False)


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    """MoCo v3's loss of queries among the keys of the batch, times 2 τ, by `conic_loss`.

    Values and gradients are solo-learn's: with several ranks the keys are those of all and get no gradient;
    in one process they get it where they require it.

    Args:
        query: (B, D), normalised here. All ranks have as many.
        key: (B, D): row i is the positive of query row i, and a negative of the others. Normalised here.
        temperature: τ, from 1e-6 to 1e6.

    Returns:
        The mean over the rows of this rank, times 2 τ.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Example:
        >>> import torch
        >>> from contrastive_ops.adapters.solo_learn import mocov3_loss_func
        >>> mocov3_loss_func(torch.randn(8, 256, requires_grad=True), torch.randn(8, 256)).backward()
    """
    check_tensor("query", query)
    check_tensor("key", key)
    if query.ndim != 2 or key.shape != query.shape:
        raise ValueError(
            f"query and key must both be (B, D), got shapes {tuple(query.shape)} and {tuple(key.shape)}"
        )
    own = torch.arange(len(query), device=query.device)
    group = world()
    if group is not None:
        own, key = own + len(query) * group.rank(), key.detach()
    loss = conic_loss(query[None], key, own, temperature=temperature, consistency_weight=0.0, group=group)
    return loss * (2 * temperature)
