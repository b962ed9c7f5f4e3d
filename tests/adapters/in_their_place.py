"""A plugin of pytest that puts the adapters in the place of a peer's own losses, for the peer's own tests.

    cd build/peers/lightly
    PYTHONPATH=.:…/tests/adapters python -m pytest --rootdir=. -p in_their_place tests/loss/test_co2.py

The folder that they are run in tells which peer that is. This module is no part of the package `tests`, for
the tests of others have a package of that name. solo-learn need not be installed: its tests of losses import
nothing but functions of `solo.losses`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest

from contrastive_ops.adapters import lightly, open_clip, solo_learn

# What is replaced, and where a peer's tests and its own modules find it.
LIGHTLY = {
    "NTXentLoss": ("lightly.loss", "lightly.loss.ntx_ent_loss"),
    "CO2Regularizer": ("lightly.loss.regularizer", "lightly.loss.regularizer.co2"),
}
OPEN_CLIP = {
    "ClipLoss": ("open_clip", "open_clip.loss", "open_clip.factory"),
}


def replace(adapter: ModuleType, names: dict[str, tuple[str, ...]]) -> None:
    for name, places in names.items():
        for place in places:
            setattr(importlib.import_module(place), name, getattr(adapter, name))


def pytest_configure(config: pytest.Config) -> None:
    if (config.rootpath / "lightly").is_dir():
        replace(lightly, LIGHTLY)
    elif (config.rootpath / "src/open_clip").is_dir():
        replace(open_clip, OPEN_CLIP)
    else:
        sys.modules |= {"solo": ModuleType("solo"), "solo.losses": solo_learn}
