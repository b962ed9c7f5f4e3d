"""The losses over the ranks of a process group: as if one process had all rows and all keys.

Around the three steps of a loss (`_contract.py`) the ranks exchange rows, a few numbers a row, and gradients
of rows. A rank computes 1/P of the pairs, and what it holds beside its own rows and keys are the rows of all.

- `co2`, a queue in shards: every rank meets the rows of all with its own keys. Partials go to the rank whose
  rows they are, which merges them; so do gradients, with what the merge has found in between.
- `nt_xent`, where rows are each other's keys: every rank meets its own rows with those of all.
- `conic`, a weight in shards: as of `co2`, and the gradient of its own shard needs no exchange.

A rank works on what it has itself while the rows of others are on their way. Each operation here is one
operator: sizes that only the ranks together know stay inside, so torch.compile sees shapes that each rank
knows alone. What comes from several ranks is added up in their order.

Backward gives each rank the derivative, in its own inputs, of the sum of all ranks' losses, of which
DistributedDataParallel makes the mean for the parameters behind them. A shard of a weight that is a parameter
itself, a leaf, gets that mean at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _backends, _ops
from ._contract import (
    CO2Partial,
    CO2Row,
    CO2Settings,
    ConICCoefficients,
    ConICSettings,
    NTXentCoefficients,
    NTXentKeys,
    NTXentSettings,
    SGDSettings,
    computed_in,
)
from ._ranks import Disagreement, Ranks, named

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# A CUDA graph would repeat what the ranks agreed on when it was captured.
_define = partial(
    _ops.define, tags=(torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
)

_define(
    "co2_across_ranks(Tensor query, Tensor key, Tensor queue, float temperature, "
    "float consistency_temperature, float instance_weight, float consistency_weight, bool include_positive, "
    "bool normalize, bool compute_gradient, str? backend, str group) -> (Tensor loss, Tensor instance_loss, "
    "Tensor consistency_loss, Tensor positive_rank, Tensor share, Tensor gradient)"
)
_define(
    "nt_xent_across_ranks(Tensor views, float temperature, float consistency_temperature, "
    "float consistency_weight, bool normalize, str? backend, str group) -> (Tensor loss, "
    "Tensor instance_loss, Tensor consistency_loss, Tensor positive_rank, Tensor share, Tensor statistics)"
)
_define(
    "nt_xent_across_ranks_backward(Tensor grad_loss, Tensor views, Tensor statistics, float temperature, "
    "float consistency_temperature, float consistency_weight, bool normalize, str? backend, str group) "
    "-> Tensor"
)
_define(
    "conic_across_ranks(Tensor views, Tensor weight, Tensor target, float temperature, int? num_instances, "
    "float consistency_weight, str? backend, bool average_weight, str group) -> (Tensor loss, "
    "Tensor classification_loss, Tensor consistency_loss, Tensor positive_rank, Tensor share, "
    "Tensor statistics)"
)
_define(
    "conic_across_ranks_backward(Tensor grad_loss, Tensor views, Tensor weight, Tensor target, "
    "Tensor statistics, float temperature, float consistency_weight, bool views_need_grad, "
    "bool weight_needs_grad, str? backend, bool average_weight, str group) "
    "-> (Tensor grad_views, Tensor grad_weight)"
)
_define(
    "conic_across_ranks_backward_sgd_(Tensor grad_loss, Tensor views, Tensor(a!) weight, "
    "Tensor(b!) momentum_buffer, Tensor target, Tensor statistics, float temperature, "
    "float consistency_weight, float lr, float momentum, float weight_decay, bool nesterov, str? backend, "
    "bool average_weight, str group) -> Tensor grad_views"
)


def telling(group: ProcessGroup | None, operation: str) -> AbstractContextManager[Any]:
    """Around the checks of a loss: what is refused on one rank, the others are told of."""
    if group is None or torch.compiler.is_compiling():
        return nullcontext()
    return Ranks(group, operation).telling()


def _told(operation: str, arguments: Sequence[Any]) -> AbstractContextManager[Any]:
    """Around the checks of an operator, whose last argument is the group's name."""
    return Ranks(named(arguments[-1]), operation).telling()


