"""What is measured: sizes, inputs, and implementations of the same losses.

A step is one forward and backward to the query, with the settings of MoCo in the CO2 paper.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.eager import eager_co2
from contrastive_ops import co2_loss

BATCHES = (32, 256, 1024)
QUEUES = (4096, 65536, 262144)
LONGEST_QUEUE = 1 << 20  # for what needs no logits
DTYPES = ("float32", "bfloat16")

SETTINGS = {
    "co2": {"temperature": 0.07, "consistency_temperature": 0.04, "consistency_weight": 10.0},
    "info_nce": {"temperature": 0.07, "consistency_weight": 0.0},
}
# Matrix products of 2·B·K·D operations that a step needs: CO2 takes two passes over the queue, each with the
# similarities of query and key, and the second with the gradient; InfoNCE has no use for the key's.
PRODUCTS = {"co2": 5, "info_nce": 3}

# B×K matrices that eager PyTorch holds at its peak, measured; the other peers hold fewer or about as many.
EAGER_MATRICES = {"co2": 12, "info_nce": 4}

FUSED = ("cpu",)  # backends of the package
PEERS = {"co2": ("eager", "compile"), "info_nce": ("eager", "compile", "lightly")}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One implementation of a loss at one size; the fields are those of a record in the results."""

    loss: str
    impl: str
    dtype: str
    B: int
    K: int
    D: int = 128

    def __str__(self) -> str:
        return f"{self.loss}-{self.impl}-{self.dtype}-B{self.B}-K{self.K}"

    @property
    def operations(self) -> int:
        """Floating-point operations of the matrix products of a step."""
        return PRODUCTS[self.loss] * 2 * self.B * self.K * self.D


def grid() -> Iterator[Case]:
    """All cases that can run here, the implementations of a size one after the other."""
    for loss, dtype, batch, keys in itertools.product(SETTINGS, DTYPES, BATCHES, QUEUES):
        for impl in (*FUSED, *PEERS[loss]):
            case = Case(loss, impl, dtype, batch, keys)
            if _is_installed(impl) and _fits(case):
                yield case
    for loss, dtype, impl in itertools.product(SETTINGS, DTYPES, FUSED):
        yield Case(loss, impl, dtype, 256, LONGEST_QUEUE)


def _is_installed(impl: str) -> bool:
    if impl == "compile":
        return shutil.which("c++") is not None  # torch.compile makes C++ for CPUs
    return impl != "lightly" or importlib.util.find_spec("lightly") is not None


def _fits(case: Case) -> bool:
    """Whether memory can hold the B×K matrices of a peer: eager CO2 takes 12 GiB at the largest size."""
    if case.impl in FUSED:
        return True
    matrices = EAGER_MATRICES[case.loss] * case.B * case.K * getattr(torch, case.dtype).itemsize
    return matrices <= 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, D), which requires a gradient, key (B, D) that resembles it, normalised queue (K, D)."""
    generator = torch.Generator(device).manual_seed(0)
    rows = partial(torch.randn, generator=generator, device=device)
    query = rows(case.B, case.D)
    key = query + rows(case.B, case.D)
    queue = F.normalize(rows(case.K, case.D), dim=1)
    dtype = getattr(torch, case.dtype)
    return query.to(dtype).requires_grad_(), key.to(dtype), queue.to(dtype)


def implementation(case: Case) -> Loss:
    """``loss(query, key, queue)`` of the case; `impl` is a peer's name or a backend of the package."""
    settings = SETTINGS[case.loss]
    if case.impl == "eager":
        return partial(eager_co2, **settings)
    if case.impl == "compile":
        # What was compiled for other sizes would count against the limit beyond which dynamo gives up.
        torch.compiler.reset()
        return partial(torch.compile(eager_co2, dynamic=False), **settings)
    if case.impl == "lightly":
        return _lightly_nt_xent(settings["temperature"])
    return partial(co2_loss, backend=case.impl, **settings)


def _lightly_nt_xent(temperature: float) -> Loss:
    """lightly's NTXentLoss with a memory bank, which is MoCo's InfoNCE, on a bank that holds the queue."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules.memory_bank import MemoryBankModule

    class Bank(MemoryBankModule):
        def forward(self, output, labels=None, update=False):
            return super().forward(output, labels, update=False)  # the loss is measured, not the enqueueing

    criterion = NTXentLoss(temperature)
    criterion.memory_bank = Bank(size=0)

    def loss(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        criterion.memory_bank.bank = queue
        criterion.memory_bank.size = queue.shape
        return criterion(query, key)

    return loss


def step(loss: Loss, query: Tensor, key: Tensor, queue: Tensor) -> None:
    """Forward, and backward to the query."""
    query.grad = None
    loss(query, key, queue).backward()
