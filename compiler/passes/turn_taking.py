"""In which order a body computes and sends, for one micro-batch and for two.

Nodes that wait for the same transfers, and that the same transfers wait for, are one piece of
work. A list scheduler gives the computing stream the piece that is ready and whose longest path to
the end is longest; transfers are started where their operands are there, and go one after the
other on a stream of their own. A body that is run layer by layer is judged by the time from one
run to the next: what the second micro-batch has in flight at the end of a run arrives while the
next run computes for the first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import networkx as nx

from compiler.ir import Graph, Node, Turn, Who
from compiler.spec_collectives import BETWEEN_RANKS
from compiler.turns import shared

TRIES = 40  # orders near the best one
SLOWER = (0.5, 1.0, 2.0)  # transfers, beside computing: loads and links differ, the order stays
RUNS = 6  # of a body one after the other, until they are alike
LIMIT = float("inf")


@dataclass(frozen=True)
class Piece:
    """Nodes that run together. ``needs`` are numbers of pieces; a transfer is one node."""

    nodes: tuple[str, ...]
    seconds: float
    sends: bool
    needs: frozenset[int]
    bytes: float = 0.0  # of what it gives, while somebody needs it


def pieces(
    graph: Graph, seconds: Mapping[str, float], size: Callable[[Node], float]
) -> list[Piece]:
    """The work of one micro-batch, in an order in which it can be done."""
    own = [n.name for n in graph if n.name not in shared(graph) and n.op != "input"]
    among = graph.nx.subgraph(own)
    sends = {n for n in own if graph[n].op in BETWEEN_RANKS}
    groups: dict[object, list[str]] = {}
    home: dict[str, object] = {}
    for name in own:
        if name in sends:
            key: object = name
        else:
            waits = frozenset(nx.ancestors(among, name) & sends)
            awaited = frozenset(nx.descendants(among, name) & sends)
            key = (waits, awaited)
        groups.setdefault(key, []).append(name)
        home[name] = key
    whole: nx.DiGraph[object] = nx.DiGraph()
    whole.add_nodes_from(groups)
    whole.add_edges_from((home[a], home[b]) for a, b in among.edges() if home[a] != home[b])
    place = {name: i for i, name in enumerate(own)}
    order = list(nx.lexicographical_topological_sort(whole, key=lambda k: place[groups[k][0]]))
    number = {key: i for i, key in enumerate(order)}
    out = []
    for key in order:
        names = groups[key]
        outside = [n for n in names if any(home.get(u) != key for u in graph.nx.successors(n))]
        out.append(
            Piece(
                tuple(names),
                sum(seconds[n] for n in names),
                names[0] in sends,
                frozenset(number[k] for k in whole.predecessors(key)),
                sum(size(graph[n]) for n in outside),
            )
        )
    return out


@dataclass(frozen=True)
class Order:
    """Pieces in the order in which they are begun: (which micro-batch, which piece). ``later`` are
    pieces of the second micro-batch that the next run of the body does; they stand there first.

    Attributes:
        seconds: from one run of the body to the next. ``peak``: bytes alive at once. ``judged``:
            what it is chosen by.
    """

    items: tuple[tuple[int, int], ...]
    later: frozenset[int]
    seconds: float
    peak: float
    judged: float = 0.0


class Scheduler:
    """Orders of one body's pieces for so many micro-batches."""

    def __init__(self, work: Sequence[Piece], parts: int):
        self.work, self.parts = work, parts

    @cached_property
    def _paths(self) -> list[float]:
        """The longest path from each piece to the end."""
        out = [0.0] * len(self.work)
        for i in reversed(range(len(self.work))):
            after = [out[j] for j, p in enumerate(self.work) if i in p.needs]
            out[i] = self.work[i].seconds + max(after, default=0.0)
        return out

    @property
    def bound(self) -> float:
        """No order of a run is shorter: all computing, or all sending."""
        sending = sum(p.seconds for p in self.work if p.sends)
        return self.parts * max(sending, sum(p.seconds for p in self.work) - sending)

    def best(self, limit: float = LIMIT) -> Order:
        """The quickest order that is found, among those that need at most ``limit`` bytes."""
        options = [frozenset[int]()] + ([self._after_last()] if self.parts > 1 else [])
        found: list[Order] = []
        for later in options:
            base = self._paths
            found.append(self._order(base, later))
            randomly = random.Random(0)
            for _ in range(TRIES if self.parts > 1 else 0):
                tried = [p * randomly.uniform(0.4, 1.6) for p in base]
                found.append(self._order(tried, later))
        fit = [o for o in found if o.peak <= limit] or [min(found, key=lambda o: o.peak)]
        least = min(o.judged for o in fit)
        return next(o for o in fit if o.judged <= least * 1.001)

    def _after_last(self) -> frozenset[int]:
        """What the second micro-batch can leave to the next run: all behind its last transfer."""
        last = max(i for i, p in enumerate(self.work) if p.sends)
        found: set[int] = set()
        for i, piece in enumerate(self.work):
            if last in piece.needs or piece.needs & found:
                found.add(i)
        return frozenset(found)

    def _order(self, priority: Sequence[float], later: frozenset[int]) -> Order:
        items = self._listed(priority, later)
        judged = sum(self.time(items, later, slower) for slower in SLOWER)
        seconds = self.time(items, later)
        return Order(tuple(items), later, seconds, self._peak(items, later), judged)

    def _listed(self, priority: Sequence[float], later: frozenset[int]) -> list[tuple[int, int]]:
        """List scheduling of one run, with the transfer that the run before left in flight."""
        left = {(w, i) for w in range(self.parts) for i in range(len(self.work))}
        end: dict[tuple[int, int], float] = {}
        now = link = 0.0
        if later:  # what is left over ends the second micro-batch's run before this one
            link = max(self.work[j].seconds for i in later for j in self.work[i].needs)
        arrives = link
        items: list[tuple[int, int]] = []
        over = {(1, i) for i in later}
        while left:
            ready = []
            for one in left:
                who, i = one
                if one in over:
                    needs = [(1, j) for j in self.work[i].needs if j in later]
                else:
                    needs = [(who, j) for j in self.work[i].needs]
                    if later and who == 1:
                        needs += over
                if all(n in end for n in needs):
                    waits = [end[n] for n in needs]
                    if one in over:
                        waits.append(arrives)
                    ready.append((one, max(waits, default=0.0)))
            sends = [r for r in ready if self.work[r[0][1]].sends]
            if sends:
                one, _ = max(sends, key=lambda r: (priority[r[0][1]], -r[0][0], -r[0][1]))
                link = max(link, now) + self.work[one[1]].seconds
                end[one] = link
            else:
                there = [r for r in ready if r[1] <= now] or [min(ready, key=lambda r: r[1])]
                one, at = max(there, key=lambda r: (priority[r[0][1]], -r[0][0], -r[0][1]))
                now = max(now, at) + self.work[one[1]].seconds
                end[one] = now
            items.append(one)
            left.remove(one)
        return items

    def time(
        self, items: Sequence[tuple[int, int]], later: frozenset[int], slower: float = 1.0
    ) -> float:
        """Seconds from one run in this order to the next, if transfers take so many times as long
        as they should."""
        marks: list[float] = []
        before: dict[tuple[int, int], float] = {}
        now = link = 0.0
        for _ in range(RUNS):
            end: dict[tuple[int, int], float] = {}
            for who, i in items:
                piece = self.work[i]
                left_over = who == 1 and i in later
                waits = []
                for j in piece.needs:
                    known = before if left_over and j not in later else end
                    waits.append(known.get((who, j), 0.0))
                if piece.sends:
                    link = max(link, now) + piece.seconds * slower
                    end[who, i] = link
                else:
                    now = max(now, *waits, 0.0) + piece.seconds
                    end[who, i] = now
            before = end
            marks.append(now)
        return (marks[-1] - marks[RUNS // 2 - 1]) / (RUNS - RUNS // 2)

    def _peak(self, items: Sequence[tuple[int, int]], later: frozenset[int]) -> float:
        """Bytes of what is alive at once, of the pieces' results."""
        last: dict[tuple[int, int], int] = {}
        for at, (who, i) in enumerate(items):
            for j in self.work[i].needs:
                last[who, j] = len(items) if who == 1 and i in later else at
        alive = peak = 0.0
        for at, (_, i) in enumerate(items):
            alive += self.work[i].bytes
            peak = max(peak, alive)
            alive -= sum(self.work[j].bytes for (w, j), end in last.items() if end == at)
        return peak


def turns(work: Sequence[Piece], order: Order) -> tuple[Turn, ...]:
    """The turns of two micro-batches, as a body holds them."""
    out: list[Turn] = []
    later: list[str] = []
    for who, i in order.items:
        if who == 1 and i in order.later:
            later += work[i].nodes
            if not any(t.who == "before" for t in out):
                out.append(Turn("before"))
            continue
        name: Who = "second" if who else "first"
        if out and out[-1].who == name:
            out[-1] = replace(out[-1], nodes=(*out[-1].nodes, *work[i].nodes))
        else:
            out.append(Turn(name, work[i].nodes))
    return (*out, *([Turn("later", tuple(later))] if later else []))
