"""Several processes that are the ranks of a group, for tests."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

TIMEOUT = datetime.timedelta(seconds=60)  # of an operation: a rank that hangs ends the test


def run(
    worker: Callable[..., Any], size: int, *arguments: Any, timeout: datetime.timedelta = TIMEOUT
) -> list[Any]:
    """What `worker(group, *arguments)` returns on each of so many ranks, which talk over gloo; None of one
    that left without returning.

    Args:
        worker: a function of a module.
        *arguments: and what it returns, are pickled.

    Raises:
        torch.multiprocessing.ProcessRaisedException: it raised on a rank; the message has that traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (size, folder, timeout, worker, arguments), nprocs=size)
        results = (_result(folder, rank) for rank in range(size))
        return [torch.load(file, weights_only=False) if file.exists() else None for file in results]


def _result(folder: str, rank: int) -> Path:
    return Path(folder, f"result-{rank}")


def _rank(
    rank: int, size: int, folder: str, timeout: datetime.timedelta, worker: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    torch.save(worker(dist.group.WORLD, *arguments), _result(folder, rank))
    # Others may still be waiting for this one's last message.
    dist.barrier()
    dist.destroy_process_group()
    # DDP and torch.compile keep a group beyond its end, and with it threads of gloo that may still free a
    # message's tensors. Where they do so while Python comes down, PyTorch ends the process with SIGABRT.
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)
