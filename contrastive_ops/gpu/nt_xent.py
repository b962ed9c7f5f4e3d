"""NT-Xent on GPUs, with or without consistency: how a call is planned and its kernels are launched.

1. prepare      both views' rows of length 1, those of an instance beside each other, padded to whole tiles.
2. statistics   what each range of keys knows of a row: `NTXentPartial`.
3. merge        the ranges' numbers, in a fixed order: losses, ranks, and coefficients.

In backward prepare comes again, then

4. gradient     what each range of keys adds to the gradient: "gradient", or "plain" without the consistency
                term, which has tiles of its own.
5. finish       adds that up in a fixed order, and differentiates the normalisation.

The kernels say what bounds them: kernels/_nt_xent.py, csrc/cuda/nt_xent.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._contract import Losses, NTXentCoefficients, NTXentKeys, NTXentPartial, NTXentSettings
from .arguments import NO_VECTOR, Matrix, Views, vector
from .launch import (
    LARGEST_SCALE,
    LOG2_E,
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


class Pull(NamedTuple):
    """(padded instances, 8, 2) float32: what the gradient needs of both views of an instance. The second four
    only where RELATIVE; the last number of the eight is unused."""

    instance: Any
    query: Any  # what multiplies Q, less its slope times E_Q[d]
    slope: Any  # of Q in d
    key: Any  # what multiplies P
    top: Any  # m
    query_low: Any  # what float32 loses of `query` and `key`
    key_low: Any


class Rows(NamedTuple):
    """Prepared instances, as rows or as keys: z in the order of instances, and for the gradient `Pull` and
    the sizes (padded rows,) float32."""

    unit: Any  # Matrix (padded rows, padded dimensions); row 2 b + v is view v of instance b
    pull: Any
    sizes: Any


@dataclass(frozen=True)
class _Plan:
    padded_rows: int
    padded_keys: int
    padded_dim: int
    prepare: Launch
    prepare_keys: Launch
    statistics: Launch
    gradient: Launch
    finish: Launch


@plan
def _plan(batch: int, keys: int, consistency: bool, products: Products) -> _Plan:
    dim, chip, kernels = products.dim, products.chip, products.kernels
    larger = 16 if chip.interpreted else 1
    gradient_name = "nt_xent.gradient" if consistency else "nt_xent.plain"
    sizes: dict[str, Any] = {"rows": batch, "keys": 2 * keys, "padded": True, "CONSISTENCY": consistency}
    statistics = products.walk("nt_xent.statistics", LANES=lanes(chip.capability), **sizes)
    gradient = products.walk(gradient_name, **sizes)
    tiles = [launch.arguments["TILE"] for launch in (statistics, gradient)]
    widest = max(tile.width or tile.depth for tile in tiles)

    prepared = 4 * larger
    block = max(prepared, *(max(tile.rows, tile.keys // 2) for tile in tiles))
    depth = min(64 * larger, max(16, next_power_of_2(dim)))
    padded_batch, padded_keys = (ceil_div(count, block) * block for count in (batch, keys))
    prepare, prepare_keys = (
        kernels.launch("nt_xent.prepare", (count // prepared,), {"BLOCK": prepared, "DEPTH": depth})
        for count in (padded_batch, padded_keys)
    )
    columns = next_power_of_2(dim)
    finished = max(1, larger * 512 // columns)
    finish = kernels.launch(
        "nt_xent.finish",
        (ceil_div(batch, finished), 2),
        {"ROWS": finished, "COLUMNS": columns},
    )
    padded_dim = ceil_div(dim, widest) * widest
    return _Plan(
        2 * padded_batch, 2 * padded_keys, padded_dim, prepare, prepare_keys, statistics, gradient, finish
    )


@plan
def _merge_plan(kernels: Kernels, batch: int, parts: int, interpreted: bool) -> Launch:
    padded_parts = next_power_of_2(parts)
    rows = max(1, min(128 if interpreted else 8, 128 // padded_parts))
    grid = ceil_div(batch, rows), 2
    return kernels.launch("nt_xent.merge", grid, {"ROWS": rows, "PARTS": padded_parts})


def _statistics_scales(settings: NTXentSettings) -> dict[str, float]:
    base = settings.consistency_temperature if settings.consistency_weight else settings.temperature
    return {"scale": LOG2_E / base, "ratio": base / settings.temperature}


def _gradient_scales(settings: NTXentSettings) -> dict[str, float]:
    return {
        "scale": LOG2_E / settings.temperature,
        "scale_c": LOG2_E / settings.consistency_temperature,
    }


def _is_relative(settings: NTXentSettings, precision: str) -> bool:
    """Whether exponentials are taken relative to each row's maximum."""
    scales = _gradient_scales(settings)
    largest = max(scales["scale"], scales["scale_c"] if settings.consistency_weight else 0.0)
    return not settings.normalize or largest > LARGEST_SCALE or precision == "tf32x3"


