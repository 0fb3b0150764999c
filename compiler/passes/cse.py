"""Common subexpressions, within a body and among the bodies of one definition."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

from compiler.ir import Graph, Node, Program, Rewriter

# Each of these means itself: a cache appends, arguments differ, and a call may hold a cache.
DISTINCT = frozenset({"input", "cache", "scan", "call", "chain", "apply", "branch"})


def run_on(graph: Graph) -> Graph:
    """The body with equal values computed once, and what nothing reads left out."""
    rewriter = Rewriter(graph)
    seen: dict[Hashable, str] = {}
    for node in graph:
        inputs = tuple(rewriter.to[name] for name in node.inputs)
        key = (inputs, *_key(node))
        # A plain name stays even where it is another's equal: `trace` asks for it.
        if node.op in DISTINCT or key not in seen or (node.rounds and node.label):
            made = rewriter.copy(node).name
            seen.setdefault(key, made)
            rewriter.replace(node.name, made)
        else:
            rewriter.replace(node.name, seen[key])
    return rewriter.done()


def _key(node: Node) -> tuple[Hashable, ...]:
    # 1, 1.0 and True are equal as numbers and different as constants.
    attrs = tuple((name, value, type(value)) for name, value in sorted(node.attrs.items()))
    return node.op, node.type, attrs, node.rounds


def merge(program: Program) -> Program:
    """Bodies of one definition that have become identical are one body.

    Equal lines of the source are what makes them one definition's: blocks that happen to compute
    the same keep their own bodies, and their own classes in what is emitted.
    """
    while True:
        first: dict[Hashable, str] = {}
        same: dict[str, str] = {}
        for name, graph in program.bodies.items():
            other = first.setdefault(_form(graph), name)
            if other != name:
                same[name] = other
        if not same:
            return program
        program = _renamed(program, same)


def _form(graph: Graph) -> Hashable:
    """What a body computes, whatever its values are called."""
    number = {node.name: i for i, node in enumerate(graph)}
    nodes = tuple(
        (tuple(number[i] for i in node.inputs), node.label, node.span, *_key(node))
        for node in graph
    )
    return nodes, number[graph.output]


def _renamed(program: Program, to: Mapping[str, str]) -> Program:
    def attrs(node: Node) -> dict[str, Any]:
        return {
            key: to.get(value, value) if isinstance(value, str) and key in BODIES else value
            for key, value in node.attrs.items()
        }

    bodies: dict[str, Graph] = {}
    for name, graph in program.bodies.items():
        if name not in to:
            rewriter = Rewriter(graph)
            for node in graph:
                rewriter.replace(node.name, rewriter.copy(node, attrs=attrs(node)).name)
            bodies[name] = rewriter.done()
    modules = {
        name: replace(module, methods={k: to.get(v, v) for k, v in module.methods.items()})
        for name, module in program.modules.items()
    }
    entries = {
        name: replace(entry, body=to.get(entry.body, entry.body))
        for name, entry in program.entries.items()
    }
    return replace(program, bodies=bodies, modules=modules, entries=entries)


BODIES = frozenset(
    {"body", "read", "then", "otherwise", "block", "mask", "score"}
)  # attributes that name a body
