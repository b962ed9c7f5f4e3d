"""Memory at its peak: of the process, or of a GPU's tensors."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def resident_mib(field: str) -> float:
    """VmRSS, resident memory, or VmHWM, its high-water mark (man 5 proc). That of getrusage would remember
    what the process was forked from."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


class PeakMemory:
    """What is in use at the peak from now on, beyond what is in use now.

    On a CPU that is resident memory, which the kernel counts (Linux only), so that no allocator and no
    library's buffer hides. On a GPU it is what torch has allocated.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc holds back could be used unseen
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self.before = resident_mib("VmRSS")

    def read_mib(self) -> float:
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else resident_mib("VmHWM")
        return peak - self.before


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module returns in a process that has done nothing before.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the system killed the process for want of memory.
    """
    # A server imports torch once, and each call gets a fresh child of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
