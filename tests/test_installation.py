"""What happens on each way to install the package, and in a source tree that was not installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

import contrastive_ops
from contrastive_ops import _installation
from contrastive_ops._installation import extensions, load_extension
from tests.conftest import another_package

# Where a wheel is tested, the tests lie in another folder than the source.
ROOT = Path(os.environ.get("CONTRASTIVE_OPS_SOURCE", Path(__file__).resolve().parents[1]))
in_the_source = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="setup.py is in the source only")
PACKAGE = Path(contrastive_ops.__path__[0])


def test_the_tests_of_an_unbuilt_tree_do_not_test_another_package(tmp_path: Path) -> None:
    tree, installed = tmp_path / "tree", tmp_path / "site-packages" / "contrastive_ops"
    assert another_package(tree, installed) == ""  # where an installed package is tested, no source is near
    (tree / "contrastive_ops").mkdir(parents=True)
    assert another_package(tree, tree / "contrastive_ops") == ""
    message = another_package(tree, installed)
    assert str(tree / "contrastive_ops") in message
    assert str(installed) in message


def is_editable() -> bool:
    return PACKAGE.parent == ROOT


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source as a clone has it, without what was compiled."""
    folder = tmp_path_factory.mktemp("clone") / "contrastive-ops"
    left_out = shutil.ignore_patterns(
        *(".git*", ".venv*", ".*cache*", ".hypothesis", ".benchmarks", "*.so", "__pycache__", "build"),
        *("dist", "runs", "*.egg-info", "CMakeFiles"),
    )
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ["PYTHONPATH", "PYTHONWARNINGS", "CXX", "CC", "CFLAGS", "CXXFLAGS"]
    ours += ["CONTRASTIVE_OPS_WITHOUT_CPP", "CONTRASTIVE_OPS_TORCHES"]
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=inherited | environment, capture_output=True, text=True
    )


# Building

WITHOUT_TORCH = """
import importlib.metadata as metadata
version = metadata.version
def absent(name):
    if name == "torch":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = absent
"""
OLD_TORCH = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: "2.8.0+cpu" if name == "torch" else version(name)
"""
OLD_SETUPTOOLS = "import setuptools\nsetuptools.__version__ = '65.5.0'\n"
SETUP = "import runpy, sys\nsys.argv[0] = 'setup.py'\nrunpy.run_path('setup.py', run_name='__main__')"


@in_the_source
@pytest.mark.parametrize(
    ("before", "environment", "words"),
    [
        (WITHOUT_TORCH, {}, ("--no-build-isolation", "install torch", "CONTRASTIVE_OPS_WITHOUT_CPP=1")),
        (OLD_TORCH, {}, ("torch 2.9 or newer", "has 2.8.0+cpu", "pip install --upgrade torch")),
        (OLD_SETUPTOOLS, {}, ("setuptools 77", "65.5.0", "pip install --upgrade setuptools")),
        ("", {"CXX": "no-such-compiler"}, ("no no-such-compiler", "CXX", "CONTRASTIVE_OPS_WITHOUT_CPP=1")),
        ("", {"CXX": "false"}, ("false is none", "C++20", "OpenMP", "CONTRASTIVE_OPS_WITHOUT_CPP=1")),
        ("", {"CONTRASTIVE_OPS_TORCHES": "no/such"}, ("CONTRASTIVE_OPS_TORCHES", "no/such", "no torch")),
    ],
    ids=["isolated", "old-torch", "old-setuptools", "no-compiler", "compiler-that-cannot", "no-torches"],
)
def test_a_build_that_cannot_be_stops_and_says_what_to_do(
    tree: Path, before: str, environment: dict[str, str], words: tuple[str, ...]
) -> None:
    done = run(tree, "-c", before + SETUP, "build_ext", **environment)
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert all(word in said for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tree.rglob("*.so"))


EXTENSIONS = """
import json, runpy, setuptools
setuptools.setup = lambda **given: print(json.dumps({
    each.name.partition(".")[2]: [each.libraries, each.library_dirs, each.extra_compile_args]
    for each in given["ext_modules"]
}))
runpy.run_path("setup.py")
"""


@in_the_source
def test_several_torches_are_built_against_side_by_side(tree: Path, tmp_path: Path) -> None:
    """Whether or not one is installed. What does not call torch is built once, with the newest's headers."""
    for version in ("2.9.1", "2.10.0", "2.14.1+cpu"):
        information = tmp_path / version[:4].rstrip(".") / f"torch-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.4\nName: torch\nVersion: {version}\n")
    done = run(tree, "-c", WITHOUT_TORCH + EXTENSIONS, CONTRASTIVE_OPS_TORCHES=str(tmp_path))
    assert done.returncode == 0, done.stderr
    extensions = json.loads(done.stdout)
    stems = {name.rpartition("_torch_")[0] for name in extensions} - {""}
    assert {"_cpu_default", "_calls"} <= stems
    minors = ("2_9", "2_10", "2_14")
    assert set(extensions) == {f"{stem}_torch_{minor}" for stem in stems for minor in minors} | {"_store"}
    for name, (libraries, folders, arguments) in extensions.items():
        torch = tmp_path / name.partition("_torch_")[2].replace("_", ".") / "torch"
        if name == "_store":
            torch = tmp_path / "2.14" / "torch"
            assert libraries == []
        assert folders == [str(torch / "lib")]
        assert f"-isystem{torch / 'include'}" in arguments


