"""How kernels are planned for a problem's size and launched, recorded or replayed, whatever compiles them.

A backend brings its `Kernels`, and the host code of an operator asks it for launches by the kernels' names.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._calls import Known, extension, signature
from .arguments import Tile
from .tiles import Tiling

LOG2_E = math.log2(math.e)
# log2(e)/τ up to which float32 holds exponentials of similarities within ±1, and long sums of them: they need
# no maximum.
LARGEST_SCALE = 64.0
# A range of keys counts ranks in float32, which is exact up to here.
MOST_KEYS_A_RANGE = 1 << 24
NORM_EPSILON = 1e-12  # a row shorter than this is divided by this, as in reference.py
INTERPRETER = (0, 0)  # the compute capability of Triton's interpreter

TENSORS = (Tensor, torch.nn.Parameter)


def ceil_div(count: int, size: int) -> int:
    """How many pieces of that size hold `count`."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of two that is not less than a positive number."""
    return 1 << (count - 1).bit_length()


class Chip(NamedTuple):
    """What a plan depends on: compute capability, and how many multiprocessors there are."""

    capability: tuple[int, int]
    multiprocessors: int

    @property
    def interpreted(self) -> bool:
        """Whether this is Triton's interpreter, where every program costs the same, however large."""
        return self.capability == INTERPRETER

    @property
    def is_slow_in_float64(self) -> bool:
        """Whether float64 goes at 1/64 of float32's rate: on all but the large chips of data centers. There
        every program would spend more on the lengths of its rows than on some hundred keys."""
        return not self.interpreted and self.capability not in ((7, 0), (8, 0), (9, 0), (10, 0))


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


