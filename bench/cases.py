"""What is measured: sizes, inputs, and implementations of the same losses.

A step is one forward and backward to all that gets a gradient, with the papers' settings: those of MoCo in
the CO2 paper, those of ConIC with two views and a sampled classifier, and SimCLR's, with MoCo v2's for CO2 on
it.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_ops import co2_loss, conic_loss, nt_xent_loss
from train_ref.eager import eager_co2, eager_conic, eager_nt_xent

Inputs = tuple[Tensor, ...]
Loss = Callable[..., Tensor]
Sizes = tuple[tuple[int, int], ...]  # (B, K)


@dataclass(frozen=True)
class Problem:
    """A loss as it is measured.

    Attributes:
        fused: the package's; its backend is the implementation.
        eager: the same in eager PyTorch.
        settings: keyword arguments of both.
        inputs: makes them for a size.
        products: matrix products of 2·B·K·D operations that a step needs. CO2 takes two passes over the
            queue, each with the similarities of query and key, and the second with the gradient; InfoNCE
            needs one, with the query's and the gradient, which is known up to a factor of the row; ConIC's
            second pass has gradients of views and weight. NT-Xent's similarities are symmetric, half of
            them in either pass are enough, and the gradient is one.
        exponentials: a pair of row and key, in all passes.
        eager_matrices: B×K matrices that eager PyTorch holds at its peak, measured; other peers hold fewer or
            about as many.
        headline: (B, K) of the size that the README tells of.
        among_rows: rows are compared with one another, so that K is B.
    """

    fused: Callable[..., Any]
    eager: Callable[..., Any]
    settings: dict[str, Any]
    inputs: Callable[[Case, str], Inputs]
    products: int
    exponentials: int
    eager_matrices: int
    headline: tuple[int, int]
    among_rows: bool = False


@dataclass(frozen=True)
class Grid:
    """The sizes that are measured on a kind of device, and what is measured there."""

    sizes: dict[str, Sizes]  # by loss
    dims: dict[str, tuple[int, ...]]  # by dtype
    fused: tuple[str, ...]  # backends of the package
    peers: dict[str, tuple[str, ...]]  # by loss
    longest: dict[str, tuple[int, int]] = field(default_factory=dict)  # beyond them, for what needs no logits


def _with_keys(batches: tuple[int, ...], keys: tuple[int, ...]) -> Sizes:
    return tuple(itertools.product(batches, keys))


def _among_rows(*rows: int) -> Sizes:
    return tuple((count, count) for count in rows)


_QUEUES = _with_keys((32, 256, 1024), (4096, 65536, 262144))
_GPU_QUEUES = _with_keys((256, 32, 1024, 4096), (65536, 16384, 1 << 20))
GRIDS = {
    "cpu": Grid(
        sizes={
            "co2": _QUEUES,
            "info_nce": _QUEUES,
            "nt_xent": _among_rows(512, 1024, 4096),
            "nt_xent_co2": _among_rows(512, 1024, 4096),
            "conic": _with_keys((128, 512), (4096, 65536, 262144)),
        },
        dims={"float32": (128,), "bfloat16": (128,)},
        fused=("cpu",),
        peers={
            "co2": ("eager", "compile", "lightly"),
            "info_nce": ("eager", "compile", "lightly"),
            "nt_xent": ("eager", "compile", "lightly"),
            "nt_xent_co2": ("eager", "compile"),
            "conic": ("eager", "compile", "linear_cross_entropy"),
        },
        longest={
            "co2": (256, 1 << 20),
            "info_nce": (256, 1 << 20),
            "nt_xent": (16384, 16384),
            "nt_xent_co2": (16384, 16384),
            "conic": (512, 1 << 20),
        },
    ),
    "cuda": Grid(
        sizes={
            "co2": _GPU_QUEUES,
            "info_nce": _GPU_QUEUES,
            "nt_xent": _among_rows(8192, 1024, 65536),
            "nt_xent_co2": _among_rows(8192, 1024, 65536),
            "conic": _with_keys((1024, 128), (65536, 16384, 1 << 20)),
        },
        dims={"bfloat16": (128, 256), "float32": (128,)},
        fused=("triton", "cuda"),
        peers={
            "co2": ("eager", "compile", "max-autotune"),
            "info_nce": (
                "eager", "compile", "max-autotune",
                "linear_cross_entropy", "liger", "cut_cross_entropy", "inf_cl",
            ),
            "nt_xent": ("eager", "compile", "max-autotune", "lightly", "memeff", "siglip_kernel"),
            "nt_xent_co2": ("eager", "compile", "max-autotune"),
            "conic": (
                "eager", "compile", "max-autotune", "linear_cross_entropy", "liger", "cut_cross_entropy",
            ),
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One implementation of a loss at one size; the fields are those of a record in the results.

    B counts rows (of ConIC and NT-Xent views times instances), K the rows they are compared with.
    """

    loss: str
    impl: str
    dtype: str
    B: int
    K: int
    D: int = 128

    def __str__(self) -> str:
        return f"{self.loss}-{self.impl}-{self.dtype}-B{self.B}-K{self.K}-D{self.D}"

    @property
    def problem(self) -> Problem:
        return PROBLEMS[self.loss]

    @property
    def operations(self) -> int:
        """Floating-point operations of the matrix products of a step."""
        return self.problem.products * 2 * self.B * self.K * self.D

    def small(self) -> Case:
        """The same with few keys."""
        return replace(self, K=200, B=200 if self.problem.among_rows else self.B)


