"""A program of ranks under the reference interpreter: one thread for each rank of a small mesh.

``--verify`` holds the ``shard`` pass against the program before it: each rank has its slices of the
same weights and, along the axes of the batch, sequences of its own. This module imports torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from compiler.interpret import Interpreter, parameters, random_weights
from compiler.ir import Program
from compiler.shards import Shard, runs, shards

T = TypeVar("T")


class World:
    """Where threads meet: each leaves a value, and all see all of them."""

    def __init__(self, sizes: Mapping[str, int]):
        self.sizes = dict(sizes)
        self.ranks = prod(self.sizes.values())
        self.slots: list[Any] = [None] * self.ranks
        self.failed = False
        self._meetings: dict[tuple[int, ...], threading.Barrier] = {}
        self._lock = threading.Lock()

    def meeting(self, ranks: tuple[int, ...]) -> threading.Barrier:
        """Where these ranks meet. Others may meet more often: blocks that a token picked talk to
        ranks that have the same token."""
        with self._lock:
            if ranks not in self._meetings:
                self._meetings[ranks] = threading.Barrier(len(ranks), timeout=120)
                if self.failed:
                    self._meetings[ranks].abort()
            return self._meetings[ranks]

    def abort(self) -> None:
        with self._lock:
            self.failed = True
            for meeting in self._meetings.values():
                meeting.abort()

    def members(self) -> list[Member]:
        places = product(*(range(size) for size in self.sizes.values()))
        return [
            Member(self, number, dict(zip(self.sizes, place, strict=True)))
            for number, place in enumerate(places)
        ]


class Member:
    """One rank; ``at`` is its coordinate along each axis."""

    def __init__(self, world: World, number: int, at: Mapping[str, int]):
        self.world, self.number, self.at = world, number, at

    def ways(self, axes: Iterable[str]) -> int:
        return prod(self.world.sizes[axis] for axis in axes)

    def index(self, axes: Iterable[str]) -> int:
        place = 0
        for axis in axes:
            place = place * self.world.sizes[axis] + self.at[axis]
        return place

    def exchange(self, axes: tuple[str, ...], value: T) -> list[T]:
        """The values of the ranks along some axes, in their order. All of them come here."""
        world = self.world
        ranks = []
        for place in product(*(range(world.sizes[axis]) for axis in axes)):
            at = {**self.at, **dict(zip(axes, place, strict=True))}
            number = 0
            for axis, size in world.sizes.items():
                number = number * size + at[axis]
            ranks.append(number)
        meeting = world.meeting(tuple(sorted(ranks)))
        world.slots[self.number] = value
        meeting.wait()
        found: list[T] = [world.slots[number] for number in ranks]
        meeting.wait()
        return found


def run_all(jobs: list[Callable[[], T]], world: World) -> list[T]:
    """Each rank's job in a thread of its own.

    Raises:
        Exception: the first that a job raised.
    """
    results: dict[int, T] = {}
    raised: list[BaseException] = []

    def work(number: int, job: Callable[[], T]) -> None:
        try:
            results[number] = job()
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            raised.append(error)
            world.abort()

    threads = [threading.Thread(target=work, args=item) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    return [results[number] for number in range(len(jobs))]


def interpreters(before: Program, after: Program, seed: int) -> tuple[list[Any], list[Any], World]:
    """An interpreter of each rank for two small programs, the second of which is of ranks, with
    the same weights; of a program without a mesh, the same one for all ranks."""
    sizes = {axis: after.sizes[f"ranks.{axis}"] for axis in after.mesh}
    world = World(sizes)
    members = world.members()
    weights = random_weights(before, seed, torch.float64)
    old, new = [], []
    for member in members:
        own = weights if before.mesh else own_weights(before, after, weights, member)
        one = Interpreter(before, weights, torch.float64)
        other = Interpreter(after, own, torch.float64)
        one.member = member if before.mesh else None
        other.member = member
        old.append(one)
        new.append(other)
    return old, new, world


def own_weights(
    whole: Program, local: Program, weights: Mapping[str, Tensor], member: Member
) -> dict[str, Tensor]:
    """A rank's slices of the weights, by the paths that they have there."""
    found = {(p.path, p.ranges): shard for p, shard in shards(whole, local)}
    by_path: dict[str, Shard] = {}
    for (path, ranges), shard in found.items():
        for numbers in product(*ranges):
            by_path[path.format(*numbers)] = shard
    own = {}
    for path, _ in parameters(local):
        source = _source(path, found, member)
        tensor, shard = weights[source], by_path[source]
        for axis, dim in enumerate(shard.dims):
            stretches = runs(dim, lambda axes: (member.index(axes), member.ways(axes)))
            tensor = torch.cat([tensor.narrow(axis, b, e - b) for b, e in stretches], axis)
        own[path] = tensor
    return own


def _source(path: str, found: Mapping[Any, Shard], member: Member) -> str:
    """The whole program's path of a tensor: a dealt array's blocks have other numbers there."""
    numbers = [int(part.split("]")[0]) for part in path.split("[")[1:]]
    for (pattern, ranges), shard in found.items():
        if len(ranges) != len(numbers) or pattern.format(*numbers) != path:
            continue
        out = []
        for at, number in enumerate(numbers):
            array = shard.arrays[at] if shard.arrays else None
            if array is not None:
                count = len(ranges[at])
                each = (count + array.redundant) // member.ways(array.axes)
                place = member.index(array.axes) * each + number - ranges[at].start
                number = ranges[at].start + (place if place < count else (place - count) % count)
            out.append(number)
        if all(number in own for number, own in zip(out, ranges, strict=True)):
            return pattern.format(*out)
    raise KeyError(path)
