"""What this machine can do at best, measured: the floor under every time."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from bench.cases import GRIDS, Case

MIB = 1 << 20
# (rows, inner, columns) of products: square ones that caches like, and both shapes of a loss over a queue.
MATMUL_SHAPES = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (256, 128, 65536), (256, 65536, 128)),
    "cuda": ((8192, 8192, 8192), (4096, 128, 65536), (4096, 65536, 128)),
}


def measure(device: str = "cpu") -> dict:
    """Copying in GB/s, bytes read and written; matrix products of each dtype in TFLOP/s, on a CPU
    multiply-adds too, on a GPU products in TF32; exponentials in 10¹² a second."""
    ceilings = {
        "copy_gb_s": copy_gb_s(device),
        "matmul_tflop_s": {dtype: matmul_tflop_s(dtype, device) for dtype in GRIDS[device].dims},
    }
    if device == "cpu":
        return ceilings | vector_rates()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    ceilings["matmul_tflop_s"]["tf32"] = matmul_tflop_s("float32", device)
    torch.set_float32_matmul_precision(precision)
    return ceilings | {"exponentials_t_s": exponentials_t_s()}


def floor_ms(case: Case, ceilings: dict) -> float:
    """The time of what takes longest at the best rates measured: the matrix products, the exponentials, or
    reading the queue once. All of them can run at the same time."""
    rates = [ceilings["matmul_tflop_s"][case.dtype]]
    if case.dtype == "float32":
        rates += [ceilings.get("fma_tflop_s") or 0, ceilings["matmul_tflop_s"].get("tf32", 0) / 3]
    seconds = [case.operations / (max(rates) * 1e12)]
    if "exponentials_t_s" in ceilings:
        exponentials = case.problem.exponentials * case.B * case.K
        queue = case.K * case.D * getattr(torch, case.dtype).itemsize
        seconds += [
            exponentials / (ceilings["exponentials_t_s"] * 1e12),
            queue / (ceilings["copy_gb_s"] * 1e9),
        ]
    return max(seconds) * 1e3


def copy_gb_s(device: str) -> float:
    source = torch.ones(256 * MIB, device=device)  # 1 GiB, which no cache holds
    seconds = _fastest("target.copy_(source)", source=source, target=torch.empty_like(source))
    return 2 * source.nbytes / seconds / 1e9


def matmul_tflop_s(dtype: str, device: str) -> float:
    def rate(rows: int, inner: int, columns: int) -> float:
        a = torch.randn(rows, inner, device=device).to(getattr(torch, dtype))
        b = torch.randn(inner, columns, device=device).to(getattr(torch, dtype))
        seconds = _fastest("torch.mm(a, b, out=out)", a=a, b=b, out=torch.mm(a, b))
        return 2 * rows * inner * columns / seconds / 1e12

    return max(rate(*shape) for shape in MATMUL_SHAPES[device])


def _fastest(statement: str, **names: object) -> float:
    """Seconds of the fastest of the runs that fit in half a second; waits for the device where it has to."""
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.5).times)


def exponentials_t_s() -> float:
    """2^x in 10¹² a second, of a kernel that does nothing else."""
    from bench.exponentials import chains

    steps, programs = 4096, 16 * torch.cuda.get_device_properties(0).multi_processor_count
    seconds = _fastest("run()", run=lambda: chains(steps, programs))
    return chains(steps, programs).numel() * steps / seconds / 1e12


def vector_rates() -> dict[str, float]:
    """Float32 multiply-adds of all cores, which torch.mm may stay well below, and exponentials; none where
    there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "vectors.so")
        source = Path(__file__).with_name("vectors.c")
        subprocess.run(
            [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True
        )
        vectors = ctypes.CDLL(str(library))  # a call of it releases the interpreter's lock
    result = ctypes.POINTER(ctypes.c_float)
    vectors.multiply_add.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float, result]
    vectors.exponentials.argtypes = [ctypes.c_long, result]
    vectors.multiply_add.restype = vectors.exponentials.restype = ctypes.c_double  # how many were done
    return {
        "fma_tflop_s": _on_all_cores(lambda: vectors.multiply_add(20_000_000, 0.5, 1.0, ctypes.c_float())),
        "exponentials_t_s": _on_all_cores(lambda: vectors.exponentials(2_000_000, ctypes.c_float())),
    }


def _on_all_cores(run: Callable[[], float]) -> float:
    """How many 10¹² a second, of what a call does on one core."""
    cores = torch.get_num_threads()
    best = 0.0
    with ThreadPoolExecutor(cores) as threads:
        for _ in range(10):
            start = time.perf_counter()
            done = sum(threads.map(lambda _: run(), range(cores)))
            best = max(best, done / (time.perf_counter() - start))
    return best / 1e12
