"""How many ranks and nodes a token reaches, when a router picks uniformly.

A router opens some of its groups of blocks at random and picks distinct blocks of those, all
equally often (group-limited routing; without groups, all blocks are one group). What a token sends
then depends on where the blocks are, and nothing else. The expectations are exact: hypergeometric
counts of what is open, summed up in whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import comb


@dataclass(frozen=True)
class Router:
    """``picks`` distinct ones of ``blocks``, within ``open`` of ``groups`` groups.

    Groups are contiguous runs of equal size. ``picks`` is at most what is open.
    """

    blocks: int
    picks: int
    groups: int = 1
    open: int = 1

    def __post_init__(self) -> None:
        if self.blocks % self.groups or not 1 <= self.open <= self.groups:
            raise ValueError(f"{self.open} of {self.groups} groups of {self.blocks} blocks")
        if not 1 <= self.picks <= self.open * self.group_size:
            raise ValueError(f"{self.picks} picks of {self.open * self.group_size} blocks")

    @property
    def group_size(self) -> int:
        return self.blocks // self.groups

    def reaches(self, blocks: Iterable[int]) -> Fraction:
        """The probability that at least one pick is among these blocks (their numbers)."""
        counts = [0] * self.groups
        for block in set(blocks):
            counts[block // self.group_size] += 1
        return _reaches(self, tuple(sorted(counts)))

    def reached(self, places: Iterable[Iterable[int]]) -> Fraction:
        """Of places that hold blocks (ranks, nodes), how many a token reaches on average."""
        return sum((self.reaches(place) for place in places), Fraction(0))


@cache
def _reaches(router: Router, counts: tuple[int, ...]) -> Fraction:
    """``counts``: how many of the wanted blocks stand in each group."""
    # ways[open groups so far][wanted blocks in them] = number of choices of groups
    ways: list[dict[int, int]] = [{0: 1}] + [{} for _ in range(router.open)]
    for count in counts:
        for opened in range(router.open, 0, -1):
            for wanted, number in ways[opened - 1].items():
                into = ways[opened]
                into[wanted + count] = into.get(wanted + count, 0) + number
    seen = router.open * router.group_size
    missed = sum(
        number * comb(seen - wanted, router.picks) for wanted, number in ways[router.open].items()
    )
    return 1 - Fraction(missed, comb(router.groups, router.open) * comb(seen, router.picks))


@dataclass(frozen=True)
class Spread:
    """What one token sends on average, in copies.

    Attributes:
        ranks, nodes: places that it reaches, its own included.
        other_nodes: nodes but its own; ``other_ranks``: ranks but its own.
        picks_out: picks that are on another node, each sent by itself.
        picks_up: picks that are on another rank of its own node.
        forwarded: where a copy goes to each node once and on from there to the ranks that want it:
            copies that go on inside a node, all nodes together.
    """

    ranks: float
    nodes: float
    other_ranks: float
    other_nodes: float
    picks_out: float
    picks_up: float
    forwarded: float


def spread(
    router: Router, nodes: Sequence[int], runs: Sequence[Iterable[int]] | None = None
) -> Spread:
    """How a token's copies spread over ranks that the blocks are dealt out to.

    Args:
        nodes: of each rank, the node that it stands in; as many ranks in each. A sender is any of
            these ranks, all alike often.
        runs: the blocks that each rank holds; contiguous equal runs in order, unless given.
    """
    if runs is None:
        each, rest = divmod(router.blocks, len(nodes))
        if rest:
            raise ValueError(f"{router.blocks} blocks on {len(nodes)} ranks")
        runs = [range(i * each, (i + 1) * each) for i in range(len(nodes))]
    in_node: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        in_node.setdefault(node, []).append(rank)
    to_rank = [router.reaches(run) for run in runs]
    to_node = {
        node: router.reaches(b for rank in ranks for b in runs[rank])
        for node, ranks in in_node.items()
    }
    total, count = len(nodes), Fraction(1, len(nodes))
    all_ranks, all_nodes = sum(to_rank, Fraction(0)), sum(to_node.values(), Fraction(0))
    own_rank = all_ranks * count
    own_node = sum((to_node[node] for node in nodes), Fraction(0)) * count
    share_own_node = sum(len(ranks) ** 2 for ranks in in_node.values()) / total**2
    picks_out = router.picks * (1 - share_own_node)
    enters = Fraction(len(in_node), total)  # the rank of a node that a copy comes to
    return Spread(
        float(all_ranks),
        float(all_nodes),
        float(all_ranks - own_rank),
        float(all_nodes - own_node),
        picks_out,
        router.picks * (share_own_node - 1 / total),
        float(all_ranks * (1 - enters)),
    )
