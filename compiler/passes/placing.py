"""One body gone through with the types that its arguments have on one rank.

A value is known by what it is on one rank (``Placed``): its node in the new body, and the mesh axes
along which the ranks' values are still to be added up, if it is a partial sum. A sum is put off as
long as readers are linear, so that two partial sums that are added cost one reduction; what a
reader needs of its operands it asks of the functions here, which write the collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compiler.collectives import divided, whole
from compiler.errors import UserError
from compiler.ir import Dim, Graph, Node, Rewriter, Type
from compiler.spec_collectives import BETWEEN_RANKS

if TYPE_CHECKING:
    from compiler.passes.shard import Sharder

# Attributes that name dims; the rest name other things.
OF_DIMS = frozenset({"over", "to", "dim", "dims", "rows", "picks", "heads", "values", "terms"})
Dims = Mapping[str, Dim]


class NotBuilt(UserError):
    """A deployment asks for what the pass cannot do; the message names the line."""


@dataclass(frozen=True)
class Placed:
    """A value on one rank.

    Attributes:
        partial: the mesh axes along which the ranks' values are to be added up.
    """

    name: str
    type: Type
    partial: tuple[str, ...] = ()


@dataclass
class Operands:
    """A node's operands on one rank, and what its dims are called there."""

    values: list[Placed]
    dims: dict[str, Dim] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [v.name for v in self.values]


def like(old: Dim, other: Dim) -> Dim:
    """A dim divided as another one is, part by part. What one product is called by another name is
    divided as its outermost part: the parts are contiguous too."""
    if other.axes:
        return divided(old, other.axes)
    if not old.parts and other.form == "product" and not axes_of(other.parts[1:]):
        return divided(old, axes_of(other.parts[:1])) if other.parts[0].axes else old
    if not other.parts or len(old.parts) != len(other.parts):
        return old
    parts = [like(o, n) for o, n in zip(old.parts, other.parts, strict=True)]
    return Dim.sum(parts) if old.form == "sum" else Dim.product(parts)


def with_parts(old: Dim, new: Dim) -> Iterable[tuple[Dim, Dim]]:
    """A dim and its parts, each with what it became."""
    yield old, new
    if not new.axes:
        for o, n in zip(old.parts, new.parts, strict=True):
            yield from with_parts(o, n)


def axes_of(dims: Iterable[Dim]) -> tuple[str, ...]:
    """The mesh axes that divide these dims or parts of them."""
    found: dict[str, None] = {}
    for dim in dims:
        found |= dict.fromkeys((*dim.axes, *axes_of(dim.parts)))
    return tuple(found)


def is_divided(dim: Dim) -> bool:
    return bool(axes_of([dim]))


