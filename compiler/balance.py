"""Which blocks of an array get copies, and which rank holds which: from measured loads.

What a rank computes is the sum of the loads of its blocks, each divided by its copies; all ranks
wait for the busiest. The problem is NP-hard; this is the published greedy scheme (EPLB, 2025) and
then exchanges that make the busiest rank less so, while there are any.

*Hierarchical*, where the groups of blocks divide over nodes: groups are packed on nodes, so that a
token's groups stay on few nodes; blocks are copied within their node, and copies packed on its
ranks. *Global*: copies for whichever block is the busiest, packed on all ranks.

``places`` are dealt out over ranks in contiguous runs; ``numbers[place]`` is a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compiler.errors import UserError


class BalanceError(UserError):
    """Loads and places that do not fit together."""


@dataclass(frozen=True)
class Balanced:
    """Where the blocks of one array are.

    Attributes:
        numbers: the block in each place.
        places: of each block, its places, in order.
        loads: the load of each rank.
    """

    numbers: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]
    loads: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """The busiest rank's load over the mean."""
        mean = sum(self.loads) / len(self.loads)
        return max(self.loads) / mean if mean else 1.0


def balance(
    loads: Sequence[float], places: int, groups: int = 1, nodes: int = 1, ranks: int = 1
) -> Balanced:
    """Place the blocks of one array.

    Args:
        loads: of each block, in any unit: tokens that picked it.
        places: blocks and copies together.
        groups: of blocks, in contiguous runs; a token's picks are in few of them.
        nodes: of ``ranks / nodes`` ranks each.
        ranks: each has ``places / ranks`` places.

    Raises:
        BalanceError: these numbers do not divide, or there are too few places.
    """
    _check(loads, places, groups, nodes, ranks)
    if groups % nodes:  # groups cannot be kept together: the whole cluster is one node
        groups = nodes = 1
    each = len(loads) // groups
    totals = [sum(loads[g * each : (g + 1) * each]) for g in range(groups)]
    held = packed(totals, nodes)
    numbers: list[int] = []
    for node in range(nodes):
        own = [g * each + i for g in held[node] for i in range(each)]
        copied = copies([loads[b] for b in own], places // nodes)
        shares = [loads[own[i]] / copied.count(i) for i in copied]
        packs = packed(shares, ranks // nodes)
        packs = exchanged(shares, packs)
        numbers += [own[copied[i]] for pack in packs for i in pack]
    return placed(loads, numbers, ranks)


def unmeasured(blocks: int, places: int, nodes: int, ranks: int) -> tuple[int, ...]:
    """The block in each place as long as no loads are known: ranks have contiguous runs of blocks,
    and copies of others on their node, first of those whose rank has most to do.

    Args: as ``balance`` has them; the nodes divide blocks and ranks, and the ranks places.
    """
    own, among, each = blocks // nodes, ranks // nodes, places // ranks
    found: list[int] = []
    for node in range(nodes):
        held = [list(range(own * r // among, own * (r + 1) // among)) for r in range(among)]
        home = [r for r, run in enumerate(held) for _ in run]
        count = [1] * own
        for rank, run in enumerate(held):
            while len(run) < each:
                work = [sum(1 / count[b] for b in other) for other in held]
                others = [b for b in range(own) if b not in run] or range(own)
                order = [(count[b], -work[home[b]], (home[b] - rank) % among, b) for b in others]
                copied = min(order)[-1]
                run.append(copied)
                count[copied] += 1
        found += [node * own + block for run in held for block in run]
    return tuple(found)


def placed(loads: Sequence[float], numbers: Sequence[int], ranks: int) -> Balanced:
    """What a placement gives."""
    count = [0] * len(loads)
    for block in numbers:
        count[block] += 1
    where = tuple(tuple(p for p, b in enumerate(numbers) if b == n) for n in range(len(loads)))
    each = len(numbers) // ranks
    sums = tuple(
        sum(loads[b] / count[b] for b in numbers[r * each : (r + 1) * each]) for r in range(ranks)
    )
    return Balanced(tuple(numbers), where, sums)


def copies(loads: Sequence[float], places: int) -> list[int]:
    """The block of each place: every block once, then a copy of whichever has the highest load for
    each of its copies."""
    numbers, count = list(range(len(loads))), [1] * len(loads)
    for _ in range(places - len(loads)):
        most = max(range(len(loads)), key=lambda b: (loads[b] / count[b], -b))
        numbers.append(most)
        count[most] += 1
    return numbers


def packed(loads: Sequence[float], packs: int) -> list[list[int]]:
    """Items in packs of equally many, so that the heaviest pack is light: the heaviest item first,
    each to the lightest pack with room."""
    room = len(loads) // packs
    if room == 1:
        return [[i] for i in range(packs)]
    found: list[list[int]] = [[] for _ in range(packs)]
    weights = [0.0] * packs
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        pack = min((p for p in range(packs) if len(found[p]) < room), key=lambda p: weights[p])
        found[pack].append(item)
        weights[pack] += loads[item]
    return found


def exchanged(loads: Sequence[float], packs: list[list[int]]) -> list[list[int]]:
    """The packs after exchanges of two items that make the heaviest pack lighter and no other as
    heavy."""
    packs = [list(pack) for pack in packs]
    for _ in range(len(loads) * len(packs)):  # each makes the heaviest lighter: it ends by itself
        weights = [sum(loads[i] for i in pack) for pack in packs]
        heavy = max(range(len(packs)), key=weights.__getitem__)
        best: tuple[float, int, int, int] | None = None
        for other in range(len(packs)):
            if other == heavy:
                continue
            for a, mine in enumerate(packs[heavy]):
                for b, theirs in enumerate(packs[other]):
                    moved = loads[mine] - loads[theirs]
                    peak = max(weights[heavy] - moved, weights[other] + moved)
                    if moved > 0 and peak < weights[heavy] * (1 - 1e-12):
                        best = min(best or (peak, a, other, b), (peak, a, other, b))
        if best is None:
            break
        _, a, other, b = best
        packs[heavy][a], packs[other][b] = packs[other][b], packs[heavy][a]
    return packs


def _check(loads: Sequence[float], places: int, groups: int, nodes: int, ranks: int) -> None:
    for what, count in (("groups", groups), ("nodes", nodes), ("GPUs", ranks)):
        if count < 1:
            raise BalanceError(f"{count} {what}: at least 1 is needed")
    if any(not load >= 0 or load == float("inf") for load in loads):
        raise BalanceError("a load is a finite number that is not negative")
    if places < len(loads):
        raise BalanceError(f"{len(loads)} blocks do not fit into {places} places")
    if len(loads) % groups:
        raise BalanceError(f"{len(loads)} blocks do not fall into {groups} groups")
    if ranks % nodes:
        raise BalanceError(f"{ranks} GPUs cannot be shared by {nodes} nodes")
    if places % ranks:
        raise BalanceError(f"{places} places cannot be shared by {ranks} GPUs")
