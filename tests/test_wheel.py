"""A wheel for everybody, installed where there is no compiler: what is in it, and what it loads.

`make test-wheels` installs one and runs this, and so does each build of wheels that are published; elsewhere
there is nothing to look at.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch

import contrastive_ops
from contrastive_ops import _calls, _store, available_backends
from contrastive_ops._installation import extensions, torch_minor

if os.environ.get("CONTRASTIVE_OPS_TEST_WHEEL") != "1":
    pytest.skip("no wheel was installed to be tested", allow_module_level=True)

PACKAGE = Path(contrastive_ops.__path__[0])
KERNELS = {
    "x86_64": {"_cpu_default", "_cpu_avx2", "_cpu_avx512"},
    "aarch64": {"_cpu_default"},
    "arm64": {"_cpu_default"},
}

# A step of each half of the package in a process of its own, and the files that it has loaded then.
STEP = """
import json
import torch
from contrastive_ops import DelayedSGD, InstanceClassifier, KeyQueue, co2_loss, conic_loss

torch.manual_seed(0)
encoder = torch.nn.Linear(20, 16)
queue = KeyQueue(size=256, dim=16)
classifier = InstanceClassifier(1000, 16, active=64)
optimizer = DelayedSGD(classifier, lr=0.1)
images = torch.rand(32, 20)
key = torch.nn.functional.normalize(encoder(images).detach(), dim=1)
consistent = co2_loss(encoder(images), key, queue.keys)
queue.enqueue(key)
target = classifier.activate(torch.arange(32))
distinct = conic_loss(encoder(images)[None], classifier.weight, target, num_instances=1000)
(consistent + distinct).backward()
optimizer.step()
with open("/proc/self/maps") as maps:
    files = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
print(json.dumps({
    "losses": [consistent.item(), distinct.item()],
    "gradient": encoder.weight.grad.norm().item(),
    "libraries": sorted(files),
}))
"""


def step(**environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", STEP],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def plain(library: str) -> str:
    """The name of a library without its version and the mark of a wheel that it was grafted into."""
    return re.sub(r"(-[0-9a-f]{8}|-\d[\d.]*)?\.so.*", "", Path(library).name)


def test_it_was_installed_for_this_platform_and_is_whole() -> None:
    installed = distribution("contrastive-ops")
    (tag,) = re.findall(r"^Tag: (.+)$", installed.read_text("WHEEL") or "", re.MULTILINE)
    assert not tag.endswith(("-any", "-linux_x86_64", "-linux_aarch64")), tag
    files = installed.files or []
    assert {Path(str(file.locate())) for file in files if file.suffix == ".so"} == set(PACKAGE.glob("*.so"))


def test_every_torch_has_every_kernel() -> None:
    built = defaultdict(set)
    for name in extensions(PACKAGE) - {"_store"}:
        stem, minor = name.split("_torch_")
        built[minor].add(stem)
    assert torch_minor() in built
    requirements = distribution("contrastive-ops").requires or []
    (oldest,) = (match[1] for each in requirements if (match := re.fullmatch(r"torch>=([\d.]+)", each)))
    assert oldest.replace(".", "_") in built
    kernels = {*KERNELS[platform.machine()], "_calls"}
    assert built == dict.fromkeys(built, kernels)


def test_everything_serves_without_a_compiler() -> None:
    assert not [each for each in ("cc", "gcc", "g++", "c++", "clang", "nvcc") if shutil.which(each)]
    assert str(available_backends()["cpu"]) == "available"
    assert _calls.extension is not None
    assert Path(_store.__file__ or "").parent == PACKAGE


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is loaded")
def test_a_training_step_loads_no_library_twice() -> None:
    """A second libtorch_cpu would end in a crash, and a second libgomp would keep threads of its own."""
    libraries = step()["libraries"]
    loaded = defaultdict(set)
    for file in libraries:
        if Path(file).name.startswith("lib"):  # modules of different packages may have one name
            loaded[plain(file)].add(os.path.realpath(file))
    assert {name: files for name, files in loaded.items() if len(files) > 1} == {}
    with_torch = {"libc10", "libtorch_cpu", "libtorch_python"}
    assert with_torch | {"libgomp", "libstdc++"} <= set(loaded)
    folder = os.path.realpath(Path(torch.__file__).parent)
    assert all(file.startswith(folder) for name in with_torch for file in loaded[name])
    ours = {Path(file).name.partition(".")[0] for file in libraries if Path(file).parent == PACKAGE}
    cpu = {name for name in ours if name.startswith("_cpu_")}
    assert len(cpu) == 1  # for this processor
    assert ours == cpu | {f"_calls_torch_{torch_minor()}", "_store"}
    assert cpu.pop().endswith(f"_torch_{torch_minor()}")


def test_all_instruction_sets_compute_alike() -> None:
    """A processor that lacks one takes the next; float32 sums differ in their order alone."""
    narrow = step(ATEN_CPU_CAPABILITY="default")
    for wide in (step(ATEN_CPU_CAPABILITY="avx2"), step()):
        assert wide["losses"] == pytest.approx(narrow["losses"], rel=1e-5)
        assert wide["gradient"] == pytest.approx(narrow["gradient"], rel=1e-4)
