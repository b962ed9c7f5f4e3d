"""`python -m contrastive_ops.compile`: Compiles the kernels in CUDA C++ ahead of their first use.

What is compiled is kept on disk, where every process finds it; a GPU is not needed.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import cuda
from ._contract import SGDSettings
from .cuda import _cache, _compiler
from .cuda._compiler import Program, Unsupported
from .gpu.launch import Call, Chip, recording

EXAMPLES = """examples:
  python -m contrastive_ops.compile                            # for the GPUs of this machine
  python -m contrastive_ops.compile --arch sm_75 sm_80         # for others, without them
  python -m contrastive_ops.compile --dtype bfloat16 --operator sgd_
  CONTRASTIVE_OPS_CACHE=/shared/kernels python -m contrastive_ops.compile --arch sm_80

environment:
  CONTRASTIVE_OPS_CACHE   where compiled kernels are kept, by default in the cache of the user
"""
DTYPES = ("float16", "bfloat16", "float32", "float64")
_MULTIPROCESSORS = 1  # of a chip that is not there; no kernel is compiled in another way for it


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sgd(dtype: torch.dtype) -> None:
    """With gradients of the weight's dtype and in float32, as a classifier's gradient may be."""
    for grad_dtype, nesterov in itertools.product({dtype, torch.float32}, (False, True)):
        weight, buffer, grad = (_meta(8, 8, dtype=each) for each in (dtype, dtype, grad_dtype))
        cuda.sgd_(weight, buffer, grad, SGDSettings(0.1, 0.9, 1e-4, nesterov))


def _exchange_rows(dtype: torch.dtype) -> None:
    for dim in (64, 128, 256, 512, 1024):
        weight, buffer = (_meta(8, dim, dtype=dtype) for _ in range(2))
        incoming, outgoing = (_meta(8, 2, dim, dtype=dtype) for _ in range(2))
        rows = [_meta(8, dtype=torch.int64) for _ in range(3)]
        coefficients = _meta(8, 2, 2, dtype=torch.float64)
        cuda.exchange_rows_(weight, buffer, rows[0], incoming, rows[1], coefficients, outgoing, rows[2])


# How each operator is called by those who train, in a dtype.
_CALLS: dict[str, Callable[[torch.dtype], None]] = {"sgd_": _sgd, "exchange_rows_": _exchange_rows}


def programs(target: str, operator: str, dtype: torch.dtype) -> Iterator[tuple[str, Program]]:
    """What an operator's calls in a dtype need, each with words that tell it from the others."""
    number = target.partition("_")[2]
    capability = int(number[:-1]), int(number[-1])
    with recording(Chip(capability, _MULTIPROCESSORS)) as calls:
        _CALLS[operator](dtype)
    found = {call.launch.program(call.arguments, target): call for call in calls}  # type: ignore[attr-defined]
    for program, call in found.items():
        yield _words(call), program


def _words(call: Call) -> str:
    """The kernel, the dtypes of its tensors, and what else is compiled in."""
    dtypes = dict.fromkeys(
        str(each.dtype).removeprefix("torch.") for each in _tensors(call.arguments.values())
    )
    constants = {name: value for name, value in call.arguments.items() if name.isupper()}
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
    known = [10 * major + minor for major, minor in _compiler.supported()]
    for target in requested or ():
        number = re.fullmatch(r"(?:sm|compute)_(\d+)", target)
        if not number or int(number[1]) not in known:
            found = ".".join(map(str, _compiler.nvrtc_version()))
            names = ", ".join(f"sm_{each}" for each in known if each >= 70)
            raise Unsupported(f"NVRTC {found} does not compile for {target}, but for {names}")
    if requested:
        return requested
    if not torch.cuda.is_available():
        raise Unsupported("there is no GPU here: say for which to compile, such as --arch sm_75")
    devices = range(torch.cuda.device_count())
    return sorted({_compiler.target_for(torch.cuda.get_device_capability(each)) for each in devices})


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
    parser.add_argument("--operator", nargs="+", choices=_CALLS, default=tuple(_CALLS), help="by default all")
    options = parser.parse_args(arguments)
    try:
        targets = _targets(options.arch)
    except Unsupported as reason:
        parser.exit(1, f"{parser.prog}: {reason}\n")
    began, count = time.perf_counter(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", _cache.NotKept)
        for target, operator, dtype in itertools.product(targets, options.operator, options.dtype):
            for words, program in programs(target, operator, getattr(torch, dtype)):
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
