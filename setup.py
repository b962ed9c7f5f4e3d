"""Builds the C++ extensions; everything else about the package stands in pyproject.toml.

The CPU kernels are built once for each instruction set, as separate modules from the same sources; which one
is imported is decided at run time (contrastive_ops/_cpu.py). They call PyTorch's C++ library, which changes
with every minor version: they are built against the torch of the environment, without build isolation, and
carry its version in their names. A wheel for everybody has them for several versions side by side, from the
folder that CONTRASTIVE_OPS_TORCHES names, which .ci/torches.py fills.

Where they cannot be built, nothing is installed and a message says what is missing. A package without them is
built where CONTRASTIVE_OPS_WITHOUT_CPP=1 asks for it: it is pure Python, and so is its wheel's tag.

CONTRASTIVE_OPS_SANITIZE=1 builds them for `make asan`: for one instruction set, watched by gcc's sanitizers.
"""

import copy
import glob
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import setuptools

MINIMUM_TORCH = (2, 9)
MINIMUM_SETUPTOOLS = 77  # the first that reads `license` and `license-files` in pyproject.toml

if int(setuptools.__version__.partition(".")[0]) < MINIMUM_SETUPTOOLS:
    sys.exit(
        f"contrastive_ops: setuptools {MINIMUM_SETUPTOOLS} or newer is needed to build it, and this "
        f"environment has {setuptools.__version__}. Run\n\n    pip install --upgrade setuptools\n"
    )

# ruff: noqa: E402  (an older setuptools lacks some of these)
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

WITHOUT_CPP = "CONTRASTIVE_OPS_WITHOUT_CPP"
TORCHES = "CONTRASTIVE_OPS_TORCHES"
INSTEAD = (
    f"With {WITHOUT_CPP}=1 in the environment the package is built without its C++ kernels: losses on CPUs "
    "then run at eager speed, and there is no instance classification."
)

# Names and flags as ATen gives them to its own kernels.
INSTRUCTION_SETS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    }
COMPILE_ARGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # Python's own flags ask for debugging symbols, which take a third of the time
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    # gcc 12 takes the undefined vectors of its own intrinsics for mistakes, a thousand times a build.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-aggressive-loop-optimizations",
    "-Wno-unknown-warning-option",  # clang has no such warning
    "-Wno-psabi",  # gcc's notes on how ARM passes the pairs of vectors of torch's headers
]
# A compiler that does not take the first cannot compile the kernels; one that does not take the second
# leaves out those for AMX.
CPP_PROBE = """
#include <bit>
#include <concepts>
#include <omp.h>
std::integral auto zero = std::bit_cast<int>(0.f);
"""
AMX_PROBE = """
#include <immintrin.h>
[[gnu::target("amx-tile,amx-bf16")]] bool probe(float* sums) {
  _tile_zero(0);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, sums, 64);
  return __builtin_cpu_supports("amx-bf16");
}
"""
SANITIZERS = []
if os.environ.get("CONTRASTIVE_OPS_SANITIZE", "0") not in ("", "0"):
    INSTRUCTION_SETS = {"default": []}
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1"]


