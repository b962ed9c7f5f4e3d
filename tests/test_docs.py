"""The examples in the docstrings run, and the README's tables are those of the newest results."""

from __future__ import annotations

import doctest
import importlib
import json
import re

import pytest

MODULES = ("functional", "modules", "queue", "instances", "_backends", "_history")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"contrastive_ops.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def between_markers(name: str) -> str:
    text = importlib.import_module("bench.markdown").README.read_text()
    return re.search(f"<!-- {name}:begin -->\n(.*)\n<!-- {name}:end -->", text, re.DOTALL)[1]


def test_the_readme_tells_the_newest_benchmarks() -> None:
    report = pytest.importorskip("bench.report")
    instances = pytest.importorskip("bench.instances")
    assert between_markers("benchmark") == "\n\n".join(
        report.readme_section(report.Result(path)) for path in report.newest()
    )
    newest = max(report.RESULTS.glob("*-instances.json"))
    assert between_markers("classifier") == instances.readme_section(json.loads(newest.read_text()))


def test_the_readme_tells_the_newest_demonstration() -> None:
    report = pytest.importorskip("train_ref.report")
    assert between_markers("demo") == report.demo(json.loads(report.newest_demo().read_text()))
