"""What a rank sends is what the formulas say, and what it computes a share of the whole."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from bench.ranks import Step, counting, sent, simulate
from contrastive_ops import co2_loss, conic_loss, nt_xent_loss
from tests import ranks

STEPS = [
    Step("co2", 32, 65536),
    Step("nt_xent", 64),
    Step("conic", 64, 65536),
    Step("conic", 3, 1 << 24, 100, torch.float32),
]


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("size", [1, 8, 64, 1024])
def test_sends_what_the_formula_says_and_computes_its_share(step: Step, size: int) -> None:
    counted, alone = simulate(step, size), simulate(step._replace(batch=step.batch * size), 1)
    assert counted.sent == sent(step, size)
    # Beside its share, a rank of ConIC has the consistency of all views: 2 products a view for 65,536.
    assert counted.operations == pytest.approx(alone.operations / size, rel=0.02)
    # Of the others it holds rows and a few numbers a row: no more than twenty rows of float32 for each.
    assert counted.held <= 20 * 2 * step.batch * size * step.dim * 4


def check_counts(group: dist.ProcessGroup) -> None:
    size, rank = group.size(), group.rank()
    for dtype in (torch.float32, torch.bfloat16):
        b, dim, keys = 5, 24, 40
        rows = [torch.randn(b, dim, dtype=dtype, requires_grad=i == 0) for i in range(2)]
        queue, weight = torch.randn(keys, dim), torch.randn(keys, dim, requires_grad=True)
        views, target = torch.randn(2, b, dim, dtype=dtype, requires_grad=True), torch.arange(b) + rank
        losses = {
            "co2": lambda: co2_loss(*rows, queue, group=group),  # noqa: B023
            "nt_xent": lambda: nt_xent_loss(*rows, group=group),  # noqa: B023
            "conic": lambda: conic_loss(views, weight, target, group=group),  # noqa: B023
        }
        for name, loss in losses.items():
            counter: Counter[str] = Counter()
            with counting(counter):
                loss().backward()
            assert counter["sent"] == sent(Step(name, b, size * keys, dim, dtype), size), (name, dtype)


def test_counts_of_ranks_that_are_there() -> None:
    ranks.run(check_counts, 3)
