"""`python -m contrastive_ops.compile`: Compiles the kernels in CUDA C++ ahead of their first use.

What is compiled is kept on disk, where every process finds it; a GPU is not needed.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda
from ._contract import CO2Settings, ConICSettings, NTXentSettings, SGDSettings
from .cuda import _cache, _compiler
from .cuda._compiler import Program, Unsupported
from .gpu import module_of
from .gpu.launch import Call, Chip, recording

EXAMPLES = """examples:
  python -m contrastive_ops.compile                            # for the GPUs of this machine
  python -m contrastive_ops.compile --arch sm_75 sm_80         # for others, without them
  python -m contrastive_ops.compile --dtype bfloat16 --dim 128 256 --operator co2
  CONTRASTIVE_OPS_CACHE=/shared/kernels python -m contrastive_ops.compile --arch sm_80

environment:
  CONTRASTIVE_OPS_CACHE   where compiled kernels are kept, by default in the cache of the user
"""
DTYPES = ("float16", "bfloat16", "float32", "float64")
_MULTIPROCESSORS = 80  # of the chip that calls are planned for, which need not be there


class Wanted(NamedTuple):
    """What the calls of an operator are to be like: the dtype of query, views or weight, and D."""

    dtype: torch.dtype
    dim: int

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    @property
    def stored(self) -> list[torch.dtype]:
        """The dtypes of what the rows meet: the same, or float32."""
        return list(dict.fromkeys((self.dtype, torch.float32)))


# Batches and numbers of keys, of which few and many parts are merged.
_SIZES = ((64, 4096), (256, 65536))


def _co2(wanted: Wanted) -> None:
    """CO2 over a queue, InfoNCE alone, and consistency alone."""
    for (batch, keys), stored in itertools.product(_SIZES, wanted.stored):
        query, key = (wanted.tensor(batch, wanted.dim) for _ in range(2))
        queue = wanted.tensor(keys, wanted.dim, dtype=stored)
        for instance_weight, consistency_weight in ((1.0, 0.3), (1.0, 0.0), (0.0, 1.0)):
            settings = CO2Settings(0.2, 0.05, instance_weight, consistency_weight, False, True)
            cuda.co2(query, key, queue, settings, True)


def _conic(wanted: Wanted) -> None:
    """Forward, backward, and a backward that takes the step."""
    for (batch, rows), stored in itertools.product(_SIZES, wanted.stored):
        views, target = wanted.tensor(2, batch, wanted.dim), wanted.tensor(batch, dtype=torch.int64)
        weight, buffer = (wanted.tensor(rows, wanted.dim, dtype=stored) for _ in range(2))
        settings, grad_loss = ConICSettings(0.1, 2.5), wanted.tensor(batch, dtype=torch.float32)
        *_, known = cuda.conic(views, weight, target, settings)
        cuda.conic_gradient(grad_loss, views, weight, target, known, settings, True, True)
        step = SGDSettings(0.1, 0.9, 1e-4, False)
        cuda.conic_gradient_sgd_(grad_loss, views, weight, buffer, target, known, settings, step)


def _nt_xent(wanted: Wanted) -> None:
    """With and without consistency."""
    for (batch, _), weight in itertools.product(_SIZES, (0.0, 1.0)):
        views, settings = wanted.tensor(2, batch, wanted.dim), NTXentSettings(0.5, 0.05, weight, True)
        *_, known = cuda.nt_xent(views, settings)
        cuda.nt_xent_gradient(wanted.tensor(2 * batch, dtype=torch.float32), views, known, settings)


def _sgd(wanted: Wanted) -> None:
    """With gradients of the weight's dtype and in float32."""
    for grad_dtype, nesterov in itertools.product(wanted.stored, (False, True)):
        weight, buffer, grad = (wanted.tensor(8, 8, dtype=each) for each in (None, None, grad_dtype))
        cuda.sgd_(weight, buffer, grad, SGDSettings(0.1, 0.9, 1e-4, nesterov))


def _exchange_rows(wanted: Wanted) -> None:
    weight, buffer = (wanted.tensor(8, wanted.dim) for _ in range(2))
    incoming, outgoing = (wanted.tensor(8, 2, wanted.dim) for _ in range(2))
    slots, coming, going = (wanted.tensor(8, dtype=torch.int64) for _ in range(3))
    coefficients = wanted.tensor(8, 2, 2, dtype=torch.float64)
    cuda.exchange_rows_(weight, buffer, slots, incoming, coming, coefficients, outgoing, going)


