"""Dispatch and combine: tokens go to the ranks that have the blocks they picked, and back.

Dropless, with one all-to-all each way: counts are exchanged first, then the tokens with uneven
splits. A token goes to a rank once, however many of its blocks it picked; what they give is
weighted and summed there (in f32), and one row comes back. Memory is for what arrives, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from backends.pytorch.runtime.experts import _method, _rows, picked
from backends.pytorch.runtime.fp8 import Coded
from backends.pytorch.runtime.streams import Pending

if TYPE_CHECKING:
    from backends.pytorch.runtime.mesh import Group, Mesh


Rows = TypeVar("Rows", Tensor, Coded)


@dataclass(frozen=True)
class Placement:
    """Which blocks of an array have copies, and where they are.

    Attributes:
        numbers: int64 ``[places]``, the block that lies in each place; places are dealt out over
            ranks in contiguous runs.
        places: int64 ``[blocks, most copies]``, the places of each block, the first repeated.
        copies: int64 ``[blocks]``.
    """

    numbers: Tensor
    places: Tensor
    copies: Tensor

    @staticmethod
    def of(numbers: Sequence[int], blocks: int) -> Placement:
        """
        Args:
            numbers: the block in each place; each occurs at least once.
        """
        where: list[list[int]] = [[] for _ in range(blocks)]
        for place, number in enumerate(numbers):
            where[number].append(place)
        most = max(map(len, where))
        rows = [w + w[:1] * (most - len(w)) for w in where]
        copies = torch.tensor([len(w) for w in where])
        return Placement(torch.tensor(list(numbers)), torch.tensor(rows), copies)

    def spread(self, pick: Tensor, start: int) -> Tensor:
        """A place for each pick: the copies of a block take turns, from copy ``start`` on."""
        flat = pick.flatten()
        order = flat.argsort(stable=True)
        ordered = flat[order]
        counts = torch.bincount(flat, minlength=len(self.copies))
        before = counts.cumsum(0) - counts
        turn = torch.empty_like(flat)
        turn[order] = torch.arange(len(flat), device=flat.device) - before[ordered]
        copy = (turn + start) % self.copies.to(flat.device)[flat]
        return self.places.to(flat.device)[flat, copy].view_as(pick)


class Hop:
    """Rows that go to some ranks of a group, each row once to each of them, and sums that come
    back.

    Args:
        goes: bool ``[rows, ranks]``.
    """

    def __init__(self, group: Group, goes: Tensor):
        self.group = group
        self.rows = len(goes)
        self.to, self.row = goes.t().nonzero(as_tuple=True)  # by rank, then by row
        self._counts = goes.sum(0)
        self.sends: list[int] = self._counts.tolist()
        self.comes: list[int] = []

    def meet(self) -> None:
        """Tell each rank how many rows come to it."""
        ones = [1] * self.group.size
        come = self.group.all_to_all(self._counts[:, None], ones, ones, "counts")
        self.comes = come.flatten().tolist()

    def leaving(self, x: Tensor) -> Tensor:
        """``[rows, ...]`` to what is sent: rows to the first rank, to the next, ..."""
        return x.index_select(0, self.row)

    def there(self, x: Tensor, what: str = "dispatch") -> Tensor:
        """What is sent to what arrives."""
        return self.group.all_to_all(x, self.sends, self.comes, what)

    def back(self, y: Tensor) -> Tensor:
        """What was made of what arrived, ``[arrived, ...]``, sent back to where it came from."""
        return self.group.all_to_all(y, self.comes, self.sends, "combine")

    def summed(self, got: Tensor) -> Tensor:
        """What came back to sums in f32, ``[rows, ...]``."""
        y = got
        total = torch.zeros(self.rows, *y.shape[1:], dtype=torch.float32, device=y.device)
        return total.index_add_(0, self.row, got.float())


class Sent:
    """A routing that has been started: what is sent along it is started too."""

    def __init__(self, mesh: Mesh, way: Way, routing: Pending[Routing], device: torch.device):
        self._mesh, self._way, self._routing, self._device = mesh, way, routing, device

    def start_dispatch(self, x: Rows) -> Pending[Rows]:
        """``Routing.dispatch``, begun. What comes is known when its turn comes; what is computed
        before and after it is sent, the caller computes."""
        leaving = self._way.leaving(x)
        return self._mesh.begin(
            lambda: self._routing.wait().sent(leaving),
            self._device,
            lambda there: self._routing.wait().arrived(there),
        )

    def start_combine(self, out: Tensor) -> Pending[Tensor]:
        """``Routing.combine``, begun."""
        routing = self._routing.wait()
        returning = routing.returning(out)
        return self._mesh.begin(
            lambda: routing.returned(returning), self._device, lambda got: routing.home(got, out)
        )

    def apply(self, *given: Any, **options: Any) -> Tensor:
        """``Routing.apply``."""
        return self._routing.wait().apply(*given, **options)

    @property
    def block(self) -> Tensor:
        return self._routing.wait().block


class Way:
    """Where a rank's rows go first: what it knows before the ranks have met.

    Args:
        place: int64 ``[rows, picks]``, the places that each row picked; ``gate``: f32, the same.
        shape: of the picks, ``[*rows, picks]``; ``dtype``: of the gate as it was given.
        first: None if nothing is sent.
    """

    def __init__(
        self,
        place: Tensor,
        gate: Tensor,
        shape: torch.Size,
        dtype: torch.dtype,
        each: bool,
        first: Hop | None,
    ):
        self.place, self.gate, self.shape, self.dtype = place, gate, shape, dtype
        self.each, self.first = each, first

    def leaving(self, x: Rows) -> Rows:
        """The rows of an argument as they are sent.

        Args:
            x: ``[*rows, picks or 1, ...]``, where an axis of rows may have length 1. Of a coded
                one, codes and scales are sent.
        """
        lead = torch.Size(self.shape if self.each else (*self.shape[:-1], 1))
        mine = torch.arange(lead.numel(), device=x.device)
        given: Any = x
        rows: Any = _rows(given, lead, mine)
        if self.first is None:
            return cast(Rows, rows)
        return cast(Rows, _each(self.first.leaving, rows))


def _each(work: Callable[[Tensor], Tensor], rows: Any) -> Any:
    """Of a coded value, codes and scales."""
    return rows.each(work) if isinstance(rows, Coded) else work(rows)


class Routing:
    """The rows that have arrived at this rank, and the way back.

    Attributes:
        block: int64 ``[rows]``, which of this rank's blocks each row is for; ascending.
    """

    def __init__(
        self, mesh: Mesh, way: Way, hops: Sequence[Hop], place: Tensor, gate: Tensor, own: range
    ):
        """
        Args:
            place: int64 ``[arrived, picks]``, the places that each token picked, others' too.
            gate: f32 ``[arrived, picks]``.
            own: this rank's places.
        """
        self._mesh, self._way, self._hops = mesh, way, hops
        mine = (place >= own.start) & (place < own.stop)
        self._arrived = len(place)
        token, pick = mine.nonzero(as_tuple=True)
        block = place[token, pick] - own.start
        order = block.argsort(stable=True)
        self.block = block[order]
        self._token = token[order]
        self._gate = gate[token, pick][order]

    def dispatch(self, x: Rows) -> Rows:
        """The rows of an argument for this rank's blocks.

        Args:
            x: ``[*rows, picks or 1, ...]``, where an axis of rows may have length 1. Of a coded
                one, codes and scales are sent.

        Returns:
            ``[len(block), ...]``.
        """
        leaving = self._way.leaving(x)
        return self.arrived(self._mesh.in_order(lambda: self.sent(leaving), self.block.device))

    def sent(self, leaving: Rows) -> Rows:
        """What leaves to what arrives, over every hop."""
        rows: Any = leaving
        for number, hop in enumerate(self._hops):
            rows = _each(hop.leaving, rows) if number else rows
            rows = _each(hop.there, rows)
        return cast(Rows, rows)

    def arrived(self, there: Rows) -> Rows:
        """What has arrived, a row for each of this rank's blocks that it is for."""
        return there.index_select(0, self._token)

    def apply(
        self,
        blocks: nn.ModuleList,
        *args: Rows,
        start: int = 0,
        method: str = "forward",
        whole: Sequence[int] = (),
    ) -> Tensor:
        """What this rank's blocks give for the rows that are theirs, ``[len(block), ...]``.

        Args:
            args: as dispatched; those at ``whole`` are given to every block as they are.
            start: the number of the first block, for ``Numbered`` ones.
            method: which of the block's methods.
        """
        counts = torch.bincount(self.block, minlength=len(blocks)).tolist()
        ends = list(accumulate(counts, initial=0))
        parts = [
            [a] * len(counts) if i in whole else [a[b:e] for b, e in pairwise(ends)]
            for i, a in enumerate(args)
        ]
        # With no rows at all, any block knows the shape of its result.
        busy = [n for n, count in enumerate(counts) if count] or [0]
        made = [_method(blocks[start + n], method)(*(part[n] for part in parts)) for n in busy]
        return made[0] if len(made) == 1 else torch.cat(made)

    def combine(self, out: Tensor) -> Tensor:
        """The weighted sums of the blocks' results, at home.

        Args:
            out: ``[len(block), ...]``.

        Returns:
            ``[*rows, ...]``, f32 if the gate is, else the blocks' dtype.
        """
        returning = self.returning(out)
        got = self._mesh.in_order(lambda: self.returned(returning), out.device)
        return self.home(got, out)

    def returning(self, out: Tensor) -> Tensor:
        """The blocks' results weighted and summed for each token that has arrived."""
        weight = self._gate.reshape(-1, *[1] * (out.ndim - 1))
        total = torch.zeros(self._arrived, *out.shape[1:], dtype=torch.float32, device=out.device)
        total.index_add_(0, self._token, out.float() * weight)
        return total.to(out.dtype) if self._hops else total

    def returned(self, returning: Tensor) -> Tensor:
        """What returns, over every hop, to what has come home."""
        got = returning
        for number, hop in reversed([*enumerate(self._hops)]):
            got = hop.back(got)
            if number:
                got = hop.summed(got).to(returning.dtype)
        return got

    def home(self, got: Tensor, out: Tensor) -> Tensor:
        """What has come home, summed for each row."""
        way, rest = self._way, out.shape[1:]
        total = self._hops[0].summed(got) if self._hops else got
        if way.each:
            total = total.view(*way.shape, *rest).sum(len(way.shape) - 1)
        else:
            total = total.view(*way.shape[:-1], *rest)
        return total.to(torch.promote_types(way.dtype, out.dtype))