def grid(device: str = "cpu") -> Iterator[Case]:
    """All cases that can run here, the implementations of a size one after the other."""
    chosen = GRIDS[device]
    by_loss, by_dtype = chosen.sizes.items(), chosen.dims.items()
    for (loss, sizes), (dtype, dims) in itertools.product(by_loss, by_dtype):
        for dim, size in itertools.product(dims, sizes):
            for impl in (*chosen.fused, *chosen.peers[loss]):
                case = Case(loss, impl, dtype, *size, dim)
                if _is_installed(case, device) and _fits(case, device):
                    yield case
    for (loss, size), dtype, impl in itertools.product(chosen.longest.items(), chosen.dims, chosen.fused):
        yield Case(loss, impl, dtype, *size)


PACKAGES = {
    "lightly": "lightly",
    "liger": "liger_kernel",
    "cut_cross_entropy": "cut_cross_entropy",
    "inf_cl": "inf_cl",
    "memeff": "memeff",
    "siglip_kernel": "siglip_kernel",
}


def _is_installed(case: Case, device: str) -> bool:
    if case.impl == "compile":
        return device != "cpu" or shutil.which("c++") is not None  # torch.compile makes C++ for CPUs
    if case.impl == "max-autotune":
        return case.problem.headline[0] == case.B  # compiling takes a minute a size
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
    matrices = case.problem.eager_matrices * case.B * case.K * getattr(torch, case.dtype).itemsize
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return matrices <= 0.8 * memory


def inputs(case: Case, device: str = "cpu") -> Inputs:
    """The tensors of a case, of which those that get a gradient require one."""
    return case.problem.inputs(case, device)


def _queue_inputs(case: Case, device: str) -> Inputs:
    """Query (B, D), key (B, D) that resembles it, normalised queue (K, D)."""
    generator = torch.Generator(device).manual_seed(0)
    rows = partial(torch.randn, generator=generator, device=device)
    query = rows(case.B, case.D)
    key = query + rows(case.B, case.D)
    queue = F.normalize(rows(case.K, case.D), dim=1)
    dtype = getattr(torch, case.dtype)
    return query.to(dtype).requires_grad_(), key.to(dtype), queue.to(dtype)


