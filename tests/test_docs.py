"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("functional", "modules", "queue", "instances", "_backends", "_history")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"contrastive_ops.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
