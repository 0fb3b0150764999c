"""What of each stored tensor a rank has: the program before and after ``shard``, side by side.

A row of the manifest tells it of one pattern of tensors, for all ranks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal, Protocol

from compiler.ir import Child, Dim, Program
from compiler.tensors import Pattern, Place, Tensor, child_place, patterns


@dataclass(frozen=True)
class DimShard:
    """A stored dim: an index in equal contiguous parts over ``axes``, or what its parts are."""

    size: int
    axes: tuple[str, ...] = ()
    form: Literal["atom", "sum", "product"] = "atom"
    parts: tuple[DimShard, ...] = ()

    @property
    def is_divided(self) -> bool:
        return bool(self.axes) or any(part.is_divided for part in self.parts)


class Divided(Protocol):
    """A dim as ``DimShard`` tells it, or a row of the manifest."""

    @property
    def size(self) -> int: ...
    @property
    def axes(self) -> tuple[str, ...]: ...
    @property
    def form(self) -> str: ...
    @property
    def parts(self) -> Sequence[Divided]: ...


Run = tuple[int, int]  # begin and end
Runs = tuple[Run, ...]


def runs(dim: Divided, place: Callable[[tuple[str, ...]], tuple[int, int]]) -> Runs:
    """Which stretches of a stored dim a rank has.

    Args:
        place: the rank's place along some axes, and how many ranks there are along them.
    """
    if dim.axes:
        at, ways = place(dim.axes)
        size = dim.size // ways
        return ((at * size, at * size + size),)
    if not dim.parts:
        return ((0, dim.size),)
    if dim.form == "sum":
        found, at = list[Run](), 0
        for part in dim.parts:
            found += [(at + begin, at + end) for begin, end in runs(part, place)]
            at += part.size
        return _joined(found)
    inner: Runs = ((0, 1),)
    size = 1
    for part in reversed(dim.parts):
        own = runs(part, place)
        if inner == ((0, size),):
            inner = tuple((begin * size, end * size) for begin, end in own)
        else:
            inner = tuple((n * size + b, n * size + e) for n in numbers(own) for b, e in inner)
        size *= part.size
    return _joined(inner)


def _joined(runs: Sequence[Run]) -> Runs:
    out: list[Run] = []
    for begin, end in runs:
        if out and out[-1][1] == begin:
            out[-1] = (out[-1][0], end)
        else:
            out.append((begin, end))
    return tuple(out)


def numbers(runs: Runs) -> Iterator[int]:
    for begin, end in runs:
        yield from range(begin, end)


@dataclass(frozen=True)
class ArrayShard:
    """An array of modules, dealt out in contiguous runs over ``axes``, with so many ``redundant``
    copies. Tokens are sent once to each of ``nodes``; to each rank by itself if it is 1."""

    axes: tuple[str, ...]
    redundant: int
    nodes: int = 1


@dataclass(frozen=True)
class Shard:
    """Of one pattern: its dims, if one is divided, and the arrays on the way to it, if one is."""

    dims: tuple[DimShard, ...]
    arrays: tuple[ArrayShard | None, ...]


def shards(whole: Program, local: Program) -> list[tuple[Pattern, Shard]]:
    """Every pattern of the whole program, with what a rank of the local one has of it."""
    found = dict(_walk(whole, local))
    return [(p, found[p.path, p.ranges]) for p in patterns(whole)]


Key = tuple[str, tuple[range, ...]]
Arrays = tuple[ArrayShard | None, ...]


def _walk(whole: Program, local: Program) -> Iterator[tuple[Key, Shard]]:
    sizes = local.sizes
    nodes = _nodes(local)

    def walk(place: Place, module: str, arrays: Arrays) -> Iterator[tuple[Key, Shard]]:
        own = local.modules[module]
        for before, after in zip(place.module.parameters, own.parameters, strict=True):
            pairs = zip(before.type.dims, after.type.dims, strict=True)
            dims = tuple(_dim(b, a, sizes) for b, a in pairs)
            path = f"{place.path}.{before.name}" if place.path else before.name
            divided = dims if any(d.is_divided for d in dims) else ()
            yield (path, place.ranges), Shard(divided, arrays if any(arrays) else ())
        for child, mine in zip(place.module.children, own.children, strict=True):
            inner = arrays if child.array is None else (*arrays, _array(child, mine, sizes, nodes))
            yield from walk(child_place(whole, place, child), mine.module, inner)

    yield from walk(Place(whole.modules[whole.root]), local.root, ())


def _dim(whole: Dim, local: Dim, sizes: dict[str, int]) -> DimShard:
    size = whole.size.at(sizes)
    if local.axes:
        return DimShard(size, local.axes)
    parts = zip(whole.parts, local.parts, strict=True)
    return DimShard(size, (), whole.form, tuple(_dim(w, p, sizes) for w, p in parts))


def _nodes(local: Program) -> dict[tuple[str, ...], int]:
    """Of the axes that blocks are dealt out over, how many nodes tokens are sent to once."""
    found: dict[tuple[str, ...], int] = {}
    for body in local.bodies.values():
        for node in body:
            if node.op == "routing" and node.attrs["per_node"]:
                axes = tuple(node.attrs["axes"])
                ranks = prod(local.sizes[f"ranks.{axis}"] for axis in axes)
                found[axes] = ranks // node.attrs["per_node"]
    return found


def _array(
    whole: Child, local: Child, sizes: dict[str, int], nodes: dict[tuple[str, ...], int]
) -> ArrayShard | None:
    if whole.array is None or local.array is None or not local.array.axes:
        return None
    ways = 1
    for axis in local.array.axes:
        ways *= sizes[f"ranks.{axis}"]
    redundant = local.array.size.at(sizes) * ways - whole.array.size.at(sizes)
    return ArrayShard(local.array.axes, redundant, nodes.get(local.array.axes, 1))


@dataclass(frozen=True)
class OwnTensor(Tensor):
    """A rank's part of a stored tensor: ``shape`` is the part's, ``runs`` say, for each dim, which
    stretches of the stored one it is."""

    stored_shape: tuple[int, ...] = ()
    runs: tuple[Runs, ...] = ()

    @property
    def is_whole(self) -> bool:
        return self.shape == self.stored_shape

    def stretches(self) -> Iterator[Run]:
        """Begin and end, in elements of the stored tensor, of what lies behind one another there;
        in the order of the part's elements."""
        divided = [i for i, size in enumerate(self.stored_shape) if self.shape[i] != size]
        last = divided[-1] if divided else 0
        below = prod(self.stored_shape[last + 1 :])
        rows = product(*(numbers(r) for r in self.runs[:last]))
        for at in rows:
            row = 0
            for size, number in zip(self.stored_shape[: last + 1], (*at, 0), strict=True):
                row = row * size + number
            for begin, end in self.runs[last]:
                yield (row + begin) * below, (row + end) * below
