"""The formulas of the peers in plain PyTorch, with all their matrices: the oracles of the adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def features(count: int, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Iterator[Tensor]:
    """So many tensors of random numbers, of rows of different lengths, that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        lengths = 0.5 + torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64)
        yield (x * lengths).to(dtype).requires_grad_()


def gradients(loss: Tensor, *inputs: Tensor) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)


def nt_xent(view1: Tensor, view2: Tensor, temperature: float) -> Tensor:
    """SimCLR's: the other 2 B − 1 rows are the classes of a row."""
    rows = F.normalize(torch.cat([view1, view2]), dim=1)
    logits = rows @ rows.T / temperature
    logits = logits.masked_fill(torch.eye(len(rows), dtype=torch.bool), -torch.inf)
    count = len(view1)
    return F.cross_entropy(logits, torch.arange(2 * count).roll(count))


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo's, of rows as they are; a gradient passes through the positive to the key."""
    logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


def co2(query: Tensor, key: Tensor, bank: Tensor | None, temperature: float) -> Tensor:
    """½ (KL(P‖Q) + KL(Q‖P)) with the positive in both lists, whose P and negatives are constants."""
    query, key = F.normalize(query, dim=1), F.normalize(key.detach(), dim=1)
    held = query.detach()
    if bank is not None:
        to_keys = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ bank.T], dim=1)
        to_queries = torch.cat([(key * held).sum(dim=1, keepdim=True), key @ bank.T], dim=1)
    else:  # the positives are on the diagonals
        to_keys, to_queries = query @ key.T, key @ held.T
    q, p = (F.log_softmax(x / temperature, dim=1) for x in (to_keys, to_queries))
    both = (p.exp() * (p - q) + q.exp() * (q - p)).sum(dim=1)
    return both.mean() / 2


def simclr_by_masks(z: Tensor, indexes: Tensor, temperature: float) -> Tensor:
    """solo-learn's: the sum over all positives of a row."""
    z = F.normalize(z, dim=-1)
    similarities = torch.exp(z @ z.T / temperature)
    same = indexes[:, None] == indexes
    positive = (similarities * (same & ~torch.eye(len(z), dtype=torch.bool))).sum(dim=1)
    negative = (similarities * ~same).sum(dim=1)
    return -torch.log(positive / (positive + negative)).mean()


def among_keys(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """MoCo v3's, without its factor."""
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(query)))


def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """CLIP's, of features as they are."""
    logits, own = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
