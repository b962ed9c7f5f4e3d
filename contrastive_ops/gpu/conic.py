"""ConIC on GPUs: how a call is planned and its kernels are launched.

0. unit         the weight's rows of length 1, in the views' precision, padded to whole tiles.
1. prepare      the views likewise; each view's own key and, where they are not given, its positives.
2. statistics   what each range of keys knows of a view: `ConICPartial`.
3. merge        the ranges' numbers, in a fixed order: losses, ranks, and coefficients. `join` makes one part
                of them instead.

In backward unit and prepare come again, then

4. views        what each range of keys adds to the gradient of the views, and `finish`, which adds it up.
5. weight       the gradient of the weight, or a step of SGD with it.

The kernels say what bounds them: kernels/_conic.py, csrc/cuda/conic.h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .._contract import ConICCoefficients, ConICPartial, ConICPositives, ConICSettings, SGDSettings
from .arguments import NO_MATRIX, NO_VECTOR, Matrix, matrix, vector
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
from .sgd import sgd_


class Pull(NamedTuple):
    """(padded rows, 4) float32: what the gradients need of a view."""

    max_s: Any
    size: Any  # |grad_loss ∂ℓ_s/∂s_n|
    instance: Any  # grad_loss · coefficient
    share: Any  # coefficient / |∂ℓ_s/∂s_n|


class ConICLosses(NamedTuple):
    """What the merge writes: (B,), (V, B), (B,), (V, B) int64 and `ConICCoefficients` (V, B, 3)."""

    loss: Any
    classification_loss: Any
    consistency_loss: Any
    positive_rank: Any
    coefficients: Any


@dataclass(frozen=True)
class _Plan:
    padded_rows: int
    padded_keys: int
    padded_dim: int
    prepare: Launch
    unit: Launch
    statistics: Launch
    weight: Launch
    views: Launch
    finish: Launch


def _padded_depth(dim: int, most: int) -> int:
    return min(most, max(16, next_power_of_2(dim)))


@plan
def _plan(count: int, batch: int, keys: int, products: Products) -> _Plan:
    dim, chip, kernels = products.dim, products.chip, products.kernels
    larger = 4 if chip.interpreted else 1
    rows = count * batch
    columns = next_power_of_2(dim)

    statistics = products.walk("conic.statistics", rows, keys, padded=True, LANES=lanes(chip.capability))
    whole_keys = keys % products.tiling("conic.views").walked == 0
    views = products.walk("conic.views", rows, keys, padded=True, WHOLE_KEYS=whole_keys)
    tiling = products.tiling("conic.weight")
    tile = products.tile(tiling, rows, padded=True)
    whole = {
        "WHOLE_ROWS": dim <= tile.width,
        "WHOLE_KEYS": keys % tile.rows == 0,
        "WHOLE_COLUMNS": dim % tile.width == 0,
    }
    grid = ceil_div(keys, tile.rows), ceil_div(dim, tile.width)
    weight = kernels.launch("conic.weight", grid, {"TILE": tile, **whole}, tiling)

    tiles = [launch.arguments["TILE"] for launch in (statistics, views)]
    widest = max(each.width or each.depth for each in (*tiles, tile))
    block_of_rows = max(tile.keys, *(each.rows for each in tiles))
    block_of_keys = max(tile.rows, *(each.keys for each in tiles))
    padded_rows = ceil_div(rows, block_of_rows) * block_of_rows
    padded_keys = ceil_div(keys, block_of_keys) * block_of_keys
    prepared, finished = 4 * larger, max(1, larger * 512 // columns)
    return _Plan(
        padded_rows,
        padded_keys,
        ceil_div(dim, widest) * widest,
        prepare=kernels.launch(
            "conic.prepare",
            (padded_rows // prepared,),
            {"ROWS": prepared, "DEPTH": _padded_depth(dim, 64)},
        ),
        unit=kernels.launch(
            "conic.unit",
            (padded_keys // 16,),
            {"ROWS": 16, "DEPTH": _padded_depth(dim, 128)},
        ),
        statistics=statistics,
        weight=weight,
        views=views,
        finish=kernels.launch(
            "conic.finish",
            (ceil_div(rows, finished),),
            {"ROWS": finished, "COLUMNS": columns},
        ),
    )


@plan
def _merge_plan(kernels: Kernels, batch: int, parts: int, dim: int, interpreted: bool) -> Launch:
    padded_parts = next_power_of_2(parts)
    rows = max(1, min(32 if interpreted else 8, 256 // padded_parts))
    arguments = {"ROWS": rows, "PARTS": padded_parts, "DEPTH": _padded_depth(dim, 64)}
    return kernels.launch("conic.merge", (ceil_div(batch, rows),), arguments)


@plan
def _join_plan(kernels: Kernels, rows: int, parts: int) -> Launch:
    padded_parts = next_power_of_2(parts)
    block = max(1, min(8, 256 // padded_parts))
    grid = (ceil_div(rows, block),)
    return kernels.launch("conic.join", grid, {"ROWS": block, "PARTS": padded_parts})


def _scale(settings: ConICSettings, precision: str) -> dict[str, Any]:
    scale = LOG2_E / settings.temperature
    return {"scale": scale, "BOUNDED": scale <= LARGEST_SCALE and precision != "tf32x3"}


class _Call:
    """What the kernels of a call share: their plan, x̂, and arguments by name."""

    def __init__(self, kernels: Kernels, views: Tensor, weight: Tensor, target: Tensor) -> None:
        (self.count, self.batch, self.dim), self.device = views.shape, views.device
        self.keys = len(weight)
        self.products = kernels.products(self.dim, views.dtype, self.device)
        self.plan = _plan(self.count, self.batch, self.keys, self.products)
        self.rows = views.flatten(0, 1)  # a copy where their strides are not of one matrix
        self.views, self.weight, self.target = matrix(self.rows), matrix(weight), vector(target)
        self.unit = NO_MATRIX
        self.own: Tensor | None = None

    def prepare(
        self,
        find: bool = False,
        positives: Tensor | None = None,
        threshold: Tensor | None = None,
        norm: Tensor | None = None,
        pull: Tensor | None = None,
        grad_loss: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> None:
        self.plan.prepare(
            views=self.views,
            weight=self.weight,
            target=self.target,
            positives=positives,
            grad_loss=NO_VECTOR if grad_loss is None else vector(grad_loss),
            coefficients=coefficients,
            unit=self.unit,
            own=self.own,
            threshold=threshold,
            norm=norm,
            pull=pull,
            count=len(self.rows),
            batch=self.batch,
            keys=self.keys,
            dim=self.dim,
            padded_rows=self.plan.padded_rows,
            FIND=find,
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return empty(shape, dtype, self.device)

    def make_unit(self) -> None:
        """Room for x̂ and for the key that each view owns, which `prepare` fills."""
        self.unit = self._padded(self.plan.padded_rows)
        self.own = self.empty(self.plan.padded_rows, dtype=torch.int32)

    def _padded(self, rows: int) -> Matrix:
        padded_dim = self.plan.padded_dim
        return Matrix(self.empty(rows, padded_dim, dtype=self.products.dtype), padded_dim, 1)

    def unit_weight(self) -> tuple[Matrix, Tensor]:
        """ŵ and 1/‖w‖."""
        unit, inverse = self._padded(self.plan.padded_keys), self.empty(self.plan.padded_keys)
        self.plan.unit(weight=self.weight, unit_weight=unit, inverse=inverse, keys=self.keys, dim=self.dim)
        return unit, inverse

    def positives(self) -> Tensor:
        positives = self.empty(len(self.rows), len(ConICPositives._fields), dtype=torch.float64)
        self.prepare(find=True, positives=positives)
        return positives

    def statistics(self, settings: ConICSettings, positives: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Partials and positives, found if there are none."""
        launch, padded_rows = self.plan.statistics, self.plan.padded_rows
        self.make_unit()
        threshold = self.empty(padded_rows)
        find = positives is None
        if positives is None:
            positives = self.empty(len(self.rows), len(ConICPositives._fields), dtype=torch.float64)
        self.prepare(find, positives, threshold)
        partial = self.empty(launch.grid[1], padded_rows, len(ConICPartial._fields))
        launch(
            unit=self.unit,
            own=self.own,
            threshold=threshold,
            unit_weight=self.unit_weight()[0],
            partial=partial,
            keys=self.keys,
            padded_rows=padded_rows,
            **_scale(settings, self.products.precision),
        )
        return partial[:, : len(self.rows)], positives


