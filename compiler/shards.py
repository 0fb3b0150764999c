"""What of each stored tensor a rank has: the program before and after ``shard``, side by side.

A row of the manifest tells it of one pattern of tensors, for all ranks at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from compiler.ir import Child, Dim, Program
from compiler.tensors import Pattern, Place, child_place, patterns


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


@dataclass(frozen=True)
class ArrayShard:
    """An array of modules, dealt out in contiguous runs over ``axes``, its ``redundant`` copies
    behind it."""

    axes: tuple[str, ...]
    redundant: int


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

    def walk(place: Place, module: str, arrays: Arrays) -> Iterator[tuple[Key, Shard]]:
        own = local.modules[module]
        for before, after in zip(place.module.parameters, own.parameters, strict=True):
            pairs = zip(before.type.dims, after.type.dims, strict=True)
            dims = tuple(_dim(b, a, sizes) for b, a in pairs)
            path = f"{place.path}.{before.name}" if place.path else before.name
            divided = dims if any(d.is_divided for d in dims) else ()
            yield (path, place.ranges), Shard(divided, arrays if any(arrays) else ())
        for child, mine in zip(place.module.children, own.children, strict=True):
            inner = arrays if child.array is None else (*arrays, _array(child, mine, sizes))
            yield from walk(child_place(whole, place, child), mine.module, inner)

    yield from walk(Place(whole.modules[whole.root]), local.root, ())


def _dim(whole: Dim, local: Dim, sizes: dict[str, int]) -> DimShard:
    size = whole.size.at(sizes)
    if local.axes:
        return DimShard(size, local.axes)
    parts = zip(whole.parts, local.parts, strict=True)
    return DimShard(size, (), whole.form, tuple(_dim(w, p, sizes) for w, p in parts))


def _array(whole: Child, local: Child, sizes: dict[str, int]) -> ArrayShard | None:
    if whole.array is None or local.array is None or not local.array.axes:
        return None
    ways = 1
    for axis in local.array.axes:
        ways *= sizes[f"ranks.{axis}"]
    redundant = local.array.size.at(sizes) * ways - whole.array.size.at(sizes)
    return ArrayShard(local.array.axes, redundant)
