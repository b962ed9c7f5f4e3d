from __future__ import annotations

import torch

from train_ref.memory import PeakMemory, in_fresh_process


def measured() -> tuple[float, float]:
    """What is told before and after 64 MiB have been in use for a while."""
    peak = PeakMemory(torch.device("cpu"))
    before = peak.read_mib()
    torch.ones(2**24)
    return before, peak.read_mib()


def test_the_peak_is_told_when_it_is_gone():
    before, after = in_fresh_process(measured)
    assert before < 32
    assert 64 <= after < 96
