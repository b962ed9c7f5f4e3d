"""Peak memory of a step, in a process of its own: what resident memory reaches above what was there before.

Resident memory is what the kernel counts (Linux only), so that no allocator and no library's buffer hides.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench.cases import Case, implementation, inputs, step
from train_ref.machine import resident_mib


def peak_extra_mib(case: Case) -> float:
    """Peak memory in MiB that a step of `case` takes beyond its input.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the system killed the process for want of memory.
    """
    # A server imports torch once, and each case gets a fresh child of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, case).result()


def _measure(case: Case) -> float:
    loss, tensors = implementation(case), inputs(case)
    # A small step first, which loads libraries and starts threads. What torch.compile makes serves one size
    # only, and compiling is not part of a step: there it is a whole one.
    step(loss, *(tensors if case.impl == "compile" else inputs(case.small())))
    for tensor in tensors:
        tensor.grad = None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc holds back could serve the step unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident_mib("VmRSS")
    step(loss, *tensors)
    return resident_mib("VmHWM") - before
