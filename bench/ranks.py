"""`python -m bench.ranks`: what a rank sends, computes and holds in a step of a loss over P ranks.

Nothing is sent: the loss's own code runs as rank 0 of a group of P that is not there, on tensors without
memory. What it hands to a collective is counted there, and its products by PyTorch's counter of operations.
`sent` says the same as a formula; `tests/test_bench_ranks.py` holds the two together, for groups that are
there too.

`--time` measures steps on 1, 2 and 4 processes of this machine instead.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from contrastive_ops import _backends, _ranks, conic_loss, distributed, info_nce_loss, nt_xent_loss
from contrastive_ops import reference as kernels
from contrastive_ops._contract import (
    CO2Partial,
    CO2Row,
    CO2Settings,
    ConICCoefficients,
    ConICPartial,
    ConICPositives,
    NTXentCoefficients,
    NTXentSettings,
)
from train_ref.machine import describe
from train_ref.markdown import table
from train_ref.memory import PeakMemory

HEADER = 8 * (2 + _ranks._MOST_OWN)  # bytes in which a rank agrees


class Step(NamedTuple):
    """A step of a loss.

    Attributes:
        loss: "co2", "nt_xent" or "conic".
        batch: of a rank: queries, or instances of two views.
        keys: K of the whole queue, or A of the whole weight.
        dim: D.
        dtype: of rows.
    """

    loss: str
    batch: int
    keys: int = 0
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16


class Counted(NamedTuple):
    """Bytes that a rank sends, floating-point operations of its matrix products, and bytes of the rows and
    messages that it holds beside its own."""

    sent: int
    operations: int
    held: int


def sent(step: Step, size: int, record: int = 8) -> int:
    """Bytes that a rank sends: rows and numbers of rows, once to each other rank or once to their owners.

    Args:
        record: bytes of a number in a partial: 8 for float64, of the C++ backend, 4 for Triton's float32.
    """
    others, b, d = size - 1, step.batch, step.dim * step.dtype.itemsize
    gradients = step.dim * torch.float32.itemsize

    def message(*parts: int) -> int:
        return sum(part + -part % _ranks._ALIGNMENT for part in parts)

    if step.loss == "co2":
        gathered = message(b * d, b * d) + message(b * len(CO2Row._fields) * 8)
        owned = b * (len(CO2Partial._fields) * record + gradients)
        return others * (HEADER + gathered + owned)
    if step.loss == "nt_xent":
        known = message(2 * b * d, 2 * b * 4, 2 * b * len(NTXentCoefficients._fields) * 8)
        return others * (2 * HEADER + message(2 * b * d) + known)
    known = message(2 * b * d, 8 * b, 4 * b, 2 * b * len(ConICCoefficients._fields) * 8)
    gathered = message(2 * b * d, 8 * b) + known
    owned = 2 * b * (len(ConICPartial._fields) * record + d)
    summed = 2 * others * (2 * b * len(ConICPositives._fields) * 8)  # of P times as much, by a ring
    return others * (2 * HEADER + gathered + owned) + summed


@contextlib.contextmanager
def counting(counter: Counter[str]) -> Iterator[None]:
    """Counts the bytes that this process's collectives send, while they do what they do."""
    all_gather, all_to_all, all_reduce = _ranks._all_gather, dist.all_to_all_single, dist.all_reduce

    def counted_gather(output: Tensor, x: Tensor, group: Any, **more: Any) -> Any:
        counter["sent"] += x.nbytes * (group.size() - 1)
        counter["held"] += output.nbytes
        return all_gather(output, x, group=group, **more)

    def counted_to_all(output: Tensor, x: Tensor, *splits: Any, group: Any, **more: Any) -> Any:
        counter["sent"] += x.nbytes - splits[1][group.rank()]
        counter["held"] += output.nbytes
        return all_to_all(output, x, *splits, group=group, **more)

    def counted_reduce(x: Tensor, group: Any, **more: Any) -> Any:
        counter["sent"] += 2 * x.nbytes * (group.size() - 1) // group.size()
        return all_reduce(x, group=group, **more)

    with (
        mock.patch.object(_ranks, "_all_gather", counted_gather),
        mock.patch.object(dist, "all_to_all_single", counted_to_all),
        mock.patch.object(dist, "all_reduce", counted_reduce),
    ):
        yield


