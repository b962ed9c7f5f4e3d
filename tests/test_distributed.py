"""Losses over several ranks are those of one process that has all rows and all keys."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from contrastive_ops import (
    CO2Loss,
    NTXentLoss,
    co2_loss,
    conic_loss,
    consistency_loss,
    info_nce_loss,
    nt_xent_loss,
)
from contrastive_ops._contract import PendingStep, SGDSettings
from tests import ranks
from tests.cases import mostly_thorough, rows

Group = dist.ProcessGroup

# How many rows the first ranks have; of the last, two or none.
BATCHES = {
    "equal": (6, 6, 6, 6),
    "ragged": (7, 3, 5, 1),
    "one has none": (5, 0, 4, 3),
    "the first has none": (0, 1, 1, 2),
}
KEYS = {"equal": (40, 40, 40, 40), "ragged": (37, 11, 64, 5), "one has none": (33, 0, 20, 0)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def part(x: Tensor, counts: Sequence[int], rank: int, dim: int = 0) -> Tensor:
    """The rank's of the rows of all; memory of its own."""
    return x.narrow(dim, sum(counts[:rank]), counts[rank]).detach().clone()


def some(kinds: dict[str, tuple[int, ...]], few: bool) -> list[tuple[str, tuple[int, ...]]]:
    return [item for item in kinds.items() if not few or item[0] == "one has none"]


def near(actual: Tensor, expected: Tensor, said: Any, tolerance: float | None = None) -> None:
    if tolerance is None:
        tolerance = TOLERANCE[expected.dtype] if expected.is_floating_point() else 0.0
    size = expected.double().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance * (1 + size), msg=lambda text: f"{said}: {text}"
    )


def check_queue(group: Group, dtype: torch.dtype, backend: str, few: bool) -> None:
    size, rank, dim = group.size(), group.rank(), 13
    losses: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (co2_loss, {"temperature": 0.2, "consistency_temperature": 0.1, "consistency_weight": 0.7}),
        (co2_loss, {"include_positive": True, "consistency_weight": 2.0, "consistency_temperature": 0.2}),
        (co2_loss, {"normalize": False, "temperature": 0.5, "consistency_temperature": 0.3}),
        (info_nce_loss, {"temperature": 0.07}),
        (consistency_loss, {"temperature": 0.1}),
    ]
    for of_rows, batches in some(BATCHES, few):
        for of_keys, shards in some(KEYS, few):
            b, k = batches[:size], shards[:size]
            query, key, queue = (
                rows(sum(b), dim, 0, dtype),
                rows(sum(b), dim, 1, dtype),
                rows(sum(k), dim, 2, dtype),
            )
            queue = F.normalize(queue, dim=1)
            for loss, settings in losses:
                if not settings.get("normalize", True):
                    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
                for reduction in ("mean",) if few else ("mean", "sum", "none"):
                    said = (loss.__name__, settings, reduction, of_rows, of_keys, size, backend)
                    options = {**settings, "reduction": reduction, "return_metrics": True, "backend": backend}
                    weights = rows(sum(b), 1, 3, dtype).squeeze(1)
                    whole = query.clone().requires_grad_()
                    one, metrics = loss(whole, key, queue, **options)
                    (one if reduction != "none" else one @ weights).backward()
                    assert whole.grad is not None

                    own = part(query, b, rank).requires_grad_()
                    mine, own_metrics = loss(
                        own, part(key, b, rank), part(queue, k, rank), group=group, **options
                    )
                    (mine if reduction != "none" else mine @ part(weights, b, rank)).backward()
                    assert own.grad is not None
                    scale = size if reduction == "mean" else 1  # DDP takes the mean of what the ranks have
                    near(own.grad, scale * part(whole.grad, b, rank), said)
                    for field, other in zip(metrics, own_metrics, strict=True):
                        near(other, part(field, b, rank), said)
                    if reduction == "none":
                        near(mine, part(one.detach(), b, rank), said)
                    else:
                        total = mine.detach().clone()
                        dist.all_reduce(total, group=group)
                        near(total / scale, one.detach(), said)


