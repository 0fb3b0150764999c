"""What no order of two streams beats, as far as its two longest chains say.

Two micro-batches are two chains of tasks that take turns on the streams, and each task is whole.
All else that computes (gradients of weights, shared experts) fills the gaps between them: here it
may be interrupted, and has to wait only for the last task of its chain that comes before it. Every
order of the chains' tasks, by when they start, is gone through; of those that have the same tasks
behind them, the ones that are no better in anything are left out (a job shop of two jobs is a
shortest path: Akers 1956). That leaves things out, but adds nothing: no order is shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

MOST = 40_000  # beginnings of orders that are looked at


class Begun(NamedTuple):
    """The beginning of an order: when the last task of each chain ends; for how long at least the
    first stream has nothing to do; the chains' turns, the last one first, as nested pairs."""

    end: tuple[float, float]
    idle: float
    turns: Any


@dataclass(frozen=True)
class Chain:
    """Tasks one after the other, with their streams and seconds. After the first n of them, so many
    seconds are left (``tail``), on the second stream (``sent``), and have become possible on the
    first (``possible``): their own and what fills gaps."""

    tasks: list[int]
    lanes: list[int]
    seconds: list[float]
    tail: list[float]
    sent: list[float]
    possible: list[float]


def least_of_chains(
    lanes: Sequence[int], seconds: Sequence[float], needs: Sequence[Sequence[int]], best: float
) -> tuple[float, list[int]]:
    """What no order beats, and the chains' tasks in the order that takes so long.

    Args:
        lanes: the stream of each task, 0 or 1. ``needs``: tasks before it in the list.
        best: what a known order takes. If none is shorter, this is returned, and no order.

    Returns:
        0 and no order where there are no two chains, or too many orders.
    """
    chains = _chains(lanes, seconds, needs)
    if len(chains) < 2:
        return 0.0, []
    one, two = chains
    whole = sum(s for s, lane in zip(seconds, lanes, strict=True) if lane == 0)
    free = whole - one.possible[-1] - two.possible[-1]  # what waits for neither
    least, turns = best, None
    looked = 0
    row: list[list[Begun]] = [[] for _ in range(len(two.tasks) + 1)]
    row[0] = [Begun((0.0, 0.0), 0.0, None)]
    for i in range(len(one.tasks) + 1):
        below: list[list[Begun]] = [[] for _ in row]
        for j in range(len(two.tasks) + 1):
            begun = _unbeaten(row[j])
            looked += len(begun)
            if looked > MOST:
                return 0.0, []
            possible = free + one.possible[i] + two.possible[j]
            for so_far in begun:
                for turn in (0, 1):
                    chain, n = chains[turn], (i, j)[turn]
                    if n == len(chain.tasks):
                        continue
                    start = _start(so_far, chains, (i, j), turn)
                    end = (
                        start + chain.seconds[n] if turn == 0 else so_far.end[0],
                        start + chain.seconds[n] if turn == 1 else so_far.end[1],
                    )
                    idle = so_far.idle
                    if chain.lanes[n] == 0:
                        idle = max(idle, start - possible)
                    left = (one.tail[i + (turn == 0)], two.tail[j + (turn == 1)])
                    total = max(
                        end[0] + left[0],
                        end[1] + left[1],
                        whole + idle,
                        start + one.sent[i] + two.sent[j],
                    )
                    if total < least:
                        done = Begun(end, idle, (turn, so_far.turns))
                        (below[j] if turn == 0 else row[j + 1]).append(done)
                        if not any(left):
                            least, turns = total, done.turns
        row = below
    return least, _order(turns, chains)


def _start(so_far: Begun, chains: Sequence[Chain], done: tuple[int, int], turn: int) -> float:
    """When a chain's next task starts: after its last one, after the other chain's if that is on
    the same stream, and after both have started, as orders are by that."""
    chain, n = chains[turn], done[turn]
    other, m = chains[1 - turn], done[1 - turn]
    start = so_far.end[turn]
    if m:
        end = so_far.end[1 - turn]
        alike = other.lanes[m - 1] == chain.lanes[n]
        start = max(start, end if alike else end - other.seconds[m - 1])
    return start


def _unbeaten(begun: list[Begun]) -> list[Begun]:
    """Those that no other is at least as good as in everything."""
    out: list[Begun] = []
    for one in sorted(begun, key=lambda b: (b.end, b.idle)):
        if not any(o.end[1] <= one.end[1] and o.idle <= one.idle for o in out):
            out.append(one)
    return out


def _order(turns: Any, chains: Sequence[Chain]) -> list[int]:
    taken: list[int] = []
    while turns is not None:
        taken.append(turns[0])
        turns = turns[1]
    left = [iter(chain.tasks) for chain in chains]
    return [next(left[turn]) for turn in reversed(taken)]


def _chains(
    lanes: Sequence[int], seconds: Sequence[float], needs: Sequence[Sequence[int]]
) -> list[Chain]:
    """The longest path of each of the two parts of the graph, among those that no need connects,
    that have the longest."""
    count = len(lanes)
    part = _parts(needs)
    longest, behind = list(seconds), [-1] * count
    ends: dict[int, int] = {}
    for n in range(count):
        if needs[n]:
            behind[n] = max(needs[n], key=lambda need: longest[need])
            longest[n] += longest[behind[n]]
        if longest[n] > longest[ends.setdefault(part[n], n)]:
            ends[part[n]] = n
    out: list[Chain] = []
    for end in sorted(ends.values(), key=lambda n: -longest[n])[:2]:
        path = [end]
        while behind[path[-1]] >= 0:
            path.append(behind[path[-1]])
        path.reverse()
        own = [n for n in range(count) if part[n] == part[end]]
        out.append(_chain(path, own, lanes, seconds, needs))
    return out


def _parts(needs: Sequence[Sequence[int]]) -> list[int]:
    """Of each task, the lowest number that needs connect it with."""
    part = list(range(len(needs)))
    for _ in part:
        before = list(part)
        for n, own in enumerate(needs):
            low = min(part[m] for m in (n, *own))
            for m in (n, *own):
                part[m] = low
        if part == before:
            break
    return part


def _chain(
    path: list[int],
    part: list[int],
    lanes: Sequence[int],
    seconds: Sequence[float],
    needs: Sequence[Sequence[int]],
) -> Chain:
    """A path as a chain, with what of its part becomes possible along it."""
    place = {n: i + 1 for i, n in enumerate(path)}
    after: dict[int, int] = {}  # how many of the path come before a task at least
    possible = [0.0] * (len(path) + 1)
    for n in part:
        after[n] = place.get(n, max((after[m] for m in needs[n]), default=0))
        possible[after[n]] += seconds[n] if lanes[n] == 0 else 0.0
    tail, sent = [0.0], [0.0]
    for n in reversed(path):
        tail.append(tail[-1] + seconds[n])
        sent.append(sent[-1] + (seconds[n] if lanes[n] else 0.0))
    return Chain(
        path,
        [lanes[n] for n in path],
        [seconds[n] for n in path],
        tail[::-1],
        sent[::-1],
        list(accumulate(possible)),
    )
