"""How a release is made: what stops one, what it leaves, and that its definitions name what is supported."""

from __future__ import annotations

import datetime
import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

if not (ROOT / ".ci").is_dir():
    pytest.skip("releases are made of the source", allow_module_level=True)

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def script(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


release = script("release")
CHANGELOG = "# Changelog\n\n## 1.1.0 (unreleased)\n\n- A thing.\n\n## 1.0.0 (2026-01-01)\n\n- All of it.\n"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the files that a release changes, as they are here but for the changelog."""
    if shutil.which("git") is None:
        pytest.skip("git is needed")
    for file in release.PLACES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    for variable in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{variable}_NAME", "Somebody")
        monkeypatch.setenv(f"{variable}_EMAIL", "somebody@example.org")
    monkeypatch.chdir(tmp_path)
    release.git("init", "--quiet")
    release.git("add", ".")
    release.git("commit", "--message", "A start")
    return tmp_path


def test_a_release_is_dated_committed_and_tagged(repository: Path) -> None:
    """What is built has the version already."""
    seen = "grep -q '^## 1.1.0 (20' CHANGELOG.md && grep -q '\"1.1.0\"' contrastive_ops/__init__.py"
    release.release("1.1.0", ("sh", "-c", seen))
    today = datetime.datetime.now(datetime.UTC).date()
    assert (repository / "CHANGELOG.md").read_text() == CHANGELOG.replace("unreleased", today.isoformat())
    assert '__version__ = "1.1.0"\n' in (repository / "contrastive_ops/__init__.py").read_text()
    assert "\nversion: 1.1.0\n" in (repository / "CITATION.cff").read_text()
    assert release.git("status", "--porcelain") == ""
    assert release.git("rev-list", "--count", "HEAD") == "2"
    assert release.git("rev-parse", "v1.1.0^{commit}") == release.git("rev-parse", "HEAD")


@pytest.mark.parametrize(
    ("version", "before", "reason"),
    [
        ("1.1.0", "touch new", "not committed"),
        ("1.1.0", "echo >> CITATION.cff", "not committed"),
        ("1.2.0", "true", "no section"),
        ("1.0.0", "true", "no section"),  # it has a date
        ("1.1.0", "sed -i 's/- A thing.//' CHANGELOG.md && git commit -qam Less", "no section"),
        ("1.1.0", "git tag v1.1.0", "tag v1.1.0 exists"),
        ("1.1", "true", "no version"),
        ("v1.1.0", "true", "no version"),
        ("", "true", "no version"),
    ],
)
def test_no_release_of_what_is_not_ready(repository: Path, version: str, before: str, reason: str) -> None:
    subprocess.run(before, shell=True, check=True)
    state = [release.git(*each) for each in (("status", "--porcelain"), ("rev-parse", "HEAD"), ("tag",))]
    with pytest.raises(SystemExit, match=reason):
        release.release(version, ("false",))
    assert state == [
        release.git(*each) for each in (("status", "--porcelain"), ("rev-parse", "HEAD"), ("tag",))
    ]


def test_a_build_that_fails_leaves_the_tree_as_it_was(repository: Path) -> None:
    head = release.git("rev-parse", "HEAD")
    with pytest.raises(subprocess.CalledProcessError):
        release.release("1.1.0", ("false",))
    assert release.git("status", "--porcelain") == ""
    assert release.git("tag") == ""
    assert release.git("rev-parse", "HEAD") == head


def test_a_file_without_a_version_stops_a_release(repository: Path) -> None:
    (repository / "CITATION.cff").write_text("title: contrastive_ops\n")
    release.git("commit", "--all", "--message", "Less")
    with pytest.raises(ValueError, match="CITATION"):
        release.release("1.1.0", ("true",))
    assert release.git("status", "--porcelain") == ""


def test_what_is_built_for_a_release_is_all_of_it() -> None:
    done = subprocess.run(
        ["make", "--dry-run", *release.BUILD[1:]], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert "--sdist" in done
    assert ".ci/repair dist" in done
    assert "twine check --strict dist/*\n" in done


# Definitions

MINORS = list(script("torches").MINORS)
CLASSIFIER = "Programming Language :: Python :: 3."
PYTHONS = [
    "3." + each.removeprefix(CLASSIFIER)
    for each in PYPROJECT["project"]["classifiers"]
    if each.startswith(CLASSIFIER)
]


def workflow(name: str) -> Any:
    return pytest.importorskip("yaml").safe_load((ROOT / ".github/workflows" / name).read_text())


def test_kernels_are_built_for_every_torch_from_the_oldest_to_the_one_of_development() -> None:
    (oldest,) = (
        match[1] for each in PYPROJECT["project"]["dependencies"] if (match := re.match("torch>=(.+)", each))
    )
    (newest,) = re.findall(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    first, last = (int(each.removeprefix("2.")) for each in (oldest, newest))
    assert [f"2.{minor}" for minor in range(first, last + 1)] == MINORS


def test_wheels_are_built_for_every_python() -> None:
    built = PYPROJECT["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp{python.replace('.', '')}-*" for python in PYTHONS]


in_a_repository = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="workflows are the repository's")


@in_a_repository
@pytest.mark.parametrize(("name", "job"), [("test.yml", "versions"), ("wheels.yml", "test")])
def test_workflows_test_every_torch_with_every_python(name: str, job: str) -> None:
    matrix = workflow(name)["jobs"][job]["strategy"]["matrix"]
    assert matrix == {"torch": MINORS, "python": PYTHONS}


@in_a_repository
def test_nothing_is_published_but_by_a_tag_and_after_all_tests() -> None:
    definition = workflow("wheels.yml")
    assert definition[True]["push"] == {"tags": ["v*"]}  # YAML takes "on" for a truth value
    jobs = definition["jobs"]
    publish = jobs.pop("publish")
    assert "refs/tags/v" in publish["if"]
    assert set(publish["needs"]) == set(jobs)
    assert publish["permissions"] == {"id-token": "write"}
    assert definition["permissions"] == {"contents": "read"}


@in_a_repository
@pytest.mark.parametrize("name", ["test.yml", "wheels.yml"])
def test_what_workflows_make_and_name_is_there(name: str) -> None:
    text = (ROOT / ".github/workflows" / name).read_text()
    workflow(name)
    targets = re.findall(r"run: make ([\w-]+)", text)
    subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
    for path in re.findall(r"--ignore=(\S+)", text):
        assert (ROOT / path).exists()
