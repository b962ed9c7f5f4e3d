"""What compilers of device code make of csrc/row_math.h, the scalar mathematics of a row; no GPU needed."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"

KERNEL = """
#include "row_math.h"
using namespace contrastive_ops;

extern "C" __global__ void co2(const CO2Partial* partial, Parts parts, CO2Settings settings, CO2Row* row,
                               RowLosses* losses, Coefficients* gradient) {
  losses[0] = finish(merge(partial, parts, settings), settings, row[0]);
  gradient[0] = coefficients(row[0]);
}

extern "C" __global__ void nt_xent(const NTXentPartial* partial, Parts parts, double positive,
                                   NTXentSettings settings, NTXentCoefficients* rows, RowLosses* losses,
                                   Coefficients* gradient) {
  const NTXentPartial first = merge(partial, partial + 1, parts, settings);
  const NTXentPartial second = merge(partial + 1, partial, parts, settings);
  losses[0] = finish(first, second, positive, settings, rows[0]);
  losses[1] = finish(second, first, positive, settings, rows[1]);
  gradient[0] = coefficients(rows[0], rows[1], scale_to_half(gradient_bound(gradient[1], 1., 0.5)));
}

extern "C" __global__ void conic(const ConICPartial* partial, Parts parts, double positive,
                                 ConICSettings settings, ConICCoefficients* view, double* loss,
                                 Coefficients* gradient) {
  loss[0] = finish(merge(partial, parts, settings), positive, settings, view[0]);
  gradient[0] = coefficients(view[0], 1.);
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_nvcc_compiles_it(tmp_path: Path) -> None:
    source = tmp_path / "rows.cu"
    source.write_text(KERNEL)
    command = ["nvcc", "-std=c++20", "-arch=sm_75", "-Werror=all-warnings", f"-I{CSRC}", "-ptx", "rows.cu"]
    compiled = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    assert (tmp_path / "rows.ptx").read_text().count(".entry") == 3


def nvrtc() -> ctypes.CDLL | None:
    """NVRTC as torch's CUDA libraries bring it, if they are there."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        for library in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(library))
    return None


def test_nvrtc_compiles_it_without_headers() -> None:
    """At run time there is no <math.h>, nor anything else of the standard library."""
    library = nvrtc()
    if library is None:
        pytest.skip("there is no NVRTC")
    names = ["row_math.h", "records.h", "host_device.h"]
    headers = [(CSRC / name).read_bytes() for name in names]
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program),
        KERNEL.encode(),
        b"rows.cu",
        len(names),
        (ctypes.c_char_p * len(names))(*headers),
        (ctypes.c_char_p * len(names))(*(name.encode() for name in names)),
    )
    assert created == 0
    options = [b"-std=c++20", b"-arch=compute_75"]
    result = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert result == 0, log.value.decode()
