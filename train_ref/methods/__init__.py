"""The methods of the papers, each as short as its paper allows, and their names."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from ..errors import UsageError
from .conic import ConIC
from .instdisc import InstDisc
from .method import Method
from .moco import MoCo
from .simclr import SimCLR


class NamedMethod(NamedTuple):
    """A method as a paper has it.

    Attributes:
        kind: the class that trains it. Several methods may be of a kind; checkpoints tell the kind's name.
        settings: the paper's, as arguments of the kind; the kind's defaults have the others.
    """

    kind: type[Method]
    settings: dict[str, Any]


MOCO_V1 = {"head": "linear", "temperature": 0.07, "schedule": "step", "consistency_temperature": 0.04}
MOCO_V2 = {"head": "mlp", "temperature": 0.2, "schedule": "cosine", "consistency_temperature": 0.05}

METHODS = {
    "moco_v1": NamedMethod(MoCo, {**MOCO_V1, "consistency_weight": 0.0}),
    "moco_v1_co2": NamedMethod(MoCo, {**MOCO_V1, "consistency_weight": 10.0}),
    "moco_v2": NamedMethod(MoCo, {**MOCO_V2, "consistency_weight": 0.0}),
    "moco_v2_co2": NamedMethod(MoCo, {**MOCO_V2, "consistency_weight": 0.3}),
    "simclr": NamedMethod(SimCLR, {}),
    "simclr_co2": NamedMethod(SimCLR, {"consistency_weight": 0.3}),  # no paper says it: that of MoCo v2
    "instdisc": NamedMethod(InstDisc, {}),
    "exemplar_cnn": NamedMethod(ConIC, {"consistency_weight": 0.0}),
    "conic": NamedMethod(ConIC, {}),
    "conic_sampled": NamedMethod(ConIC, {"active": 65536}),
}
ALIASES = {"moco": "moco_v2_co2"}

KINDS: dict[str, type[Method]] = {kind.name: kind for kind in (MoCo, SimCLR, ConIC, InstDisc)}


def method_name(name: str) -> str:
    """A name in `METHODS`, also of an alias.

    Raises:
        UsageError: there is no such method; the message lists those that there are.
    """
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise UsageError(f"there is no method {name}; there are {', '.join([*METHODS, *ALIASES])}")
    return name


def settings_of(name: str) -> dict[str, Any]:
    """A method's value of every setting in which the named methods of its kind differ.

    Args:
        name: in `METHODS`.
    """
    kind = METHODS[name].kind
    names = dict.fromkeys(
        each for method in METHODS.values() if method.kind is kind for each in method.settings
    )
    return {each: METHODS[name].settings.get(each, default(kind, each)) for each in names}


def default(kind: type[Method], argument: str) -> Any:
    """That of a kind's argument, which may be one that all methods have."""
    signatures = (inspect.signature(each.__init__).parameters for each in kind.__mro__)
    return next(parameters[argument].default for parameters in signatures if argument in parameters)


__all__ = [
    "ALIASES",
    "KINDS",
    "METHODS",
    "MOCO_V1",
    "MOCO_V2",
    "ConIC",
    "InstDisc",
    "Method",
    "MoCo",
    "NamedMethod",
    "SimCLR",
    "method_name",
    "settings_of",
]