class Route:
    """The ranks that have the blocks of an array; see ``Mesh.route``."""

    def __init__(
        self,
        mesh: Mesh,
        blocks: nn.Module,
        axes: tuple[str, ...],
        sent: tuple[str, ...],
        each: bool,
        per_node: int,
    ):
        self.mesh, self.axes, self.sent_along, self.each = mesh, axes, sent, each
        self.per_node, self.blocks = per_node, blocks
        self.count = len(blocks)  # type: ignore[arg-type]
        first = mesh.index(*axes) * self.count
        self.own = range(first, first + self.count)

    def begin(self, pick: Tensor, gate: Tensor) -> Way:
        """What can be said before the ranks meet."""
        picked(self.blocks, pick)
        mesh = self.mesh
        placement = mesh.placements.get(str(self.blocks.path))
        start = mesh.index(*self.sent_along)
        places = pick if placement is None else placement.spread(pick, start)
        gates = gate.expand(pick.shape).float()
        if self.each:
            places, gates = places.reshape(-1, 1), gates.reshape(-1, 1)
        else:
            places, gates = places.flatten(0, -2), gates.flatten(0, -2)
        groups = self.groups()
        first = self._hop(groups, 0, places) if groups else None
        return Way(places, gates, pick.shape, gate.dtype, self.each, first)

    def meet(self, way: Way) -> Routing:
        """The ranks tell each other what they send."""
        places, gates, hops = way.place, way.gate, []
        groups = self.groups()
        for number in range(len(groups)):
            hop = way.first if number == 0 else self._hop(groups, number, places)
            assert hop is not None
            hop.meet()
            hops.append(hop)
            meta = torch.stack([places.int(), gates.view(torch.int32)], -1).flatten(1)
            meta = hop.there(hop.leaving(meta), "picks").view(-1, places.shape[1], 2)
            places, gates = meta[..., 0].long(), meta[..., 1].contiguous().view(torch.float32)
        return Routing(self.mesh, way, hops, places, gates, self.own)

    def groups(self) -> list[Group]:
        """The ranks among which rows are sent, hop by hop; made by all of them when first asked."""
        if not self.sent_along:
            return []
        if self.per_node:
            return [*self.mesh.across(self.sent_along, self.per_node)]
        return [self.mesh.group(*self.sent_along)]

    def _hop(self, groups: list[Group], number: int, places: Tensor) -> Hop:
        to = _ranks(
            self.mesh,
            places.div(self.count, rounding_mode="floor"),
            self.axes,
            self.sent_along,
        )
        per_node = self.per_node
        if per_node and number == 0:
            to = to.div(per_node, rounding_mode="floor")  # whose node, and then who in it
        elif per_node:
            here = to.div(per_node, rounding_mode="floor") == groups[0].index
            to = torch.where(here, to % per_node, per_node)
        group = groups[number]
        goes = torch.zeros(len(to), group.size + 1, dtype=torch.bool, device=places.device)
        goes.scatter_(1, to, True)
        return Hop(group, goes[:, :-1])


def _ranks(mesh: Mesh, holder: Tensor, axes: tuple[str, ...], sent: tuple[str, ...]) -> Tensor:
    """Where along ``sent`` a holder's place along ``axes`` is; the number of ranks there if it is
    elsewhere along the other axes than this rank."""
    at, left = {}, holder
    for axis in reversed(axes):
        at[axis], left = left % mesh.sizes[axis], left.div(mesh.sizes[axis], rounding_mode="floor")
    to = torch.zeros_like(holder)
    for axis in sent:
        to = to * mesh.sizes[axis] + at[axis]
    for axis in axes:
        if axis not in sent:
            to = torch.where(at[axis] == mesh.at[axis], to, mesh.ways(*sent))
    return to
