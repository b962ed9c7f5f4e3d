"""In which order threads that branched apart are to go on, so that they meet again as early as on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx


def ranks(successors: Sequence[Sequence[int]]) -> list[int]:
    """A number for each instruction, by those that may follow it: what comes before another on every way
    through a loop's body, or through the kernel, has a smaller one. Where threads with the smallest number
    always go first, they wait wherever the ways of others lead. A compiler may place blocks in another order.
    """
    following = {at + 1 for at, after in enumerate(successors) if list(after) != [at + 1]}
    starts = sorted({0} | following.union(*successors))
    starts = [at for at in starts if at < len(successors)]
    ends = [*starts[1:], len(successors)]
    flow = nx.DiGraph()
    flow.add_nodes_from(starts)
    for start, end in zip(starts, ends, strict=True):
        flow.add_edges_from((start, after) for after in successors[end - 1] if after < len(successors))

    result, number = [0] * len(successors), 0
    length = {start: end - start for start, end in zip(starts, ends, strict=True)}
    for start in _in_order(flow, 0):
        for at in range(start, start + length[start]):
            result[at], number = number, number + 1
    return result


def _in_order(flow: nx.DiGraph, first: int) -> list[int]:
    """Blocks, so that each comes before those it leads to; of a loop, whose blocks come together, the edges
    to its first block do not count."""
    parts = nx.condensation(flow)
    result: list[int] = []
    for part in nx.lexicographical_topological_sort(
        parts, key=lambda part: min(parts.nodes[part]["members"])
    ):
        blocks = parts.nodes[part]["members"]
        if len(blocks) == 1:
            result += blocks
            continue
        entered = [to for at, to in flow.edges if to in blocks and at not in blocks]
        head = first if first in blocks else min(entered, default=min(blocks))
        loop = nx.DiGraph(flow.subgraph(blocks))
        loop.remove_edges_from(list(loop.in_edges(head)))
        result += _in_order(loop, head)
    return result
