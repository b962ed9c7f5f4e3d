"""What several processes exchange; in a single process, nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def group() -> dist.ProcessGroup | None:
    """All processes, for what takes a group; None where there is only one."""
    return dist.group.WORLD if world_size() > 1 else None


def own_rows(rows: Tensor) -> Tensor:
    """This process's share of rows that `gather` has put together."""
    share = len(rows) // world_size()
    return rows[rank() * share : (rank() + 1) * share]


@torch.no_grad()
def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, (P·B, …) from (B, …) each, in the order of the processes; no gradient."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_objects(value: Any) -> list[Any]:
    """What each process passes, in their order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def put_together(state: dict[str, Any]) -> None:
    """Makes of a state's shards whole tensors, as one process has them; all processes call it."""
    for name, value in state.items():
        if isinstance(value, DTensor):
            state[name] = value.full_tensor()


def total(values: Tensor) -> Tensor:
    """The sum over all processes; no gradient."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def mean(values: Tensor) -> Tensor:
    """The mean over all processes; no gradient."""
    return total(values) / world_size()


class _Sum(torch.autograd.Function):
    """The sum over all processes. Each process's summand is in every process's result, so its gradient is the
    sum of theirs."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


differentiable_sum = _Sum.apply