def check_nt_xent(group: Group, dtype: torch.dtype, backend: str, few: bool) -> None:
    size, rank, dim = group.size(), group.rank(), 13
    for of_rows, batches in some(BATCHES, few):
        b = batches[:size]
        view1, view2 = rows(sum(b), dim, 0, dtype), rows(sum(b), dim, 1, dtype)
        weights = rows(2 * sum(b), 1, 2, dtype).view(2, sum(b))
        for settings in (
            {"temperature": 0.5},
            {"temperature": 0.2, "consistency_weight": 1.5, "consistency_temperature": 0.2},
            {
                "normalize": False,
                "temperature": 2.0,
                "consistency_weight": 0.5,
                "consistency_temperature": 1.0,
            },
        ):
            for reduction in ("mean",) if few else ("mean", "sum", "none"):
                said = (settings, reduction, of_rows, size, backend)
                options: Any = {
                    **settings,
                    "reduction": reduction,
                    "return_metrics": True,
                    "backend": backend,
                }
                whole = [view.clone().requires_grad_() for view in (view1, view2)]
                one, metrics = nt_xent_loss(*whole, **options)
                (one if reduction != "none" else one @ weights.flatten()).backward()

                own = [part(view, b, rank).requires_grad_() for view in (view1, view2)]
                mine, own_metrics = nt_xent_loss(*own, group=group, **options)
                of_own = part(weights, b, rank, 1).flatten()
                (mine if reduction != "none" else mine @ of_own).backward()
                scale = size if reduction == "mean" else 1
                for x, y in zip(own, whole, strict=True):
                    assert x.grad is not None
                    assert y.grad is not None
                    near(x.grad, scale * part(y.grad, b, rank), said)
                for field, other in zip(metrics, own_metrics, strict=True):
                    near(other, part(field.view(2, -1), b, rank, 1).flatten(), said)
                if reduction != "none":
                    total = mine.detach().clone()
                    dist.all_reduce(total, group=group)
                    near(total / scale, one.detach(), said)


def check_conic(group: Group, dtype: torch.dtype, backend: str, few: bool) -> None:
    size, rank, dim = group.size(), group.rank(), 13
    for of_rows, batches in some(BATCHES, few):
        for of_keys, shards in some(KEYS, few):
            b, a = batches[:size], shards[:size]
            views = rows(3 * sum(b), dim, 0, dtype).view(3, sum(b), dim)
            weight, weights = rows(sum(a), dim, 1, dtype), rows(sum(b), 1, 2, dtype).squeeze(1)
            target = torch.arange(sum(b)) * 17 % sum(a)
            for settings in (
                {"temperature": 0.2, "num_instances": 1000},
                {"temperature": 0.5, "consistency_weight": 0.0},
            ):
                for reduction in ("mean",) if few else ("mean", "sum", "none"):
                    said = (settings, reduction, of_rows, of_keys, size, backend)
                    options: Any = {
                        **settings,
                        "reduction": reduction,
                        "return_metrics": True,
                        "backend": backend,
                    }
                    every, matrix = views.clone().requires_grad_(), weight.clone().requires_grad_()
                    one, metrics = conic_loss(every, matrix, target, **options)
                    (one if reduction != "none" else one @ weights).backward()
                    assert every.grad is not None
                    assert matrix.grad is not None

                    own, shard = (
                        part(views, b, rank, 1).requires_grad_(),
                        part(weight, a, rank).requires_grad_(),
                    )
                    mine, own_metrics = conic_loss(own, shard, part(target, b, rank), group=group, **options)
                    (mine if reduction != "none" else mine @ part(weights, b, rank)).backward()
                    assert own.grad is not None
                    assert shard.grad is not None
                    scale = size if reduction == "mean" else 1
                    near(own.grad, scale * part(every.grad, b, rank, 1), said)
                    near(shard.grad, scale / size * part(matrix.grad, a, rank), said)
                    for field, other in zip(metrics, own_metrics, strict=True):
                        near(other, part(field, b, rank, field.ndim - 1), said)
                    if reduction != "none":
                        total = mine.detach().clone()
                        dist.all_reduce(total, group=group)
                        near(total / scale, one.detach(), said)


