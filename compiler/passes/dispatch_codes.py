"""Codes are sent in the place of the values that receivers would quantise.

A tile lies within a token, so that quantising and sending are done in either order with the same
codes and scales. ``fp8`` runs this when it has placed its codes.
"""

from __future__ import annotations

from dataclasses import replace

from compiler.coding import Coding
from compiler.ir import Graph, Node, Program, Rewriter


def run(program: Program) -> Program:
    if not program.mesh:
        return program
    return program.with_bodies({name: _body(graph) for name, graph in program.bodies.items()})


def _coding(graph: Graph, node: Node) -> Coding | None:
    """The one coding that all who read what is dispatched want of it."""
    users = graph.users(node.name)
    found = {u.attrs["coding"] for u in users if u.op == "quantize"}
    alike = len(found) == 1 and all(u.op == "quantize" for u in users) and node.name != graph.output
    coding: Coding | None = found.pop() if alike else None
    sent = {d.name for d in node.type.dims if d.kind == "rows"}
    return None if coding is None or set(coding.over) & sent else coding


def _body(graph: Graph) -> Graph:
    made = Rewriter(graph)
    coded: dict[tuple[str, Coding], str] = {}  # what has been quantised, by its new name
    moved: set[str] = set()
    for node in graph:
        if node.op == "quantize" and node.inputs[0] in moved:
            made.replace(node.name, made.to[node.inputs[0]])
            continue
        coding = _coding(graph, node) if node.op == "dispatch" else None
        if coding is not None:
            node = _quantised(made, node, coding, coded)
            made.replace(node.name, made.new.add(node).name)
            moved.add(node.name)
            continue
        copy = made.copy(node)
        made.replace(node.name, copy.name)
        if node.op == "quantize":
            coded[copy.inputs[0], node.attrs["coding"]] = copy.name
    return made.done()


def _quantised(
    made: Rewriter, node: Node, coding: Coding, coded: dict[tuple[str, Coding], str]
) -> Node:
    """The node, with codes as what it sends."""
    sent, pick, x = (made.to[i] for i in node.inputs)
    if (x, coding) not in coded:
        type = replace(made.new[x].type, dtype="coded", coding=coding)
        one = made.emit(
            f"{x}_codes", "quantize", [x], type, attrs={"coding": coding}, span=node.span
        )
        coded[x, coding] = one.name
    type = replace(node.type, dtype="coded", coding=coding)
    return node.with_(inputs=(sent, pick, coded[x, coding]), type=type)
