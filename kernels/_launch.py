"""What the kernels share on the host: how they are planned for a problem's size and launched, or recorded."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Matrix, Tile, Vector
from ._tiles import INTERPRETER, Tiling, select

LOG2_E = math.log2(math.e)
# log2(e)/τ up to which float32 holds exponentials of similarities within ±1, and long sums of them: they need
# no maximum.
LARGEST_SCALE = 64.0
# A range of keys counts ranks in float32, which is exact up to here.
MOST_KEYS_A_RANGE = 1 << 24


class Chip(NamedTuple):
    """What a plan depends on: compute capability, and how many multiprocessors there are."""

    capability: tuple[int, int]
    multiprocessors: int

    @property
    def interpreted(self) -> bool:
        """Whether this is Triton's interpreter, where every program costs the same, however large."""
        return self.capability == INTERPRETER


class Call(NamedTuple):
    """A call of a kernel as it was recorded: the launch, and its arguments by name."""

    launch: Launch
    arguments: dict[str, Any]


class Recording(NamedTuple):
    """The calls of kernels that took place on a chip which need not exist."""

    chip: Chip
    calls: list[Call]


_recording: Recording | None = None


@contextlib.contextmanager
def recording(chip: Chip) -> Iterator[list[Call]]:
    """Kernels that are called in this block are listed and not launched, planned as for `chip`. On meta
    tensors that computes nothing, but tells how each kernel would be called.

    Example:
        >>> with recording(Chip((9, 0), 132)) as calls:  # doctest: +SKIP
        ...     kernels.co2(query, key, queue, settings, compute_gradient=True)
        >>> [call.launch.name for call in calls]  # doctest: +SKIP
        ['co2.statistics', 'co2.merge', 'co2.gradient', 'co2.finish']
    """
    global _recording
    before, _recording = _recording, Recording(chip, [])
    try:
        yield _recording.calls
    finally:
        _recording = before


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and those arguments that depend on the problem's size alone. Called with the
    others, by name, it is launched.

    Attributes:
        name: of the loss and the kernel, as in the table of tiles.
        arguments: Triton's own `num_warps` and `num_stages` are among them.
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def __call__(self, **arguments: Any) -> None:
        if _recording is None:
            self.kernel[self.grid](**arguments, **self.arguments)
        else:
            _recording.calls.append(Call(self, arguments | self.arguments))


F = TypeVar("F", bound=Callable[..., Any])
_plans: list[Any] = []


def plan(function: F) -> F:
    """Makes plans once for each problem's size, for a call has no time for it."""
    cached = functools.lru_cache(maxsize=1024)(function)
    _plans.append(cached)
    return cached  # type: ignore[return-value]


def forget_plans() -> None:
    """After a change of the table of tiles."""
    for cached in _plans:
        cached.cache_clear()


@functools.cache
def _device_chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(INTERPRETER, 1)
    properties = torch.cuda.get_device_properties(device)
    return Chip((properties.major, properties.minor), properties.multi_processor_count)


def chip_of(device: torch.device) -> Chip:
    return _device_chip(device) if _recording is None else _recording.chip


def current(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes a tensor's device the current one, on which kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def matrix(tensor: Tensor) -> Matrix:
    """A tensor of two dimensions as a kernel's argument."""
    return Matrix(tensor, *tensor.stride())


def vector(tensor: Tensor) -> Vector:
    """A tensor of one dimension as a kernel's argument."""
    return Vector(tensor, tensor.stride(0))


NO_MATRIX, NO_VECTOR = Matrix(None, 0, 0), Vector(None, 0)


def lanes(capability: tuple[int, int]) -> int:
    """In how many lanes the statistics of a row are kept, to be merged at the end: lane i has the keys that
    are i modulo this number. The registers of a matrix product repeat every 8 columns, so one thread holds
    all of a lane, and threads exchange nothing on the way. From tensor memory a thread loads whole rows."""
    return 1 if capability[0] == 10 else 8


def precision_of(dtype: torch.dtype) -> str:
    """How rows are multiplied: as they are in half precision; float32 exactly, or in TF32 if PyTorch may.

    PyTorch's older setters, `set_float32_matmul_precision` and `allow_tf32`, write this property too, and it
    inherits from `torch.backends.fp32_precision`. Their getters raise where both kinds were used.
    """
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


class Products(NamedTuple):
    """How rows of D dimensions are multiplied on a chip."""

    dim: int
    dtype: torch.dtype
    precision: str
    chip: Chip

    def tiling(self, name: str) -> Tiling:
        return select(name, self.chip.capability, self.precision, self.dim)

    def tile(self, tiling: Tiling, all_keys: int, padded: bool = False) -> Tile:
        """What is compiled into a kernel that walks. Where rows are `padded`, tiles and chunks may be taken for
        whole."""
        padded_dim = max(16, triton.next_power_of_2(self.dim))
        depth = min(tiling.depth, padded_dim)
        chunked = self.dim > depth
        width = tiling.width and (min(tiling.width, padded_dim) if chunked else depth)
        return Tile(
            rows=tiling.held,
            keys=tiling.walked,
            depth=depth,
            width=width,
            chunked=chunked,
            whole_keys=padded or all_keys % tiling.walked == 0,
            whole_columns=padded or (self.dim % depth == 0 and (not width or self.dim % width == 0)),
            dtype=getattr(tl, str(self.dtype).removeprefix("torch.")),
            precision=self.precision,
        )

    def walk(
        self, name: str, kernel: Any, rows: int, keys: int, padded: bool = False, **arguments: Any
    ) -> Launch:
        """A kernel whose programs hold rows and walk the keys: row blocks × ranges of keys × chunks of the
        gradient's dimensions."""
        tiling = self.tiling(name)
        tile = self.tile(tiling, keys, padded)
        blocks, steps = triton.cdiv(rows, tiling.held), triton.cdiv(keys, tiling.walked)
        chunks = triton.cdiv(self.dim, tile.width) if tile.width else 1
        slots = tiling.programs * self.chip.multiprocessors
        size = steps_a_range(steps, blocks * chunks, slots, MOST_KEYS_A_RANGE // tiling.walked)
        grid = blocks, triton.cdiv(steps, size), chunks
        own = {"TILE": tile, "keys_a_range": size * tiling.walked, **tiling.options}
        return Launch(name, kernel, grid, own | arguments)


def steps_a_range(steps: int, blocks: int, slots: int, most: int = MOST_KEYS_A_RANGE) -> int:
    """How many tiles of keys make a range, at most `most`, so that `blocks` programs for each range, of which
    `slots` run at a time, are done first. Beginning and end of a program cost about as much as two tiles."""

    def time(size: int) -> int:
        return triton.cdiv(blocks * triton.cdiv(steps, size), slots) * (size + 2)

    most_ranges = min(steps, max(1, 4 * slots // blocks))
    candidates = {triton.cdiv(steps, ranges) for ranges in range(1, most_ranges + 1)}
    return min(most, min(sorted(candidates, reverse=True), key=time))