def check_step_in_backward(group: Group, dtype: torch.dtype, backend: str, few: bool) -> None:
    size, rank, dim = group.size(), group.rank(), 13
    b, a, sgd = BATCHES["ragged"][:size], KEYS["ragged"][:size], SGDSettings(0.1, 0.9, 0.01, False)
    views = rows(2 * sum(b), dim, 0, dtype).view(2, sum(b), dim)
    weight, momentum = rows(sum(a), dim, 1, dtype), rows(sum(a), dim, 2, dtype)
    target = torch.arange(sum(b)) * 17 % sum(a)

    def step(views: Tensor, weight: Tensor, momentum: Tensor, target: Tensor, **options: Any) -> Tensor:
        views.requires_grad_(), weight.requires_grad_()
        update = PendingStep(momentum, sgd, weight=weight)
        conic_loss(views, weight, target, update=update, backend=backend, **options).backward()
        assert views.grad is not None
        return views.grad

    every = [x.clone() for x in (views, weight, momentum)]
    wanted = step(*every, target)
    own = [part(views, b, rank, 1), part(weight, a, rank), part(momentum, a, rank)]
    found = step(*own, part(target, b, rank), group=group)
    near(found, size * part(wanted, b, rank, 1), backend)
    for x, y in zip(own[1:], every[1:], strict=True):
        near(x.detach(), part(y.detach(), a, rank), backend)


def check_losses(group: Group) -> None:
    for dtype, backend in ((torch.float64, "reference"), (torch.float64, "cpu"), (torch.float32, "cpu")):
        for check in (check_queue, check_nt_xent, check_conic, check_step_in_backward):
            check(group, dtype, backend, few=False)


def check_interpreted(group: Group) -> None:
    for check in (check_queue, check_nt_xent, check_conic, check_step_in_backward):
        check(group, torch.float32, "triton", few=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", mostly_thorough([2, 3, 4], (3).__eq__))
def test_losses(size: int) -> None:
    ranks.run(check_losses, size)


@pytest.mark.slow
@pytest.mark.thorough
def test_losses_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ranks.run(check_interpreted, 3)


def check_compiled(group: Group) -> None:
    """One graph, whatever the sizes on the other ranks; backward too."""
    size, rank, dim = group.size(), group.rank(), 16
    b, k = BATCHES["ragged"][:size], KEYS["ragged"][:size]
    query, key = rows(sum(b), dim, 0, torch.float64), rows(sum(b), dim, 1, torch.float64)
    weight, target = rows(sum(k), dim, 2, torch.float64), torch.arange(sum(b)) * 7 % sum(k)

    def losses(query: Tensor, key: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        views = torch.stack([query, key])
        return (
            co2_loss(query, key.detach(), weight.detach(), group=group)
            + 2 * nt_xent_loss(query, key, consistency_weight=0.5, group=group)
            + 3 * conic_loss(views, weight, target, num_instances=1000, group=group)
        )

    results = []
    for function in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        own = [part(x, b, rank).requires_grad_() for x in (query, key)]
        own.append(part(weight, k, rank).requires_grad_())
        loss = function(*own, part(target, b, rank))
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in own)])
    for eager, compiled in zip(*results, strict=True):
        near(compiled, eager, "compiled")


class Towers(torch.nn.Module):
    """A network whose batch is shared out, and what it is trained with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 16)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def check_ddp(group: Group) -> None:
    """Two batches are accumulated, of which the second is ragged: DDP's gradients are one process's."""
    size, rank, dim = group.size(), group.rank(), 16
    k = KEYS["ragged"][:size]
    queue = F.normalize(rows(sum(k), dim, 9, torch.float64), dim=1)
    weight = rows(sum(k), dim, 10, torch.float64)
    single, shared = Towers(), torch.nn.parallel.DistributedDataParallel(Towers(), process_group=group)
    single_weight, shard = (x.requires_grad_() for x in (weight.clone(), part(weight, k, rank)))

    def loss(
        net: torch.nn.Module, x: Tensor, weight: Tensor, queue: Tensor, target: Tensor, **group: Any
    ) -> Tensor:
        features = net(x.flatten(0, 1)).view(2, -1, dim)
        return (
            nt_xent_loss(*features, **group)
            + co2_loss(features[0], features[1].detach(), queue, **group)
            + conic_loss(features, weight, target, **group)
        )

    for i, b in enumerate((BATCHES["equal"][:size], BATCHES["one has none"][:size])):
        x = rows(2 * sum(b), 12, i, torch.float64).view(2, sum(b), 12)
        target = torch.arange(sum(b)) * 7 % sum(k)
        loss(single, x, single_weight, queue, target).backward()
        with shared.no_sync() if i == 0 else torch.enable_grad():
            own = part(x, b, rank, 1), shard, part(queue, k, rank), part(target, b, rank)
            loss(shared, *own, group=group).backward()
    for one, other in zip(single.parameters(), shared.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        near(other.grad, one.grad, "DDP")
    assert single_weight.grad is not None
    assert shard.grad is not None
    near(shard.grad, part(single_weight.grad, k, rank), "the weight beside DDP")


def check_autocast(group: Group) -> None:
    """Features in half precision are multiplied in it, with each rank's gradients in their dtype."""
    size, rank, dim = group.size(), group.rank(), 32
    b, k = BATCHES["ragged"][:size], KEYS["ragged"][:size]
    x, matrix = rows(sum(b), dim, 0, torch.float32), rows(dim, dim, 1, torch.float32)
    key, queue = rows(sum(b), dim, 2, torch.float32), F.normalize(rows(sum(k), dim, 3, torch.float32), dim=1)

    def of(x: Tensor, key: Tensor, queue: Tensor, scale: int, **options: Any) -> list[Tensor]:
        net = matrix.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            features = x @ net
            assert features.dtype == torch.bfloat16
            loss = co2_loss(features, key, queue, **options) + nt_xent_loss(
                features, key.to(features.dtype), **options
            )
        loss.backward()
        assert net.grad is not None
        return [loss.detach() / scale, net.grad / scale]

    wanted = of(x, key, queue, 1)
    found = of(part(x, b, rank), part(key, b, rank), part(queue, k, rank), size, group=group)
    for one, other in zip(wanted, found, strict=True):
        dist.all_reduce(other, group=group)
        near(other, one, "autocast", 2e-2)