@in_the_source
def test_sources_that_do_not_compile_are_an_error(tree: Path, tmp_path: Path) -> None:
    """A package without kernels is never what is left of a failed compilation."""
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken)
    for source in (broken / "csrc").rglob("*.cpp"):
        source.write_text("#error this one\n")
    done = run(broken, "-c", SETUP, "bdist_wheel")
    assert done.returncode != 0
    assert "this one" in done.stderr
    assert not list(broken.rglob("*.whl"))


@in_the_source
def test_a_package_without_cpp_is_pure_and_complete(tree: Path, tmp_path: Path) -> None:
    done = run(tree, "-c", SETUP, "bdist_wheel", "--dist-dir", str(tmp_path), CONTRASTIVE_OPS_WITHOUT_CPP="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        metadata = content.read(next(name for name in names if name.endswith("METADATA"))).decode()
        scripts = content.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    recipes = {f"train_ref/recipes/{file.name}" for file in (ROOT / "train_ref" / "recipes").glob("*.yaml")}
    modules = {
        str(file.relative_to(tree)).replace("kernels/", "contrastive_ops/kernels/", 1)
        for package in ("contrastive_ops", "kernels", "train_ref")
        for file in (tree / package).rglob("*.py")
    }
    device_code = {
        f"contrastive_ops/{file.relative_to(ROOT)}"
        for pattern in ("*.h", "cuda/*.h")
        for file in (ROOT / "csrc").glob(pattern)
    }
    assert recipes
    assert device_code
    assert not [name for name in names if re.search("csrc/(cpu|calls|store)", name)]
    assert (
        recipes | device_code | modules | {"contrastive_ops/py.typed", "contrastive_ops/_store.pyi"} <= names
    )
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {
        "contrastive_ops",
        "train_ref",
    }
    assert "contrastive-ops-train" in scripts

    # On a package index there are no files beside the README: its links name the repository.
    readme = metadata.partition("\n\n")[2]
    links = re.findall(r"\]\(([^)\s]+)\)", readme)
    assert len(links) > 8
    repository = re.search(r"^Project-URL: Repository, (.+)$", metadata, re.MULTILINE)[1]
    for link in links:
        assert link.startswith(("https://", "#")), link
        if link.startswith(repository):
            path = re.fullmatch(r"/(?:blob|raw)/HEAD/([^#]+)(#.*)?", link.removeprefix(repository))[1]
            assert (ROOT / path).exists(), link


@in_the_source
def test_what_was_deleted_is_in_no_later_wheel(tree: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(tree, clone)
    gone = [clone / "contrastive_ops" / "gone.py", clone / "train_ref" / "recipes" / "gone.yaml"]
    for file in gone:
        file.touch()
    for there in (True, False):
        done = run(clone, "-c", SETUP, "bdist_wheel", CONTRASTIVE_OPS_WITHOUT_CPP="1")
        assert done.returncode == 0, done.stderr
        (wheel,) = (clone / "dist").glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            assert [name.endswith(("gone.py", "gone.yaml")) for name in content.namelist()].count(
                True
            ) == 2 * there
        for file in gone:
            file.unlink(missing_ok=True)


@in_the_source
def test_the_source_distribution_is_enough_to_test(tree: Path, tmp_path: Path) -> None:
    done = run(tree, "-c", SETUP, "sdist", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    folders = ("contrastive_ops", "kernels", "csrc", "train_ref", "tests", "bench", "docs")
    wanted = {
        str(file.relative_to(tree))
        for folder in folders
        for file in (tree / folder).rglob("*")
        if file.is_file()
    }
    wanted |= {"setup.py", "pyproject.toml", "Makefile", "constraints.txt", "constraints-oldest.txt"}
    wanted |= {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"}
    assert wanted <= names, sorted(wanted - names)
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.fixture(scope="module")
def under_version_control() -> set[str]:
    """The files of the repository, but for those that a forge and version control need."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("version control tells which files are meant")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # as where the checkout is another user's
        pytest.skip(f"version control does not tell which files are meant: {listed.stderr}")
    return {name for name in listed.stdout.splitlines() if not name.startswith(".git")}


@pytest.fixture(scope="module")
def unpacked(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the source distribution unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    done = run(tree, "-c", SETUP, "sdist", "--dist-dir", str(folder))
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@in_the_source
def test_the_source_distribution_is_what_is_under_version_control(
    under_version_control: set[str], unpacked: Path
) -> None:
    """And what setuptools adds."""
    ours = under_version_control
    inside = {file.relative_to(unpacked).as_posix() for file in unpacked.rglob("*") if file.is_file()}
    added = {
        name for name in inside if re.match(r"(PKG-INFO|setup\.cfg|contrastive_ops\.egg-info/.+)$", name)
    }
    assert inside - added == ours
    for name in ours:
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes(), name


@in_the_source
def test_the_source_distribution_builds_the_same_wheel(unpacked: Path, tree: Path, tmp_path: Path) -> None:
    contents = []
    for source in (unpacked, tree):
        wheels = tmp_path / str(len(contents))
        done = run(source, "-c", SETUP, "bdist_wheel", "-d", str(wheels), CONTRASTIVE_OPS_WITHOUT_CPP="1")
        assert done.returncode == 0, done.stderr
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            contents.append({name: content.read(name) for name in content.namelist()})
    assert contents[0] == contents[1]


def test_the_version_is_told_alike() -> None:
    assert distribution("contrastive-ops").version == contrastive_ops.__version__
    citation = ROOT / "CITATION.cff"
    if citation.exists():
        assert f"\nversion: {contrastive_ops.__version__}\n" in citation.read_text()


# What was compiled


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf reads what was compiled")
def test_extensions_hold_no_paths_and_no_debugging_symbols() -> None:
    for file in PACKAGE.glob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"):
        dynamic = subprocess.run(["readelf", "-dW", file], check=True, capture_output=True, text=True).stdout
        paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
        assert all(path.startswith("$ORIGIN") for path in paths), (file, paths)
        sections = subprocess.run(["readelf", "-SW", file], check=True, capture_output=True, text=True).stdout
        assert ".debug_info" not in sections, file


@pytest.mark.parametrize("other", ["2.8.0", "2.99.1+cu130", "3.0.0.dev20270101"])
def test_another_torch_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    ours = ".".join(torch.__version__.split(".")[:2])
    monkeypatch.setattr(torch, "__version__", other)
    with pytest.raises(ImportError) as refused:
        load_extension("_cpu_default")
    message = str(refused.value)
    assert re.search(rf"built for torch ([\d.]+, )*{re.escape(ours)}\b", message)
    assert f"this is torch {other}" in message
    assert "pip install --no-build-isolation" in message


def test_the_versions_that_it_was_built_for_are_told_in_their_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for minor in ("2_10", "2_9", "2_14"):
        (tmp_path / f"_cpu_default_torch_{minor}{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    monkeypatch.setattr(contrastive_ops, "__path__", [str(tmp_path)])
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.raises(ImportError, match=r"built for torch 2\.9, 2\.10, 2\.14, and this is torch 2\.99\.0"):
        load_extension("_cpu_default")


def test_an_extension_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(contrastive_ops, "__path__", [str(tmp_path)])
    with pytest.raises(ImportError, match=r"installed without its C\+\+ extension _cpu_default"):
        load_extension("_cpu_default")


def test_an_extension_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    minor = "_".join(torch.__version__.split(".")[:2])
    broken = tmp_path / f"_cpu_broken_torch_{minor}{sysconfig.get_config_var('EXT_SUFFIX')}"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(contrastive_ops, "__path__", [str(tmp_path)])
    with pytest.raises(
        ImportError, match=r"_cpu_broken_torch_.* cannot be loaded .*install contrastive_ops again"
    ):
        load_extension("_cpu_broken")


def test_what_lies_beside_extensions_is_none(tmp_path: Path) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in (f"_store{suffix}", "_cpu_default_torch_2_9.cpython-30-x86_64-linux-gnu.so", "queue.py"):
        (tmp_path / name).touch()
    assert extensions(tmp_path) == {"_store"}


# A source tree without extensions

REPORT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import contrastive_ops
    import contrastive_ops as again
    from contrastive_ops import functional, available_backends
import torch
loss = contrastive_ops.info_nce_loss(torch.eye(2), torch.eye(2), torch.eye(2))
print(json.dumps({
    "warnings": [str(each.message) for each in caught if "source tree" in str(each.message)],
    "blamed": [each.filename for each in caught if "source tree" in str(each.message)],
    "folder": functional.__file__,
    "cpu": bool(available_backends()["cpu"]),
}))
"""


@in_the_source
@pytest.mark.parametrize(
    "has", [(), ("_store",), ("_cpu_default_torch_1_0", "_cpu_avx2_torch_1_0", "_store")]
)
def test_a_source_tree_hands_over_to_the_installed_package(tree: Path, has: tuple[str, ...]) -> None:
    """Also one that has some extensions, but not all that this Python and torch need."""
    files = [tree / "contrastive_ops" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in has]
    for file in files:
        file.touch()
    done = run(tree, "-c", REPORT)
    for file in files:
        file.unlink()
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (warning,) = report["warnings"]
    assert ", version " not in warning  # which is the same
    assert str(tree / "contrastive_ops") in warning
    assert str(PACKAGE) in warning
    assert f"pip install --no-build-isolation --editable {tree}" in warning
    assert report["blamed"] == ["<string>"]  # who imported it
    assert Path(report["folder"]).parent == PACKAGE
    assert report["cpu"]


@in_the_source
@pytest.mark.skipif(not is_editable(), reason="it is installed where torch is")
def test_a_source_tree_alone_says_so_and_works(tree: Path) -> None:
    """-S leaves out what makes an editable installation known; then torch is, and contrastive_ops is not."""
    done = run(tree, "-S", "-c", REPORT, PYTHONPATH=sysconfig.get_path("purelib"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (warning,) = report["warnings"]
    assert "not installed elsewhere" in warning
    assert f"pip install --no-build-isolation --editable {tree}" in warning
    assert Path(report["folder"]).parent == tree / "contrastive_ops"
    assert not report["cpu"]


@in_the_source
def test_versions_that_differ_are_told(tree: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(tree, newer)
    init = newer / "contrastive_ops" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{contrastive_ops.__version__}"', '"99.0"'))
    (warning,) = json.loads(run(newer, "-c", REPORT).stdout)["warnings"]
    assert f"version {contrastive_ops.__version__} where this is 99.0" in warning


@in_the_source
@pytest.mark.skipif(not is_editable(), reason="it is installed where torch is")
def test_a_folder_of_that_name_is_no_package(tree: Path, tmp_path: Path) -> None:
    clone = tmp_path / "contrastive_ops"
    shutil.copytree(tree, clone)
    path = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])
    done = run(clone, "-S", "-c", REPORT, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "not installed elsewhere" in json.loads(done.stdout)["warnings"][0]


def test_what_is_whole_is_left_alone(recwarn: pytest.WarningsRecorder) -> None:
    here = [str(PACKAGE)]
    assert _installation.installed_instead(here) == here
    assert not recwarn.list


@in_the_source
def test_the_trainer_finds_the_kernels_from_a_source_tree(tree: Path) -> None:
    pytest.importorskip("lightning")
    done = run(
        tree, "-m", "train_ref", "validate", "--methods", "moco_v2_co2", "--steps", "2", "--free", "false"
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"moco_v2_co2 +cpu ", done.stdout), done.stdout
