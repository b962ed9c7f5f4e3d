"""A call goes one way through the package: nothing imports anything above."""

from __future__ import annotations

import pytest

layers = pytest.importorskip("bench.layers")


def test_every_module_has_a_layer() -> None:
    assert not layers.unplaced()


def test_nothing_imports_what_is_above() -> None:
    assert layers.imports()
    assert not layers.upward()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from ._ops import co2", ["_ops"]),
        ("from . import _ops, functional", ["_ops", "functional"]),
        ("def late():\n    from .classifier.disk import Disk", ["classifier.disk"]),
        ("import contrastive_ops.reference", ["reference"]),
        ("from contrastive_ops.kernels import _co2", ["kernels"]),
        ("import torch", []),
    ],
)
def test_imports_of_every_form_are_seen(tmp_path, text: str, found: list[str]) -> None:
    file = tmp_path / "queue.py"
    file.write_text(text)
    assert list(layers.imported("queue", file)) == found


def test_imports_of_a_folder_are_relative_to_it(tmp_path) -> None:
    (tmp_path / "disk.py").write_text("from ..functional import co2_loss\nfrom .folder import Folder")
    assert list(layers.imported("classifier.disk", tmp_path / "disk.py")) == [
        "functional",
        "classifier.folder",
    ]
