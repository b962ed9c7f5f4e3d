"""Inputs of the tests: one seeded factory, and the hypothesis strategies that draw its arguments."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from contrastive_ops._backends import BACKENDS
from tests.gpu_emulator.driver import REQUESTED

# The Triton kernels are interpreted, slowly, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The keys of a long queue: of one that people train with, or sixteen times fewer where kernels run slowly.
SLOW = INTERPRETED or bool(REQUESTED) or os.environ.get("HYPOTHESIS_PROFILE") == "interpreted"
FULL_SIZE = 4096 if SLOW else 65536

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def refusal(backend: str, dtype: torch.dtype, operator: str = "co2") -> str | None:
    """Why a backend does not serve a dtype."""
    reason: str | None = import_module(BACKENDS[backend]).refuses(operator, torch.empty(1, 1, dtype=dtype))
    return reason


def require(backend: str, dtype: torch.dtype, operator: str = "co2") -> None:
    """Skips the test where the backend does not serve a dtype."""
    if reason := refusal(backend, dtype, operator):
        pytest.skip(reason)


def mostly_thorough(values: Iterable[Any], kept: Callable[[Any], bool]) -> list[Any]:
    """A test's parameters, of which those that are not kept are left to `make test-all`; a tuple has those of
    several names."""
    return [
        each
        if kept(each)
        else pytest.param(*(each if type(each) is tuple else (each,)), marks=pytest.mark.thorough)
        for each in values
    ]


def rows(count: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(count, dim, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(torch.get_default_device(), dtype)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in other memory: "rows", "columns" (MoCo's (D, K) buffer), "strided", "offset"."""
    if layout == "columns":
        return x.T.contiguous().T
    if layout == "strided":
        spaced = x.new_full((2 * x.shape[0], 3 * x.shape[1]), float("nan"))
        spaced[::2, 1::3] = x
        return spaced[::2, 1::3]
    if layout == "offset":
        shifted = x.new_full((x.numel() + 1,), float("nan"))
        shifted[1:] = x.flatten()
        return shifted[1:].view(x.shape)
    return x.contiguous()


LAYOUTS = ("rows", "columns", "strided", "offset")


@dataclass(frozen=True)
class Case:
    """Arguments of one call: a query, a key that resembles it, and a normalised queue."""

    batch: int = 8
    keys: int = 50
    dim: int = 16
    dtype: torch.dtype = torch.float32
    queue_dtype: torch.dtype | None = None  # None: the query's
    layout: str = "rows"
    queue_layout: str = "rows"
    resemblance: float = 1.0  # how much of the key is the query
    query_scale: float = 1.0
    queue_scale: float = 1.0
    temperature: float = 0.07
    consistency_temperature: float = 0.04
    consistency_weight: float = 10.0
    include_positive: bool = False
    normalize: bool = True
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        query = rows(self.batch, self.dim, self.seed, torch.float64)
        key = self.resemblance * query + rows(self.batch, self.dim, self.seed + 1, torch.float64)
        queue = self.queue_scale * F.normalize(rows(self.keys, self.dim, self.seed + 2, torch.float64), dim=1)
        if not self.normalize:
            query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        return (
            lay_out((self.query_scale * query).to(self.dtype), self.layout),
            lay_out((self.query_scale * key).to(self.dtype), self.layout),
            lay_out(queue.to(self.queue_dtype or self.dtype), self.queue_layout),
        )

    def multiplications(self) -> int:
        return self.batch * self.keys * self.dim

    def settings(self) -> dict[str, float | bool]:
        return {
            "temperature": self.temperature,
            "consistency_temperature": self.consistency_temperature,
            "consistency_weight": self.consistency_weight,
            "include_positive": self.include_positive,
            "normalize": self.normalize,
        }

    def replace(self, **changes: object) -> Case:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class ConICCase:
    """Arguments of one call of `conic_loss`: views that resemble one another and their row of the weight."""

    views: int = 2
    batch: int = 8
    rows: int = 50
    dim: int = 16
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # None: the views'
    layout: str = "rows"
    weight_layout: str = "rows"
    resemblance: float = 1.0  # how much of each view, and of its row of the weight, they have in common
    view_scale: float = 1.0
    weight_scale: float = 1.0
    sampled: int = 1  # how many times more instances there are than rows
    temperature: float = 0.1
    consistency_weight: float = 2.5
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        target = torch.randint(self.rows, (self.batch,), generator=generator, device="cpu")
        target = target.to(torch.get_default_device())
        common = self.resemblance * rows(self.rows, self.dim, self.seed, torch.float64)
        weight = common + rows(self.rows, self.dim, self.seed + 1, torch.float64)
        views = rows(self.views * self.batch, self.dim, self.seed + 2, torch.float64)
        views = self.view_scale * (views + common[target].repeat(self.views, 1))
        views = lay_out(views.to(self.dtype), self.layout)
        views = views.unflatten(0, (self.views, self.batch))
        weight = (self.weight_scale * weight).to(self.weight_dtype or self.dtype)
        return views, lay_out(weight, self.weight_layout), target

    def multiplications(self) -> int:
        return self.views * self.batch * self.rows * self.dim

    def settings(self) -> dict[str, float | int]:
        return {
            "num_instances": self.sampled * self.rows,
            "temperature": self.temperature,
            "consistency_weight": self.consistency_weight,
        }

    def replace(self, **changes: object) -> ConICCase:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class NTXentCase:
    """Arguments of one call of `nt_xent_loss`: two views that resemble one another."""

    batch: int = 8
    dim: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "rows"
    resemblance: float = 1.0  # how much of the second view is the first
    scale: float = 1.0
    temperature: float = 0.5
    consistency_weight: float = 1.0
    consistency_temperature: float = 0.05
    normalize: bool = True
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor]:
        view1 = rows(self.batch, self.dim, self.seed, torch.float64)
        view2 = self.resemblance * view1 + rows(self.batch, self.dim, self.seed + 1, torch.float64)
        if not self.normalize:
            view1, view2 = F.normalize(view1, dim=1), F.normalize(view2, dim=1)
        view1, view2 = (lay_out((self.scale * x).to(self.dtype), self.layout) for x in (view1, view2))
        return view1, view2

    def multiplications(self) -> int:
        return (2 * self.batch) ** 2 * self.dim

    def settings(self) -> dict[str, float | bool]:
        return {
            "temperature": self.temperature,
            "consistency_weight": self.consistency_weight,
            "consistency_temperature": self.consistency_temperature,
            "normalize": self.normalize,
        }

    def replace(self, **changes: object) -> NTXentCase:
        return dataclasses.replace(self, **changes)