def _agree(
    operation: str, operator: str, rows: Tensor, backend: str | None, group: str, alike: dict[str, Any],
    own: dict[str, int],
) -> tuple[Ranks, Any, dict[str, list[int]]]:  # fmt: skip
    """The ranks, what serves such rows on all of them, and what each says of itself."""
    ranks = Ranks(named(group), operation)
    with ranks.telling():
        kernels = _backends.select(backend, operator, rows)
    return ranks, kernels, ranks.agree({**alike, "the backend": kernels.__name__}, **own)


def _need(ranks: Ranks, what: str, counts: Sequence[int]) -> None:
    if not any(counts):
        raise Disagreement(f"{ranks.operation} among {ranks.size} ranks: at least one must have {what}")


def _share(ranks: Ranks, counts: Sequence[int], like: Tensor) -> Tensor:
    """P / ΣB, (): the sum of a rank's losses times this has the mean of all for its mean over the ranks."""
    return like.new_full((), ranks.size / sum(counts), dtype=computed_in(like))


def _of_others(ranks: Ranks, by_rank: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The rows of all ranks but this one."""
    own = by_rank[ranks.rank]
    return torch.cat([*by_rank[: ranks.rank], own.narrow(dim, 0, 0), *by_rank[ranks.rank + 1 :]], dim)


def _but_own(ranks: Ranks, counts: Sequence[int]) -> list[int]:
    return [0 if rank == ranks.rank else count for rank, count in enumerate(counts)]


# ---- A queue in shards ----


def _co2(query: Tensor, key: Tensor, queue: Tensor, *settings_and_more: Any) -> tuple[Tensor, ...]:
    *values, compute_gradient, backend, group = settings_and_more
    settings = CO2Settings(*values)
    alike = {
        "D": query.shape[1],
        "the dtype of query": query.dtype,
        "the dtype of key": key.dtype,
        "the dtype of queue": queue.dtype,
        **settings._asdict(),
    }
    own = {"rows": len(query), "keys": len(queue), "gradient": compute_gradient}
    ranks, kernels, said = _agree("co2_loss", "co2", query, backend, group, alike, own)
    _need(ranks, "a query", said["rows"])
    _need(ranks, "a key in its queue", said["keys"])
    shards = _QueueShards(ranks, kernels, settings, said["rows"], said["keys"])
    return shards.losses(query, key, queue, compute_gradient, any(said["gradient"]))


class _QueueShards:
    """The steps of `co2` over the shards of a queue."""

    def __init__(
        self, ranks: Ranks, kernels: Any, settings: CO2Settings, rows: Sequence[int], keys: Sequence[int]
    ) -> None:
        self.ranks, self.kernels, self.settings, self.rows, self.keys = ranks, kernels, settings, rows, keys
        self.own, self.has_keys = rows[ranks.rank], keys[ranks.rank] > 0
        # A rank sends to each other one that has rows, and gets from each other one that has keys.
        self.sent = _but_own(ranks, [count * self.has_keys for count in rows])
        self.received = _but_own(ranks, [self.own * (count > 0) for count in keys])

    def losses(
        self, query: Tensor, key: Tensor, queue: Tensor, compute_gradient: bool, anyone_needs_gradient: bool
    ) -> tuple[Tensor, ...]:
        gathering = self.ranks.gather([query, key], self.rows, [0, 0])
        own_partial, record = self.own_statistics(query, key, queue)
        others = [_of_others(self.ranks, by_rank) for by_rank in gathering.wait()]
        partial = own_partial[:, :0]
        if self.has_keys and len(others[0]):
            partial, _ = self.kernels.co2_statistics(*others, queue, self.settings)
        arrived = self.to_owners(partial[0], own_partial[0])

        dtype = computed_in(query)
        losses = [query.new_empty(0, dtype=dtype) for _ in range(3)]
        rank = query.new_empty(0, dtype=torch.int64)
        if self.own:
            *losses, rank, record = self.kernels.co2_merge(torch.stack(arrived), record, self.settings)
        gradient = query.new_empty((0, query.shape[1]), dtype=dtype)
        if anyone_needs_gradient:
            found = self.gradient(query, key, queue, record, others)
            gradient = found if compute_gradient else gradient
        loss, instance, consistency = (each.to(dtype) for each in losses)
        return loss, instance, consistency, rank, _share(self.ranks, self.rows, query), gradient

    def own_statistics(self, query: Tensor, key: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        """The partial over this rank's keys, without meaning where it has none, and the rows' records."""
        if not self.own:
            partial, record = (
                query.new_empty(shape, dtype=torch.float64)
                for shape in ((1, 0, len(CO2Partial._fields)), (0, len(CO2Row._fields)))
            )
            return partial, record
        # What is known of a row without keys does not depend on one that stands in for a shard of none.
        return self.kernels.co2_statistics(query, key, queue if self.has_keys else key[:1], self.settings)

    def gradient(
        self, query: Tensor, key: Tensor, queue: Tensor, record: Tensor, others: Sequence[Tensor]
    ) -> Tensor:
        """dL/dq (B, D) of this rank's rows, over the keys of all."""
        gathering = self.ranks.gather([record], self.rows, [0])
        own = query.new_empty((self.own, query.shape[1]), dtype=computed_in(query))
        if self.own and self.has_keys:
            own = self.kernels.co2_gradient(query, key, queue, record, self.settings)
        (by_rank,) = gathering.wait()
        parts = own[:0]
        if self.has_keys and len(others[0]):
            records = _of_others(self.ranks, self.without_positives(by_rank))
            parts = self.kernels.co2_gradient(*others, queue, records, self.settings)
        first, *rest = self.to_owners(parts, own)
        return sum(rest, start=first)

    def without_positives(self, by_rank: Sequence[Tensor]) -> list[Tensor]:
        """The rows' records with ∂L/∂s_+ for those alone whose positive counts here: with the keys of its own
        rank, or with the first keys there are where that has none."""
        first = next(rank for rank, count in enumerate(self.keys) if count)
        records = []
        for rank, record in enumerate(by_rank):
            if self.keys[rank] or first != self.ranks.rank:
                record = record.clone()
                record[:, CO2Row._fields.index("grad_positive")] = 0
            records.append(record)
        return records

    def to_owners(self, of_others: Tensor, own: Tensor) -> list[Tensor]:
        """Send what was found for the rows of others; returns, in the order of the ranks, what each that has
        keys has found for the rows of this one."""
        arrived = self.ranks.send(of_others, self.sent, self.received).wait()
        arrived[self.ranks.rank] = own
        return [each for each, count in zip(arrived, self.keys, strict=True) if count]


# ---- Rows that are each other's keys ----


def _agree_on_views(
    operation: str, views: Tensor, settings: NTXentSettings, backend: str | None, group: str
) -> tuple[Ranks, Any, list[int]]:
    alike = {"D": views.shape[2], "the dtype of the views": views.dtype, **settings._asdict()}
    own = {"rows": views.shape[1]}
    ranks, kernels, said = _agree(operation, "nt_xent", views, backend, group, alike, own)
    _need(ranks, "views", said["rows"])
    return ranks, kernels, said["rows"]


def _nt_xent(views: Tensor, *settings_and_more: Any) -> tuple[Tensor, ...]:
    *values, backend, group = settings_and_more
    settings = NTXentSettings(*values)
    ranks, kernels, counts = _agree_on_views("nt_xent_loss", views, settings, backend, group)
    gathering = ranks.gather([views], counts, [1])
    batch, dtype = views.shape[1], computed_in(views)
    keys = NTXentKeys(views, torch.arange(batch, device=views.device))
    if batch:
        partial, positive = kernels.nt_xent_statistics(views, settings, keys)
    (by_rank,) = gathering.wait()
    share = _share(ranks, [2 * count for count in counts], views)
    if not batch:
        loss, instance, consistency = (views.new_empty(0, dtype=dtype) for _ in range(3))
        statistics = views.new_empty((0, len(NTXentCoefficients._fields)), dtype=torch.float64)
        return loss, instance, consistency, views.new_empty(0, dtype=torch.int64), share, statistics
    others = _of_others(ranks, by_rank, 1)
    if others.shape[1]:
        keys = NTXentKeys(others, torch.full_like(keys.target, -1))
        more, _ = kernels.nt_xent_statistics(views, settings, keys)
        partial = torch.cat([partial, more])
    *losses, rank, statistics = kernels.nt_xent_merge(partial, positive, settings)
    loss, instance, consistency = (each.to(dtype) for each in losses)
    return loss, instance, consistency, rank, share, statistics


def _nt_xent_backward(
    grad_loss: Tensor, views: Tensor, statistics: Tensor, *settings_and_more: Any
) -> Tensor:
    *values, backend, group = settings_and_more
    settings, batch = NTXentSettings(*values), views.shape[1]
    operation = "the backward of nt_xent_loss"
    ranks, kernels, counts = _agree_on_views(operation, views, settings, backend, group)
    known = [views, grad_loss.view(2, batch), statistics.view(2, batch, statistics.shape[1])]
    gathering = ranks.gather(known, counts, [1, 1, 1])
    rows = grad_loss, views, statistics, settings
    gradient = views.new_empty(views.shape)
    if batch:
        own = torch.arange(batch, device=views.device)
        gradient = kernels.nt_xent_gradient(*rows, NTXentKeys(views, own, grad_loss, statistics))
    others, *of_others = (_of_others(ranks, by_rank, 1) for by_rank in gathering.wait())
    if batch and others.shape[1]:
        keys = NTXentKeys(others, torch.full_like(own, -1), *(each.flatten(0, 1) for each in of_others))
        more = kernels.nt_xent_gradient(*rows, keys)
        gradient = (gradient.to(computed_in(views)) + more).to(views.dtype)
    return gradient


# ---- A weight in shards ----


class _WeightShards:
    """The steps of `conic` over the shards of a weight.

    Attributes:
        rows: how many rows the shards have.
        views, target: the views of all ranks (V, ΣB, D), and which of this rank's rows each owns, or −1.
    """

    def __init__(
        self, operation: str, views: Tensor, weight: Tensor, target: Tensor, alike: dict[str, Any],
        backend: str | None, group: str,
    ) -> None:  # fmt: skip
        lowest, highest = 0, -1
        if target.is_cpu and len(target):  # a GPU's would have to be waited for
            lowest, highest = (int(extreme) for extreme in target.aminmax())
        alike = {
            "V": len(views),
            "D": views.shape[2],
            "the dtype of views": views.dtype,
            "the dtype of weight": weight.dtype,
            **alike,
        }
        own = {"batch": views.shape[1], "rows": len(weight), "lowest": lowest, "highest": highest}
        ranks, self.kernels, said = _agree(operation, "conic", views, backend, group, alike, own)
        self.ranks = ranks
        self.counts, self.shards, self.own_views, self.weight = said["batch"], said["rows"], views, weight
        _need(ranks, "views", self.counts)
        _need(ranks, "a row of the weight", self.shards)
        self.rows = sum(self.shards)
        for rank, (low, high) in enumerate(zip(said["lowest"], said["highest"], strict=True)):
            if low < 0 or high >= self.rows:
                raise ValueError(
                    f"target must be rows of the whole weight, from 0 to {self.rows - 1}, got values from "
                    f"{low} to {high} on rank {rank}"
                )
        self.first = sum(self.shards[: ranks.rank])
        self.total = sum(self.counts)

    def gather(self, target: Tensor, *more: Tensor, row: Sequence[int] = ()) -> list[Tensor]:
        """The views and targets of all ranks, and more of them; `target` is what operators are given."""
        tensors = [self.own_views, target, *more]
        gathering = self.ranks.gather(tensors, self.counts, [1, 0, *row])
        every = zip(gathering.wait(), (1, 0, *row), strict=True)
        views, rows, *others = (torch.cat(by_rank, dim) for by_rank, dim in every)
        self.views, self.outside = views, (rows < 0) | (rows >= self.rows)
        here = (rows >= self.first) & (rows < self.first + len(self.weight))
        self.target = torch.where(here, rows - self.first, -1)
        return others

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's of what all views have."""
        begin = sum(self.counts[: self.ranks.rank])
        return x.narrow(dim, begin, self.counts[self.ranks.rank])

    def to_owners(self, x: Tensor) -> list[Tensor]:
        """Of (V, ΣB, …), what each rank with a part of the weight has for this rank's views: (V, B, …)."""
        return self.arrived(self.send(x))

    def send(self, x: Tensor) -> Any:
        batch = self.counts[self.ranks.rank]
        sent = [count * (len(self.weight) > 0) for count in self.counts]
        received = [batch * (rows > 0) for rows in self.shards]
        return self.ranks.send(x.transpose(0, 1) if sum(sent) else x.transpose(0, 1)[:0], sent, received)

    def arrived(self, sending: Any) -> list[Tensor]:
        parts = sending.wait()
        return [part.transpose(0, 1) for part, rows in zip(parts, self.shards, strict=True) if rows]


def _conic(
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    num_instances: int | None,
    consistency_weight: float,
    backend: str | None,
    average_weight: bool,
    group: str,
) -> tuple[Tensor, ...]:
    alike = {
        "temperature": temperature,
        "num_instances": num_instances,
        "consistency_weight": consistency_weight,
        "whether weight is a leaf": average_weight,
    }
    shards = _WeightShards("conic_loss", views, weight, target, alike, backend, group)
    compensation = 1.0
    if num_instances is not None:
        if num_instances < shards.rows:
            raise ValueError(
                f"num_instances must be at least the {shards.rows} rows of the whole weight, "
                f"got {num_instances}"
            )
        if shards.rows > 1:
            compensation = (num_instances - 1) / (shards.rows - 1)
    settings = ConICSettings(temperature, consistency_weight, compensation)
    shards.gather(target)

    kernels, (count, batch, _), everyone = shards.kernels, views.shape, shards.total
    # A rank that has a view's row tells all others of its similarity, which its negatives are compared with.
    positives = views.new_zeros((count, everyone, 2), dtype=torch.float64)
    if len(weight):
        here = (shards.target >= 0)[:, None]
        found = kernels.conic_positives(shards.views, weight, shards.target)
        positives = torch.where(here, found.view(count, everyone, 2), positives)
    positives = shards.ranks.sum(positives).masked_fill(shards.outside[:, None], torch.nan)
    # Where there is no part of the weight, a row that stands in for it tells what partials look like.
    of_rows, part_of_weight = positives.view(-1, 2), weight if len(weight) else shards.views[0, :1]
    found = kernels.conic_statistics(shards.views, part_of_weight, shards.target, of_rows, settings)
    parts = shards.to_owners(found.view(count, everyone, -1))

    dtype, share = computed_in(views), _share(shards.ranks, shards.counts, views)
    if not batch:
        loss, consistency = (views.new_empty(0, dtype=dtype) for _ in range(2))
        classification = views.new_empty((count, 0), dtype=dtype)
        rank = views.new_empty((count, 0), dtype=torch.int64)
        statistics = views.new_empty((count, 0, len(ConICCoefficients._fields)), dtype=torch.float64)
        return loss, classification, consistency, rank, share, statistics
    own = shards.own(positives, 1).reshape(-1, 2)
    stacked = torch.stack([part.reshape(count * batch, -1) for part in parts])
    loss, classification, consistency, rank, statistics = kernels.conic_merge(stacked, own, views, settings)
    return loss.to(dtype), classification.to(dtype), consistency.to(dtype), rank, share, statistics


class _Backward:
    """What the two backwards of `conic` begin with: everything that is known of the views of all ranks."""

    def __init__(
        self, grad_loss: Tensor, views: Tensor, weight: Tensor, target: Tensor, statistics: Tensor,
        temperature: float, consistency_weight: float, alike: dict[str, Any], backend: str | None, group: str,
    ) -> None:  # fmt: skip
        operation = "the backward of conic_loss"
        alike = {"temperature": temperature, "consistency_weight": consistency_weight, **alike}
        self.shards = shards = _WeightShards(operation, views, weight, target, alike, backend, group)
        self.grad_loss, self.statistics = shards.gather(target, grad_loss, statistics, row=[0, 1])
        # Every rank with a part of the weight adds its share of the views' consistency.
        parts = sum(rows > 0 for rows in shards.shards)
        self.settings = ConICSettings(temperature, consistency_weight / parts)
        self.rows = shards.views, weight, shards.target, self.statistics, self.settings

    def sum(self, parts: Sequence[Tensor], like: Tensor, factor: int = 1) -> Tensor:
        """The gradients of this rank's views, whose parts are of all shards."""
        total = parts[0].to(computed_in(like))
        for part in parts[1:]:
            total = total + part
        return (total * factor if factor != 1 else total).to(like.dtype).contiguous()


def _conic_backward(
    grad_loss: Tensor,
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    statistics: Tensor,
    temperature: float,
    consistency_weight: float,
    views_need_grad: bool,
    weight_needs_grad: bool,
    backend: str | None,
    average_weight: bool,
    group: str,
) -> tuple[Tensor, Tensor]:
    alike = {"whether views need a gradient": views_need_grad}
    every = _Backward(
        grad_loss, views, weight, target, statistics, temperature, consistency_weight, alike, backend, group
    )
    shards, gradient = every.shards, every.shards.kernels.conic_gradient
    grad_views, grad_weight = views.new_empty((0, *views.shape[1:])), weight.new_empty((0, weight.shape[1]))
    sending = None
    if views_need_grad:
        found = views.new_empty((len(views), 0, views.shape[2]))
        if len(weight):
            found, _ = gradient(every.grad_loss, *every.rows, True, False)
        sending = shards.send(found)
    if weight_needs_grad and len(weight):  # while the gradients of views are on their way
        grad_loss = every.grad_loss / shards.ranks.size if average_weight else every.grad_loss
        _, grad_weight = gradient(grad_loss, *every.rows, False, True)
    if sending is not None:
        grad_views = every.sum(shards.arrived(sending), views)
    return grad_views, grad_weight


def _conic_backward_sgd_(
    grad_loss: Tensor,
    views: Tensor,
    weight: Tensor,
    momentum_buffer: Tensor,
    target: Tensor,
    statistics: Tensor,
    temperature: float,
    consistency_weight: float,
    *sgd_and_more: Any,
) -> Tensor:
    *values, backend, average_weight, group = sgd_and_more
    sgd = SGDSettings(*values)
    every = _Backward(
        grad_loss, views, weight, target, statistics, temperature, consistency_weight, sgd._asdict(), backend,
        group,
    )  # fmt: skip
    shards, size = every.shards, every.shards.ranks.size if average_weight else 1
    found = views.new_empty((len(views), 0, views.shape[2]))
    if len(weight):
        of_all, _, target_here, coefficients, settings = every.rows
        found = shards.kernels.conic_gradient_sgd_(
            every.grad_loss / size, of_all, weight, momentum_buffer, target_here, coefficients, settings, sgd
        )
    return every.sum(shards.to_owners(found), views, size)


# ---- Operators ----


def _co2_fake(query: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *losses, gradient = _ops.co2_fake(query, *arguments[:-1])
    return *losses, query.new_empty((), dtype=computed_in(query)), gradient


def _nt_xent_fake(views: Tensor, *_: Any) -> tuple[Tensor, ...]:
    *losses, statistics = _ops.nt_xent_fake(views)
    return *losses, views.new_empty((), dtype=computed_in(views)), statistics


def _conic_fake(views: Tensor, weight: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, ...]:
    *losses, statistics = _ops.conic_fake(views, weight, target)
    return *losses, views.new_empty((), dtype=computed_in(views)), statistics


def _register(
    name: str,
    operation: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    record: Callable[..., Any] | None = None,
) -> Any:
    return _ops.register(name, kernel, fake, record, partial(_told, operation))


nt_xent_backward = _register(
    "nt_xent_across_ranks_backward",
    "the backward of nt_xent_loss",
    _nt_xent_backward,
    lambda grad_loss, views, *_: views.new_empty(views.shape),
    _ops.refuse_double_backward,
)
conic_backward = _register(
    "conic_across_ranks_backward",
    "the backward of conic_loss",
    _conic_backward,
    lambda grad_loss, views, weight, *arguments: _ops.conic_backward_fake(
        grad_loss, views, weight, *arguments[:-2]
    ),
    _ops.refuse_double_backward,
)
conic_backward_sgd_ = _register(
    "conic_across_ranks_backward_sgd_",
    "the backward of conic_loss",
    _conic_backward_sgd_,
    lambda grad_loss, views, *_: views.new_empty(views.shape),
)
co2 = _register("co2_across_ranks", "co2_loss", _co2, _co2_fake, _ops.record_co2)
nt_xent = _register(
    "nt_xent_across_ranks",
    "nt_xent_loss",
    _nt_xent,
    _nt_xent_fake,
    partial(_ops.record_nt_xent, nt_xent_backward),
)
conic = _register(
    "conic_across_ranks", "conic_loss", _conic, _conic_fake, partial(_ops.record_conic, conic_backward)
)
conic_with_update = partial(
    _ops.with_update, torch.ops.contrastive_ops.conic_across_ranks, conic_backward_sgd_
)
