"""Peak memory of a step on a CPU, in a process of its own."""

from __future__ import annotations

import torch

from bench.cases import Case, implementation, inputs, step
from train_ref.memory import PeakMemory, in_fresh_process


def peak_extra_mib(case: Case) -> float:
    """Peak memory in MiB that a step of `case` takes beyond its input.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the system killed the process for want of memory.
    """
    return in_fresh_process(_measure, case)


def _measure(case: Case) -> float:
    loss, tensors = implementation(case), inputs(case)
    # A small step first, which loads libraries and starts threads. What torch.compile makes serves one size
    # only, and compiling is not part of a step: there it is a whole one.
    step(loss, *(tensors if case.impl == "compile" else inputs(case.small())))
    for tensor in tensors:
        tensor.grad = None
    peak = PeakMemory(torch.device("cpu"))
    step(loss, *tensors)
    return peak.read_mib()
