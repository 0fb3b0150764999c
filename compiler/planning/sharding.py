"""Which part of everything one rank holds, under a deployment's shard rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from compiler.errors import UserError
from compiler.ir import Dim, Program
from compiler.tensors import Place
from dsl.deploy.typed import Deployment

Where = tuple[str, tuple[range, ...]]  # a place: its path and ranges
SHARED_STATE = ("optimizer", "gradients", "parameters")


@dataclass(frozen=True)
class Placed:
    """An array of blocks: ``each`` of them (copies included) on each of ``ranks``."""

    axes: tuple[str, ...]
    ranks: int
    each: int
    redundant: int = 0


class Sharding:
    """The rules of one deployment.

    Raises:
        UserError: positions are divided, which is not planned yet.
    """

    def __init__(self, deployment: Deployment, blocks: Mapping[Where, str]):
        """
        Args:
            blocks: of each place of the module tree (path and ranges), the block that stands there.
        """
        self.deployment = deployment
        self.blocks = blocks
        load = deployment.train or deployment.serve
        self.imbalance = load.imbalance if load is not None else 1.0
        self.splits: list[tuple[str, str, int, tuple[str, ...]]] = []
        self.products: list[tuple[str, str, tuple[str, ...]]] = []  # names of products they begin
        for rule in deployment.shard:
            if rule.target.kind in ("time", "history") and rule.axes:
                raise UserError(
                    f"deployment '{deployment.name}' divides positions ('{rule.target}'), and plans"
                    " do not count what that sends yet"
                )
            if rule.target.kind in ("index", "extent"):
                self.splits += [(s.block, s.name, s.extent, rule.axes) for s in rule.splits]
                named = {(s.block, s.name) for s in rule.splits}
                own = {s.block for s in rule.splits}
                self.products += [
                    (block, name, rule.axes)
                    for block, name, _ in rule.reaches
                    if block in own and (block, name) not in named
                ]
        self._seen: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}

    def array(self, place: Place, child: str, extent: int) -> Placed:
        """Where the blocks of an array indexed by data stand."""
        for rule in self.deployment.shard:
            if rule.target.kind != "array":
                continue
            for split in rule.splits:
                if (split.block, split.name) == (place.module.block, child):
                    return Placed(rule.axes, split.ways, split.each, split.redundant)
        return Placed((), 1, extent)

    def axes(self, place: Place, dims: Iterable[Dim], program: Program) -> tuple[str, ...]:
        """Mesh axes over which some of these dims are divided."""
        if not self.splits:
            return ()
        found: dict[str, None] = {}
        for dim in _atoms(dims):
            for axes in self._axes_of(place, dim, program):
                found.update(dict.fromkeys(axes))
        return tuple(found)

    def ways(self, place: Place, dims: Sequence[Dim], program: Program) -> int:
        """Into how many parts a value with these dims falls."""
        return self.deployment.mesh.ways(self.axes(place, dims, program))

    def _axes_of(self, place: Place, dim: Dim, program: Program) -> Iterator[tuple[str, ...]]:
        """An index is divided where a rule names it; and in the blocks that it is handed to, where
        an index has its extent (names may differ there)."""
        if dim.kind != "plain":
            return
        for block, name, axes in self.products:
            if place.module.block == block and dim.name == name:
                yield axes
        size = program.size(dim)
        above = [self.blocks.get(outer, "") for outer in _above(place)]
        for block, name, extent, axes in self.splits:
            own = place.module.block == block and dim.name == name
            handed = block in above and place.module.block != block
            if (own or handed) and size == extent:
                yield axes

    # -- places of ranks -------------------------------------------------------------------------

    @cached_property
    def per_node(self) -> int:
        cluster = self.deployment.cluster
        return cluster.per_node if cluster is not None else self.deployment.mesh.size

    def nodes(self, axes: Sequence[str]) -> list[int]:
        """The node of each rank of a group along these axes, the first axis outermost."""
        mesh = self.deployment.mesh
        steps = [[i * mesh.stride(a) for i in range(mesh.sizes[a])] for a in axes]
        return [sum(offsets) // self.per_node for offsets in product(*steps)]

    def whole_over(self, axes: Iterable[str]) -> tuple[str, ...]:
        """The mesh axes on which a parameter is whole that ``axes`` divide, but the pipeline's."""
        stages = self.deployment.stages
        taken = {*axes, *([stages.axis] if stages is not None else [])}
        return tuple(a.name for a in self.deployment.mesh.axes if a.name not in taken)

    def state(self, target: str) -> tuple[str, ...] | None:
        """How ``optimizer``, ``gradients`` or ``parameters`` are spread: axes, ("replicas",), or
        None if they are not."""
        for rule in self.deployment.shard:
            if rule.target.kind == target:
                return ("replicas",) if rule.replicas else (rule.axes or None)
        return None


def _above(place: Place) -> Iterator[Where]:
    """The places that a place is in, from near to far."""
    path, ranges = place.path, place.ranges
    while path:
        path, _, child = path.rpartition(".")
        ranges = ranges[:-1] if child.endswith("]") else ranges
        yield path, ranges


def _atoms(dims: Iterable[Dim]) -> Iterator[Dim]:
    for dim in dims:
        if dim.parts:
            yield from _atoms(dim.parts)
        else:
            yield dim
