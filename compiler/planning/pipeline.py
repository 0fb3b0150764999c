"""Pipeline schedules, simulated event by event.

A schedule is one list of chunks for each rank, in the order that the rank runs them; the simulation
starts each as soon as its rank is free and what it needs has been sent. Where a bubble comes from
is thereby not assumed but seen. Chunks are

- ``F``: forward; ``B``: the whole backward; ``I``: its part for the inputs only; ``W``: a weight
  part that an ``I`` left; ``FI`` (a pair): a forward and a whole backward chunk of two
  micro-batches that go in opposite directions, overlapped with each other.

Sources: 1F1B, arXiv:2104.04473; ZB1P (ZB-H1), arXiv:2401.10241; DualPipe, arXiv:2412.19437, section
3.2.1, and the repository of its authors, 2025.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["F", "B", "I", "W"]


@dataclass(frozen=True)
class Chunk:
    """Part of a micro-batch on one stage. ``direction`` 1 runs the stages from the last rank on."""

    kind: Kind
    direction: int
    number: int  # of the micro-batch, within its direction


# What a rank runs next: one chunk, or a pair: a forward chunk overlapped with a whole backward one.
Turn = tuple[Chunk, ...]


@dataclass(frozen=True)
class Times:
    """Durations of one stage's chunks, in seconds. The whole backward is ``backward``, its part for
    the inputs alone ``inputs``; ``memory`` is what a forward chunk leaves behind, in bytes."""

    forward: float
    backward: float
    inputs: float
    weight: float
    memory: float = 0.0


@dataclass(frozen=True)
class Event:
    """A turn of a rank, as it ran."""

    rank: int
    turn: Turn
    start: float
    end: float

    @property
    def kind(self) -> str:
        return "pair" if len(self.turn) > 1 else self.turn[0].kind


@dataclass
class Run:
    """A simulated step. ``end`` is when the last rank is done."""

    events: list[Event]
    end: float
    peaks: list[float] = field(default_factory=list)  # bytes of activations, by rank
    flight: list[int] = field(default_factory=list)  # chunks in flight at most, by rank

    def busy(self, rank: int) -> float:
        return sum(e.end - e.start for e in self.events if e.rank == rank)

    def bubble(self, rank: int) -> float:
        """How long a rank waits in all."""
        return self.end - self.busy(rank)

    def parts(self, ranks: int) -> dict[str, float]:
        """Mean seconds of a rank by kind of turn (F, B, I, W, pair), and its bubble."""
        out = dict.fromkeys(("F", "B", "I", "W", "pair"), 0.0)
        for event in self.events:
            out[event.kind] += (event.end - event.start) / ranks
        out["bubble"] = self.end - sum(out.values())
        return out


# -- the schedules ---------------------------------------------------------------------------------


def one_f_one_b(ranks: int, micro_batches: int) -> list[list[Turn]]:
    """1F1B: a rank runs as many forwards ahead as ranks come after it, then one each in turn."""
    out: list[list[Turn]] = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        turns: list[Turn] = [(Chunk("F", 0, i),) for i in range(ahead)]
        for i in range(micro_batches):
            if ahead + i < micro_batches:
                turns.append((Chunk("F", 0, ahead + i),))
            turns.append((Chunk("B", 0, i),))
        out.append(turns)
    return out


def zb1p(ranks: int, micro_batches: int) -> list[list[Turn]]:
    """ZB1P: 1F1B whose weight parts come later: the rank numbered r defers r of them, so that the
    ranks before it get their gradients earlier, and runs them where it would wait."""
    out: list[list[Turn]] = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        turns: list[Turn] = [(Chunk("F", 0, i),) for i in range(ahead)]
        weights = 0
        for i in range(micro_batches):
            if ahead + i < micro_batches:
                turns.append((Chunk("F", 0, ahead + i),))
            turns.append((Chunk("I", 0, i),))
            if i >= rank:
                turns.append((Chunk("W", 0, weights),))
                weights += 1
        turns += [(Chunk("W", 0, i),) for i in range(weights, micro_batches)]
        out.append(turns)
    return out


def dualpipe(ranks: int, micro_batches: int) -> list[list[Turn]]:
    """DualPipe: micro-batches enter at both ends, half of them at each; where a rank has one of
    either direction, a forward and a backward chunk run as a pair. (The authors' code runs the
    first pair of the ranks in the middle one after the other, which the formula does not.)

    Args:
        ranks: even.
        micro_batches: of both directions together; even, at least twice the ranks.
    """
    if ranks % 2 or micro_batches % 2 or micro_batches < 2 * ranks:
        raise ValueError("ranks and micro-batches are even, and twice as many micro-batches")
    return [_Dual(rank, ranks, micro_batches // 2).turns() for rank in range(ranks)]


class _Dual:
    """The turns of one rank of DualPipe. ``near`` micro-batches entered at the end of the pipeline
    that is closer to this rank, ``far`` ones at the other."""

    def __init__(self, rank: int, ranks: int, each: int):
        self.ranks, self.half, self.each = ranks, ranks // 2, each
        self.near = 0 if rank < self.half else 1
        self.depth = min(rank, ranks - 1 - rank)  # 0 at the ends
        self.out: list[Turn] = []
        self.done: dict[tuple[str, int], int] = {}
        self.left: deque[Chunk] = deque()  # weight parts that have not run

    def take(self, kind: Kind, side: int) -> Chunk:
        """The next chunk of a side (0 near, 1 far). An input part leaves its weight part."""
        direction = self.near ^ side
        key = ("F" if kind == "F" else "B", direction)
        number = self.done.get(key, 0)
        self.done[key] = number + 1
        if kind == "I":
            self.left.append(Chunk("W", direction, number))
        return Chunk(kind, direction, number)

    def run(self, kind: Kind, side: int) -> None:
        self.out.append((self.take(kind, side),))

    def pair(self, forward: int, backward: int) -> None:
        self.out.append((self.take("F", forward), self.take("B", backward)))

    def weight(self) -> None:
        self.out.append((self.left.popleft(),))

    def turns(self) -> list[Turn]:
        away = self.half - self.depth - 1  # ranks between this one and the middle
        for _ in range(2 * away):
            self.run("F", 0)
        for _ in range(self.depth + 1):
            self.run("F", 0)
            self.run("F", 1)
        for _ in range(away):
            self.run("I", 1)
            self.weight()
            self.run("F", 1)
        for _ in range(self.each - self.ranks + self.depth + 1):
            self.pair(0, 1)
            self.pair(1, 0)
        for _ in range(away):
            self.run("B", 1)
            self.pair(1, 0)
        split = False
        for i in range(self.depth + 1):
            if i == (self.depth + 1) // 2 and self.depth % 2:
                split = True
            self.run("I" if split else "B", 1)
            if i == (self.depth + 1) // 2 and not self.depth % 2:
                split = True
            self.run("I" if split else "B", 0)
        for _ in range(away):
            self.weight()
            self.run("I", 0)
        while self.left:
            self.weight()
        return self.out


SCHEDULES: Mapping[str, Callable[[int, int], list[list[Turn]]]] = {
    "1f1b": one_f_one_b,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
}


# -- the simulation --------------------------------------------------------------------------------


def simulate(
    schedule: Sequence[Sequence[Turn]],
    times: Sequence[Times],
    pair: Callable[[int, int], float] | None = None,
    send: float = 0.0,
) -> Run:
    """Run a schedule.

    Args:
        schedule: the turns of each rank.
        times: of each stage. Direction 0 runs stage r on rank r, direction 1 the other way round.
        pair: seconds of a pair, by the stage of its forward and of its backward chunk; both after
            each other unless given.
        send: seconds from the end of a chunk until the next rank has what it sent.

    Raises:
        ValueError: the schedule waits for something that never comes.
    """
    ranks = len(schedule)
    todo = [deque(turns) for turns in schedule]
    free, finished = [0.0] * ranks, dict[tuple[str, int, int, int], float]()
    events: list[Event] = []

    def stage(rank: int, chunk: Chunk) -> int:
        return ranks - 1 - rank if chunk.direction else rank

    def ready(rank: int, chunk: Chunk) -> float | None:
        """When a chunk's input is there; None if it has not been computed."""
        at, last = stage(rank, chunk), ranks - 1
        if chunk.kind == "W":
            return 0.0  # its input part stands before it in the same list
        if chunk.kind == "F":
            if at == 0:
                return 0.0
            done = finished.get(("F", chunk.direction, chunk.number, at - 1))
        elif at == last:
            return finished.get(("F", chunk.direction, chunk.number, last))
        else:
            done = finished.get(("B", chunk.direction, chunk.number, at + 1))
        return None if done is None else done + send

    alone = [
        {"F": t.forward, "B": t.backward, "I": t.inputs, "W": t.weight} for t in times
    ]  # by stage and kind

    def duration(rank: int, turn: Turn) -> float:
        if len(turn) > 1 and pair is not None:
            return pair(stage(rank, turn[0]), stage(rank, turn[1]))
        return sum(alone[stage(rank, chunk)][chunk.kind] for chunk in turn)

    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while todo[rank]:
                turn = todo[rank][0]
                when = [ready(rank, chunk) for chunk in turn]
                known = [w for w in when if w is not None]
                if len(known) < len(when):
                    break
                start = max([free[rank], *known])
                end = free[rank] = start + duration(rank, turn)
                for chunk in turn:
                    if chunk.kind != "W":
                        kind = "F" if chunk.kind == "F" else "B"
                        finished[kind, chunk.direction, chunk.number, stage(rank, chunk)] = end
                events.append(Event(rank, turn, start, end))
                todo[rank].popleft()
                moved = True
    if any(todo):
        raise ValueError("the schedule waits for itself")
    run = Run(events, max(free))
    if any(t.memory for t in times):
        _measure_memory(run, ranks, times, stage)
    return run


def _measure_memory(
    run: Run, ranks: int, times: Sequence[Times], stage: Callable[[int, Chunk], int]
) -> None:
    """What is kept for the backward pass: from a forward chunk's start to the end of its last
    backward part."""
    all_changes: list[list[tuple[float, int, float]]] = [[] for _ in range(ranks)]
    for event in run.events:
        for chunk in event.turn:
            bytes = times[stage(event.rank, chunk)].memory
            if chunk.kind == "F":
                all_changes[event.rank].append((event.start, 1, bytes))
            elif chunk.kind in ("B", "W"):
                all_changes[event.rank].append((event.end, -1, -bytes))
    for changes in all_changes:
        held = most = 0.0
        count = most_chunks = 0
        for _, number, bytes in sorted(changes):
            held, count = held + bytes, count + number
            most, most_chunks = max(most, held), max(most_chunks, count)
        run.peaks.append(most)
        run.flight.append(most_chunks)