def torch_version():
    """The version of the torch that is installed where this runs, or None."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def minor(version):
    return tuple(map(int, version.split(".")[:2]))


def torches():
    """The torches that the kernels are built against, the newest first: versions, and the folders that have
    their headers and libraries. They are the one that is installed here, if there is one, or those in the
    folder that is named. None is imported."""
    if not os.environ.get(TORCHES):
        version = torch_version()
        return {version: find_spec("torch").submodule_search_locations[0]} if version else {}
    named = importlib.metadata.distributions(name="torch", path=glob.glob(f"{os.environ[TORCHES]}/*/"))
    found = {each.version: str(each.locate_file("torch")) for each in named}
    if not found:
        sys.exit(
            f"contrastive_ops: {TORCHES} names {os.environ[TORCHES]}, in whose folders there is no torch"
        )
    return dict(sorted(found.items(), key=lambda each: minor(each[0]), reverse=True))


def extensions():
    """For each torch one extension for each instruction set and one for calls of a kind that was seen before,
    and one for the bookkeeping of instances."""
    found = torches() or {"none": ""}  # an error as soon as something is to be compiled
    # It uses the pybind11 that comes with torch's headers, and nothing else of torch.
    store = extension("_store", "csrc/store", [], *next(iter(found.items())))
    return [each for torch in found.items() for each in extensions_for(*torch)] + [store]


def extensions_for(version, folder):
    suffix = "torch_" + "_".join(version.split(".")[:2])
    # Without a path to them: torch is imported first, and has them loaded, wherever it lies.
    libraries = ["c10", "torch", "torch_cpu", "torch_python"]
    for name, flags in INSTRUCTION_SETS.items():
        flags = [
            # ATen's thread pool is inlined from its headers. Nothing links OpenMP's library: torch's own has
            # been loaded with torch_cpu, and a second one would keep threads of its own.
            "-fopenmp",
            "-fno-trapping-math",
            "-ffp-contract=off",  # multiply-adds are fused where the source says so, and nowhere else
            "-Wno-unknown-pragmas",
            f"-DCPU_CAPABILITY={name.upper()}",
            f"-DCPU_CAPABILITY_{name.upper()}",
            *flags,
        ]
        yield extension(f"_cpu_{name}_{suffix}", "csrc/cpu", flags, version, folder, libraries)
    yield extension(f"_calls_{suffix}", "csrc/calls", [], version, folder, libraries)


def extension(name, sources, flags, version, folder, libraries=()):
    headers = [f"{folder}/include", f"{folder}/include/torch/csrc/api/include"]
    made = Extension(
        f"contrastive_ops.{name}",
        [*sorted(glob.glob(f"{sources}/*.cpp")), "csrc/glibc.cpp"],
        depends=["setup.py", *sorted(glob.glob("csrc/*.h")), *sorted(glob.glob(f"{sources}/*.h"))],
        language="c++",
        libraries=list(libraries),
        library_dirs=[f"{folder}/lib"],
        extra_compile_args=[
            *COMPILE_ARGS,
            f"-DTORCH_EXTENSION_NAME={name}",
            *flags,
            *SANITIZERS,
            # As headers of the system, torch's keep their warnings to themselves.
            *(f"-isystem{path}" for path in headers),
        ],
        extra_link_args=SANITIZERS,
    )
    made.torch = version
    return made


class BuildPython(build_py):
    """Starts from nothing: what an earlier build left would be installed too, though its source is gone."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExtensions(build_ext):
    """Builds the extensions side by side, or says why it cannot."""

    def initialize_options(self):
        super().initialize_options()
        # All at once: two cores would else end with one at work. Each takes up to a gigabyte.
        self.parallel = int(os.environ.get("MAX_JOBS") or len(INSTRUCTION_SETS) + 2)

    def run(self):
        if not torches():
            raise SetupError(
                "the C++ kernels of contrastive_ops are compiled against the torch that they will run with, "
                "and where this build runs there is none. pip builds in an environment of its own unless it "
                "is told otherwise: install torch first, then run\n\n"
                "    pip install --no-build-isolation .\n\n"
                f"{INSTEAD}"
            )
        oldest = min(torches(), key=minor)
        if minor(oldest) < MINIMUM_TORCH:
            raise SetupError(
                f"contrastive_ops needs torch {'.'.join(map(str, MINIMUM_TORCH))} or newer, and this "
                f"environment has {oldest}. The C++ kernels are compiled against the torch that "
                "they will run with: upgrade torch first\n\n    pip install --upgrade torch\n"
            )
        super().run()

    def build_extensions(self):
        self.check_compiler()
        super().build_extensions()

    def check_compiler(self):
        command = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)[0]
        if shutil.which(command) is None:
            raise SetupError(
                f"contrastive_ops needs a C++20 compiler, and there is no {command}: install one, such as "
                f"g++ 11 or newer, or let CXX name it. {INSTEAD}"
            )
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(CPP_PROBE)
            try:
                self.compiler.compile([str(source)], folder, extra_postargs=["-std=c++20", "-fopenmp"])
            except CompileError as error:
                raise SetupError(
                    f"contrastive_ops needs a C++20 compiler with OpenMP, and {command} is none: install "
                    f"one, such as g++ 11 or newer, or let CXX name it. {INSTEAD}"
                ) from error
            source.write_text(AMX_PROBE)
            probe = [command, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
            if subprocess.run(probe, capture_output=True).returncode == 0:
                for each in self.extensions:
                    if each.name.startswith("contrastive_ops._cpu_avx512"):
                        each.define_macros.append(("CONTRASTIVE_OPS_WITH_AMX", None))

    def build_extension(self, extension):
        """Each in a folder of its own, for they share sources; it is kept, so that what was built for an
        editable installation serves a wheel too."""
        builder = copy.copy(self)
        kept = f"{sys.implementation.cache_tag}-{platform.machine()}-torch-{extension.torch}"
        kept += "-sanitized" if SANITIZERS else ""
        builder.build_lib = os.path.join("build", kept)
        builder.build_temp = os.path.join(builder.build_lib, "objects", extension.name)
        super(BuildExtensions, builder).build_extension(extension)
        built, wanted = builder.get_ext_fullpath(extension.name), self.get_ext_fullpath(extension.name)
        self.mkpath(os.path.dirname(wanted))
        self.copy_file(built, wanted)


def readme():
    """README.md for a package index, where links to files of the repository must name it."""
    pyproject = Path("pyproject.toml").read_text(encoding="utf-8")
    (repository,) = re.findall(r'^Repository = "(.+)"$', pyproject, re.MULTILINE)

    def absolute(link):
        image, text, path = link.groups()
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/HEAD/{path})"

    text = Path("README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", absolute, text)


setup(
    packages=[
        *find_packages(include=["contrastive_ops", "contrastive_ops.*", "train_ref", "train_ref.*"]),
        "contrastive_ops.kernels",
        "contrastive_ops.csrc",
    ],
    package_dir={"contrastive_ops.kernels": "kernels", "contrastive_ops.csrc": "csrc"},
    package_data={
        "contrastive_ops": ["py.typed", "*.pyi"],
        "contrastive_ops.csrc": ["*.h", "cuda/*.h"],  # which are compiled where they run
        "train_ref": ["recipes/*.yaml"],
    },
    include_package_data=False,  # all else in MANIFEST.in is for the source distribution alone
    ext_modules=extensions() if os.environ.get(WITHOUT_CPP, "0") in ("", "0") else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtensions},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
