"""What ranks say to each other: agreements, rows, refusals, and what becomes of them where a rank dies."""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from contrastive_ops import info_nce_loss, nt_xent_loss
from contrastive_ops._ranks import Disagreement, Ranks
from tests import ranks

Group = dist.ProcessGroup


def check_rows(group: Group) -> None:
    """Rows of several tensors and dtypes, of which ranks have different numbers."""
    us = Ranks(group, "a test")
    counts = [3, 0, 2, 5][: us.size]
    own = counts[us.rank]
    said = us.agree({"dtype": torch.float16, "nothing": None}, rows=own, more=7 + us.rank)
    assert said == {"rows": counts, "more": [7 + rank for rank in range(us.size)]}

    x = torch.full((own, 7), us.rank, dtype=torch.bfloat16)
    y = torch.full((2, 3, own), us.rank, dtype=torch.int64).transpose(0, 1)
    every_x, every_y = us.gather([x, y], counts, [0, 2]).wait()
    for rank, count in enumerate(counts):
        assert torch.equal(every_x[rank], torch.full((count, 7), rank, dtype=torch.bfloat16))
        assert torch.equal(every_y[rank], torch.full((3, 2, count), rank, dtype=torch.int64))

    leaving = torch.cat([torch.full((n, 2), 10.0 * us.rank + to) for to, n in enumerate(counts)])
    for sender, arrived in enumerate(us.send(leaving, counts, [own] * us.size).wait()):
        assert torch.equal(arrived, torch.full((own, 2), 10.0 * sender + us.rank))

    one = torch.zeros(us.size, dtype=torch.float64)
    one[us.rank] = 0.1 * us.rank
    assert torch.equal(us.sum(one), 0.1 * torch.arange(us.size, dtype=torch.float64))


def check_disagreements(group: Group) -> None:
    us = Ranks(group, "a test")
    with pytest.raises(
        Disagreement, match=r"a test among 3 ranks: .* but size is 0 on ranks 0, 1, 1 on rank 2"
    ):
        us.agree({"size": us.rank // 2, "other": 5})
    with pytest.raises(Disagreement, match="the operation is a test on ranks 0, 2, another on rank 1"):
        (Ranks(group, "another") if us.rank == 1 else us).agree({"size": 1})

    def refuse() -> None:
        with us.telling():
            if us.rank == 2:
                raise TypeError("size must be a number")
        us.agree({})

    if us.rank == 2:
        with pytest.raises(TypeError, match="size must be a number"):
            refuse()
    else:
        with pytest.raises(Disagreement, match="refused on rank 2: TypeError: size must be a number"):
            refuse()
    us.agree({"all": "go on"})


def check_groups(group: Group) -> None:
    """Of a group of some ranks, others know nothing; and one of a single rank is as none."""
    members = dist.new_group([0, 2])
    alone = [dist.new_group([rank]) for rank in range(group.size())][group.rank()]
    generator = torch.Generator().manual_seed(group.rank())
    view1, view2 = (torch.randn(4, 8, generator=generator) for _ in range(2))
    assert isinstance(alone, Group)
    torch.testing.assert_close(nt_xent_loss(view1, view2, group=alone), nt_xent_loss(view1, view2))
    if group.rank() == 1:
        with pytest.raises(ValueError, match="group that this process belongs to"):
            nt_xent_loss(view1, view2, group=members)  # type: ignore[arg-type]
    else:
        assert isinstance(members, Group)
        every = [torch.empty(2, 4, 8) for _ in range(2)]
        dist.all_gather(every, torch.stack([view1, view2]), group=members)
        one = nt_xent_loss(*torch.cat(every, 1))
        mine = nt_xent_loss(view1, view2, group=members)
        dist.all_reduce(mine, group=members)
        torch.testing.assert_close(mine / 2, one)


def check_everything(group: Group) -> None:
    for check in (check_rows, check_disagreements, check_groups):
        check(group)


def test_three_ranks() -> None:
    ranks.run(check_everything, 3)


def loss_beside_a_rank_that_ends(group: Group, how: str) -> tuple[str, float]:
    """What the others are told, and after how many seconds; one rank dies or hangs instead of taking part."""
    query = torch.randn(4, 8)
    assert info_nce_loss(query, query, query, group=group).isfinite()
    dist.barrier(group)
    if group.rank() == 1:
        if how == "dies":
            os._exit(0)
        time.sleep(12)
        os._exit(0)
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        info_nce_loss(query, query, query, group=group)
    return str(caught.value), time.monotonic() - begin


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_ends(how: str, tmp_path: Any) -> None:
    """It is one error on each of the others, which names the operation, within the timeout."""
    ranks.run(ends, 3, how, str(tmp_path), timeout=datetime.timedelta(seconds=5))
    for rank in (0, 2):
        message, _, seconds = (tmp_path / str(rank)).read_text().rpartition("\n")
        assert message.startswith(f"co2_loss: agreeing failed on rank {rank} of 3:")
        assert float(seconds) < 10


def ends(group: Group, how: str, folder: str) -> None:
    message, seconds = loss_beside_a_rank_that_ends(group, how)
    with open(f"{folder}/{group.rank()}", "w", encoding="utf-8") as file:
        file.write(f"{message}\n{seconds}")
    time.sleep(1)
    os._exit(0)  # no more can be done with this group
