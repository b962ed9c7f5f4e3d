"""CO2 and InfoNCE on GPUs: how a call is planned and its kernels are launched.

0. round        the queue in the query's half precision, where it has another dtype. Where float64 is slow,
                `prepare` measures the rows.
1. statistics   what each range of keys knows of a row: `CO2Partial`.
2. merge        the ranges' numbers, in a fixed order: losses, rank, and what a row's gradient needs. `join`
                makes one part of them instead.
3. gradient     what each range of keys adds to the gradient.
4. finish       adds that up in a fixed order, and differentiates the normalisation.

The kernels say what bounds them: kernels/_co2.py, csrc/cuda/co2.h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._contract import CO2Partial, CO2Row, CO2Settings, Losses
from .arguments import matrix
from .launch import (
    LARGEST_SCALE,
    LOG2_E,
    NORM_EPSILON,
    Kernels,
    Launch,
    Products,
    ceil_div,
    current,
    empty,
    lanes,
    next_power_of_2,
    plan,
    replayed,
)


@dataclass(frozen=True)
class _Plan:
    prepare: Launch
    statistics: Launch
    gradient: Launch
    finish: Launch


@plan
def _plan(batch: int, keys: int, products: Products) -> _Plan:
    prepared, depth = 4, min(64, max(16, next_power_of_2(products.dim)))
    grid, arguments = (ceil_div(batch, prepared),), {"ROWS": prepared, "DEPTH": depth}
    prepare = products.kernels.launch("co2.prepare", grid, arguments)
    chip = products.chip
    statistics = products.walk(
        "co2.statistics",
        batch,
        keys,
        LANES=lanes(chip.capability),
        PREPARED=chip.is_slow_in_float64,
    )
    gradient = products.walk("co2.gradient", batch, keys)
    columns = next_power_of_2(products.dim)
    ranges = min(next_power_of_2(gradient.grid[1]), max(1, 8192 // columns))
    arguments = {"RANGES": ranges, "COLUMNS": columns}
    finish = products.kernels.launch("co2.finish", (batch,), arguments)
    return _Plan(prepare, statistics, gradient, finish)


@plan
def _merge_plan(kernels: Kernels, batch: int, parts: int) -> tuple[Launch, Launch]:
    """To merge parts into losses, and to join them to one."""
    padded_parts = next_power_of_2(parts)
    rows = max(1, min(8, 128 // padded_parts))
    grid, arguments = (ceil_div(batch, rows),), {"ROWS": rows, "PARTS": padded_parts}
    return kernels.launch("co2.merge", grid, arguments), kernels.launch("co2.join", grid, arguments)


def _terms(settings: CO2Settings) -> dict[str, Any]:
    """What depends on the settings alone, as arguments of all kernels that walk and of the merge."""
    base = settings.consistency_temperature if settings.consistency_weight else settings.temperature
    return {
        "scale": LOG2_E / base,
        "ratio": base / settings.temperature,
        "INSTANCE": settings.instance_weight != 0,
        "CONSISTENCY": settings.consistency_weight != 0,
    }


def _bounded(settings: CO2Settings, precision: str) -> bool:
    """Whether logits need no maximum. Multiplied exactly they have one: near it nothing is lost."""
    terms = _terms(settings)
    return (
        settings.normalize
        and precision != "tf32x3"
        and terms["scale"] * max(1.0, terms["ratio"]) <= LARGEST_SCALE
    )


def _power(settings: CO2Settings, precision: str) -> int:
    """n where τ = n τc, as 4 in MoCo v2: e^{s/τc} is a power of e^{s/τ}.

    Its relative error is n times as large, which half precision does not notice, and more than four products
    would take longer than an exponential.
    """
    ratio = settings.temperature / settings.consistency_temperature
    both = settings.instance_weight != 0 and settings.consistency_weight != 0
    is_power = 2 <= round(ratio) <= 10 and math.isclose(ratio, round(ratio), rel_tol=1e-9)
    return round(ratio) if precision == "half" and both and is_power else 0


@plan
def _round_plan(kernels: Kernels, keys: int, dim: int) -> Launch:
    columns = next_power_of_2(dim)
    rows = max(1, 4096 // columns)
    return kernels.launch("co2.round", (ceil_div(keys, rows),), {"ROWS": rows, "COLUMNS": columns})


def _rounded_queue(kernels: Kernels, queue: Tensor, dtype: torch.dtype) -> Tensor:
    """The queue in half precision, its rows at multiples of 16 numbers."""
    keys, dim = queue.shape
    rounded_queue = empty((keys, ceil_div(dim, 16) * 16), dtype, queue.device)[:, :dim]
    _round_plan(kernels, keys, dim)(
        queue=matrix(queue), rounded_queue=matrix(rounded_queue), keys=keys, dim=dim
    )
    return rounded_queue


class _Call:
    """What the kernels of a call share: their plan, and arguments by name."""

    def __init__(
        self, kernels: Kernels, query: Tensor, key: Tensor, queue: Tensor, settings: CO2Settings
    ) -> None:
        (self.batch, self.dim), self.device, self.settings = query.shape, query.device, settings
        # Rows are multiplied in the query's dtype; a float64 queue, which no table has tiles for, in float32.
        dtype = query.dtype if queue.dtype != torch.float64 else torch.float32
        products = kernels.products(self.dim, dtype, self.device)
        if products.precision == "half" and queue.dtype != dtype:
            queue = _rounded_queue(kernels, queue, dtype)
        if settings.normalize and query.dtype == torch.float16 and key.dtype != torch.float16:
            # Keys are multiplied as they are stored, and float16 does not hold rows of any length.
            norm = torch.linalg.vector_norm(key, dim=1, keepdim=True, dtype=torch.float64)
            key = (key / norm.clamp_min(NORM_EPSILON)).float()
        keys = len(queue)
        self.plan = _plan(self.batch, keys, products)
        self.rows = {"query": matrix(query), "key": matrix(key), "batch": self.batch, "dim": self.dim}
        self.all = {
            **self.rows,
            "queue": matrix(queue),
            "keys": keys,
            **_terms(settings),
            "POWER": _power(settings, products.precision),
            **products.reading(query, key, queue),
        }
        self.bounded = _bounded(settings, products.precision)

    def statistics(self) -> tuple[Tensor, Tensor]:
        launch = self.plan.statistics
        partial = empty((launch.grid[1], self.batch, len(CO2Partial._fields)), torch.float32, self.device)
        rows = empty((self.batch, len(CO2Row._fields)), torch.float64, self.device)
        if launch.arguments["PREPARED"]:
            self.plan.prepare(row_records=rows, NORMALIZE=self.settings.normalize, **self.rows)
        launch(
            partial=partial,
            row_records=rows,
            NORMALIZE=self.settings.normalize,
            BOUNDED=self.bounded,
            **self.all,
        )
        return partial, rows

    def gradient(self, rows: Tensor) -> Tensor:
        ranges = self.plan.gradient.grid[1]
        parts = empty((ranges, self.batch, self.dim), torch.float32, self.device)
        gradient = empty((self.batch, self.dim), torch.float32, self.device)
        self.plan.gradient(row_records=rows, grad_parts=parts, **self.all)
        self.plan.finish(
            row_records=rows,
            grad_parts=parts,
            gradient=gradient,
            ranges=ranges,
            NORMALIZE=self.settings.normalize,
            **self.rows,
        )
        return gradient


def _merge(
    kernels: Kernels, partial: Tensor, rows: Tensor, settings: CO2Settings, dtype: torch.dtype
) -> Losses:
    """The losses in that dtype; completes `rows` in place."""
    parts, batch, _ = partial.shape
    loss, instance_loss, consistency_loss = (empty((batch,), dtype, partial.device) for _ in range(3))
    rank = empty((batch,), torch.int64, partial.device)
    losses = Losses(loss, instance_loss, consistency_loss, rank, rows)
    into_losses, _ = _merge_plan(kernels, batch, parts)
    into_losses(
        partial=partial,
        losses=losses,
        batch=batch,
        parts=parts,
        tau=settings.temperature,
        tau_c=settings.consistency_temperature,
        instance_weight=settings.instance_weight,
        consistency_weight=settings.consistency_weight,
        INCLUDE_POSITIVE=settings.include_positive,
        **_terms(settings),
    )
    return losses


@replayed
def co2(
    kernels: Kernels,
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    settings: CO2Settings,
    compute_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.co2`; float16, bfloat16 and float32, D up to 1024."""
    with current(query):
        call = _Call(kernels, query, key, queue, settings)
        partial, rows = call.statistics()
        *losses, rank, _ = _merge(kernels, partial, rows, settings, torch.float32)
        if compute_gradient:
            gradient = call.gradient(rows)
        else:
            gradient = empty((0, query.shape[1]), torch.float32, query.device)
    loss, instance_loss, consistency_loss = losses
    return loss, instance_loss, consistency_loss, rank, gradient