class _Nowhere:
    """A group of so many ranks, none of which is there."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def simulate(step: Step, size: int) -> Counted:
    """What rank 0 of that many does in forward and backward, all of which have equal shares."""
    counter: Counter[str] = Counter()
    group = _Nowhere(size)

    def agree(ranks: _ranks.Ranks, alike: Any, **own: int) -> dict[str, list[int]]:
        counter["sent"] += HEADER * (size - 1)
        return {name: [value] * size for name, value in own.items()}

    nothing = mock.Mock()
    with (
        mock.patch.object(distributed, "named", return_value=group),
        mock.patch.object(_ranks.Ranks, "agree", agree),
        mock.patch.object(_backends, "select", return_value=kernels),
        mock.patch.object(_ranks, "_all_gather", nothing),
        mock.patch.object(dist, "all_to_all_single", nothing),
        mock.patch.object(dist, "all_reduce", nothing),
        counting(counter),
        FlopCounterMode(display=False) as operations,
    ):
        _run(step, size)
    return Counted(counter["sent"], operations.get_total_flops(), counter["held"])


def _run(step: Step, size: int) -> None:
    """Forward and backward of a step's operators, on tensors without memory."""

    def empty(*shape: int, dtype: torch.dtype = step.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    b, keys = step.batch, step.keys // size
    if step.loss == "co2":
        settings = CO2Settings(0.2, 0.05, 1.0, 0.3, False, True)
        distributed._co2(
            empty(b, step.dim), empty(b, step.dim), empty(keys, step.dim), *settings, True, None, ""
        )
    elif step.loss == "nt_xent":
        views, of_views = empty(2, b, step.dim), NTXentSettings(0.5, 0.05, 0.0, True)
        *_, statistics = distributed._nt_xent(views, *of_views, None, "")
        grad_loss = empty(2 * b, dtype=torch.float32)
        distributed._nt_xent_backward(grad_loss, views, statistics, *of_views, None, "")
    else:
        views, weight = empty(2, b, step.dim), empty(keys, step.dim, dtype=torch.float32)
        target = empty(b, dtype=torch.int64)
        *_, statistics = distributed._conic(views, weight, target, 0.1, None, 2.5, None, True, "")
        known = empty(b, dtype=torch.float32), views, weight, target, statistics
        distributed._conic_backward(*known, 0.1, 2.5, True, True, None, True, "")


def _time(rank: int, size: int, folder: str, results: Any) -> None:
    """Seconds of a step of each loss, the slowest rank's, as a median of several; and the MiB that it takes
    at the peak on rank 0, beside its input."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
        timeout=datetime.timedelta(minutes=5),
    )  # fmt: skip
    group, total, keys, dim = dist.group.WORLD, 512, 65536, 128
    batch = total // size
    query, key = (torch.randn(batch, dim, requires_grad=i == 0) for i in range(2))
    queue = torch.nn.functional.normalize(torch.randn(keys // size, dim), dim=1)
    views, weight = torch.randn(2, batch, dim, requires_grad=True), queue.clone().requires_grad_()
    rows = [torch.randn(4096 // size, dim, requires_grad=True) for _ in range(2)]
    target = torch.arange(batch) + rank * batch
    losses: dict[str, Callable[[], Tensor]] = {
        "InfoNCE": lambda: info_nce_loss(query, key, queue, group=group),
        "NT-Xent": lambda: nt_xent_loss(*rows, group=group),
        "ConIC": lambda: conic_loss(views, weight, target, group=group),
    }
    for name, loss in losses.items():
        loss().backward()
        for x in (query, views, weight, *rows):
            x.grad = None
        times, peak = [], PeakMemory(torch.device("cpu"))
        for _ in range(7):
            dist.barrier(group)
            begin = time.perf_counter()
            loss().backward()
            took = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            times.append(took.item())
        if rank == 0:
            results[name, size] = statistics.median(times[2:]), peak.read_mib()
    dist.destroy_process_group()


def measured() -> str:
    """Times of steps of equal size on 1, 2 and 4 processes of one thread each."""
    sizes = (1, 2, 4)
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(_time, (size, folder, results), nprocs=size)
        results_by = dict(results)
    names = dict.fromkeys(name for name, _ in results_by)
    rows = [
        [
            name,
            *(
                f"{1e3 * results_by[name, size][0]:.0f} ms, {results_by[name, size][1]:.0f} MiB"
                for size in sizes
            ),
            f"{results_by[name, 1][0] / results_by[name, 2][0]:.2f} ×",
        ]
        for name in names
    ]
    return table(["", *(f"{size} rank{'s' * (size > 1)}" for size in sizes), "2 ranks are faster by"], rows)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    raise AssertionError


STEPS = {
    "CO2, 32 queries a rank, K = 65,536": Step("co2", 32, 65536),
    "NT-Xent, 64 instances a rank": Step("nt_xent", 64),
    "ConIC, 64 instances a rank, A = 65,536": Step("conic", 64, 65536),
    "ConIC, 64 instances a rank, A = 2²⁴": Step("conic", 64, 1 << 24),
}
SIZES = (8, 64, 1024)


def simulated() -> str:
    """What a rank does on 8, 64 and 1,024 ranks, a share of whose batch does not change."""
    rows = []
    for name, step in STEPS.items():
        for size in SIZES:
            counted = simulate(step, size)
            alone = simulate(step._replace(batch=step.batch * size), 1)
            rows.append([
                name, size, _bytes(sent(step, size, 4)), _bytes(counted.held),
                f"{counted.operations / 1e9:.3g} G", f"{alone.operations / counted.operations:.4g}",
            ])  # fmt: skip
    header = ["", "P", "sent", "held of others", "operations", "one process's / a rank's operations"]
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time", action="store_true", help="measure steps on this machine")
    if parser.parse_args().time:
        print(describe("cpu"))
        print(measured())
    else:
        print(simulated())


if __name__ == "__main__":
    main()
