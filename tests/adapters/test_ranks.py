"""The adapters among the ranks of torch.distributed give each rank what the peers give it there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as gathering
import torch.nn.functional as F
from torch import Tensor

from contrastive_ops.adapters.lightly import NTXentLoss
from contrastive_ops.adapters.open_clip import ClipLoss
from contrastive_ops.adapters.solo_learn import mocov3_loss_func, simclr_loss_func
from tests import ranks
from tests.adapters import formulas
from tests.adapters.formulas import features, gradients

BATCH, DIM = 5, 12
EXACT: Any = {"rtol": 1e-10, "atol": 1e-12}


def gathered(x: Tensor) -> Tensor:
    """The rows of all ranks; backward adds up what all ranks hand to each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of PyTorch have another name for it
        return torch.cat(gathering.all_gather(x))


def held(x: Tensor, *, own: bool) -> Tensor:
    """The rows of all ranks as constants, but for this rank's if they are to have their gradient."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    if own:
        parts[dist.get_rank()] = x
    return torch.cat(parts)


def check(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **EXACT)
    # In turn: each backward exchanges what belongs to the other rank.
    found = gradients(ours, *inputs)
    torch.testing.assert_close(found, gradients(theirs, *inputs), **EXACT)


def own_among(x: Tensor) -> Tensor:
    return torch.arange(len(x)) + len(x) * dist.get_rank()


def clip(image: Tensor, text: Tensor, scale: Tensor, local_loss: bool, gather_with_grad: bool) -> Tensor:
    """open_clip's, by what it gathers."""
    gather = gathered if gather_with_grad else lambda x: held(x, own=not local_loss)
    every_image, every_text = gather(image), gather(text)
    if not local_loss:
        return formulas.clip(every_image, every_text, scale)
    own = own_among(image)
    to_text, to_image = (scale * image @ every_text.T, scale * text @ every_image.T)
    return (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2


def check_clip(rank: int, size: int) -> None:
    for local_loss in (False, True):
        for gather_with_grad in (False, True):
            raw = tuple(features(2, BATCH, DIM, seed=rank))
            log_scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
            image, text = (F.normalize(x, dim=1) for x in raw)
            kind = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
            ours = ClipLoss(**kind, rank=rank, world_size=size)(image, text, log_scale.exp())
            check(ours, clip(image, text, log_scale.exp(), **kind), *raw, log_scale)
            # Features that nothing was computed for are leaves, and not to be taken for parameters.
            leaves = [x.detach().requires_grad_() for x in (image, text)]
            of_leaves = gradients(ClipLoss(**kind, rank=rank, world_size=size)(*leaves, 10.0), *leaves)
            again = ClipLoss(**kind, rank=rank, world_size=size)(image, text, 10.0)
            torch.testing.assert_close(of_leaves, gradients(again, image, text), **EXACT)
    with pytest.raises(ValueError, match="rank and world_size must be those of"):
        ClipLoss(rank=1 - rank, world_size=size)(image, text, 10.0)


def check_lightly(rank: int, size: int) -> None:
    out0, out1 = features(2, BATCH, DIM, seed=rank)
    every = F.normalize(torch.cat([gathered(out0), gathered(out1)]), dim=1)
    logits = (every @ every.T / 0.3).masked_fill(torch.eye(len(every), dtype=torch.bool), -torch.inf)
    own = own_among(out0)
    rows, positives = torch.cat([own, own + size * BATCH]), torch.cat([own + size * BATCH, own])
    theirs = F.cross_entropy(logits[rows], positives)
    check(NTXentLoss(0.3, gather_distributed=True)(out0, out1), theirs, out0, out1)
    check(NTXentLoss(0.3)(out0, out1), formulas.nt_xent(out0, out1, 0.3), out0, out1)

    torch.manual_seed(rank)
    criterion = NTXentLoss(0.3, (3 * BATCH, DIM), gather_distributed=True).double()
    query, key = (F.normalize(x, dim=1) for x in (out0, out1))
    bank = criterion.memory_bank.bank.clone()
    check(criterion(out0, out1), formulas.info_nce(query, key, bank, 0.3), out0, out1)
    torch.testing.assert_close(criterion.memory_bank.bank[: 2 * BATCH], held(key.detach(), own=False))
    criterion(out0, out1)
    assert criterion.memory_bank.bank_ptr.tolist() == [0]


def check_solo_learn(rank: int, size: int) -> None:
    (z,) = features(1, 2 * BATCH, DIM, seed=rank)
    indexes = torch.arange(BATCH).repeat(2) + BATCH * rank
    every, every_index = gathered(z), held(indexes, own=False)
    unit = F.normalize(every, dim=1)
    similarities = torch.exp(unit @ unit.T / 0.3)
    same = every_index[:, None] == every_index
    positive = (similarities * (same & ~torch.eye(len(every), dtype=torch.bool))).sum(dim=1)
    losses = -torch.log(positive / (positive + (similarities * ~same).sum(dim=1)))
    check(simclr_loss_func(z, indexes, 0.3), losses[own_among(z)].mean(), z)

    query, key = features(2, BATCH, DIM, seed=rank)
    every_key = F.normalize(held(key, own=False), dim=1)
    logits = F.normalize(query, dim=1) @ every_key.T / 0.3
    ours = mocov3_loss_func(query, key, 0.3)
    check(ours, F.cross_entropy(logits, own_among(query)) * 0.6, query, key)


def worker(group: dist.ProcessGroup) -> None:
    rank, size = group.rank(), group.size()
    check_clip(rank, size)
    check_lightly(rank, size)
    check_solo_learn(rank, size)


@pytest.mark.slow
def test_two_ranks_get_what_the_peers_give_them() -> None:
    ranks.run(worker, 2)
