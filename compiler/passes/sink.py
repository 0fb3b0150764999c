"""sink: what reads a scan moves into it, so that the states of all tokens are never stored.

A scan's value is its state at every token: two megabytes per token where 32 heads remember 128 x
128 numbers each. Whoever reads it sums over most of that. Where every way from the states to the
body's result leads through one value, made of the state of its own token and of values that no
state decides, what lies between becomes a body of one token, ``read``, and the scan gives that
value. The next state is not its affair, so nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx

from compiler.ir import Dim, Graph, Node, Program, Rewriter, Type
from compiler.rules import product

# Ops that treat positions one by one, as long as they do not work along time itself.
POINTWISE = frozenset(
    "map contract reduce softmax top argtop in_top gather cast "
    "flatten unflatten part select rename expand stack concat".split()
)
COPIED = frozenset({"constant", "iota"})
END = ""  # of a body: where its result goes


@dataclass(frozen=True)
class Reader:
    """``node`` is all that is read of a scan; ``inside`` are the nodes that make it, in order."""

    node: Node
    inside: tuple[Node, ...]


def run(program: Program) -> Program:
    bodies = dict(program.bodies)
    for name, graph in program.bodies.items():
        for scan in [n for n in graph if n.op == "scan" and not n.attrs.get("read")]:
            found = reader(bodies[name], bodies[name][scan.name], program.sizes)
            if found is not None:
                bodies[name], read = _moved(bodies[name], bodies[name][scan.name], found, bodies)
                bodies[read.name] = read
    return program.with_bodies(bodies)


def reader(graph: Graph, scan: Node, sizes: Mapping[str, int]) -> Reader | None:
    """The first value that all who read a scan go through, and that is smaller than its state."""
    below = nx.descendants(graph.nx, scan.name)
    flow: nx.DiGraph[str] = nx.DiGraph()
    flow.add_node(scan.name)
    for name in (scan.name, *below):
        users = set(graph.nx.successors(name))
        flow.add_edges_from((user, name) for user in users)
        if name == graph.output or not users:
            flow.add_edge(END, name)
    if END not in flow:
        return None
    before = nx.immediate_dominators(flow, END)
    at, (time,) = scan.name, [d for d in scan.type.dims if d.kind == "time"]
    while at in before and before[at] not in (END, at):
        at = before[at]
        inside = {at, *(nx.ancestors(graph.nx, at) & below)}
        if not all(_is_of_one_token(graph, graph[name], time) for name in inside):
            return None
        if _volume(graph[at], sizes) < _volume(scan, sizes):
            while (user := _cast(graph, at)) is not None:
                at = user
                inside.add(at)
            return Reader(graph[at], tuple(node for node in graph if node.name in inside))
    return None


def _cast(graph: Graph, name: str) -> str | None:
    """The cast that alone reads a value."""
    users = graph.users(name)
    alone = len(users) == 1 and name != graph.output and users[0].op == "cast"
    return users[0].name if alone else None


def _is_of_one_token(graph: Graph, node: Node, time: Dim) -> bool:
    """Is a value made token by token, of values that are there for each token or for all?"""
    if node.op not in POINTWISE or time not in node.type.dims:
        return False
    over = node.attrs.get("over", ())
    if time.name in ((over,) if isinstance(over, str) else over):
        return False
    dims = [d for n in (node, *graph.operands(node)) for d in n.type.dims]
    return not any(d.kind in ("history", "rows") for d in dims)


def _volume(node: Node, sizes: Mapping[str, int]) -> int:
    return product(d for d in node.type.dims if d.kind != "time").at(sizes)


def _moved(
    graph: Graph, scan: Node, found: Reader, taken: Mapping[str, Graph]
) -> tuple[Graph, Graph]:
    """The body with the scan in the place of what reads it, and what it does with each state."""
    (time,) = [d for d in scan.type.dims if d.kind == "time"]
    inside = {node.name for node in found.inside}
    operands = dict.fromkeys(
        i
        for node in found.inside
        for i in node.inputs
        if i not in inside and i != scan.name and graph[i].op not in COPIED
    )
    moving = [o for o in operands if time in graph[o].type.dims]
    asked = [*moving, *(o for o in operands if o not in moving)]
    read = _read(graph, scan, found, asked, time, taken)
    made = Rewriter(graph)
    for node in graph:
        if node.name == scan.name or (node.name in inside and node.name != found.node.name):
            continue
        if node.name != found.node.name:
            made.replace(node.name, made.copy(node).name)
            continue
        inputs = list(scan.inputs)
        inputs += [o for o in asked if o not in inputs[1:]]
        places = tuple(1 + inputs[1:].index(o) for o in asked)
        attrs = {**scan.attrs, "read": read.name, "asked": places}
        new = node.with_(op="scan", inputs=tuple(made.to[i] for i in inputs), attrs=attrs)
        made.replace(node.name, made.new.add(new).name)
    return made.done(), read


def _read(
    graph: Graph,
    scan: Node,
    found: Reader,
    asked: list[str],
    time: Dim,
    taken: Mapping[str, Graph],
) -> Graph:
    name, number = f"{scan.attrs['body']}.read", 1
    while name in taken:
        name, number = f"{scan.attrs['body']}.read.{number}", number + 1
    read = Graph(name)
    known: set[str] = set()
    for source in (scan.name, *asked):
        node = graph[source]
        word = str(scan.attrs["name"]) if source == scan.name else _word(graph, node)
        stem, count = word, 1
        while word in known:
            word, count = f"{stem}_{count}", count + 1
        known.add(word)
        read.add(Node(source, "input", (), without(node.type, time), {"name": word}, node.span))
    for node in found.inside:
        for operand in node.inputs:
            if operand not in read:
                read.add(graph[operand])  # a number, or those of an index
        read.add(of_one_token(node, time))
    read.output = found.node.name
    return read


def _word(graph: Graph, node: Node) -> str:
    while not node.label and len(node.inputs) == 1 and node.op in POINTWISE:
        node = graph[node.inputs[0]]
    return node.label or str(node.attrs.get("param") or node.attrs.get("name") or "x")


def without(type: Type, time: Dim) -> Type:
    """The type of one token."""
    return Type(type.dtype, tuple(d for d in type.dims if d != time), type.of)


def of_one_token(node: Node, time: Dim) -> Node:
    """The same for one token, where its operands are of one too."""
    attrs = dict(node.attrs)
    if "dims" in attrs:
        attrs["dims"] = tuple(d for d in attrs["dims"] if d != time)
    return node.with_(type=without(node.type, time), attrs=attrs)