def check_peers(group: Group) -> None:
    """What open_clip's and lightly's losses give that gather features with their gradients."""
    size, rank, batch, dim, tau = group.size(), group.rank(), 5, 16, 0.07
    image, text = (F.normalize(rows(size * batch, dim, i, torch.float64), dim=1) for i in range(2))
    b = [batch] * size

    def gathered(x: Tensor) -> Tensor:
        return torch.cat(torch.distributed.nn.functional.all_gather(x, group=group))

    def open_clip(image: Tensor, text: Tensor) -> Tensor:
        every_image, every_text = gathered(image), gathered(text)
        logits = every_image @ every_text.T / tau
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def ours(image: Tensor, text: Tensor) -> Tensor:
        own = torch.arange(batch) + rank * batch
        settings: Any = {"temperature": tau, "consistency_weight": 0.0, "group": group}
        to_text = conic_loss(image[None], text, own, **settings)
        to_image = conic_loss(text[None], image, own, **settings)
        return (to_text + to_image) / 2

    def lightly(view1: Tensor, view2: Tensor) -> Tensor:  # NTXentLoss(gather_distributed=True)
        every = torch.cat([gathered(view1), gathered(view2)])
        total = len(every) // 2
        similarities = every @ every.T / tau
        similarities.fill_diagonal_(-torch.inf)
        own = torch.arange(batch) + rank * batch
        labels = torch.cat([own + total, own])
        return F.cross_entropy(similarities[torch.cat([own, own + total])], labels)

    def ours_of_views(view1: Tensor, view2: Tensor) -> Tensor:
        return nt_xent_loss(view1, view2, temperature=tau, group=group)

    for theirs, mine in ((open_clip, ours), (lightly, ours_of_views)):
        results = []
        for loss in (theirs, mine):
            own = [part(x, b, rank).requires_grad_() for x in (image, text)]
            value = (
                loss(*(2 * x for x in own)) if loss is mine else loss(*(F.normalize(x, dim=1) for x in own))
            )
            value.backward()
            total = value.detach().clone()
            dist.all_reduce(total, group=group)
            results.append([total, *(x.grad for x in own)])
        for one, other in zip(*results, strict=True):
            near(other, one, mine.__name__)


