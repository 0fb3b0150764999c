"""hoist: what is the same in every layer is computed once, by the caller.

A value of a body that depends on no argument and no parameter, only on positions and constants (a
rotary table), is the same wherever and however often the body runs: it moves to the caller and
comes back as an argument, from body to caller up to the entry. Then equal values of a body are
computed once, and so the tables of dense and sparse layers, queries and keys become one.

Three kinds of value stay where they are: bodies of an ``apply`` get rows of several tokens, and
branch sides and composites are part of their body, so nothing leaves these; a number alone is
cheaper to write down than to pass; and a value over nothing but positions (a mask, or its parts) is
what an attention kernel computes for itself from its structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import networkx as nx

from compiler import spec
from compiler.ir import Dim, Graph, Node, Program, Rewriter, Type
from compiler.passes import cse, simplify

SOURCES = frozenset({"constant", "iota", "position"})
# What reads a body's arguments, parameters or cache; other ops are functions of their operands.
BOUND = frozenset({"input", "param", "state", "cache", "scan", "select_rows"})
# Attributes that name dims.
DIM_NAMES = frozenset({"over", "to", "dim", "dims", "part"})


def run(program: Program) -> Program:
    bodies = dict(program.bodies)
    for name in _callees_first(program):
        # Equal tables move as one.
        bodies[name] = cse.run_on(simplify.run_on(bodies[name]))
        moved = _invariants(bodies[name]) if _may_lose(program, name) else []
        if not moved:
            continue
        for caller, graph in bodies.items():
            if any(node.attrs.get("body") == name for node in graph):
                bodies[caller] = _receive(graph, bodies[name], moved)
        bodies[name] = _release(bodies[name], moved)
    return cse.merge(program.with_bodies(bodies))


def load_time(graph: Graph) -> set[str]:
    """Values that depend on nothing a step brings, nor on a parameter: frequency tables. Backends
    compute them once, when the model is loaded."""
    return _depending_on(graph, frozenset({"constant", "iota"}))


def _depending_on(graph: Graph, sources: frozenset[str]) -> set[str]:
    """Values computed from these ops alone."""
    found: set[str] = set()
    for node in graph:
        if node.op in sources or (
            node.inputs
            and found.issuperset(node.inputs)
            and node.op not in BOUND
            and not spec.runs(node, graph)
        ):
            found.add(node.name)
    return found


def _callees_first(program: Program) -> list[str]:
    calls: nx.DiGraph[str] = nx.DiGraph()
    calls.add_nodes_from(program.bodies)
    for name, graph in program.bodies.items():
        for node in graph:
            calls.add_edges_from((name, run.body) for run in spec.runs(node, graph))
    return list(reversed(list(nx.lexicographical_topological_sort(calls))))


def _may_lose(program: Program, name: str) -> bool:
    """Can every place that runs this body pass it further arguments?"""
    if any(entry.body == name for entry in program.entries.values()):
        return False
    users = {
        node.op
        for graph in program.bodies.values()
        for node in graph
        if name in node.attrs.values()
    }
    return bool(users) and users <= {"call", "chain"}


def _invariants(graph: Graph) -> list[str]:
    """The values that move, in order: those that something bound to this body reads."""
    free = _depending_on(graph, SOURCES)
    return [
        node.name
        for node in graph
        if node.name in free
        and node.op not in SOURCES
        and node.name != graph.output
        and any(dim.kind == "plain" for dim in node.type.dims)
        and not free.issuperset(graph.nx.successors(node.name))
    ]


def _release(graph: Graph, moved: list[str]) -> Graph:
    """The body with these values as further arguments, after those it has."""
    rewriter = Rewriter(graph)
    names = {node.attrs["name"] for node in graph.inputs}
    for node in graph.inputs:
        rewriter.replace(node.name, rewriter.copy(node).name)
    for name in moved:
        node = graph[name]
        known = _unused(_word(graph, node), names)
        names.add(known)
        unique = rewriter.new.fresh(known)
        made = Node(unique, "input", (), node.type, {"name": known}, node.span, node.label)
        rewriter.replace(name, rewriter.new.add(made).name)
    for node in graph:
        if node.name not in rewriter.to:
            rewriter.replace(node.name, rewriter.copy(node).name)
    return rewriter.done()


def _receive(caller: Graph, body: Graph, moved: list[str]) -> Graph:
    """The caller, which computes these values before each run of the body and passes them."""
    needed = set(moved).union(*(nx.ancestors(body.nx, name) for name in moved))
    labels = {node.label for node in caller}
    rewriter = Rewriter(caller)
    for node in caller:
        if node.attrs.get("body") != body.name:
            rewriter.replace(node.name, rewriter.copy(node).name)
            continue
        given = dict(node.attrs.get("dims", ()))
        names = _names(caller, [old for old in body if old.name in needed], given)
        here: dict[str, str] = {}
        for old in body:
            if old.name in needed:
                stem = _word(body, old) if old.name in moved else old.name
                made = _under(old, names).with_(
                    name=rewriter.new.fresh(stem),
                    inputs=tuple(here[i] for i in old.inputs),
                    label=old.label if old.label not in labels else None,
                )
                here[old.name] = rewriter.new.add(made).name
                labels.add(old.label)  # a second run of the body computes the same once more
        used = {dim.name for name in moved for dim in body[name].type.dims}
        pairs = tuple((a, b) for a, b in names.items() if a != b and a in used and a not in given)
        attrs = {**node.attrs, "dims": (*node.attrs.get("dims", ()), *pairs)}
        inputs = (*(rewriter.to[i] for i in node.inputs), *(here[name] for name in moved))
        ran = node.with_(name=rewriter.new.fresh(node.name), inputs=inputs, attrs=attrs)
        rewriter.replace(node.name, rewriter.new.add(ran).name)
    return rewriter.done()


def _word(graph: Graph, node: Node) -> str:
    """What to call a value that leaves its body: its label, or the function it is made by."""
    while not node.label and node.op == "map" and len(node.inputs) > 1:
        node = max(graph.operands(node), key=lambda operand: len(operand.type.dims))
    return node.label or str(node.attrs.get("fn", node.op))


def _unused(name: str, taken: set[str]) -> str:
    number, unused = 1, name
    while unused in taken:
        number, unused = number + 1, f"{name}_{number + 1}"
    return unused


# -- dims under the caller's names ---------------------------------------------------------------


def _names(caller: Graph, nodes: list[Node], given: Mapping[str, str]) -> dict[str, str]:
    """The caller's name for every dim of these nodes: what the call says, the same name, or a new
    one where the caller means another dim by it."""
    taken = {dim.name: dim for node in caller for whole in node.type.dims for dim in _atoms(whole)}
    wholes = [dim for node in nodes for dim in node.type.dims]
    names: dict[str, str] = {}
    for dim in (dim for whole in wholes for dim in _atoms(whole)):
        if dim.name in names:
            continue
        name = given.get(dim.name, dim.name)
        if dim.name not in given and taken.get(name, dim) != dim:
            name = _unused(name, set(taken))
        names[dim.name] = name
        taken.setdefault(name, replace(dim, name=name))
    return names | {whole.name: _called(whole, names).name for whole in wholes}


def _atoms(dim: Dim) -> list[Dim]:
    return [atom for part in dim.parts for atom in _atoms(part)] if dim.parts else [dim]


def _called(dim: Dim, names: Mapping[str, str]) -> Dim:
    if dim.form == "atom":
        return replace(dim, name=names.get(dim.name, dim.name))
    parts = [_called(part, names) for part in dim.parts]
    return Dim.sum(parts) if dim.form == "sum" else Dim.product(parts)


def _under(node: Node, names: Mapping[str, str]) -> Node:
    """The node with its dims under the caller's names, in its type and in its attributes."""

    def attr(key: str, value: Any) -> Any:
        if isinstance(value, Dim):
            return _called(value, names)
        if isinstance(value, tuple):
            return tuple(attr(key, item) for item in value)
        if isinstance(value, str) and key in DIM_NAMES:
            return names.get(value, value)
        return value

    of = _called(node.type.of, names) if node.type.of else None
    type = Type(node.type.dtype, tuple(_called(dim, names) for dim in node.type.dims), of)
    return node.with_(type=type, attrs={key: attr(key, v) for key, v in node.attrs.items()})