class _Call:
    """What the kernels of a call share: their plan, and arguments by name."""

    def __init__(
        self, kernels: Kernels, views: Tensor, settings: NTXentSettings, keys: NTXentKeys | None
    ) -> None:
        (_, self.batch, self.dim), self.device, self.views = views.shape, views.device, views
        self.settings, self.keys = settings, keys
        self.key_count = self.batch if keys is None else keys.views.shape[1]
        self.products = kernels.products(self.dim, views.dtype, self.device)
        self.plan = _plan(self.batch, self.key_count, settings.consistency_weight != 0, self.products)
        self.walking = {
            "target": NO_VECTOR if keys is None else vector(keys.target),
            "batch": self.batch,
            "keys": self.key_count,
            "padded_rows": self.plan.padded_rows,
        }

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return empty(shape, dtype, self.device)

    def prepare(
        self,
        views: Tensor,
        is_keys: bool = False,
        norm: Tensor | None = None,
        positive: Tensor | None = None,
        grad_loss: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> Rows:
        """z of the rows or keys; with a gradient of the losses, how these pull them."""
        padded_rows, padded_dim = self.plan.padded_rows, self.plan.padded_dim
        launch = self.plan.prepare
        if is_keys:
            padded_rows, launch = self.plan.padded_keys, self.plan.prepare_keys
        unit = self.empty(padded_rows, padded_dim, dtype=self.products.dtype)
        rows, relative = Rows(Matrix(unit, padded_dim, 1), None, None), False
        if grad_loss is not None:
            rows = Rows(rows.unit, self.empty(padded_rows, len(Pull._fields) + 1), self.empty(padded_rows))
            relative = _is_relative(self.settings, self.products.precision)
        launch(
            views=Views(views, *views.stride()),
            grad_loss=NO_VECTOR if grad_loss is None else vector(grad_loss),
            coefficients=coefficients,
            rows=rows,
            norm=norm,
            positive=positive,
            batch=views.shape[1],
            dim=self.dim,
            tau_c=self.settings.consistency_temperature,
            consistency_size=self.settings.consistency_weight / (2 * self.settings.consistency_temperature),
            NORMALIZE=self.settings.normalize,
            RELATIVE=relative,
            **_gradient_scales(self.settings),
        )
        return rows

    def statistics(self) -> tuple[Tensor, Tensor]:
        launch = self.plan.statistics
        positive = self.empty(2 * self.batch, dtype=torch.float64)
        rows = key_rows = self.prepare(self.views, positive=positive)
        if self.keys is not None:
            key_rows = self.prepare(self.keys.views.to(self.views.dtype), is_keys=True)
        partial = self.empty(launch.grid[1], 2 * self.batch, len(NTXentPartial._fields))
        launch(
            unit=rows.unit,
            key_unit=key_rows.unit,
            positive=positive,
            partial=partial,
            BOUNDED=not _is_relative(self.settings, self.products.precision),
            **_statistics_scales(self.settings),
            **self.walking,
        )
        return partial, positive

    def gradient(self, grad_loss: Tensor, coefficients: Tensor) -> Tensor:
        plan, launch, keys = self.plan, self.plan.gradient, self.keys
        gradient = self.empty(*self.views.shape, dtype=self.views.dtype)
        coefficients = coefficients.contiguous()
        norm = self.empty(2 * self.batch, dtype=torch.float64)
        rows = self.prepare(self.views, False, norm, None, grad_loss, coefficients)
        key_rows = rows
        if keys is not None:
            assert keys.grad_loss is not None
            assert keys.coefficients is not None
            key_rows = self.prepare(
                keys.views.to(self.views.dtype),
                is_keys=True,
                grad_loss=keys.grad_loss,
                coefficients=keys.coefficients.contiguous(),
            )
        ranges = launch.grid[1]
        parts = self.empty(ranges, plan.padded_rows, plan.padded_dim)
        launch(
            rows=rows,
            key_rows=key_rows,
            grad_parts=Matrix(parts, plan.padded_dim, 1),
            padded_keys=plan.padded_keys,
            RELATIVE=_is_relative(self.settings, self.products.precision),
            **_gradient_scales(self.settings),
            **self.walking,
        )
        plan.finish(
            views=Views(self.views, *self.views.stride()),
            norm=norm,
            grad_parts=Matrix(parts, plan.padded_dim, 1),
            coefficients=coefficients,
            grad_loss=vector(grad_loss),
            target=self.walking["target"],
            gradient=gradient,
            batch=self.batch,
            dim=self.dim,
            padded_rows=plan.padded_rows,
            ranges=ranges,
            NORMALIZE=self.settings.normalize,
        )
        return gradient


def _merge(
    kernels: Kernels, partial: Tensor, positive: Tensor, settings: NTXentSettings, dtype: torch.dtype
) -> Losses:
    """The losses in that dtype."""
    (parts, rows, _), device = partial.shape, partial.device
    loss, instance_loss, consistency_loss = (empty((rows,), dtype, device) for _ in range(3))
    rank = empty((rows,), torch.int64, device)
    coefficients = empty((rows, len(NTXentCoefficients._fields)), torch.float64, device)
    losses = Losses(loss, instance_loss, consistency_loss, rank, coefficients)
    _merge_plan(kernels, rows // 2, parts, kernels.chip_of(device).interpreted)(
        partial=partial,
        positive=positive,
        losses=losses,
        batch=rows // 2,
        parts=parts,
        tau=settings.temperature,
        tau_c=settings.consistency_temperature,
        consistency_weight=settings.consistency_weight,
        CONSISTENCY=settings.consistency_weight != 0,
        **_statistics_scales(settings),
    )
    return losses


@replayed
def nt_xent(
    kernels: Kernels, views: Tensor, settings: NTXentSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.nt_xent`; float16, bfloat16 and float32, D up to 1024."""
    with current(views):
        partial, positive = _Call(kernels, views, settings, None).statistics()
        loss, instance_loss, consistency_loss, rank, coefficients = _merge(
            kernels, partial, positive, settings, torch.float32
        )
    return loss, instance_loss, consistency_loss, rank, coefficients


def nt_xent_statistics(
    kernels: Kernels, views: Tensor, settings: NTXentSettings, keys: NTXentKeys | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.nt_xent_statistics`."""
    with current(views):
        return _Call(kernels, views, settings, keys).statistics()


def nt_xent_merge(kernels: Kernels, partial: Tensor, positive: Tensor, settings: NTXentSettings) -> Losses:
    """See `reference.nt_xent_merge`."""
    with current(partial):
        return _merge(kernels, partial.contiguous(), positive.contiguous(), settings, torch.float64)


@replayed
def nt_xent_gradient(
    kernels: Kernels,
    grad_loss: Tensor,
    views: Tensor,
    coefficients: Tensor,
    settings: NTXentSettings,
    keys: NTXentKeys | None = None,
) -> Tensor:
    """See `reference.nt_xent_gradient`."""
    with current(views):
        return _Call(kernels, views, settings, keys).gradient(grad_loss, coefficients)
