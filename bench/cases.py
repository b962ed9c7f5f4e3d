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

HEADLINE_BATCH = 256  # MoCo's


@dataclass(frozen=True)
class Grid:
    """The sizes that are measured on a kind of device, and what is measured there."""

    batches: tuple[int, ...]
    queues: tuple[int, ...]
    dims: dict[str, tuple[int, ...]]  # by dtype
    fused: tuple[str, ...]  # backends of the package
    peers: dict[str, tuple[str, ...]]  # by loss
    longest_queue: int | None = None  # beyond `queues`, for what needs no logits


GRIDS = {
    "cpu": Grid(
        batches=(32, 256, 1024),
        queues=(4096, 65536, 262144),
        dims={"float32": (128,), "bfloat16": (128,)},
        fused=("cpu",),
        peers={"co2": ("eager", "compile"), "info_nce": ("eager", "compile", "lightly")},
        longest_queue=1 << 20,
    ),
    "cuda": Grid(
        batches=(256, 32, 1024, 4096),
        queues=(65536, 16384, 1 << 20),
        dims={"bfloat16": (128, 256), "float32": (128,)},
        fused=("triton",),
        peers={
            "co2": ("eager", "compile", "max-autotune"),
            "info_nce": (
                "eager", "compile", "max-autotune",
                "linear_cross_entropy", "liger", "cut_cross_entropy", "inf_cl",
            ),
        },
    ),
}  # fmt: skip

SETTINGS = {
    "co2": {"temperature": 0.07, "consistency_temperature": 0.04, "consistency_weight": 10.0},
    "info_nce": {"temperature": 0.07, "consistency_weight": 0.0},
}
# Matrix products of 2·B·K·D operations that a step needs: CO2 takes two passes over the queue, each with the
# similarities of query and key, and the second with the gradient; InfoNCE has no use for the key's.
PRODUCTS = {"co2": 5, "info_nce": 3}

EXPONENTIALS = {"co2": 6, "info_nce": 2}  # a pair of row and key, in the two passes

# B×K matrices that eager PyTorch holds at its peak, measured; the other peers hold fewer or about as many.
EAGER_MATRICES = {"co2": 12, "info_nce": 4}

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
        return f"{self.loss}-{self.impl}-{self.dtype}-B{self.B}-K{self.K}-D{self.D}"

    @property
    def operations(self) -> int:
        """Floating-point operations of the matrix products of a step."""
        return PRODUCTS[self.loss] * 2 * self.B * self.K * self.D


def grid(device: str = "cpu") -> Iterator[Case]:
    """All cases that can run here, the implementations of a size one after the other."""
    sizes = GRIDS[device]
    for loss, (dtype, dims) in itertools.product(SETTINGS, sizes.dims.items()):
        for dim, batch, keys in itertools.product(dims, sizes.batches, sizes.queues):
            for impl in (*sizes.fused, *sizes.peers[loss]):
                case = Case(loss, impl, dtype, batch, keys, dim)
                if _is_installed(case, device) and _fits(case, device):
                    yield case
    if sizes.longest_queue:
        for loss, dtype, impl in itertools.product(SETTINGS, sizes.dims, sizes.fused):
            yield Case(loss, impl, dtype, HEADLINE_BATCH, sizes.longest_queue)


PACKAGES = {
    "lightly": "lightly",
    "liger": "liger_kernel",
    "cut_cross_entropy": "cut_cross_entropy",
    "inf_cl": "inf_cl",
}


def _is_installed(case: Case, device: str) -> bool:
    if case.impl == "compile":
        return device != "cpu" or shutil.which("c++") is not None  # torch.compile makes C++ for CPUs
    if case.impl == "max-autotune":
        return case.B == HEADLINE_BATCH  # compiling takes a minute a size
    if case.impl == "linear_cross_entropy":
        return hasattr(F, "linear_cross_entropy")
    if case.impl == "cut_cross_entropy" and case.dtype == "float32":
        return False  # it serves half precision only
    return case.impl not in PACKAGES or importlib.util.find_spec(PACKAGES[case.impl]) is not None


def _fits(case: Case, device: str) -> bool:
    """Whether memory can hold the B×K matrices of a peer: eager CO2 in bfloat16 takes 12 GiB at B = 1024 and
    K = 262144."""
    if case.impl not in ("eager", "compile", "max-autotune", "lightly"):
        return True
    matrices = EAGER_MATRICES[case.loss] * case.B * case.K * getattr(torch, case.dtype).itemsize
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return matrices <= 0.8 * memory


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
    if case.impl in ("compile", "max-autotune"):
        # What was compiled for other sizes would count against the limit beyond which dynamo gives up.
        torch.compiler.reset()
        # Graphs are captured by who measures, of every implementation alike.
        mode = "max-autotune-no-cudagraphs" if case.impl == "max-autotune" else None
        return partial(torch.compile(eager_co2, dynamic=False, mode=mode), **settings)
    if case.impl == "lightly":
        return _lightly_nt_xent(settings["temperature"])
    if case.impl in LANGUAGE_MODEL_LOSSES:
        return partial(_as_classification, LANGUAGE_MODEL_LOSSES[case.impl](), settings["temperature"])
    return partial(co2_loss, backend=case.impl, **settings)


def _as_classification(
    cross_entropy: Loss, temperature: float, query: Tensor, key: Tensor, queue: Tensor
) -> Tensor:
    """InfoNCE by a fused linear cross entropy, as near as one comes: the classifier is [keys; queue], whose
    first B rows are the classes. So the other rows' keys are negatives too, and the queue is copied."""
    weight = torch.cat([F.normalize(key, dim=1).to(queue.dtype), queue])
    target = torch.arange(len(query), device=query.device)
    return cross_entropy(F.normalize(query, dim=1) / temperature, weight, target)


def _linear_cross_entropy() -> Loss:
    """PyTorch's own, in chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return partial(F.linear_cross_entropy, options=options)


def _liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss()
    return lambda rows, weight, target: criterion(weight, rows, target)


def _cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    return lambda rows, weight, target: cal_flash_loss(
        rows, weight, target, scale=1.0, head_dim=rows.shape[1]
    ).mean()


LANGUAGE_MODEL_LOSSES = {
    "linear_cross_entropy": _linear_cross_entropy,
    "liger": _liger,
    "cut_cross_entropy": _cut_cross_entropy,
    "inf_cl": _inf_cl,
}


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