class Launch(ABC):
    """A kernel with its grid and those arguments that depend on the problem's size alone. Called with the
    others, by name, it is launched.

    An argument in capitals is known when the kernel is compiled; the others are tensors, their strides, and
    numbers.

    Attributes:
        name: of the loss and the kernel, as in the table of tiles.
        grid: how many programs there are in each of up to three dimensions.
    """

    def __init__(self, name: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self.name, self.grid, self.arguments = name, grid, arguments
        self.whole_grid = (*grid, 1, 1)[:3]

    def __call__(self, **arguments: Any) -> None:
        if _recording is not None:
            _recording.calls.append(Call(self, arguments | self.arguments))
        else:
            self.run(arguments)

    @abstractmethod
    def run(self, arguments: dict[str, Any]) -> None:
        """Launches on the current stream of the current device. Where a call is being recorded, the tape is
        told of it, or that it cannot be replayed."""

    def is_observed(self) -> bool:
        """Whether somebody waits to be told of its launches, which a replay would not do."""
        return False


class Kernels(ABC):
    """The kernels of a backend, and what host code asks about it."""

    @abstractmethod
    def launch(
        self, name: str, grid: tuple[int, ...], arguments: dict[str, Any], tiling: Tiling | None = None
    ) -> Launch:
        """Of the kernel of that name, with the threads that a tiling says, or else as usual."""

    @abstractmethod
    def tiling(self, name: str, capability: tuple[int, int], precision: str, dim: int) -> Tiling:
        """The tiles of a kernel for rows of D dimensions."""

    @abstractmethod
    def current_stream(self) -> int:
        """The current stream of the current device, as the driver knows it."""

    def may_replay(self) -> bool:
        """Whether launches may be repeated without those who would be told of them."""
        return True

    def replay(self, recorded: Any, arguments: tuple[Any, ...]) -> Any:
        """What a call gives that was `recorded` on a `Tape`, with other arguments."""
        return recorded(arguments, self.current_stream())

    def device_chip(self, device: torch.device) -> Chip:
        return _device_chip(device)

    def chip_of(self, device: torch.device) -> Chip:
        """What plans for a device depend on."""
        return self.device_chip(device) if _recording is None else _recording.chip

    def operands_of(self, dtype: torch.dtype, chip: Chip) -> tuple[torch.dtype, str]:
        """The dtype in which a chip multiplies rows of some dtype, and how; see `precision_of`."""
        return dtype, precision_of(dtype)

    def products(self, dim: int, dtype: torch.dtype, device: torch.device) -> Products:
        """How rows are multiplied on a device."""
        chip = self.chip_of(device)
        return Products(self, dim, *self.operands_of(dtype, chip), chip)

    def reading(self, dtype: torch.dtype, matrices: Sequence[Tensor]) -> dict[str, Any]:
        """What kernels that multiply the rows of these in some dtype are compiled for, by their layout."""
        return {}


@functools.cache
def _device_chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(INTERPRETER, 1)
    properties = torch.cuda.get_device_properties(device)
    return Chip((properties.major, properties.minor), properties.multi_processor_count)


F = TypeVar("F", bound=Callable[..., Any])
_plans: list[Any] = []  # caches, of plans and of what follows from them


class _Threads(threading.local):
    tape: Tape | None = None  # on which the thread's call is being recorded


_threads = _Threads()


def current_tape() -> Tape | None:
    """On which this thread's call is being recorded to be replayed, if it is."""
    return _threads.tape


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty. What a kernel writes has to come from here where its call is to be `replayed`."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if (tape := _threads.tape) is not None:
        tape.allocates(tensor)
    return tensor


class Replay(NamedTuple):
    """A call as it was recorded on a `Tape`.

    Attributes:
        compiled: what does it again (`csrc/calls/replay.h`).
        launched: with each launch, what was compiled for it, which lives as long as it is referred to.
    """

    compiled: Any
    launched: list[tuple[Launch, Any]]

    def is_observed(self) -> bool:
        """Whether somebody waits for one of its launches."""
        return any(launch.is_observed() for launch, _ in self.launched)


class Tape:
    """Records what the host does in a call of a loss: which tensors it allocates, and which kernels it
    launches with them, with tensors of the call and with numbers.

    A tensor is known by its place: first come the call's tensors, then those that are allocated.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.is_whole = True  # whether all was seen that a replay needs
        self._tensors = [*inputs]  # by place, and so that no two have one address
        self._inputs = len(inputs)
        self._launches: list[Any] = []
        self._launched: list[tuple[Launch, Any]] = []

    def allocates(self, tensor: Tensor) -> None:
        self._tensors.append(tensor)

    def launches(
        self,
        launch: Launch,
        compiled: Any,
        function: int,
        threads: int,
        shared_bytes: int,
        parameters: Iterable[Tensor | bytes],
    ) -> None:
        """A launch of what was compiled, which the driver knows as `function`, with its parameters in their
        order: tensors, of which it gets the addresses, and numbers as they lie in memory."""
        given = [
            extension.Parameter(-1, int.from_bytes(each, "little"))
            if isinstance(each, bytes)
            else extension.Parameter(self._place(each), 0)
            for each in parameters
        ]
        self._launches.append(
            extension.Launch(launch.name, function, launch.whole_grid, threads, shared_bytes, given)
        )
        self._launched.append((launch, compiled))

    def replay(self, results: Tensor | tuple[Tensor, ...]) -> Replay | None:
        """The call as it may be replayed, if it may."""
        place_of = {id(tensor): place for place, tensor in enumerate(self._tensors)}
        places = [place_of.get(id(each)) for each in ((results,) if isinstance(results, Tensor) else results)]
        if not self.is_whole or None in places:
            return None
        compiled = extension.Replay(
            [extension.Allocation(x.shape, x.dtype, x.device) for x in self._tensors[self._inputs :]],
            self._launches,
            places,
            not isinstance(results, Tensor),
            self._tensors[0].device.index or 0,
        )
        return Replay(compiled, self._launched)

    def _place(self, tensor: Tensor) -> int:
        """That of the tensor which begins where this does, which may be a view of it: strides are numbers."""
        address = tensor.data_ptr()
        places = [place for place, each in enumerate(self._tensors) if each.data_ptr() == address]
        if len(places) != 1 or not tensor.numel():
            self.is_whole = False  # PyTorch has made it, of numbers that are others in another call
            return 0
        return places[0]


_SEEN_ONCE, _NEVER_REPLAYED = "seen once", "never replayed"


def replayed(function: F) -> F:
    """A function of a backend's `Kernels` and more that allocates by `empty` and launches kernels, and does
    nothing else: what it does depends on its arguments, but on nothing of tensors except for what is in their
    signature. When it is called for the third time with arguments of a kind, it is not run: what it did the
    second time is done again."""
    replays: Known[Replay | str] = Known()

    def call(kernels: Kernels, *arguments: Any, **named: Any) -> Any:
        if named or _recording is not None or not kernels.may_replay():
            return function(kernels, *arguments, **named)
        kind = signature(arguments)
        if kind is None:
            return function(kernels, *arguments)
        key = kind, kernels, precision_of(torch.float32)
        known = replays.get(key)
        if isinstance(known, Replay) and not known.is_observed():
            with current(arguments[0]):
                return kernels.replay(known.compiled, arguments)
        inputs = [each for each in arguments if isinstance(each, Tensor)]
        # One tensor in two places would be taken for the first of them in the replay, too.
        is_recorded = (
            known == _SEEN_ONCE
            and len({each.data_ptr() for each in inputs}) == len(inputs)
            and _threads.tape is None
        )
        if not is_recorded:
            if known is None:
                replays.remember(key, _SEEN_ONCE)
            return function(kernels, *arguments)
        _threads.tape = tape = Tape(inputs)
        try:
            results = function(kernels, *arguments)
        finally:
            _threads.tape = None
        replays[key] = tape.replay(results) or _NEVER_REPLAYED
        return results

    functools.update_wrapper(call, function)
    call.replays = replays  # type: ignore[attr-defined]
    call.cache_clear = replays.clear  # type: ignore[attr-defined]
    _plans.append(call)
    return call  # type: ignore[return-value]


def plan(function: F) -> F:
    """Makes plans once for each problem's size, for a call has no time for it."""
    cached = functools.lru_cache(maxsize=1024)(function)
    _plans.append(cached)
    return cached  # type: ignore[return-value]


def forget_plans() -> None:
    """After a change of the table of tiles."""
    for cached in _plans:
        cached.cache_clear()


_NOTHING = contextlib.nullcontext()


def current(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes a tensor's device the current one, on which kernels are launched."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


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
    """How rows of D dimensions are multiplied on a chip: in which dtype, and how precisely."""

    kernels: Kernels
    dim: int
    dtype: torch.dtype
    precision: str
    chip: Chip

    def tiling(self, name: str) -> Tiling:
        return self.kernels.tiling(name, self.chip.capability, self.precision, self.dim)

    def reading(self, *matrices: Tensor) -> dict[str, Any]:
        return self.kernels.reading(self.dtype, matrices)

    def tile(self, tiling: Tiling, all_keys: int, padded: bool = False) -> Tile:
        """What is compiled into a kernel that walks. Where rows are `padded`, tiles and chunks may be taken
        for whole."""
        padded_dim = max(16, next_power_of_2(self.dim))
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
            stacked=tiling.stacked and not chunked,
            dtype=self.dtype,
            precision=self.precision,
        )

    def walk(self, name: str, rows: int, keys: int, padded: bool = False, **arguments: Any) -> Launch:
        """A kernel whose programs hold rows and walk the keys: row blocks × ranges of keys × chunks of the
        gradient's dimensions."""
        tiling = self.tiling(name)
        tile = self.tile(tiling, keys, padded)
        blocks, steps = ceil_div(rows, tiling.held), ceil_div(keys, tiling.walked)
        chunks = ceil_div(self.dim, tile.width) if tile.width else 1
        slots = tiling.programs * self.chip.multiprocessors
        size = steps_a_range(steps, blocks * chunks, slots, MOST_KEYS_A_RANGE // tiling.walked)
        grid = blocks, ceil_div(steps, size), chunks
        own = {"TILE": tile, "keys_a_range": size * tiling.walked}
        return self.kernels.launch(name, grid, own | arguments, tiling)


def steps_a_range(steps: int, blocks: int, slots: int, most: int = MOST_KEYS_A_RANGE) -> int:
    """How many tiles of keys make a range, at most `most`, so that `blocks` programs for each range, of which
    `slots` run at a time, are done first, or nearly so with fewer ranges, for each takes memory. Beginning
    and end of a program cost about as much as two tiles."""

    def time(size: int) -> int:
        return ceil_div(blocks * ceil_div(steps, size), slots) * (size + 2)

    most_ranges = min(steps, max(1, 4 * slots // blocks))
    candidates = {ceil_div(steps, ranges) for ranges in range(1, most_ranges + 1)}
    least = min(map(time, candidates))
    return min(most, max(size for size in candidates if time(size) <= 1.03 * least))
