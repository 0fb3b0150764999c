"""Dispatch and combine: tokens go to the ranks that have the blocks they picked, and back.

Dropless, with one all-to-all each way: counts are exchanged first, then the tokens with uneven
splits. A token goes to a rank once, however many of its blocks it picked; what they give is
weighted and summed there (in f32), and one row comes back. Memory is for what arrives, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

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
        counts = goes.sum(0)
        self.sends = counts.tolist()
        ones = [1] * group.size
        self.comes = group.all_to_all(counts[:, None], ones, ones, "counts").flatten().tolist()

    def there(self, x: Tensor, what: str = "dispatch") -> Tensor:
        """``[rows, ...]`` to what arrives."""
        return self.group.all_to_all(x.index_select(0, self.row), self.sends, self.comes, what)

    def back(self, y: Tensor) -> Tensor:
        """What was made of what arrived, ``[arrived, ...]``, to sums in f32, ``[rows, ...]``."""
        got = self.group.all_to_all(y, self.comes, self.sends, "combine")
        total = torch.zeros(self.rows, *y.shape[1:], dtype=torch.float32, device=y.device)
        return total.index_add_(0, self.row, got.float())


class Sent:
    """A routing that has been started: what is sent along it is started too."""

    def __init__(self, mesh: Mesh, routing: Pending[Routing], device: torch.device):
        self._mesh, self._routing, self._device = mesh, routing, device

    def start_dispatch(self, x: Rows) -> Pending[Rows]:
        """``Routing.dispatch``, begun; where rows go is known when its turn comes."""
        return self._mesh.begin(lambda: self._routing.wait().dispatch(x), self._device)

    def start_combine(self, out: Tensor) -> Pending[Tensor]:
        """``Routing.combine``, begun."""
        return self._mesh.begin(lambda: self._routing.wait().combine(out), self._device)

    def apply(self, *given: Any, **options: Any) -> Tensor:
        """``Routing.apply``."""
        return self._routing.wait().apply(*given, **options)

    @property
    def block(self) -> Tensor:
        return self._routing.wait().block


class Routing:
    """The rows that have arrived at this rank, and the way back.

    Attributes:
        block: int64 ``[rows]``, which of this rank's blocks each row is for; ascending.
    """

    def __init__(
        self,
        mesh: Mesh,
        hops: Sequence[Hop],
        place: Tensor,
        gate: Tensor,
        own: range,
        shape: torch.Size,
        dtype: torch.dtype,
        each: bool,
    ):
        """
        Args:
            place: int64 ``[arrived, picks]``, the places that each token picked, others' too.
            gate: f32 ``[arrived, picks]``.
            own: this rank's places.
            shape: of the picks at home, ``[*rows, picks]``; ``dtype``: of the gate there.
        """
        self._mesh, self._hops = mesh, hops
        self._shape, self._dtype, self._each = shape, dtype, each
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
        return self._mesh.in_order(lambda: self._dispatch(x), self.block.device)

    def _dispatch(self, x: Rows) -> Rows:
        lead = self._shape if self._each else (*self._shape[:-1], 1)
        mine = torch.arange(torch.Size(lead).numel(), device=x.device)
        given: Any = x
        rows: Any = _rows(given, torch.Size(lead), mine)
        for hop in self._hops:
            rows = rows.each(hop.there) if isinstance(rows, Coded) else hop.there(rows)
        arrived: Rows = rows.index_select(0, self._token)
        return arrived

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
        return self._mesh.in_order(lambda: self._combine(out), out.device)

    def _combine(self, out: Tensor) -> Tensor:
        weight = self._gate.reshape(-1, *[1] * (out.ndim - 1))
        total = torch.zeros(self._arrived, *out.shape[1:], dtype=torch.float32, device=out.device)
        total.index_add_(0, self._token, out.float() * weight)
        for hop in reversed(self._hops):
            total = hop.back(total.to(out.dtype))
        rest = out.shape[1:]
        if self._each:
            total = total.view(*self._shape, *rest).sum(len(self._shape) - 1)
        else:
            total = total.view(*self._shape[:-1], *rest)
        return total.to(torch.promote_types(self._dtype, out.dtype))


def routed(
    mesh: Mesh,
    blocks: nn.Module,
    pick: Tensor,
    gate: Tensor,
    axes: tuple[str, ...],
    sent: tuple[str, ...],
    each: bool,
    per_node: int,
) -> Routing:
    """See ``Mesh.route``."""
    path = str(blocks.path)
    picked(blocks, pick)
    count = len(blocks)  # type: ignore[arg-type]
    placement = mesh.placements.get(path)
    places = pick if placement is None else placement.spread(pick, mesh.index(*sent))
    gates = gate.expand(pick.shape).float()
    if each:
        places, gates = places.reshape(-1, 1), gates.reshape(-1, 1)
    else:
        places, gates = places.flatten(0, -2), gates.flatten(0, -2)
    first = mesh.index(*axes) * count
    own = range(first, first + count)
    hops: list[Hop] = []
    groups: list[Group] = []
    if sent:
        groups = [*mesh.across(sent, per_node)] if per_node else [mesh.group(*sent)]
    for number, group in enumerate(groups):
        to = _ranks(mesh, places.div(count, rounding_mode="floor"), axes, sent)
        if per_node and number == 0:
            to = to.div(per_node, rounding_mode="floor")  # whose node, and then who in it
        elif per_node:
            here = to.div(per_node, rounding_mode="floor") == groups[0].index
            to = torch.where(here, to % per_node, per_node)
        goes = torch.zeros(len(to), group.size + 1, dtype=torch.bool, device=pick.device)
        goes.scatter_(1, to, True)
        hop = Hop(group, goes[:, :-1])
        hops.append(hop)
        meta = torch.stack([places.int(), gates.view(torch.int32)], -1)
        meta = hop.there(meta.flatten(1), "picks").view(-1, places.shape[1], 2)
        places, gates = meta[..., 0].long(), meta[..., 1].contiguous().view(torch.float32)
    return Routing(mesh, hops, places, gates, own, pick.shape, gate.dtype, each)


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
