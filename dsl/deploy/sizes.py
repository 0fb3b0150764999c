"""What a deployment's shard rules divide, at the sizes the model has, and whether they can.

The uses are followed down from the model with each index's rules: an index that a block passes on
is the same index in the block that receives it, so ``Dense.f -> tp`` reaches the weights of the
SwiGLU that Dense uses, and no other's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dsl import typed
from dsl.deploy.typed import Mesh, ShardRule, Split
from dsl.diagnostics import Diagnostics, Span
from dsl.extents import Extent
from dsl.instances import Instance, Instances
from dsl.scope import atoms


@dataclass(frozen=True)
class _Dim:
    """An index in one place: its size and the rules that divide it."""

    size: int
    rules: tuple[ShardRule, ...]


@dataclass(frozen=True)
class _On:
    """Mesh axes in use, by which rule, for which index."""

    rule: ShardRule
    index: str
    axes: tuple[str, ...]


class Sizes:
    """Follows one model under one set of rules; ``splits`` collects what each rule divides."""

    def __init__(
        self,
        instances: Instances,
        rules: Iterable[ShardRule],
        mesh: Mesh,
        found: Diagnostics,
        used: dict[object, Instance],
    ):
        self.instances = instances
        self.used = used  # by user and use: the same for all deployments
        self.mesh = mesh
        self.found = found
        self.rules = [r for r in rules if r.axes]
        self.by_place = {
            (r.target.block, r.target.name): r for r in self.rules if r.target.block is not None
        }
        self.by_extent = {
            instances.checker.constant_extent(r.target.name): r
            for r in self.rules
            if r.target.kind == "extent"
        }
        self.by_dynamic = {
            r.target.name: r for r in self.rules if r.target.kind in ("time", "history")
        }
        self.tokens = [r for r in self.rules if r.target.kind in ("batch", "time")]
        self.splits: dict[Span, dict[Split, None]] = {}
        self.reached: dict[Span, dict[tuple[str, str, Extent], None]] = {}
        self._seen: set[object] = set()
        self._told: set[object] = set()  # pairs of rules that have been seen to disagree

    def visit(
        self,
        instance: Instance,
        bound: Mapping[str, _Dim] = {},
        arrays: tuple[_On, ...] = (),
    ) -> None:
        """A block with what its formal indices are bound to, inside placed arrays of blocks."""
        key = (
            instance.name,
            tuple((name, dim.size, tuple(map(id, dim.rules))) for name, dim in bound.items()),
            tuple((id(on.rule), on.index) for on in arrays),
        )
        if key in self._seen:
            return
        self._seen.add(key)
        block = instance.block
        at = _Place(self, instance, bound)
        for stored in block.stored:
            self._once(self._on(stored.axes, at, arrays), stored.name, block.name, stored.span)
            for index in (i for axis in stored.axes for i in atoms(axis)):
                for rule in at.rules(index):
                    there = (block.name, index.name, instance.extent(index.size))
                    self.reached.setdefault(rule.span, {})[there] = None
        # Tokens that were sent to a placed array of blocks are no longer spread over its axes.
        spread = {name for on in arrays for name in on.axes}
        tokens = tuple(
            _On(r, r.target.name, tuple(a for a in r.axes if a not in spread)) for r in self.tokens
        )
        for definition in block.defs.values():
            for e in definition.equations:
                self._once(self._on(e.axes, at, tokens), e.name, block.name, e.span)
        for use in block.uses:
            self._use(instance, use, at, arrays)

    def _use(self, instance: Instance, use: typed.Use, at: _Place, arrays: tuple[_On, ...]) -> None:
        block, target = instance.block.name, use.target[0]
        bound = {
            formal.text: _Dim(
                instance.extent(axis.size).at(self.instances.sizes),
                tuple(dict.fromkeys(r for i in atoms(axis) for r in at.rules(i))),
            )
            for formal, axis in zip(target.indices, use.bind, strict=True)
        }
        if use.array is not None:
            placed = [_On(r, use.array.name, r.axes) for r in at.rules(use.array)]
            rule = self.by_place.get((block, use.name))
            if rule is not None:
                size = instance.extent(use.array.extent).at(self.instances.sizes)
                self.split(rule, block, use.name, size, use.span)
                placed.append(_On(rule, use.name, rule.axes))
            arrays += tuple(placed)
        key = (instance.name, id(use))
        if key not in self.used:
            self.used[key] = self.instances.used(instance, use)
        self.visit(self.used[key], bound, arrays)

    # -- what goes wrong -------------------------------------------------------------------------

    def _on(self, axes: Iterable[typed.Axis], at: _Place, also: tuple[_On, ...]) -> list[_On]:
        """Every rule that divides a value of these axes, with the index it divides."""
        out = list(also)
        for index in (i for axis in axes for i in atoms(axis)):
            parts = atoms(index.alias) if index.alias is not None else []
            begins = outermost(index)
            first = at.rules(begins) if begins is not None else ()
            out += [_On(r, index.name, r.axes) for r in at.rules(index) if r not in first]
            for one in parts:
                out += [_On(r, one.name, r.axes) for r in at.rules(one)]
        return out

    def _once(self, used: list[_On], name: str, block: str, span: Span) -> None:
        """A mesh axis divides a value at most once."""
        first: dict[str, _On] = {}
        for on in used:
            for axis in on.axes:
                before = first.setdefault(axis, on)
                if before.index == on.index or self.mesh.sizes[axis] == 1:
                    continue
                self._twice(axis, before, on, name, block, span)
                return

    def _twice(self, axis: str, one: _On, other: _On, name: str, block: str, span: Span) -> None:
        first, second = sorted(
            (one, other), key=lambda on: (on.rule.span.line, on.rule.span.column)
        )
        pair = (first.rule.span, second.rule.span)
        if pair in self._told:
            return
        self._told.add(pair)
        hint = "give one of them another axis"
        if "batch" in (one.index, other.index):
            hint += ", or place an array of blocks instead of its index"
        self.found.error(
            "E0814",
            f"mesh axis '{axis}' would divide '{name}' of '{block}' twice,"
            f" along '{first.index}' and along '{second.index}'",
            second.rule.span,
            notes=[
                (first.rule.span, f"'{axis}' is given to '{first.index}' here"),
                (span, f"'{name}' has both"),
            ],
            hint=hint,
        )

    def differ(self, index: typed.Index, one: ShardRule, other: ShardRule) -> None:
        self.found.error(
            "E0814",
            f"'{index.name}' is one index, and two rules divide it differently",
            other.span,
            notes=[(one.span, "the other rule is here"), (index.span, "it is passed on here")],
            hint="keep one of the rules",
        )

    def split(self, rule: ShardRule, block: str, name: str, size: int, span: Span | None) -> None:
        ways = self.mesh.ways(rule.axes)
        split = Split(block, name, size, rule.redundant, ways)
        if split in self.splits.setdefault(rule.span, {}):
            return
        self.splits[rule.span][split] = None
        left = (size + rule.redundant) % ways
        if left == 0:
            return
        shown = f"{size} + {rule.redundant}" if rule.redundant else str(size)
        hint = ""
        if rule.target.kind == "array":
            more = rule.redundant + ways - left
            hint = (
                f"copies fill up the ranks: {rule.target} -> {_spelled(rule)} with {more} redundant"
            )
        self.found.error(
            "E0815",
            f"'{block}.{name}' has {shown} entries, which {ways} ranks cannot share evenly",
            rule.span,
            notes=[(span, "declared here")],
            hint=hint,
        )


class _Place:
    """The indices of one block in one place, each looked at when it is first met."""

    def __init__(self, sizes: Sizes, instance: Instance, bound: Mapping[str, _Dim]):
        self.sizes = sizes
        self.instance = instance
        self.bound = bound
        self._dims: dict[typed.Index, tuple[ShardRule, ...]] = {}
        for index in instance.block.scope.indices.values():
            self.rules(index)

    def rules(self, index: typed.Index) -> tuple[ShardRule, ...]:
        """The rules that divide an index."""
        if index.kind != "plain":
            rule = self.sizes.by_dynamic.get(index.name) if index.kind == "history" else None
            return () if rule is None else (rule,)
        if index not in self._dims:
            self._dims[index] = self._find(index)
        return self._dims[index]

    def _find(self, index: typed.Index) -> tuple[ShardRule, ...]:
        sizes, block = self.sizes, self.instance.block.name
        outer = self.bound.get(index.name) if index.formal else None
        rules = list(outer.rules) if outer is not None else []
        own = sizes.by_place.get((block, index.name))
        if own is None and not index.formal:
            own = sizes.by_extent.get(index.extent)
        if own is None and not rules and (first := outermost(index)) is not None:
            return self.rules(first)  # the same contiguous parts
        if own is None:
            return tuple(rules)
        for other in rules:
            if other.axes != own.axes:
                sizes.differ(index, other, own)
        if outer is not None:
            size = outer.size
        else:
            size = self.instance.extent(index.extent).at(sizes.instances.sizes)
        sizes.split(own, block, index.name, size, index.span)
        return tuple(dict.fromkeys([*rules, own]))


def outermost(index: typed.Index) -> typed.Index | None:
    """Of an index that stands for a product, the one in whose parts it falls too; None of another,
    and of a sum, whose parts lie behind one another."""
    axis: typed.Axis | None = index.alias
    while isinstance(axis, typed.Product):
        axis = axis.parts[0]
    return axis if isinstance(axis, typed.Index) else None


def _spelled(rule: ShardRule) -> str:
    return rule.axes[0] if len(rule.axes) == 1 else f"({', '.join(rule.axes)})"
