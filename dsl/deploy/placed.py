"""Where a deployment's shard rules place what each block declares.

``placed`` follows the uses down from the model, as ``deploy_sizes`` does when it checks them, and
gives the tree of blocks with the mesh axes of every index and of every array of blocks. It is what
the ``shard`` pass knows of the source: the graph's modules and their children stand in this order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsl import typed
from dsl.deploy.sizes import Sizes, _Dim, _Place, outermost
from dsl.deploy.typed import Deployment, ShardRule
from dsl.diagnostics import Diagnostic, DiagnosticError, Diagnostics
from dsl.instances import Instance, Instances
from dsl.program import CheckedProgram
from dsl.scope import atoms

Axes = tuple[str, ...]


@dataclass(frozen=True)
class PlacedUse:
    """A use of a block.

    Attributes:
        axes: over which an array that is indexed by data is dealt out.
        redundant: how many further copies of its blocks there are.
        blocks: how many it has, in ``groups`` contiguous groups: of ``e = (g, m)``, as many as g.
    """

    name: str
    axes: Axes
    redundant: int
    block: PlacedBlock
    blocks: int = 1
    groups: int = 1


@dataclass(frozen=True)
class PlacedBlock:
    """A block in one place of the model: the axes of its indices that are divided, by name, and its
    uses in the order of the source."""

    block: str
    axes: tuple[tuple[str, Axes], ...]
    uses: tuple[PlacedUse, ...]

    def of(self, index: str) -> Axes:
        return dict(self.axes).get(index, ())


def placed(source: CheckedProgram, deployment: Deployment) -> PlacedBlock:
    """The tree of the model's blocks under a deployment that holds at the program's sizes.

    Raises:
        DiagnosticError: a rule asks for what is not built.
    """
    assert source.model is not None
    instances = Instances(source.checker, source.constants)
    root = instances.root(*source.model)
    for rule in deployment.shard:
        if rule.axes and rule.target.kind in ("time", "history"):
            message = f"positions cannot be divided yet: '{rule.target}' stays whole on every rank"
            raise DiagnosticError([Diagnostic("E0818", message, rule.span)])
    follow = Sizes(instances, deployment.shard, deployment.mesh, Diagnostics(), {})
    return _Follower(follow).block(root, {})


def dealt(block: PlacedBlock) -> Iterator[PlacedUse]:
    """Every array of blocks that a deployment deals out over ranks, each once."""
    found: dict[PlacedUse, None] = {}

    def walk(block: PlacedBlock) -> None:
        for use in block.uses:
            if use.axes:
                found[use] = None
            walk(use.block)

    walk(block)
    yield from found


class _Follower:
    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self._made: dict[object, PlacedBlock] = {}

    def block(self, instance: Instance, bound: Mapping[str, _Dim]) -> PlacedBlock:
        key = (instance.name, tuple((n, d.size, tuple(map(id, d.rules))) for n, d in bound.items()))
        if key not in self._made:
            at = _Place(self.sizes, instance, bound)
            indices = instance.block.scope.indices.values()
            axes = {i.name: _axes(at, i) for i in indices if i.kind == "plain"}
            uses = tuple(self._use(instance, use, at) for use in instance.block.uses)
            known = tuple((name, own) for name, own in axes.items() if own)
            self._made[key] = PlacedBlock(instance.block.name, known, uses)
        return self._made[key]

    def _use(self, instance: Instance, use: typed.Use, at: _Place) -> PlacedUse:
        sizes = self.sizes.instances.sizes
        bound = {
            formal.text: _Dim(
                instance.extent(axis.size).at(sizes),
                tuple(dict.fromkeys(r for i in atoms(axis) for r in at.rules(i))),
            )
            for formal, axis in zip(use.target[0].indices, use.bind, strict=True)
        }
        axes: Axes = ()
        redundant, blocks, groups = 0, 1, 1
        if use.array is not None:
            blocks = instance.extent(use.array.extent).at(sizes)
            if use.array.alias is not None:
                groups = instance.extent(atoms(use.array.alias)[0].extent).at(sizes)
            rule = self.sizes.by_place.get((instance.block.name, use.name))
            if rule is not None:
                axes, redundant = rule.axes, rule.redundant
            else:
                axes = _axes(at, use.array)
        block = self.block(self.sizes.instances.used(instance, use), bound)
        return PlacedUse(use.name, axes, redundant, block, blocks, groups)


def _axes(at: _Place, index: typed.Index) -> Axes:
    """The axes that divide an index. One that stands for a product ``e = (g, m)`` is divided with
    the first of its indices: both fall into the same contiguous parts."""
    rules: list[ShardRule] = list(at.rules(index))
    first = outermost(index)
    if index.alias is None or (rules and (first is None or rules != list(at.rules(first)))):
        return rules[0].axes if rules else ()  # named by a rule of its own
    for inner in atoms(index.alias):
        for rule in at.rules(inner) if inner is not first else ():
            message = f"'{index.name}' cannot be divided along '{inner.name}', which is not its"
            hint = f"divide '{first.name}' or '{index.name}' instead" if first is not None else ""
            raise DiagnosticError(
                [Diagnostic("E0818", f"{message} outermost index", rule.span, hint=hint)]
            )
    return rules[0].axes if rules else ()
