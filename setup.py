"""Builds the C++ extensions; everything else about the package stands in pyproject.toml.

The CPU kernels are built once for each instruction set, as separate modules from the same sources; which one
is imported is decided at run time (contrastive_ops/_backends.py). They call PyTorch's C++ library, which
changes with every minor version: they are built against the torch of the environment, without build
isolation, and carry its version in their names.

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
import sys
import tempfile
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
]
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


def extensions():
    """One extension for each instruction set, one for calls of a kind that was seen before, and one for the
    bookkeeping of instances."""
    minor = "_".join((torch_version() or "none").split(".")[:2])
    # Without a path to them: torch is imported first, and has them loaded.
    libraries = ["c10", "torch", "torch_cpu", "torch_python"]
    cpu = [
        Extension(
            f"contrastive_ops._cpu_{name}_torch_{minor}",
            sorted(glob.glob("csrc/cpu/*.cpp")),
            depends=["setup.py", *sorted(glob.glob("csrc/*.h")), *sorted(glob.glob("csrc/cpu/*.h"))],
            language="c++",
            libraries=libraries,
            extra_compile_args=[
                *COMPILE_ARGS,
                "-fopenmp",  # ATen's thread pool is inlined from its headers
                "-fno-trapping-math",
                "-ffp-contract=off",  # multiply-adds are fused where the source says so, and nowhere else
                "-Wno-unknown-pragmas",
                f"-DCPU_CAPABILITY={name.upper()}",
                f"-DCPU_CAPABILITY_{name.upper()}",
                f"-DTORCH_EXTENSION_NAME=_cpu_{name}_torch_{minor}",
                *flags,
                *SANITIZERS,
            ],
            extra_link_args=["-fopenmp", *SANITIZERS],
        )
        for name, flags in INSTRUCTION_SETS.items()
    ]
    calls = Extension(
        f"contrastive_ops._calls_torch_{minor}",
        sorted(glob.glob("csrc/calls/*.cpp")),
        depends=["setup.py", *sorted(glob.glob("csrc/calls/*.h"))],
        language="c++",
        libraries=libraries,
        extra_compile_args=[*COMPILE_ARGS, f"-DTORCH_EXTENSION_NAME=_calls_torch_{minor}", *SANITIZERS],
        extra_link_args=SANITIZERS,
    )
    store = Extension(  # uses the pybind11 that comes with torch's headers, and nothing else of torch
        "contrastive_ops._store",
        sorted(glob.glob("csrc/store/*.cpp")),
        depends=["setup.py", *sorted(glob.glob("csrc/store/*.h"))],
        language="c++",
        extra_compile_args=[*COMPILE_ARGS, *SANITIZERS],
        extra_link_args=SANITIZERS,
    )
    return [*cpu, calls, store]


class BuildPython(build_py):
    """Starts from nothing: what an earlier build left would be installed too, though its source is gone."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExtensions(build_ext):
    """Builds the extensions side by side against the torch of this environment, or says why it cannot."""

    def initialize_options(self):
        super().initialize_options()
        # All at once: two cores would else end with one at work. Each takes up to a gigabyte.
        self.parallel = int(os.environ.get("MAX_JOBS") or len(INSTRUCTION_SETS) + 2)

    def run(self):
        if torch_version() is None:
            raise SetupError(
                "the C++ kernels of contrastive_ops are compiled against the torch that they will run with, "
                "and where this build runs there is none. pip builds in an environment of its own unless it "
                "is told otherwise: install torch first, then run\n\n"
                "    pip install --no-build-isolation .\n\n"
                f"{INSTEAD}"
            )
        if tuple(map(int, torch_version().split(".")[:2])) < MINIMUM_TORCH:
            raise SetupError(
                f"contrastive_ops needs torch {'.'.join(map(str, MINIMUM_TORCH))} or newer, and this "
                f"environment has {torch_version()}. The C++ kernels are compiled against the torch that "
                "they will run with: upgrade torch first\n\n    pip install --upgrade torch\n"
            )
        from torch.utils import cpp_extension

        for extension in self.extensions:
            extension.library_dirs = cpp_extension.library_paths("cpu")
            # As headers of the system, torch's keep their warnings to themselves.
            extension.extra_compile_args += [f"-isystem{path}" for path in cpp_extension.include_paths("cpu")]
        super().run()

    def build_extensions(self):
        self.check_compiler()
        super().build_extensions()

    def check_compiler(self):
        command = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)[0]
        if shutil.which(command) is None:
            raise SetupError(
                f"contrastive_ops needs a C++20 compiler, and there is no {command}: install one, such as "
                f"g++ 10 or newer, or let CXX name it. {INSTEAD}"
            )
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <omp.h>\n#include <concepts>\nstd::integral auto zero = 0;\n")
            try:
                self.compiler.compile([str(source)], folder, extra_postargs=["-std=c++20", "-fopenmp"])
            except CompileError as error:
                raise SetupError(
                    f"contrastive_ops needs a C++20 compiler with OpenMP, and {command} is none: install "
                    f"one, such as g++ 10 or newer, or let CXX name it. {INSTEAD}"
                ) from error

    def build_extension(self, extension):
        """Each in a folder of its own, for they share sources; it is kept, so that what was built for an
        editable installation serves a wheel too."""
        builder = copy.copy(self)
        kept = f"{sys.implementation.cache_tag}-torch-{torch_version()}{'-sanitized' if SANITIZERS else ''}"
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