class _Gradient(_Call):
    """A call for gradients: x̂, and how the losses pull each view."""

    def __init__(
        self,
        kernels: Kernels,
        grad_loss: Tensor,
        views: Tensor,
        weight: Tensor,
        target: Tensor,
        coefficients: Tensor,
        settings: ConICSettings,
    ) -> None:
        super().__init__(kernels, views, weight, target)
        self.settings, self.grad_loss = settings, grad_loss
        self.make_unit()
        self.norm = self.empty(len(self.rows), dtype=torch.float64)
        pull = self.empty(self.plan.padded_rows, len(Pull._fields))
        self.prepare(norm=self.norm, pull=pull, grad_loss=grad_loss, coefficients=coefficients.contiguous())
        unit_weight, self.inverse = self.unit_weight()
        self.walking = {
            "unit": self.unit,
            "own": self.own,
            "pull": pull,
            "unit_weight": unit_weight,
            "keys": self.keys,
            "padded_rows": self.plan.padded_rows,
            **_scale(settings, self.products.precision),
        }

    def of_views(self, gradient: Tensor) -> None:
        """Writes the gradient of the views (V, B, D)."""
        launch, plan = self.plan.views, self.plan
        parts = self.empty(launch.grid[1], plan.padded_rows, plan.padded_dim)
        grad_parts = Matrix(parts, plan.padded_dim, 1)
        launch(grad_parts=grad_parts, **self.walking)
        plan.finish(
            views=self.views,
            norm=self.norm,
            grad_parts=grad_parts,
            grad_loss=vector(self.grad_loss),
            gradient=Matrix(gradient, self.dim, 1),
            count=len(self.rows),
            batch=self.batch,
            dim=self.dim,
            padded_rows=plan.padded_rows,
            ranges=launch.grid[1],
            consistency_weight=self.settings.consistency_weight,
        )

    def of_weight(self, gradient: Tensor) -> None:
        """Writes the gradient of the weight (A, D)."""
        self._of_weight(matrix(gradient), NO_MATRIX, SGDSettings(0.0, 0.0, 0.0, False))

    def step(self, momentum_buffer: Tensor, sgd: SGDSettings) -> None:
        """Takes a step of SGD with it."""
        self._of_weight(NO_MATRIX, matrix(momentum_buffer), sgd)

    def _of_weight(self, gradient: Matrix, momentum_buffer: Matrix, sgd: SGDSettings) -> None:
        self.plan.weight(
            inverse=self.inverse,
            weight=self.weight,
            dim=self.dim,
            gradient=gradient,
            momentum_buffer=momentum_buffer,
            lr=sgd.lr,
            momentum=sgd.momentum,
            weight_decay=sgd.weight_decay,
            NESTEROV=sgd.nesterov,
            **self.walking,
        )


