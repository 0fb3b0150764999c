"""What a rank has of the stored tensors: which tensors, and which parts of them.

``own`` turns a manifest's row, which tells of all ranks, into a pattern of this rank's tensors:
allocating, reading a checkpoint and drawing random values then work as they do on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from math import prod

import torch

from backends.pytorch.runtime import Mesh
from compiler.balance import unmeasured
from compiler.errors import UserError
from compiler.manifest import ArrayRow, DimRow, Manifest, ParameterRow
from compiler.shards import OwnTensor, Runs, numbers, runs
from compiler.tensors import Pattern, Tensor


class PlacementError(UserError):
    """Where the copies of blocks are to be does not fit the compiled deployment."""


@dataclass(frozen=True)
class OwnPattern(Pattern):
    """A rank's tensors of a pattern."""

    row: ParameterRow | None = None
    mesh: Mesh | None = None
    placements: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __len__(self) -> int:
        return prod(len(self._places(i)) for i in range(len(self.ranges)))

    def _places(self, at: int) -> range:
        """Which places of an array's numbers this rank has; of one that is not dealt out, all."""
        assert self.row is not None and self.mesh is not None
        dealt = self.row.dealt[at] if self.row.dealt else None
        whole = self.ranges[at]
        if dealt is None:
            return range(len(whole))
        return own_places(self.mesh, dealt, len(whole))

    def tensors(self) -> Iterator[Tensor]:
        assert self.row is not None and self.mesh is not None
        base = {f.name: getattr(self, f.name) for f in fields(Pattern)}
        base["shape"] = stored = self.row.shape
        names = _names(Pattern(**base))
        dims = self.row.shard
        runs = tuple(
            own_runs(self.mesh, dims[i]) if dims else ((0, size),) for i, size in enumerate(stored)
        )
        places = [self._places(i) for i in range(len(self.ranges))]
        for at in product(*places):
            named, own = [], []
            for i, place in enumerate(at):
                dealt = self.row.dealt[i] if self.row.dealt else None
                if dealt is None:
                    named.append(place)
                    own.append(self.ranges[i][place])
                else:
                    block = self._block(i, own, place)
                    named.append(block)
                    own.append(self.ranges[i].start + place - places[i].start)
            yield OwnTensor(
                self.path.format(*own), names(named), self.shape, self.dtype, self, stored, runs
            )

    def _block(self, at: int, before: Sequence[int], place: int) -> int:
        """The number of the block in a place of an array."""
        array = self.path.split(f"[{{{at}}}]")[0].format(*before)
        held = dict(self.placements).get(array.replace("[", ".").replace("]", ""))
        return place if held is None else held[place]


def own(
    manifest: Manifest, mesh: Mesh, placements: Mapping[str, Sequence[int]] = {}
) -> list[Pattern]:
    """This rank's tensors of every row of a manifest.

    Args:
        placements: by the path of an array of modules (``layers.3.mlp.expert``), the number of the
            block in each place; as ``places`` has them unless given.

    Raises:
        PlacementError: there is no such array, or it has other places.
    """
    held = tuple(places(manifest, mesh, placements).items())
    found: list[Pattern] = []
    for row in manifest.parameters:
        whole = row.pattern()
        base = {f.name: getattr(whole, f.name) for f in fields(Pattern)}
        if row.shard:
            base["shape"] = tuple(
                sum(end - begin for begin, end in own_runs(mesh, dim)) for dim in row.shard
            )
        found.append(OwnPattern(**base, row=row, mesh=mesh, placements=held))
    return found


def places(
    manifest: Manifest, mesh: Mesh, placements: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """The block in each place of every array that has copies, or for which it is given.

    Raises: as ``own`` does.
    """
    arrays: dict[str, tuple[int, ArrayRow]] = {}
    for row in manifest.parameters:
        for at, dealt in enumerate(row.dealt or ()):
            if dealt is None:
                continue
            stem = row.path.split(f"[{{{at}}}]")[0]
            start, stop = row.ranges[at]
            for before in product(*(range(*pair) for pair in row.ranges[:at])):
                path = stem.format(*before).replace("[", ".").replace("]", "")
                arrays[path] = (stop - start, dealt)
    unknown = [path for path in placements if path not in arrays]
    if unknown:
        raise PlacementError(f"no array of blocks is called '{unknown[0]}': {', '.join(arrays)}")
    found: dict[str, tuple[int, ...]] = {}
    for path, (blocks, dealt) in arrays.items():
        count = blocks + dealt.redundant
        if path in placements:
            found[path] = tuple(placements[path])
        elif dealt.redundant:
            found[path] = _unmeasured(blocks, count, dealt.nodes, mesh.ways(*dealt.axes))
        else:
            continue
        if len(found[path]) != count or set(found[path]) != set(range(blocks)):
            raise PlacementError(
                f"'{path}' has {count} places for {blocks} blocks, each of which lies in one at "
                f"least; the placement has {len(found[path])} of {len(set(found[path]))}"
            )
    return found


_unmeasured = cache(unmeasured)  # layers are alike


def own_places(mesh: Mesh, dealt: ArrayRow, blocks: int) -> range:
    """The places of an array that this rank has."""
    each = (blocks + dealt.redundant) // mesh.ways(*dealt.axes)
    first = mesh.index(*dealt.axes) * each
    return range(first, first + each)


def own_runs(mesh: Mesh, dim: DimRow) -> Runs:
    """Which stretches of a stored dim this rank has."""
    return runs(dim, lambda axes: (mesh.index(*axes), mesh.ways(*axes)))


def part_of(whole: torch.Tensor, own: OwnTensor) -> torch.Tensor:
    """A rank's part of a tensor that is there as a whole."""
    for axis, stretches in enumerate(own.runs):
        if sum(end - begin for begin, end in stretches) != whole.shape[axis]:
            index = torch.tensor(list(numbers(stretches)), device=whole.device)
            whole = whole.index_select(axis, index)
    return whole


def _names(pattern: Pattern) -> Callable[[Sequence[int]], str]:
    """The checkpoint's name of a tensor, by its places in the pattern's ranges."""
    from dsl.templates import numbered

    parts = numbered(pattern.name, pattern.ranges)
    return lambda places: "".join(p if isinstance(p, str) else str(p.at(places)) for p in parts)
