"""The methods of the papers, each as short as its paper allows."""

from .conic import ConIC
from .instdisc import InstDisc
from .method import Method
from .moco import MoCo
from .simclr import SimCLR

METHODS: dict[str, type[Method]] = {"moco": MoCo, "simclr": SimCLR, "conic": ConIC, "instdisc": InstDisc}

__all__ = ["METHODS", "ConIC", "InstDisc", "Method", "MoCo", "SimCLR"]
