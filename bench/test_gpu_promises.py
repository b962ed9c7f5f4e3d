"""What is promised of the GPU kernels, as ratios measured in one run.

python -m pytest bench/test_gpu_promises.py -s
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import ceilings, gpu
from bench.cases import GRIDS, Case, grid, implementation, inputs, step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
FUSED = GRIDS["cuda"].fused[:1]  # the backend that serves where nobody chose


@pytest.mark.parametrize("backend", FUSED)
def test_at_the_size_of_moco(backend: str) -> None:
    """bfloat16, 256 × 65536 × 128: 8 times eager, 4 times the best compiled, at most twice the floor."""
    case = Case("co2", backend, "bfloat16", B=256, K=65536)
    fused = gpu.measure(case)
    peers = {name: gpu.measure(dataclasses.replace(case, impl=name)) for name in GRIDS["cuda"].peers["co2"]}
    floor = ceilings.floor_ms(case, ceilings.measure("cuda"))
    print(
        f"\n{case}: {fused['ms']:.4f} ms, {fused['ms'] / floor:.2f} × the floor, "
        f"wall {fused['wall_ms']:.4f} ms"
    )
    for name, peer in peers.items():
        print(
            f"  {peer['ms'] / fused['ms']:.2f} × faster than {name} ({peer['ms']:.4f} ms), "
            f"wall {peer['wall_ms'] / fused['wall_ms']:.2f} ×"
        )
    assert peers["eager"]["ms"] >= 8 * fused["ms"]
    assert min(peers["compile"]["ms"], peers["max-autotune"]["ms"]) >= 4 * fused["ms"]
    assert fused["ms"] <= 2 * floor
    assert fused["wall_ms"] < min(peer["wall_ms"] for peer in peers.values())


@pytest.mark.parametrize("backend", FUSED)
def test_conic_with_a_sampled_classifier(backend: str) -> None:
    """bfloat16, 1024 × 65536 × 128: 8 times eager, 2.5 times the floor at most, ahead of fused peers."""
    case = Case("conic", backend, "bfloat16", B=1024, K=65536)
    fused, floor = gpu.measure(case), ceilings.floor_ms(case, ceilings.measure("cuda"))
    print(f"\n{case}: {fused['ms']:.4f} ms, {fused['ms'] / floor:.2f} × the floor")
    here = {each.impl for each in grid("cuda") if each.loss == "conic" and each.dtype == "bfloat16"}
    for name in here & {"eager", "linear_cross_entropy", "liger", "cut_cross_entropy"}:
        peer = gpu.measure(dataclasses.replace(case, impl=name))
        print(f"  {peer['ms'] / fused['ms']:.2f} × faster than {name} ({peer['ms']:.4f} ms)")
        assert peer["ms"] >= (8 if name == "eager" else 1) * fused["ms"]
    assert fused["ms"] <= 2.5 * floor


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("loss", "size"), [("co2", (4096, 1 << 20)), ("nt_xent_co2", (65536, 65536))])
def test_memory_of_very_many_keys(loss: str, size: tuple[int, int], backend: str) -> None:
    """Less than a GiB where one matrix of logits takes 8."""
    case = Case(loss, backend, "bfloat16", *size)
    one = inputs(case, "cuda")
    step(implementation(case), *one)
    peak = gpu.peak_extra_mib(implementation(case), one)
    print(f"\n{case}: {peak:.1f} MiB")
    assert peak < 1024


@pytest.mark.parametrize(
    "case",
    [case for case in grid("cuda") if case.impl == "eager"] if torch.cuda.is_available() else [],
    ids=str,
)
@pytest.mark.parametrize("backend", FUSED)
def test_never_slower_than_eager(case: Case, backend: str) -> None:
    fused, eager = gpu.measure(dataclasses.replace(case, impl=backend)), gpu.measure(case)
    print(
        f"\n{case}: {eager['ms'] / fused['ms']:.2f} × GPU time, "
        f"{eager['wall_ms'] / fused['wall_ms']:.2f} × wall"
    )
    assert fused["ms"] <= eager["ms"]
    assert fused["wall_ms"] <= eager["wall_ms"]