def _view_inputs(case: Case, device: str) -> Inputs:
    """Two views (B / 2, D) of instances."""
    generator = torch.Generator(device).manual_seed(0)
    rows = partial(torch.randn, generator=generator, device=device)
    view1 = rows(case.B // 2, case.D)
    view2 = view1 + rows(case.B // 2, case.D)
    dtype = getattr(torch, case.dtype)
    return view1.to(dtype).requires_grad_(), view2.to(dtype).requires_grad_()


def _classifier_inputs(case: Case, device: str) -> Inputs:
    """Two views (2, B / 2, D) of instances, weight (K, D), target (B / 2,)."""
    generator = torch.Generator(device).manual_seed(0)
    rows = partial(torch.randn, generator=generator, device=device)
    weight = rows(case.K, case.D)
    target = torch.randint(case.K, (case.B // 2,), generator=generator, device=device)
    views = weight[target] + rows(2, case.B // 2, case.D)
    dtype = getattr(torch, case.dtype)
    return views.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


_MOCO = {"temperature": 0.07, "consistency_temperature": 0.04, "consistency_weight": 10.0}
_SIMCLR = {"temperature": 0.1, "consistency_temperature": 0.05, "consistency_weight": 0.0}
_CONIC = {"num_instances": 1_281_167, "temperature": 0.1, "consistency_weight": 2.5}
_CO2 = Problem(
    fused=co2_loss,
    eager=eager_co2,
    settings=_MOCO,
    inputs=_queue_inputs,
    products=5,
    exponentials=6,
    eager_matrices=12,
    headline=(256, 65536),
)
_NT_XENT = Problem(
    fused=nt_xent_loss,
    eager=eager_nt_xent,
    settings=_SIMCLR,
    inputs=_view_inputs,
    products=2,
    exponentials=2,
    eager_matrices=4,
    headline=(4096, 4096),
    among_rows=True,
)
PROBLEMS = {
    "co2": _CO2,
    "info_nce": replace(
        _CO2, settings=_MOCO | {"consistency_weight": 0.0}, products=2, exponentials=1, eager_matrices=4
    ),
    "nt_xent": _NT_XENT,
    "nt_xent_co2": replace(
        _NT_XENT, settings=_SIMCLR | {"consistency_weight": 1.0}, exponentials=4, eager_matrices=23
    ),
    "conic": Problem(
        fused=conic_loss,
        eager=eager_conic,
        settings=_CONIC,
        inputs=_classifier_inputs,
        products=4,
        exponentials=2,
        eager_matrices=5,
        headline=(512, 65536),
    ),
}


def implementation(case: Case) -> Loss:
    """The loss of a case's tensors; `impl` is a peer's name or a backend of the package."""
    problem = case.problem
    if case.impl == "eager":
        return partial(problem.eager, **problem.settings)
    if case.impl in ("compile", "max-autotune"):
        # What was compiled for other sizes would count against the limit beyond which dynamo gives up.
        torch.compiler.reset()
        # Graphs are captured by who measures, of every implementation alike.
        mode = "max-autotune-no-cudagraphs" if case.impl == "max-autotune" else None
        return partial(torch.compile(problem.eager, dynamic=False, mode=mode), **problem.settings)
    if case.impl == "lightly":
        return LIGHTLY[case.loss](**problem.settings)
    if case.impl in PAIR_LOSSES:
        return PAIR_LOSSES[case.impl](problem.settings["temperature"])
    if case.impl in LANGUAGE_MODEL_LOSSES:
        as_peer = _classify_views if case.loss == "conic" else _classify_query
        return partial(as_peer, LANGUAGE_MODEL_LOSSES[case.impl](), problem.settings["temperature"])
    return partial(problem.fused, **problem.settings, backend=case.impl)


def _classify_query(
    cross_entropy: Loss, temperature: float, query: Tensor, key: Tensor, queue: Tensor
) -> Tensor:
    """InfoNCE by a fused linear cross entropy, as near as one comes: the classifier is [keys; queue], whose
    first B rows are the classes. So the other rows' keys are negatives too, and the queue is copied."""
    weight = torch.cat([F.normalize(key, dim=1).to(queue.dtype), queue])
    target = torch.arange(len(query), device=query.device)
    return cross_entropy(F.normalize(query, dim=1) / temperature, weight, target)


def _classify_views(
    cross_entropy: Loss, temperature: float, views: Tensor, weight: Tensor, target: Tensor
) -> Tensor:
    """ConIC's classification by a fused linear cross entropy: without β, and without consistency."""
    rows = F.normalize(views.flatten(0, 1), dim=1) / temperature
    return cross_entropy(rows, F.normalize(weight, dim=1), target.repeat(len(views)))


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


def _memeff(temperature: float) -> Loss:
    """NT-Xent by two calls of memeff's InfoNCE: each view's rows against the other view and themselves. No
    negative is dropped for being near, and its gradients are those of the loss."""
    from memeff import MemoryEfficientQwen3Loss

    criterion = MemoryEfficientQwen3Loss(temperature, margin=3.0, use_qq_negatives=True, stable=False)
    return lambda view1, view2: (criterion(view1, view2) + criterion(view2, view1)) / 2


def _siglip_kernel(temperature: float) -> Loss:
    """A sigmoid loss of as many pairs as NT-Xent's: each row with all rows, of which that of the other view
    is the positive. A sigmoid a pair takes the place of the softmax."""
    from siglip_kernel import fused_siglip_loss

    def loss(view1: Tensor, view2: Tensor) -> Tensor:
        view1, view2 = F.normalize(view1, dim=1), F.normalize(view2, dim=1)
        scale, bias = view1.new_tensor([-math.log(temperature), -10.0], dtype=torch.float32)
        return fused_siglip_loss(torch.cat([view1, view2]), torch.cat([view2, view1]), scale, bias)

    return loss


PAIR_LOSSES: dict[str, Callable[[float], Loss]] = {"memeff": _memeff, "siglip_kernel": _siglip_kernel}


def _lightly_nt_xent(*, temperature: float, **_: Any) -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature)


def _lightly_info_nce(*, temperature: float, **_: Any) -> Loss:
    """lightly's NTXentLoss with a memory bank, which is MoCo's InfoNCE."""
    from lightly.loss import NTXentLoss

    return _with_a_bank(NTXentLoss(temperature))


def _lightly_co2(*, consistency_temperature: float, consistency_weight: float, **settings: Any) -> Loss:
    """InfoNCE and lightly's CO2Regularizer, added as its documentation has it. The regularizer returns a new
    tensor with the value of its term: no gradient comes back through it."""
    from lightly.loss.regularizer import CO2Regularizer

    contrast = _lightly_info_nce(**settings)
    consistency = _with_a_bank(CO2Regularizer(consistency_weight, consistency_temperature))
    return lambda *tensors: contrast(*tensors) + consistency(*tensors)


def _with_a_bank(criterion: Any) -> Loss:
    """A loss of lightly's of two batches, on a memory bank that holds the queue."""
    from lightly.models.modules.memory_bank import MemoryBankModule

    class Bank(MemoryBankModule):
        def forward(self, output, labels=None, update=False):
            return super().forward(output, labels, update=False)  # the loss is measured, not the enqueueing

    criterion.memory_bank = Bank(size=0)

    def loss(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        criterion.memory_bank.bank = queue
        criterion.memory_bank.size = queue.shape
        return criterion(query, key)

    return loss


# Losses of peers through whose consistency term no gradient comes back: their steps do less.
WITHOUT_CONSISTENCY_GRADIENT = {("co2", "lightly")}
LIGHTLY = {"co2": _lightly_co2, "info_nce": _lightly_info_nce, "nt_xent": _lightly_nt_xent}


def step(loss: Loss, *tensors: Tensor) -> None:
    """Forward, and backward to what requires a gradient."""
    for tensor in tensors:
        tensor.grad = None
    loss(*tensors).backward()