class Placer:
    """Makes the body of one rank."""

    def __init__(self, sharder: Sharder, module: str, old: Graph, name: str):
        self.sharder = sharder
        self.module = module
        self.old = old
        self.rewriter = Rewriter(old, name)
        self.values: dict[str, Placed] = {}  # by the old node's name
        self._known: dict[tuple[object, ...], Placed] = {}  # collectives that are there already

    def run(self, types: tuple[Type, ...], plain: bool) -> tuple[Graph, Placed]:
        from compiler.passes.placing_rules import place  # the rules need this module

        given = iter(types)
        for node in self.old:
            if node.op == "input":
                made = self.rewriter.new.add(node.with_(type=next(given)))
                self.values[node.name] = Placed(made.name, made.type)
            else:
                self.values[node.name] = place(self, node)
        result = self.values[self.old.output]
        if plain:
            result = self.entire(result)
        graph = self.rewriter.done(result.name)
        return graph, result

    # -- what rules ask ---------------------------------------------------------------------------

    def emit(self, node: Node, inputs: Iterable[str], type: Type, **changes: Any) -> Placed:
        """The node itself on one rank."""
        made = node.with_(inputs=tuple(inputs), type=type, **changes)
        if made.name in self.rewriter.new:
            made = made.with_(name=self.rewriter.new.fresh(made.name))
        self.rewriter.new.add(made)
        return Placed(made.name, type)

    def beside(self, value: Placed, op: str, type: Type, **attrs: Any) -> Placed:
        """A further node that makes something of a value, each once."""
        key = (op, value.name, tuple(attrs.items()))
        if key not in self._known:
            before = self.rewriter.new[value.name]
            short = op.replace("_", "")
            made = self.rewriter.emit(
                f"{value.name}.{short}", op, [value.name], type, attrs=attrs, span=before.span
            )
            self._known[key] = Placed(made.name, type)
        return self._known[key]

    def summed(self, value: Placed) -> Placed:
        """A partial sum put together."""
        if not value.partial:
            return value
        return self.beside(value, "all_reduce", value.type, axes=value.partial, fn="sum")

    def gathered(self, value: Placed, name: str) -> Placed:
        """The value with one dim, or a part of one, whole; ``name`` is what it is called now."""
        value = self.summed(value)
        dim = value.type.dim(name)
        if dim.axes:
            type = _with(value.type, dim, whole(dim))
            return self.beside(value, "all_gather", type, axes=dim.axes, dim=name)
        if not is_divided(dim):
            return value
        if dim.form == "sum":
            return self._sum_gathered(value, dim)
        pieces = self.beside(
            value, "unflatten", _with(value.type, dim, *dim.parts), dim=name, into=dim.parts
        )
        for part in dim.parts:
            pieces = self.gathered(pieces, part.name)
        into = _whole(dim)
        dims = tuple(_whole(p).name for p in dim.parts)
        rest = tuple(d for d in pieces.type.dims if d.name not in dims)
        at = value.type.names.index(name)
        type = replace(pieces.type, dims=(*rest[:at], into, *rest[at:]))
        return self.beside(pieces, "flatten", type, dims=dims, into=into)

    def _sum_gathered(self, value: Placed, dim: Dim) -> Placed:
        parts = []
        for part in dim.parts:
            type = _with(value.type, dim, part)
            one = self.beside(value, "part", type, dim=dim.name, part=part.name)
            parts.append(self.gathered(one, part.name))
        into = _whole(dim)
        type = _with(value.type, dim, into)
        made = self.rewriter.emit(
            f"{value.name}.whole", "concat", [p.name for p in parts], type, attrs={"dim": into}
        )
        return Placed(made.name, type)

    def entire(self, value: Placed) -> Placed:
        """The value whole on every rank."""
        value = self.summed(value)
        for dim in value.type.dims:
            if is_divided(dim):
                value = self.gathered(value, dim.name)
        return value

    def part(self, value: Placed, dim: Dim, axes: tuple[str, ...], alone: bool) -> Placed:
        """A rank's part of a dim that is whole.

        A partial sum along the same axes is scattered if no one else reads it, which sends half of
        what an all-reduce does; else a part of the all-reduced one costs nothing.
        """
        type = _with(value.type, dim, divided(dim, axes))
        attrs = {"axes": axes, "dim": dim.name}
        if value.partial == axes and alone:
            return self.beside(value, "reduce_scatter", type, **attrs)
        return self.beside(self.summed(value), "part_of", type, **attrs)

    def unified(self, node: Node) -> Operands:
        """A node's operands, such that each dim is the same in all of them."""
        values = [self.values[i] for i in node.inputs]
        for name in self._names(node, values):
            found = {dims[name] for dims in self._dims(node, values) if name in dims}
            if len(found) < 2:
                continue
            parts = {d for d in found if is_divided(d)}
            if len(parts) == 1 and (part := next(iter(parts))).axes:
                values = self._each(node, values, name, part)
            else:
                values = self._each(node, values, name, None)
        dims = {k: v for one in self._dims(node, values) for k, v in one.items()}
        return Operands(values, dims)

    def _names(self, node: Node, values: list[Placed]) -> list[str]:
        return list(dict.fromkeys(n for i in node.inputs for n in self.old[i].type.names))

    def _dims(self, node: Node, values: list[Placed]) -> list[dict[str, Dim]]:
        """For each operand: what its dims, and their parts, became."""
        return [
            {
                old.name: new
                for o, n in zip(self.old[i].type.dims, v.type.dims, strict=True)
                for old, new in with_parts(o, n)
            }
            for i, v in zip(node.inputs, values, strict=True)
        ]

    def _each(self, node: Node, values: list[Placed], name: str, part: Dim | None) -> list[Placed]:
        """The operands with one dim the same in all: this part of it, or all of it."""
        out = []
        for i, value in zip(node.inputs, values, strict=True):
            names = self.old[i].type.names
            if name in names:
                own = value.type.dims[names.index(name)]
                if part is None:
                    value = self.gathered(value, own.name)
                elif own != part:
                    alone = len(self.old.users(i)) == 1 and i != self.old.output
                    value = self.part(value, own, part.axes, alone)
            out.append(value)
        return out

    def made_whole(self, node: Node, given: Operands, names: Iterable[str]) -> Operands:
        """Operands in which these dims (by their old names) are whole."""
        values = list(given.values)
        for at, i in enumerate(node.inputs):
            for name, old in zip(self.old[i].type.names, self.old[i].type.dims, strict=True):
                if name in names:
                    place = self.old[i].type.names.index(old.name)
                    values[at] = self.gathered(values[at], values[at].type.dims[place].name)
        dims = {k: v for one in self._dims(node, values) for k, v in one.items()}
        return Operands(values, dims)

    def all_summed(self, given: Operands) -> Operands:
        return Operands([self.summed(v) for v in given.values], given.dims)

    def fails(self, node: Node, message: str) -> NotBuilt:
        where = f"{node.span}: " if node.span else ""
        return NotBuilt(f"{where}{message}")


def renamed(value: Any, dims: Dims) -> Any:
    """An attribute with names of dims, or dims, as they are now."""
    if isinstance(value, Dim):
        return dims.get(value.name, value)
    if isinstance(value, str):
        return dims[value].name if value in dims else value
    if isinstance(value, tuple):
        return tuple(renamed(v, dims) for v in value)
    return value


def attributes(node: Node, dims: Dims) -> dict[str, Any]:
    found = {k: renamed(v, dims) if k in OF_DIMS else v for k, v in node.attrs.items()}
    if "quantises" in found:  # which dims tiles run along
        found["quantises"] = tuple(
            c and c.along(*renamed(c.over, dims)) for c in found["quantises"]
        )
    return found


def communicates(graph: Graph) -> bool:
    return any(node.op in BETWEEN_RANKS for node in graph)


def _whole(dim: Dim) -> Dim:
    if not dim.parts:
        return whole(dim)
    parts = [_whole(part) for part in dim.parts]
    return Dim.sum(parts) if dim.form == "sum" else Dim.product(parts)


def _with(type: Type, old: Dim, *new: Dim) -> Type:
    out: list[Dim] = []
    for dim in type.dims:
        out += new if dim.name == old.name else (dim,)
    return replace(type, dims=tuple(out))