# How each operator is called by those who train.
_CALLS: dict[str, Callable[[Wanted], None]] = {
    "co2": _co2, "conic": _conic, "nt_xent": _nt_xent, "sgd_": _sgd, "exchange_rows_": _exchange_rows,
}  # fmt: skip


def programs(target: str, operator: str, wanted: Wanted) -> Iterator[tuple[str, Program]]:
    """What an operator's calls need, each with words that tell it from the others."""
    capability = divmod(int("".join(filter(str.isdecimal, target))), 10)
    with recording(Chip(capability, _MULTIPROCESSORS)) as calls:
        _CALLS[operator](wanted)
    found = {call.launch.program(call.arguments, target): call for call in calls}  # type: ignore[attr-defined]
    for program, call in found.items():
        yield _words(call), program


def _words(call: Call) -> str:
    """The kernel, the dtypes of its tensors, and what else is compiled in."""
    arguments = call.launch.asked_for(call.arguments)  # type: ignore[attr-defined]
    tensors = _tensors(arguments.values())
    dtypes = dict.fromkeys(str(each.dtype).removeprefix("torch.") for each in tensors)
    constants = {name: value for name, value in arguments.items() if name.isupper()}
    flags = [name.lower() for name, value in constants.items() if value is True]
    sizes = [f"{name.lower()} {value}" for name, value in constants.items() if type(value) is int]
    return f"{call.launch.name} ({', '.join([*dtypes, *flags, *sizes])})"


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _targets(requested: list[str] | None) -> list[str]:
    """What to compile for: what was asked for, or the GPUs of this machine.

    Raises:
        Unsupported: there is none, or NVRTC does not know it.
    """
    if requested:
        return [_target(each) for each in requested]
    if not torch.cuda.is_available():
        raise Unsupported("there is no GPU here: say for which to compile, such as --arch sm_75")
    devices = range(torch.cuda.device_count())
    return sorted({_compiler.target_for(torch.cuda.get_device_capability(each)) for each in devices})


def _target(requested: str) -> str:
    """The name of what a GPU will ask for: "sm_90a" of "sm_90", too."""
    for capability in _compiler.supported():
        name = _compiler.architecture(capability)
        for kind in ("sm", "compute"):
            if requested in (f"{kind}_{name}", f"{kind}_{name.rstrip('a')}"):
                return f"{kind}_{name}"
    found = ".".join(map(str, _compiler.nvrtc_version()))
    names = ", ".join(
        "sm_" + _compiler.architecture(each) for each in _compiler.supported() if each >= (7, 0)
    )
    raise Unsupported(f"NVRTC {found} does not compile for {requested}, but for {names}")


def _dimensions(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= cuda.MAX_DIM:
        raise argparse.ArgumentTypeError(f"must be from 1 to {cuda.MAX_DIM}, got {text}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m contrastive_ops.compile",
        description=__doc__.partition(": ")[2],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch", nargs="+", metavar="sm_XX", help="architectures of GPUs; by default those of this machine"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=DTYPES[:3], help="by default all but float64"
    )
    parser.add_argument(
        "--dim", nargs="+", type=_dimensions, default=[128], help="dimensions of rows (default: 128)"
    )
    parser.add_argument("--operator", nargs="+", choices=_CALLS, default=tuple(_CALLS), help="by default all")
    options = parser.parse_args(arguments)
    try:
        targets = _targets(options.arch)
    except Unsupported as reason:
        parser.exit(1, f"{parser.prog}: {reason}\n")
    began, count = time.perf_counter(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", _cache.NotKept)
        asked = itertools.product(targets, options.operator, options.dtype, options.dim)
        for target, operator, dtype, dim in asked:
            if getattr(torch, dtype) not in cuda.SERVED[str(module_of(operator))]:
                continue
            for words, program in programs(target, operator, Wanted(getattr(torch, dtype), dim)):
                before = time.perf_counter()
                try:
                    _compiler.compile_program(program)
                except _cache.NotKept as reason:
                    parser.exit(1, f"{parser.prog}: {reason}\n")
                print(f"{target:10} {time.perf_counter() - before:6.2f} s  {words}", flush=True)
                count += 1
    print(f"{count} kernels in {time.perf_counter() - began:.1f} s, kept in {_cache.folder()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
