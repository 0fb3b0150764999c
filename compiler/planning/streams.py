"""Two streams of a device, computing and communicating: what runs when.

Work is a graph of tasks, each on one stream. A list scheduler takes, of the stream that can end a
task first, the task whose longest path to the end is longest; several rules for that path are
tried, with and without patience (a stream may wait for a task that is worth more than what is
ready), and the order that the two longest chains would have alone (``chains.py``); the order that
ends first is kept. Where communication is overlapped, kernels are
launched for the multiprocessors that it leaves, whether or not a transfer is running at that
moment.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from typing import Literal

from compiler.planning.chains import least_of_chains

Stream = Literal["compute", "communicate"]
STREAMS: tuple[Stream, ...] = ("compute", "communicate")
EFFORT = 120_000  # tasks that are placed while orders are tried
PATIENCE = (0.0, 0.5, 1.0)  # of the time until the stream could have ended a task
TURNS = 6  # times that an order is improved from its end
GOOD_ENOUGH = 1.002  # an order this close to the least is not improved further
RULES = ((1.0, 1.0), (0.0, 1.0), (0.3, 1.0), (1.0, 0.3), (0.0, 0.0))  # what a path weighs
ABOVE = (0.0, 0.5, 1.0)  # how much the order of the two chains counts, in longest paths
KEPT = 4  # orders whose neighbours are tried
SPREADS = (0.02, 0.05, 0.15, 0.3)


@dataclass(frozen=True)
class Task:
    """Work on one stream; ``needs`` are numbers of tasks before it in the list."""

    name: str
    stream: Stream
    seconds: float
    needs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Slot:
    """A task as it ran."""

    task: int
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """An order of tasks and its times.

    Attributes:
        total: seconds until the last task is done.
        computing, communicating: seconds of the tasks on each stream, nothing overlapped.
        bound: the least that any order can take: all computing on the multiprocessors that are
            left, or all communication. ``least``: what any order takes that keeps to what needs
            what, since the first and the last tasks have nothing beside them; no less.
    """

    slots: tuple[Slot, ...]
    total: float
    computing: float
    communicating: float
    bound: float
    least: float
    charge: float = 0.0

    @property
    def exposed(self) -> float:
        """Seconds during which communication is waited for."""
        return max(0.0, self.total - self.computing / (1 - self.charge))

    @property
    def sequential(self) -> float:
        return self.computing + self.communicating

    @property
    def hidden(self) -> float:
        """(sequential - total) / (sequential - bound): how much of what can be hidden is."""
        return self._hidden(self.total)

    @property
    def reachable(self) -> float:
        """The same of an order that takes ``least``: no order hides more."""
        return self._hidden(self.least)

    def _hidden(self, total: float) -> float:
        possible = self.sequential - self.bound
        return (self.sequential - total) / possible if possible > 0 else 1.0

    def __str__(self) -> str:
        """How much is hidden, and how much can be where that is less than all."""
        told = f"{self.hidden:.1%} hidden"
        if self.reachable < 0.9995:
            told += f" (no order hides more than {self.reachable:.1%})"
        return told


def bound(computing: float, communicating: float, charge: float) -> float:
    """No order is shorter. Computing goes at ``1 - charge``, unless nothing communicates."""
    return max(communicating, computing / (1 - charge) if communicating else computing)


def sequential(tasks: Sequence[Task]) -> Schedule:
    """One task after the other."""
    slots, now = [], 0.0
    for number, task in enumerate(tasks):
        slots.append(Slot(number, now, now + task.seconds))
        now += task.seconds
    return _schedule(tasks, slots, 0.0, 0.0)


def overlapped(tasks: Sequence[Task], charge: float, effort: int = EFFORT) -> Schedule:
    """The best order that is found; the same for the same tasks.

    Each rule's order is improved by turns from the end and from the beginning (what ended last is
    taken first, in the opposite direction), and from orders near the best ones.

    Args:
        charge: share of the multiprocessors that is kept for communication.
        effort: tasks that may be placed while orders are tried.
    """
    if all(task.stream == "compute" for task in tasks if task.seconds):
        charge = 0.0
    work = _Work(tasks, charge)
    ends, least = _searched(work, effort)
    return _schedule(tasks, work.slots(ends), charge, least)


class _Work:
    """Tasks as lists, for a scheduler that runs often."""

    def __init__(self, tasks: Sequence[Task], charge: float):
        self.count = len(tasks)
        self.lane = [STREAMS.index(task.stream) for task in tasks]
        speed = (1.0 - charge, 1.0)
        self.seconds = [t.seconds / speed[n] for t, n in zip(tasks, self.lane, strict=True)]
        self.needs = [list(task.needs) for task in tasks]
        self.readers: list[list[int]] = [[] for _ in tasks]
        for number, task in enumerate(tasks):
            for need in task.needs:
                self.readers[need].append(number)

    def slots(self, ends: Sequence[float]) -> list[Slot]:
        """The tasks as they ran. An end less its seconds can lie a rounding before the end of the
        task before it: each starts no sooner than its stream is free."""
        free = [0.0, 0.0]
        out: dict[int, Slot] = {}
        for number in sorted(range(self.count), key=lambda n: (ends[n], ends[n] - self.seconds[n])):
            lane, end = self.lane[number], ends[number]
            out[number] = Slot(number, max(free[lane], end - self.seconds[number]), end)
            free[lane] = end
        return [out[number] for number in range(self.count)]

    @cached_property
    def least(self) -> float:
        """The shortest that any order can be, as far as each stream alone says."""
        tails = self.path(1.0, 1.0)
        return max(self._least(lane, tails) for lane in range(len(STREAMS)))

    def chains(self, best: float) -> tuple[float, list[int]]:
        """The same as far as the two longest chains say, and their order; see ``chains.py``."""
        return least_of_chains(self.lane, self.seconds, self.needs, best)

    def path(self, computing: float, communicating: float) -> list[float]:
        """Of each task, the longest path from its start to the end, by these weights; where both
        are zero, in tasks."""
        weights = (computing, communicating)
        out = [0.0] * self.count
        for number in reversed(range(self.count)):
            longest = max((out[r] for r in self.readers[number]), default=0.0)
            own = self.seconds[number] * weights[self.lane[number]] if any(weights) else 1.0
            out[number] = own + longest
        return out

    def _least(self, lane: int, tails: Sequence[float]) -> float:
        """When everything is done at least, going by one stream: each of its tasks comes when what
        it needs can be done, and is followed by what comes after it; it may be interrupted for one
        with a longer way to go (Jackson's preemptive schedule)."""
        heads = [0.0] * self.count
        for number in range(self.count):
            ready = (heads[n] + self.seconds[n] for n in self.needs[number])
            heads[number] = max(ready, default=0.0)
        own = sorted((heads[n], n) for n in range(self.count) if self.lane[n] == lane)
        left = {n: self.seconds[n] for _, n in own}
        waiting: list[tuple[float, int]] = []
        now = least = 0.0
        position = 0
        while position < len(own) or waiting:
            if not waiting:
                now = max(now, own[position][0])
            while position < len(own) and own[position][0] <= now:
                number = own[position][1]
                heappush(waiting, (self.seconds[number] - tails[number], number))
                position += 1
            after, number = waiting[0]
            until = own[position][0] if position < len(own) else float("inf")
            if now + left[number] <= until:
                now += left[number]
                heappop(waiting)
                least = max(least, now - after)
            else:
                left[number] -= until - now
                now = until
        return least

    def run(self, priority: Sequence[float], patience: float, back: bool = False) -> list[float]:
        """When each task ends; ``back`` from the end to the beginning."""
        needs, readers = (self.readers, self.needs) if back else (self.needs, self.readers)
        if patience:
            return self._patiently(priority, patience, needs, readers)
        seconds, lanes = self.seconds, self.lane
        waiting = [len(need) for need in needs]
        ends = [0.0] * self.count
        queues: tuple[list[tuple[float, int]], list[tuple[float, int]]] = ([], [])
        for number, count in enumerate(waiting):
            if count == 0:
                heappush(queues[lanes[number]], (-priority[number], number))
        running: list[tuple[float, int]] = []  # by when they end
        busy = [False, False]
        now = 0.0
        while True:
            for lane in (0, 1):
                if not busy[lane] and queues[lane]:
                    _, number = heappop(queues[lane])
                    ends[number] = now + seconds[number]
                    heappush(running, (ends[number], number))
                    busy[lane] = True
            if not running:
                return ends
            now, number = heappop(running)
            busy[lanes[number]] = False
            for reader in readers[number]:
                waiting[reader] -= 1
                if waiting[reader] == 0:
                    heappush(queues[lanes[reader]], (-priority[reader], reader))

    def _patiently(
        self,
        priority: Sequence[float],
        patience: float,
        needs: Sequence[Sequence[int]],
        readers: Sequence[Sequence[int]],
    ) -> list[float]:
        """As ``run``, but a stream may wait for a task that is not ready yet (Giffler and Thompson
        1960): for as long as none that is could have ended, times ``patience``."""
        seconds, lanes = self.seconds, self.lane
        waiting = [len(need) for need in needs]
        since, ends = [0.0] * self.count, [0.0] * self.count
        known: tuple[list[int], list[int]] = ([], [])  # tasks whose start is known
        free = [0.0, 0.0]
        for number, count in enumerate(waiting):
            if count == 0:
                known[lanes[number]].append(number)
        for _ in range(self.count):
            lane, start, first = 0, 0.0, float("inf")
            for one in (0, 1):
                soonest = float("inf")
                for number in known[one]:
                    begin = since[number] if since[number] > free[one] else free[one]
                    soonest = begin if begin < soonest else soonest
                    if begin + seconds[number] < first:
                        lane, first = one, begin + seconds[number]
                start = soonest if lane == one else start
            limit = start + patience * (first - start)
            chosen, most = -1, float("-inf")
            for number in known[lane]:
                if (since[number] <= start or since[number] < limit) and priority[number] > most:
                    chosen, most = number, priority[number]
            begin = since[chosen] if since[chosen] > free[lane] else free[lane]
            end = free[lane] = ends[chosen] = begin + seconds[chosen]
            known[lane].remove(chosen)
            for reader in readers[chosen]:
                since[reader] = end if end > since[reader] else since[reader]
                waiting[reader] -= 1
                if waiting[reader] == 0:
                    known[lanes[reader]].append(reader)
        return ends


Tried = tuple[float, list[float], float, list[float]]  # its end, priorities, patience, all ends


def _searched(work: _Work, effort: int) -> tuple[list[float], float]:
    """The ends of the best order that is found, and what no order beats."""
    least = work.least if effort else 0.0
    left = effort

    def enough() -> float:
        return least * GOOD_ENOUGH

    def improved(priority: list[float], patience: float) -> Tried:
        nonlocal left
        ends = work.run(priority, patience)
        left -= work.count
        for _ in range(TURNS):
            if max(ends, default=0.0) <= enough() or left <= 0:
                break
            left -= 2 * work.count
            again = work.run(work.run(ends, patience, back=True), patience)
            if max(again) >= max(ends) * (1 - 1e-9):
                break
            ends = again
        return max(ends, default=0.0), priority, patience, ends

    best: list[Tried] = []
    for patience in PATIENCE:
        for weights in RULES:
            if best and (best[0][0] <= enough() or left <= 0):
                break
            best.append(improved(work.path(*weights), patience))
            best.sort(key=lambda tried: tried[0])
    if best[0][0] > enough() and effort:
        bound, order = work.chains(best[0][0])
        least = max(least, bound)
        for above in ABOVE if order else ():
            best += [improved(_led(work, order, above), patience) for patience in PATIENCE]
        best.sort(key=lambda tried: tried[0])
    del best[KEPT:]
    randomly = random.Random(0)
    while best[0][0] > enough() and left > 0:
        place = randomly.randrange(len(best))
        end, priority, _, _ = best[place]
        spread = max(priority) * randomly.choice(SPREADS)
        near = [p + randomly.gauss(0, spread) for p in priority]
        tried = improved(near, randomly.choice(PATIENCE))
        if tried[0] < end:
            best[place] = tried
            best.sort(key=lambda one: one[0])
    return best[0][3], least


def _led(work: _Work, order: Sequence[int], above: float) -> list[float]:
    """Paths to the end, but that the chains' tasks come in this order.

    Args:
        above: how far before all others, in longest paths.
    """
    out = work.path(1.0, 1.0)
    longest = max(out)
    for place, number in enumerate(order):
        out[number] = longest * (above + 1 - place / len(order))
    return out


def _schedule(
    tasks: Sequence[Task], slots: Iterable[Slot], charge: float, least: float
) -> Schedule:
    slots = tuple(slots)
    communicating = sum(t.seconds for t in tasks if t.stream == "communicate")
    computing = sum(t.seconds for t in tasks) - communicating
    total = max((s.end for s in slots), default=0.0)
    least_of_all = bound(computing, communicating, charge)
    return Schedule(
        slots,
        total,
        computing,
        communicating,
        least_of_all,
        max(least, least_of_all),
        charge if communicating else 0.0,
    )
