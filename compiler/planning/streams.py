"""Two streams of a device, computing and communicating: what runs when.

Work is a graph of tasks, each on one stream. A list scheduler gives every stream that is free the
ready task whose longest path to the end is longest; several rules for that path are tried, and the
order that ends first is kept. Where communication is overlapped, kernels are launched for the
multiprocessors that it leaves, whether or not a transfer is running at that moment.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal

Stream = Literal["compute", "communicate"]
EFFORT = 60_000  # tasks that are placed while orders are tried
TURNS = 6  # times that an order is improved from its end
GOOD_ENOUGH = 1.005  # an order this close to the bound is not improved further


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
            left, or all communication.
    """

    slots: tuple[Slot, ...]
    total: float
    computing: float
    communicating: float
    bound: float

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
        possible = self.sequential - self.bound
        return (self.sequential - self.total) / possible if possible > 0 else 1.0


def bound(computing: float, communicating: float, charge: float) -> float:
    """No order is shorter. Computing goes at ``1 - charge``, unless nothing communicates."""
    return max(communicating, computing / (1 - charge) if communicating else computing)


def sequential(tasks: Sequence[Task]) -> Schedule:
    """One task after the other."""
    slots, now = [], 0.0
    for number, task in enumerate(tasks):
        slots.append(Slot(number, now, now + task.seconds))
        now += task.seconds
    return _schedule(tasks, slots, 0.0)


def overlapped(tasks: Sequence[Task], charge: float, effort: int = EFFORT) -> Schedule:
    """The best order that is found; the same for the same tasks.

    Each rule's order is improved by turns from the end and from the beginning (what ended last is
    taken first, in the opposite direction), and from orders near the best one.

    Args:
        charge: share of the multiprocessors that is kept for communication.
        effort: tasks that may be placed while orders are tried.
    """
    length = len(tasks)
    readers: list[list[int]] = [[] for _ in range(length)]
    for number, task in enumerate(tasks):
        for need in task.needs:
            readers[need].append(number)
    needs = [list(task.needs) for task in tasks]

    def path(weight: Callable[[Task], float]) -> list[float]:
        out = [0.0] * length
        for number in reversed(range(length)):
            longest = max((out[r] for r in readers[number]), default=0.0)
            out[number] = weight(tasks[number]) + longest
        return out

    communicating = sum(t.seconds for t in tasks if t.stream == "communicate")
    computing = sum(t.seconds for t in tasks) - communicating
    base = path(lambda t: t.seconds)
    if not communicating:
        return _run(tasks, needs, readers, base, 0.0)
    enough = bound(computing, communicating, charge) * GOOD_ENOUGH

    left = effort

    def improved(priority: Sequence[float]) -> Schedule:
        nonlocal left
        best = _run(tasks, needs, readers, priority, charge)
        left -= length
        for _ in range(TURNS):
            if best.total <= enough or left <= 0:
                break
            left -= 2 * length
            behind = _run(tasks, readers, needs, [s.end for s in best.slots], charge)
            again = _run(tasks, needs, readers, [s.end for s in behind.slots], charge)
            if again.total >= best.total * (1 - 1e-9):
                break
            best = again
        return best

    rules = [
        base,
        path(lambda t: t.seconds if t.stream == "communicate" else 0.0),
        path(lambda t: t.seconds if t.stream == "communicate" else 0.3 * t.seconds),
        path(lambda t: t.seconds if t.stream == "compute" else 0.3 * t.seconds),
        path(lambda t: 1.0),
    ]
    best, chosen = improved(base), base
    for rule in rules[1:]:
        if best.total <= enough or left <= 0:
            break
        schedule = improved(rule)
        if schedule.total < best.total:
            best, chosen = schedule, rule
    randomly = random.Random(0)
    for number in range(effort):
        if best.total <= enough or left <= 0:
            break
        spread = max(chosen) * (0.05, 0.15, 0.3)[number % 3]
        tried = [p + randomly.gauss(0, spread) for p in chosen]
        schedule = improved(tried)
        if schedule.total < best.total:
            best, chosen = schedule, tried
    return best


def _run(
    tasks: Sequence[Task],
    needs: Sequence[Sequence[int]],
    readers: Sequence[Sequence[int]],
    priority: Sequence[float],
    charge: float,
) -> Schedule:
    """List scheduling: whichever stream is free first takes its ready task of highest priority."""
    waiting = [len(need) for need in needs]
    queues: dict[Stream, list[tuple[float, int]]] = {"compute": [], "communicate": []}
    for number, count in enumerate(waiting):
        if count == 0:
            heappush(queues[tasks[number].stream], (-priority[number], number))
    slots: list[Slot] = [Slot(0, 0.0, 0.0)] * len(tasks)
    running: list[tuple[float, int]] = []  # by when they end
    busy: set[Stream] = set()
    now = 0.0
    while True:
        for stream, queue in queues.items():
            if stream not in busy and queue:
                _, number = heappop(queue)
                speed = 1.0 - charge if stream == "compute" else 1.0
                end = now + tasks[number].seconds / speed
                slots[number] = Slot(number, now, end)
                heappush(running, (end, number))
                busy.add(stream)
        if not running:
            return _schedule(tasks, slots, charge)
        now, number = heappop(running)
        busy.discard(tasks[number].stream)
        for reader in readers[number]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heappush(queues[tasks[reader].stream], (-priority[reader], reader))


def _schedule(tasks: Sequence[Task], slots: Iterable[Slot], charge: float) -> Schedule:
    slots = tuple(slots)
    communicating = sum(t.seconds for t in tasks if t.stream == "communicate")
    computing = sum(t.seconds for t in tasks) - communicating
    return Schedule(
        slots,
        max((s.end for s in slots), default=0.0),
        computing,
        communicating,
        bound(computing, communicating, charge),
        charge if communicating else 0.0,
    )
