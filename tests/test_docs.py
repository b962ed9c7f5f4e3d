"""The examples in the docstrings run, and the README's tables are those of the newest results."""

from __future__ import annotations

import doctest
import importlib
import json

import pytest

from bench.files import DROP_IN, README, newest_result
from train_ref.markdown import parts

MODULES = (
    "functional", "modules", "queue", "_backends", "classifier.classifier", "classifier.optimizer",
    "classifier.memory_bank", "classifier.history", "adapters.lightly", "adapters.solo_learn",
    "adapters.open_clip",
)  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"contrastive_ops.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_readme_tells_the_newest_benchmarks() -> None:
    report = pytest.importorskip("bench.report")
    instances = pytest.importorskip("bench.instances")
    results = report.newest_results()
    assert parts(README, "headline")[1] == report.readme_headline(results)
    assert parts(README, "benchmark")[1] == "\n\n".join(map(report.readme_section, results))
    newest = newest_result("-instances")
    assert parts(README, "classifier")[1] == instances.readme_section(json.loads(newest.read_text()))


def test_the_readme_tells_the_newest_demonstration() -> None:
    report = pytest.importorskip("bench.report")
    assert parts(README, "demo")[1] == report.demo_section(json.loads(newest_result("-demo").read_text()))


def test_the_pages_for_other_projects_tell_the_newest_benchmarks() -> None:
    report = pytest.importorskip("bench.report")
    results = report.newest_results()
    for page in report.DROP_INS:
        assert parts(DROP_IN / f"{page}.md", "measured")[1] == report.drop_in_section(page, results), page
