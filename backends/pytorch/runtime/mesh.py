"""The ranks of a deployment in a grid, and what they do together.

An emitted model names its mesh once, ``MESH = Mesh({"dp": 2, "ep": 4})``; loading it connects
the mesh to the processes of ``torch.distributed``. Ranks are numbered row-major: neighbours along
the last axis have neighbouring numbers. Every method is called by all ranks along its axes, with
tensors of one shape; ``traffic`` counts what a rank has sent to others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from backends.pytorch.runtime.routing import Placement, Route, Routing, Sent
from backends.pytorch.runtime.streams import Pending, Stream
from compiler.errors import UserError

T = TypeVar("T")


class ConnectionLost(UserError):
    """What ranks do together has failed on this one, most likely for another one's sake."""


@contextmanager
def connected() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConnectionLost(f"a connection to another rank was lost: {first}") from error


REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass
class Group:
    """The ranks along some axes, in the order of the axes: ``ranks[0]`` has coordinate 0.

    Attributes:
        index: this rank's place among them.
        sent: bytes that this rank sent to the others, by operation.
    """

    ranks: list[int]
    index: int
    handle: dist.ProcessGroup | None
    sent: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def _places(self) -> list[int]:
        """Of each process of the group as torch numbers them, ascending, its place here."""
        return [self.ranks.index(rank) for rank in sorted(self.ranks)]

    def all_to_all(
        self, rows: Tensor, to: list[int], come: list[int], what: str = "dispatch"
    ) -> Tensor:
        """Rows sent to each rank of the group, ``to[i]`` of them to rank i one after the other;
        returns those that come, ``come[i]`` from rank i."""
        width = rows[:1].numel() * rows.element_size() if rows.numel() else 0
        self.sent[what] += (sum(to) - to[self.index]) * width
        if self.handle is None:
            return rows
        if rows.device.type == "cpu":
            return self._exchanged(rows, to, come)
        places = self._places()
        if places != sorted(places):
            rows = torch.cat([rows.split(to)[i] for i in places])
        out = rows.new_empty(sum(come), *rows.shape[1:])
        # As bytes: not every number format is known.
        given = [come[i] for i in places], [to[i] for i in places]
        with connected():
            dist.all_to_all_single(
                _bytes(out), _bytes(rows.contiguous()), *given, group=self.handle
            )
        if places != sorted(places):
            parts = dict(zip(places, out.split(given[0]), strict=True))
            out = torch.cat([parts[i] for i in range(self.size)])
        return out

    def _exchanged(self, rows: Tensor, to: list[int], come: list[int]) -> Tensor:
        """``all_to_all`` over gloo. Whoever receives asks for it before anything is sent: in gloo's
        own all-to-all the asking may stand behind what goes the other way, and a link that could
        carry both directions at once then carries one after the other."""
        out = rows.new_empty(sum(come), *rows.shape[1:])
        given, taken = rows.contiguous().split(to), out.split(come)
        # As bytes: gloo does not know every number format.
        others = [(i, rank) for i, rank in enumerate(self.ranks) if i != self.index]
        with connected():
            work = [
                dist.irecv(_bytes(taken[i]), rank, group=self.handle)
                for i, rank in others
                if taken[i].numel()
            ]
            work += [
                dist.isend(_bytes(given[i]), rank, group=self.handle)
                for i, rank in others
                if given[i].numel()
            ]
            taken[self.index].copy_(given[self.index])
            for one in work:
                if one is not None:
                    one.wait()
        return out

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of one shape, in the order of the group."""
        if self.handle is None:
            return [x]
        x = x.contiguous()
        self.sent["all_gather"] += x.nbytes * (self.size - 1)
        out = [torch.empty_like(x) for _ in self.ranks]
        with connected():
            dist.all_gather([_bytes(o) for o in out], _bytes(x), group=self.handle)
        places = self._places()
        return [out[places.index(i)] for i in range(self.size)]

    def all_reduce(self, x: Tensor, fn: str) -> Tensor:
        if self.handle is None:
            return x
        self.sent["all_reduce"] += 2 * x.nbytes * (self.size - 1) // self.size
        x = x.contiguous().clone() if x.requires_grad or not x.is_contiguous() else x.clone()
        with connected():
            dist.all_reduce(x, REDUCE["sum" if fn == "mean" else fn], group=self.handle)
        return x / self.size if fn == "mean" else x

    def reduce_scatter(self, x: Tensor, axis: int) -> Tensor:
        """Each rank's part along ``axis`` of the sum."""
        if self.handle is None:
            return x
        parts = x.chunk(self.size, axis)
        self.sent["reduce_scatter"] += parts[0].nbytes * (self.size - 1)
        if x.device.type == "cpu":  # gloo has none: each rank's part goes to it, and is added there
            rows = torch.stack(parts)
            each = [1] * self.size
            before = self.sent["dispatch"]
            got = self.all_to_all(rows, each, each)
            self.sent["dispatch"] = before
            return got.sum(0)
        out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        places = self._places()
        given = [parts[i].contiguous() for i in places]
        with connected():
            dist.reduce_scatter(out, given, group=self.handle)
        return out