def check_refusals(group: Group) -> None:
    rank, dim = group.rank(), 8
    good = {"temperature": 0.2}
    query, key, queue = (rows(4, dim, i, torch.float32) for i in range(3))
    weight, target, views = rows(6, dim, 3, torch.float32), torch.arange(4), torch.stack([query, key])
    odd = rank == 1
    settings = {"temperature": 0.3 if odd else 0.2, "group": group}
    wrong = {"temperature": -1.0 if odd else 0.2, "group": group}
    narrow = [x[:, :7] if odd else x for x in (query, key)]
    wide = [x.double() if odd else x for x in (query, key)]
    no_queue: Any = None if odd else queue
    learnt = queue.clone().requires_grad_() if odd else queue
    backend = "reference" if odd else "cpu"
    outside = target + 1000 if odd else target
    cases: list[tuple[str, Callable[[], Any]]] = [
        (r"temperature is 0\.2 on .* 0\.3 on rank 1", lambda: info_nce_loss(query, key, queue, **settings)),
        ("temperature", lambda: info_nce_loss(query, key, queue, **wrong)),
        ("D is 8 on .* 7 on rank 1", lambda: nt_xent_loss(*narrow, group=group)),
        ("the dtype of query is", lambda: co2_loss(*wide, queue, group=group)),
        (
            "the operation is",
            lambda: (nt_xent_loss if odd else co2_loss)(query, key, *[queue] * (not odd), group=group),
        ),
        ("from 0 to .* on rank 1", lambda: conic_loss(views, weight, outside, group=group)),
        ("num_instances", lambda: conic_loss(views, weight, target, num_instances=7, group=group)),
        ("at least one must have a query", lambda: co2_loss(query[:0], key[:0], queue, group=group)),
        ("at least one must have a key", lambda: co2_loss(query, key, queue[:0], group=group)),
        ("queue must be a torch.Tensor", lambda: co2_loss(query, key, no_queue, group=group)),
        ("backend", lambda: co2_loss(query, key, queue, backend=backend, group=group)),
        ("requires", lambda: co2_loss(query, key, learnt, group=group)),
    ]
    for message, call in cases:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            call()
        assert info_nce_loss(query, key, queue, group=group, **good).isfinite()  # all ranks go on together
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup or None"):
        nt_xent_loss(query, key, group="world")  # type: ignore[arg-type]


def check_modules(group: Group) -> None:
    query, key, queue = (rows(4, 8, i + group.rank(), torch.float32) for i in range(3))
    assert CO2Loss(group=group)(query, key, queue) == co2_loss(query, key, queue, group=group)
    module = copy.deepcopy(NTXentLoss(group=group))
    assert module.group is group
    assert module(query, key) == nt_xent_loss(query, key, group=group)


def check_manners(group: Group) -> None:
    for check in (check_compiled, check_ddp, check_autocast, check_peers, check_refusals, check_modules):
        check(group)


@pytest.mark.parametrize("size", mostly_thorough([2, 3], (2).__eq__))
def test_manners(size: int) -> None:
    ranks.run(check_manners, size)


def check_operators(group: Group) -> None:
    operators, name = torch.ops.contrastive_ops, group.group_name
    query, key, queue = (rows(n, 8, i) for i, n in enumerate((4, 4, 16)))
    views, target = rows(8, 8, 3).view(2, 4, 8), torch.tensor([1, 3, 5, 7])
    of_pairs, of_rows = (0.2, 0.1, 0.3, True, "reference", name), (0.2, None, 0.3, "reference", True, name)
    *_, of_views = operators.nt_xent_across_ranks(views, *of_pairs)
    *_, of_weight = operators.conic_across_ranks(views, queue, target, *of_rows)
    known, settings = (rows(4, 1, 4).squeeze(1), views, queue), (0.2, 0.3)
    backend = ("reference", True, name)
    learnt = [x.clone().requires_grad_() for x in (query, views, queue)]
    calls: dict[str, tuple[Any, ...]] = {
        "co2": (learnt[0], key, queue, 0.2, 0.1, 1.0, 0.3, False, True, True, "reference", name),
        "nt_xent": (learnt[1], *of_pairs),
        "conic": (learnt[1], learnt[2], target, *of_rows),
    }
    backwards: dict[str, tuple[Any, ...]] = {
        "nt_xent": (rows(8, 1, 5).squeeze(1), views, of_views, *of_pairs),
        "conic": (*known, target, of_weight, *settings, True, True, *backend),
    }
    for loss, arguments in calls.items():
        torch.library.opcheck(getattr(operators, f"{loss}_across_ranks"), arguments)
    for loss, arguments in backwards.items():
        torch.library.opcheck(getattr(operators, f"{loss}_across_ranks_backward"), arguments)
    step = (*known, torch.zeros_like(queue), target, of_weight, *settings, 0.1, 0.9, 0.0, False, *backend)
    torch.library.opcheck(operators.conic_across_ranks_backward_sgd_, step)

    # A group of one rank is as none.
    for loss in (co2_loss, info_nce_loss, consistency_loss):
        torch.testing.assert_close(loss(query, key, queue, group=group), loss(query, key, queue))
    torch.testing.assert_close(nt_xent_loss(query, key, group=group), nt_xent_loss(query, key))
    torch.testing.assert_close(
        conic_loss(views, queue, target, group=group), conic_loss(views, queue, target)
    )


def test_operators() -> None:
    ranks.run(check_operators, 1)
