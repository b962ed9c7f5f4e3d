"""An adapter speaks another project's language without having it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from contrastive_ops import adapters

ALLOWED = {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("file", sorted(Path(adapters.__path__[0]).glob("*.py")), ids=lambda file: file.stem)
def test_adapters_import_torch_and_this_package_alone(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert str(node.module).partition(".")[0] in ALLOWED
