"""Instance classification: a row of weight for every instance."""

from .classifier import InstanceClassifier
from .memory_bank import MemoryBank
from .optimizer import DelayedSGD

__all__ = ["DelayedSGD", "InstanceClassifier", "MemoryBank"]