def _merge(
    kernels: Kernels,
    partial: Tensor,
    positives: Tensor,
    views: Tensor,
    settings: ConICSettings,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses in that dtype. `partial` may have numbers between its parts."""
    (count, batch, dim), device, parts = views.shape, views.device, len(partial)
    rows = views.flatten(0, 1)
    loss, consistency = (empty((batch,), dtype, device) for _ in range(2))
    classification = empty((count, batch), dtype, device)
    rank = empty((count, batch), torch.int64, device)
    coefficients = empty((count, batch, len(ConICCoefficients._fields)), torch.float64, device)
    losses = ConICLosses(loss, classification, consistency, rank, coefficients)
    _merge_plan(kernels, batch, parts, dim, kernels.chip_of(device).interpreted)(
        partial=partial,
        positives=positives,
        views=matrix(rows),
        losses=losses,
        part_stride=partial.stride(0),
        views_count=count,
        batch=batch,
        dim=dim,
        parts=parts,
        scale=LOG2_E / settings.temperature,
        tau=settings.temperature,
        log_compensation=math.log(settings.compensation),
        consistency_weight=settings.consistency_weight,
    )
    return losses


@replayed
def conic(
    kernels: Kernels, views: Tensor, weight: Tensor, target: Tensor, settings: ConICSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.conic`; float16, bfloat16 and float32 views, D up to 1024. The loss of an instance whose
    target is not a row of the weight is NaN."""
    with current(views):
        partial, positives = _Call(kernels, views, weight, target).statistics(settings)
        return _merge(kernels, partial, positives, views, settings, torch.float32)


def conic_positives(kernels: Kernels, views: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """See `reference.conic_positives`."""
    with current(views):
        return _Call(kernels, views, weight, target).positives()


def conic_statistics(
    kernels: Kernels,
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    positives: Tensor,
    settings: ConICSettings,
) -> Tensor:
    """See `reference.conic_statistics`."""
    with current(views):
        partial, _ = _Call(kernels, views, weight, target).statistics(settings, positives.contiguous())
        return _joined(kernels, partial, settings)


def _joined(kernels: Kernels, partial: Tensor, settings: ConICSettings) -> Tensor:
    """One part (1, V·B, 3) of several."""
    parts, rows, fields = partial.shape
    if parts == 1:
        return partial.contiguous()
    joined = empty((1, rows, fields), torch.float32, partial.device)
    _join_plan(kernels, rows, parts)(
        partial=partial,
        joined=joined,
        part_stride=partial.stride(0),
        rows=rows,
        parts=parts,
        scale=LOG2_E / settings.temperature,
    )
    return joined


def conic_merge(
    kernels: Kernels, partial: Tensor, positives: Tensor, views: Tensor, settings: ConICSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.conic_merge`."""
    if not partial[0].is_contiguous():
        partial = partial.contiguous()
    with current(views):
        return _merge(kernels, partial, positives.contiguous(), views, settings, torch.float64)


@replayed
def conic_gradient(
    kernels: Kernels,
    grad_loss: Tensor,
    views: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficients: Tensor,
    settings: ConICSettings,
    views_need_grad: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.conic_gradient`."""
    count, batch, dim = views.shape
    grad_views = empty((count if views_need_grad else 0, batch, dim), views.dtype, views.device)
    grad_weight = empty((len(weight) if weight_needs_grad else 0, dim), weight.dtype, weight.device)
    with current(views):
        gradient = _Gradient(kernels, grad_loss, views, weight, target, coefficients, settings)
        if views_need_grad:
            gradient.of_views(grad_views)
        if weight_needs_grad:
            gradient.of_weight(grad_weight)
    return grad_views, grad_weight


def conic_gradient_sgd_(
    kernels: Kernels,
    grad_loss: Tensor,
    views: Tensor,
    weight: Tensor,
    momentum_buffer: Tensor,
    target: Tensor,
    coefficients: Tensor,
    settings: ConICSettings,
    sgd: SGDSettings,
) -> Tensor:
    """See `reference.conic_gradient_sgd_`."""
    grad_views = torch.empty(views.shape, dtype=views.dtype, device=views.device)
    with current(views):
        gradient = _Gradient(kernels, grad_loss, views, weight, target, coefficients, settings)
        gradient.of_views(grad_views)  # first, from the weight as it was in forward
        if gradient.plan.weight.arguments["WHOLE_ROWS"]:
            gradient.step(momentum_buffer, sgd)
        else:  # other programs still need what one would overwrite
            grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            gradient.of_weight(grad_weight)
            sgd_(kernels, weight, momentum_buffer, grad_weight, sgd)
    increment_version((momentum_buffer, weight))
    return grad_views