class Mesh:
    """Ranks along named axes.

    Attributes:
        sizes: how many stand along each axis.
        rank: this process' number; its coordinates are ``at``.
    """

    def __init__(self, sizes: Mapping[str, int]):
        self.sizes = dict(sizes)
        self.rank = 0
        self.at = dict.fromkeys(sizes, 0)
        self.placements: dict[str, Placement] = {}
        self._groups: dict[tuple[str, ...], Group] = {}
        self._connected = False
        self._stream: Stream | None = None  # what is started runs there

    @property
    def size(self) -> int:
        return prod(self.sizes.values())

    def connect(self, rank: int) -> None:
        """Take a rank's place. ``torch.distributed`` is initialised, with as many processes."""
        self.rank = rank
        left = rank
        for axis, size in reversed(self.sizes.items()):
            left, self.at[axis] = divmod(left, size)
        self._connected = True

    def index(self, *axes: str) -> int:
        """This rank's place along some axes, the first outermost."""
        place = 0
        for axis in axes:
            place = place * self.sizes[axis] + self.at[axis]
        return place

    def ways(self, *axes: str) -> int:
        return prod(self.sizes[axis] for axis in axes)

    def across(self, axes: tuple[str, ...], per_node: int) -> tuple[Group, Group]:
        """The ranks along some axes in the same place of each node, and those of this node."""
        own = (*axes, f"{per_node} between nodes"), (*axes, f"{per_node} within a node")
        if own[0] not in self._groups:
            rows = self._rows(axes)
            nodes = [[row[i : i + per_node] for i in range(0, len(row), per_node)] for row in rows]
            columns = [list(ranks) for row in nodes for ranks in zip(*row, strict=True)]
            self._make(own[0], columns)
            self._make(own[1], [ranks for row in nodes for ranks in row])
        return self._groups[own[0]], self._groups[own[1]]

    def group(self, *axes: str) -> Group:
        """The ranks along some axes that are where this one is along the others.

        All ranks ask for the same groups in the same order, as they run one program.
        """
        if axes not in self._groups:
            self._make(axes, self._rows(axes))
        return self._groups[axes]

    def _rows(self, axes: tuple[str, ...]) -> list[list[int]]:
        """Ranks along some axes, for each place along the others."""
        others = [a for a in self.sizes if a not in axes]
        found = []
        for fixed in product(*(range(self.sizes[a]) for a in others)):
            at = dict(zip(others, fixed, strict=True))
            places = product(*(range(self.sizes[a]) for a in axes))
            found.append([self._number({**at, **dict(zip(axes, p, strict=True))}) for p in places])
        return found

    def _make(self, name: tuple[str, ...], rows: list[list[int]]) -> None:
        """Every one of these groups, as all ranks must; this rank's is kept."""
        if not self._connected:
            raise RuntimeError(f"the mesh {self} is not connected to its processes")
        for ranks in rows:
            alone = len(ranks) == 1 and not (dist.is_initialized() and self.size == 1)
            with connected():
                handle = None if alone else dist.new_group(ranks)
            if self.rank in ranks:
                self._groups[name] = Group(ranks, ranks.index(self.rank), handle)

    def _number(self, at: dict[str, int]) -> int:
        number = 0
        for axis, size in self.sizes.items():
            number = number * size + at[axis]
        return number

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that this rank has sent to others, by operation."""
        total: Counter[str] = Counter()
        for group in self._groups.values():
            total += group.sent
        return dict(total)

    # -- what emitted models call ------------------------------------------------------------------

    def start(self, what: str, x: Tensor, *given: Any, **options: Any) -> Pending[Tensor]:
        """Begin one of the methods below; ``wait()`` of what this gives has its result. What is
        started runs in the order of the starts, beside the caller."""
        return self.begin(partial(getattr(self, what), x, *given, **options), x.device)

    def start_route(
        self,
        blocks: torch.nn.Module,
        pick: Tensor,
        gate: Tensor,
        *axes: str,
        sent: tuple[str, ...] | None = None,
        each: bool = False,
        per_node: int = 0,
    ) -> Sent:
        """``route``, begun; ``start_dispatch`` and ``start_combine`` go on from there."""
        sent = axes if sent is None else sent
        route = Route(self, blocks, axes, sent, each, per_node)
        if sent and not self._known(sent, per_node):  # making groups is in the order of all
            self.in_order(route.groups, pick.device)
        way = route.begin(pick, gate)
        return Sent(self, way, self.begin(lambda: route.meet(way), pick.device), pick.device)

    def _known(self, sent: tuple[str, ...], per_node: int) -> bool:
        return ((*sent, f"{per_node} between nodes") if per_node else sent) in self._groups

    def begin(
        self,
        work: Callable[[], T],
        device: torch.device,
        finish: Callable[[T], T] | None = None,
    ) -> Pending[T]:
        """Run something in the order of what is started; ``finish`` it where it is waited for."""
        if self._stream is None:
            self._stream = Stream()
        return self._stream.start(work, device, finish)

    def in_order(self, work: Callable[[], T], device: torch.device) -> T:
        """Run something now, but behind what was started before it: all ranks do it so."""
        if self._stream is None or self._stream.is_current:
            return work()
        return self._stream.start(work, device).wait()

    def all_reduce(self, x: Tensor, *axes: str, fn: str = "sum") -> Tensor:
        """The sum (mean, max, min) of the ranks' values, on each of them."""
        return self.in_order(lambda: self.group(*axes).all_reduce(x, fn), x.device)

    def reduce_scatter(self, x: Tensor, axis: int, *axes: str) -> Tensor:
        """This rank's part along ``axis`` of the sum of the ranks' values."""
        return self.in_order(lambda: self.group(*axes).reduce_scatter(x, axis), x.device)

    def all_gather(self, x: Tensor, axis: int, *axes: str) -> Tensor:
        """The ranks' parts along ``axis`` behind one another."""
        return self.in_order(lambda: torch.cat(self.group(*axes).all_gather(x), axis), x.device)

    def part(self, x: Tensor, axis: int, *axes: str) -> Tensor:
        """This rank's part along ``axis`` of a value that all have; nothing is sent."""
        size = x.shape[axis] // self.ways(*axes)
        return x.narrow(axis, self.index(*axes) * size, size)

    def embedding(self, index: Tensor, table: Tensor, *axes: str) -> Tensor:
        """``table[index]`` where ``table`` has this rank's rows: 0 for rows that others have."""
        own = index - self.index(*axes) * len(table)
        here = (own >= 0) & (own < len(table))
        rows = torch.nn.functional.embedding(torch.where(here, own, 0), table)
        return torch.where(here.reshape(*here.shape, *[1] * (table.ndim - 1)), rows, 0)

    def gather(self, table: Tensor, index: Tensor, *axes: str) -> Tensor:
        """``table.gather(-1, index)`` where ``table`` has this rank's part: 0 for others'."""
        own = index - self.index(*axes) * table.shape[-1]
        here = (own >= 0) & (own < table.shape[-1])
        return torch.where(here, table.gather(-1, torch.where(here, own, 0)), 0)

    def route(
        self,
        blocks: torch.nn.Module,
        pick: Tensor,
        gate: Tensor,
        *axes: str,
        sent: tuple[str, ...] | None = None,
        each: bool = False,
        per_node: int = 0,
    ) -> Routing:
        """Where tokens go: an array of blocks lies on the ranks along ``axes``, ``blocks`` here.

        Args:
            pick: int64 ``[*rows, picks]``, numbers of blocks of the whole array.
            gate: ``[*rows, picks]``, or with axes of length 1: what results are weighted with.
            sent: the axes along which ranks have tokens of their own; all unless given. Along the
                others they have the same tokens, and each does the work of its own blocks.
            each: what is dispatched differs from pick to pick.
            per_node: so many neighbouring ranks share a node: a token goes to a node once, to the
                rank in the place of its own, and is forwarded inside.
        """
        sent = axes if sent is None else sent
        route = Route(self, blocks, axes, sent, each, per_node)
        return self.in_order(lambda: route.meet(route.begin(pick, gate)), pick.device)

    def __repr__(self) -> str:
        return f"Mesh({self.sizes})"


def _bytes(x: Tensor) -> Tensor:
    """A contiguous tensor's rows as bytes."""
    if x.ndim < 2:
        return x.view(torch.uint8).view(len(x), -1) if len(x) else x.view(torch.uint8).view(0, 1)
    if not x.numel():
        return x.new_empty(x.shape[0], 0, dtype=torch.uint8)
    return x.view(x.shape[0], -1).view(torch.uint8)
