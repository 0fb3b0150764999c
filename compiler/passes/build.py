"""A body under construction, and how axes become dims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compiler import rules
from compiler.ir import KEPT, Dim, Graph, Node, Type
from dsl import typed
from dsl.diagnostics import Span
from dsl.instances import Instance


@dataclass(frozen=True)
class Lifting:
    """For each argument, the caller's dims beyond its formal's. ``rows``: they are flattened into
    the rows of one block of an array."""

    dims: tuple[tuple[Dim, ...], ...]
    rows: bool = False


def dim_of(instance: Instance, axis: typed.Axis) -> Dim:
    """An axis of a block as a dim, under its own name."""
    if isinstance(axis, typed.Index):
        size, start = instance.extent(axis.extent), instance.extent(axis.start)
        return Dim(axis.name, size, axis.kind, start=start)  # type: ignore[arg-type]
    parts = [dim_of(instance, p) for p in axis.parts]
    return Dim.sum(parts) if isinstance(axis, typed.Sum) else Dim.product(parts)


SOURCES = ("param", "state", "input", "position", "iota")


class Builder:
    """A body under construction: nodes can still be renamed, labelled and shared."""

    def __init__(self, name: str):
        self.name = name
        self.nodes: dict[str, Node] = {}
        self._shared: dict[object, str] = {}
        self._hints: dict[str, str] = {}
        self._number = 0

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def add(
        self, op: str, inputs: tuple[str, ...], type: Type, span: Span | None, /, **attrs: Any
    ) -> str:
        """A node; sources (parameters, positions, iotas) are made once per body."""
        key = (op, tuple(sorted(attrs.items())), type) if not inputs and op != "constant" else None
        if key is not None and key in self._shared:
            return self._shared[key]
        self._number += 1
        name = str(attrs.get("param", "")) or f"%{self._number}"
        self.nodes[name] = Node(name, op, inputs, type, attrs, span)
        if key is not None:
            self._shared[key] = name
        return name

    def type(self, name: str) -> Type:
        return self.nodes[name].type

    def operands(self, names: tuple[str, ...]) -> list[Node]:
        return [self.nodes[n] for n in names]

    def dtype(self, *names: str) -> Any:
        return rules.join(self.operands(names))

    def name_value(
        self, node: str, name: str, rounds: bool, span: Span, taken: bool, trace: bool
    ) -> str:
        """Give a value its source name; one that has a name already (``taken``) gets a copy.

        Names of a block's equations can be traced; those of inlined functions only help a reader.
        """
        old = self.nodes[node]
        if taken or old.label is not None or old.op in SOURCES:
            node = self.add("cast", (node,), old.type, span)
            old = self.nodes[node]
        label = name if trace else None
        self.nodes[node] = old.with_(label=label, rounds=rounds or old.rounds, span=span)
        self._hints[node] = name
        return node

    def hint(self, node: str) -> str:
        """What a value that cannot be traced is called, if it has a name."""
        return self._hints.get(node, "")

    def call(self, node: str, name: str) -> None:
        self._hints[node] = name

    def finish(self, output: str) -> Graph:
        """The graph: labelled values under their labels, the others numbered in order."""
        names: dict[str, str] = {}
        taken: set[str] = set()

        def fresh(stem: str) -> str:
            name, number = stem, 1
            while name in taken:
                name, number = f"{stem}.{number}", number + 1
            taken.add(name)
            return name

        live = self._live(output)
        nodes = [n for n in self.nodes.values() if n.name in live]
        for node in nodes:  # arguments keep their names whatever else is called so
            if node.op == "input":
                names[node.name] = fresh(node.attrs["name"])
        for node in nodes:
            known = node.label or node.attrs.get("param") if node.op != "input" else None
            if known:
                names[node.name] = fresh(known)
        for node in nodes:
            if node.name not in names and node.name in self._hints:
                names[node.name] = fresh(self._hints[node.name])
        number = 0
        graph = Graph(self.name)
        for node in nodes:
            if node.name not in names:
                number += 1
                names[node.name] = fresh(str(number))
            graph.add(
                node.with_(name=names[node.name], inputs=tuple(names[i] for i in node.inputs))
            )
        graph.output = names[output]
        return graph

    def _live(self, output: str) -> set[str]:
        stack = [output, *(n.name for n in self.nodes.values() if n.op == "input" or n.op in KEPT)]
        live: set[str] = set()
        while stack:
            name = stack.pop()
            if name not in live:
                live.add(name)
                stack += self.nodes[name].inputs
        return live