# MoCo's and MoCo v2's settings in the CO2 paper.
PAPERS = (
    {"temperature": 0.07, "consistency_temperature": 0.04, "consistency_weight": 10.0},
    {"temperature": 0.2, "consistency_temperature": 0.05, "consistency_weight": 0.3},
)

# Sizes on both sides of what kernels tile by: vectors of 4 to 16, panels of 32, tiles of keys of 64 to 128.
sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 95, 96, 97, 128, 130, 257]))


def affordable(case: Case | ConICCase | NTXentCase) -> bool:
    """Whether a case takes seconds where kernels run slowly: of its sizes not all are of the largest."""
    return not SLOW or case.multiplications() <= 1 << 21


cases = st.builds(
    Case,
    batch=sizes,
    keys=st.one_of(sizes, st.sampled_from([300, 1000])),
    dim=st.one_of(sizes, st.sampled_from([200, 1024])),
    layout=st.sampled_from(LAYOUTS),
    queue_layout=st.sampled_from(LAYOUTS),
    resemblance=st.sampled_from([0.0, 1.0, 5.0]),
    include_positive=st.booleans(),
    normalize=st.booleans(),
    seed=st.integers(0, 1000),
).filter(affordable)

conic_cases = st.builds(
    ConICCase,
    views=st.integers(1, 4),
    batch=sizes,
    rows=st.one_of(sizes, st.sampled_from([300, 1000])),
    dim=st.one_of(sizes, st.sampled_from([200, 1024])),
    layout=st.sampled_from(LAYOUTS),
    weight_layout=st.sampled_from(LAYOUTS),
    resemblance=st.sampled_from([0.0, 1.0, 5.0]),
    sampled=st.sampled_from([1, 20]),
    seed=st.integers(0, 1000),
).filter(affordable)

nt_xent_cases = st.builds(
    NTXentCase,
    batch=st.one_of(sizes, st.sampled_from([150, 300])),
    dim=st.one_of(sizes, st.sampled_from([200, 1024])),
    layout=st.sampled_from(LAYOUTS),
    resemblance=st.sampled_from([0.0, 1.0, 5.0]),
    consistency_weight=st.sampled_from([0.0, 1.0]),
    normalize=st.booleans(),
    seed=st.integers(0, 1000),
).filter(affordable)

paper_settings = st.sampled_from(PAPERS)

temperatures = st.sampled_from([1e-3, 0.01, 0.04, 0.07, 0.2, 1.0, 10.0])
scales = st.sampled_from([1e-3, 0.1, 1.0, 100.0])
