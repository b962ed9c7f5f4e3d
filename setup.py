"""Builds the C++ extensions; everything else about the package stands in pyproject.toml.

The CPU kernels are built once for each instruction set, as separate modules from the same source; which one
is imported is decided at run time (contrastive_ops/_backends.py). Where no extension can be built,
installation goes on without, and says so: the package works on its other backends.
"""

import copy
import glob
import os
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(glob.glob("csrc/cpu/*.cpp"))
HEADERS = sorted(glob.glob("csrc/cpu/*.h"))
ROWS_SOURCES = sorted(glob.glob("csrc/rows/*.cpp"))
ROWS_HEADERS = sorted(glob.glob("csrc/rows/*.h"))

# Names and flags as ATen gives them to its own kernels.
INSTRUCTION_SETS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    }


def cpu_extensions():
    try:
        from torch.utils import cpp_extension
    except ImportError:
        print(
            "contrastive_ops: torch is not installed here (build with --no-build-isolation), "
            "so the C++ kernels are left out",
            file=sys.stderr,
        )
        return []
    return [
        Extension(
            f"contrastive_ops._cpu_{name}",
            SOURCES,
            depends=HEADERS,
            language="c++",
            optional=True,  # without a compiler, installation warns and goes on
            include_dirs=cpp_extension.include_paths("cpu"),
            library_dirs=cpp_extension.library_paths("cpu"),
            runtime_library_dirs=cpp_extension.library_paths("cpu"),
            libraries=["c10", "torch", "torch_cpu", "torch_python"],
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",  # Python's own flags ask for debugging symbols, which take a third of the time
                "-fopenmp",  # ATen's thread pool is inlined from its headers
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffp-contract=off",  # multiply-adds are fused where the source says so, and nowhere else
                "-Wall",
                "-Wno-unknown-pragmas",
                f"-DCPU_CAPABILITY={name.upper()}",
                f"-DCPU_CAPABILITY_{name.upper()}",
                f"-DTORCH_EXTENSION_NAME=_cpu_{name}",
                *flags,
            ],
            extra_link_args=["-fopenmp"],
        )
        for name, flags in INSTRUCTION_SETS.items()
    ]


def rows_extensions():
    """What instance classification needs outside PyTorch: built without torch, one for all machines."""
    try:
        import pybind11
    except ImportError:
        print("contrastive_ops: pybind11 is not installed here, so _rows is left out", file=sys.stderr)
        return []
    return [
        Extension(
            "contrastive_ops._rows",
            ROWS_SOURCES,
            depends=ROWS_HEADERS,
            language="c++",
            optional=True,
            include_dirs=[pybind11.get_include()],
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-pthread",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-Wall",
            ],
            extra_link_args=["-pthread"],
        )
    ]


class BuildExtensions(build_ext):
    """Builds the extensions side by side, each in a folder of its own: they share sources, and would
    overwrite one another's objects."""

    def initialize_options(self):
        super().initialize_options()
        self.parallel = len(INSTRUCTION_SETS) + 1  # all at once: two cores would else end with one at work

    def run(self):
        super().run()
        absent = [e.name for e in self.extensions if not os.path.exists(self.get_ext_fullpath(e.name))]
        if absent:
            print(
                f"contrastive_ops: {', '.join(absent)} could not be built: those C++ kernels are absent, "
                "and where they would serve, the slow reference will; without _rows there is no instance "
                "classification",
                file=sys.stderr,
            )

    def build_extension(self, extension):
        builder = copy.copy(self)
        builder.build_temp = os.path.join(self.build_temp, extension.name)
        super(BuildExtensions, builder).build_extension(extension)


setup(
    packages=["contrastive_ops", "contrastive_ops.kernels"],
    package_dir={"contrastive_ops": "contrastive_ops", "contrastive_ops.kernels": "kernels"},
    package_data={"contrastive_ops": ["py.typed"]},
    ext_modules=cpu_extensions() + rows_extensions(),
    cmdclass={"build_ext": BuildExtensions},
)