def co2_statistics(
    kernels: Kernels, query: Tensor, key: Tensor, queue: Tensor, settings: CO2Settings
) -> tuple[Tensor, Tensor]:
    """See `reference.co2_statistics`. What is not known of a row yet is left unwritten."""
    with current(query):
        partial, rows = _Call(kernels, query, key, queue, settings).statistics()
        return _joined(kernels, partial, rows, settings), rows


def _joined(kernels: Kernels, partial: Tensor, rows: Tensor, settings: CO2Settings) -> Tensor:
    """One part (1, B, 8) of several."""
    parts, batch, fields = partial.shape
    if parts == 1:
        return partial
    joined, terms = empty((1, batch, fields), torch.float32, partial.device), _terms(settings)
    _, into_one = _merge_plan(kernels, batch, parts)
    into_one(
        partial=partial,
        joined=joined,
        row_records=rows,
        batch=batch,
        parts=parts,
        scale=terms["scale"],
        ratio=terms["ratio"],
    )
    return joined


def co2_merge(kernels: Kernels, partial: Tensor, rows: Tensor, settings: CO2Settings) -> Losses:
    """See `reference.co2_merge`."""
    with current(partial):
        return _merge(kernels, partial.contiguous(), rows.clone(), settings, torch.float64)


def co2_gradient(
    kernels: Kernels, query: Tensor, key: Tensor, queue: Tensor, rows: Tensor, settings: CO2Settings
) -> Tensor:
    """See `reference.co2_gradient`; float32."""
    with current(query):
        return _Call(kernels, query, key, queue, settings).gradient(rows.contiguous())
