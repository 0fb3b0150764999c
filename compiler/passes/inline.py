"""Calls replaced by the body they run, where that sends something between ranks.

What a child's body sends can be hidden behind its caller's work only if both stand in one body. A
child's parameters and children are then named by their path: ``mlp.expert``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from compiler import spec
from compiler.ir import KEPT, Dim, Graph, Node, Program, Rewriter, Type
from compiler.signatures import arguments
from compiler.spec_collectives import BETWEEN_RANKS

# Attributes that name dims of their body.
DIM_NAMES = frozenset(
    {"over", "to", "dim", "part", "dims", "rows", "picks", "time", "history", "heads", "values"}
)
RUNS_CHILD = frozenset({"call", "chain", "apply", "routing"})


def sends(program: Program, name: str) -> bool:
    """Whether a body, or one that it calls, sends something itself. Loops are for themselves."""
    graph = program.bodies[name]
    return any(
        n.op in BETWEEN_RANKS or (n.op == "call" and sends(program, n.attrs["body"])) for n in graph
    )


def inlined(program: Program, graph: Graph, units: frozenset[str]) -> Graph:
    """A body with the calls in it replaced that send something.

    Args:
        units: bodies that stay for themselves.
    """
    made = Rewriter(graph)
    for node in graph:
        body = str(node.attrs.get("body", ""))
        if node.op == "call" and body not in units and sends(program, body):
            inner = inlined(program, program.bodies[body], units)
            result = _Splice(program, made, node, inner).run()
            if result is not None:
                made.replace(node.name, result)
                continue
        made.replace(node.name, made.copy(node).name)
    return made.done()


class _Splice:
    """One call that becomes the nodes of its body."""

    def __init__(self, program: Program, made: Rewriter, call: Node, body: Graph):
        self.program, self.made, self.call, self.body = program, made, call, body
        self.path = str(call.attrs["child"])
        own = {d.name: d for n in made.old for d in spec.dims_of(n)}
        own |= {d.name: d for n in made.new for d in spec.dims_of(n)}
        operands = [made.old[i] for i in call.inputs]
        self.to: dict[str, Dim] = arguments(body, operands, dict(call.attrs["dims"]))
        taken = {**own, **{d.name: d for d in self.to.values()}}
        called = dict(call.attrs["dims"])
        for dim in (d for n in body for d in spec.dims_of(n)):
            if dim.name in self.to or dim.parts or dim.axes:
                continue
            name, number = called.get(dim.name, dim.name), 1
            new = replace(dim, name=name)
            while taken.get(new.name, new) != new:
                number += 1
                new = replace(dim, name=f"{name}.{number}")
            self.to[dim.name] = taken[new.name] = new

    @property
    def _renames(self) -> bool:
        return any(name != dim.name for name, dim in self.to.items())

    def run(self) -> str | None:
        """The name of the result; None if the body cannot stand in another module."""
        if not all(map(self._moves, self.body)):
            return None
        given = iter(self.call.inputs)
        names: dict[str, str] = {}
        for node in self.body:
            if node.op == "input":
                names[node.name] = self.made.to[next(given)]
                continue
            label = f"{self.path}.{node.label}" if node.label and self.path else node.label
            rounds = node.rounds
            new = Node(
                self.made.new.fresh(node.name),
                node.op,
                tuple(names[i] for i in node.inputs),
                self._type(node.type),
                dict(self._attrs(node)),
                node.span,
                label,
                rounds,
            )
            names[node.name] = self.made.new.add(new).name
        result = names[self.body.output]
        if self.call.label is None and not self.call.rounds:
            return result
        call = self.call  # its value has a name of its own
        one = self.made.emit(
            call.name, "cast", [result], call.type, span=call.span, label=call.label
        )
        if call.rounds:
            raise AssertionError(f"%{call.name}: a call that rounds is not inlined")
        return one.name

    def _moves(self, node: Node) -> bool:
        """Whether a node means the same in another module."""
        if self.call.rounds or node.op in KEPT or node.op in ("shift", "branch"):
            return False
        if node.type.dtype == "bundle" or (node.op == "rename" and self._renames):
            return False
        if node.op in RUNS_CHILD:
            return True
        bodies = [v for v in node.attrs.values() if isinstance(v, str) and v in self.program.bodies]
        return all(self._stands_alone(name) for name in bodies)

    def _stands_alone(self, name: str) -> bool:
        """Whether a composite's body reads nothing of its module; it uses this body's dims."""
        alone = all(
            n.op not in ("param", "state", "call", *KEPT) for n in self.program.bodies[name]
        )
        return alone and not self._renames

    def _dim(self, dim: Dim) -> Dim:
        if dim.name in self.to:
            return self.to[dim.name]
        if dim.parts:
            parts = [self._dim(p) for p in dim.parts]
            return Dim.sum(parts) if dim.form == "sum" else Dim.product(parts)
        if dim.axes:
            mesh = f"/{'.'.join(dim.axes)}"
            return replace(dim, name=self._name(dim.name.removesuffix(mesh)) + mesh)
        return dim

    def _name(self, name: str) -> str:
        for dim in (d for n in self.body for d in spec.dims_of(n)):
            if dim.name == name:
                return self._dim(dim).name
        return name

    def _type(self, type: Type) -> Type:
        coding = type.coding and type.coding.along(*(self._name(n) for n in type.coding.over))
        of = self._dim(type.of) if type.of else None
        return replace(type, dims=tuple(map(self._dim, type.dims)), of=of, coding=coding)

    def _attrs(self, node: Node) -> Iterator[tuple[str, Any]]:
        for key, value in node.attrs.items():
            if key == "param" and self.path:
                yield key, f"{self.path}.{value}"
            elif key == "child" and node.op in RUNS_CHILD:
                yield key, ".".join(p for p in (self.path, value) if p)
            elif key == "dims" and node.op in RUNS_CHILD:
                yield key, self._called(node, dict(value))
            else:
                yield key, self._value(key, value)

    def _called(self, node: Node, names: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """A call's dims under the names that they have now."""
        inner = {d.name for n in self.program.bodies[node.attrs["body"]] for d in n.type.dims}
        pairs = {name: self._name(names.get(name, name)) for name in sorted(inner)}
        kept = {k: v for k, v in names.items() if k not in pairs}
        return tuple((kept | {k: v for k, v in pairs.items() if k in names or k != v}).items())

    def _value(self, key: str, value: Any) -> Any:
        if isinstance(value, Dim):
            return self._dim(value)
        if isinstance(value, tuple):
            return tuple(self._value(key, v) for v in value)
        if isinstance(value, str) and key in DIM_NAMES:
            return self._name(value)
        return value
