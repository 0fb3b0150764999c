"""Nodes outlined into a composite: what every pattern of `recognise` needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compiler.ir import Graph, Node, Rewriter

# Values that may be computed a second time beside the composite: they cost nothing.
CHEAP = frozenset({"constant", "position", "iota", "cast"})


@dataclass(frozen=True)
class Match:
    """A pattern found: ``output`` and everything between it and the operands becomes ``op``.

    ``graphs`` become bodies of the program too, each named by the attribute of its key.
    """

    op: str
    output: str
    operands: tuple[str, ...]
    attrs: Mapping[str, Any]
    graphs: Mapping[str, Graph] = field(default_factory=dict)
    rounded: str = ""  # a value within whose rounding the attributes tell


def is_float(node: Node) -> bool:
    return node.type.dtype in ("act", "f32")


def rounds(node: Node) -> bool:
    """Is the value rounded here to the activation dtype? A kernel that keeps it to itself would
    not; in f32 a name rounds nothing."""
    return node.rounds and node.type.dtype == "act"


def wide(graph: Graph, name: str) -> Node:
    """The value that a node widens, or the node itself."""
    node = graph[name]
    while node.op == "cast" and not rounds(node) and is_float(graph[node.inputs[0]]):
        node = graph[node.inputs[0]]
    return node


def narrow(graph: Graph, name: str) -> Node:
    """The value in act that a node widens to f32, or the node itself: what a kernel reads."""
    node = graph[name]
    if node.op == "cast" and node.type.dtype == "f32" and graph[node.inputs[0]].type.dtype == "act":
        return graph[node.inputs[0]]
    return node


def number(graph: Graph, name: str) -> float | None:
    """The value of a numeric constant."""
    node = graph[name]
    if node.op == "cast":
        return number(graph, node.inputs[0])
    if node.op == "constant" and not isinstance(node.attrs["value"], bool):
        return float(node.attrs["value"])
    return None


def with_cast(graph: Graph, node: Node) -> Node:
    """The cast to act that alone reads a value, or the node itself."""
    users = graph.users(node.name)
    if len(users) == 1 and node.name != graph.output and not rounds(node):
        (user,) = users
        if user.op == "cast" and user.type.dtype == "act":
            return user
    return node


def inside(graph: Graph, match: Match) -> list[Node] | None:
    """The nodes between operands and output, in order; None if one of them is read elsewhere or
    must be rounded, or is an argument or a stored value that is no operand."""
    stop, found, todo = set(match.operands), {match.output}, [match.output]
    while todo:
        for operand in graph[todo.pop()].inputs:
            if operand not in stop and operand not in found:
                found.add(operand)
                todo.append(operand)
    for name in found - {match.output}:
        node = graph[name]
        read_here = found.issuperset(graph.nx.successors(name)) and name != graph.output
        # Numbers and masks over positions cost nothing; everything else is computed once.
        if not read_here and node.op not in CHEAP and is_float(node):
            return None
        if rounds(node) and name != match.rounded:
            return None
        if node.op in ("input", "param", "state", "cache"):
            return None
    return [node for node in graph if node.name in found]


def outline(name: str, nodes: Iterable[Node], old: Graph, operands: Iterable[str]) -> Graph:
    """A graph of these nodes, the last one its result, with the operands as its inputs."""
    made = Rewriter(old, name)
    names: set[str] = set()
    for operand in operands:
        node = old[operand]
        known = node.label or node.name
        while known in names:
            known += "_"
        names.add(known)
        given = Node(node.name, "input", (), node.type, {"name": known}, node.span)
        made.replace(operand, made.new.add(given).name)
    last = ""
    for node in nodes:
        last = made.copy(node).name
        made.replace(node.name, last)
    return made.done(last)


def replace(graph: Graph, matches: Iterable[Match], taken: set[str]) -> tuple[Graph, list[Graph]]:
    """The body with each match as one node, and the graphs that the new nodes name.

    Args:
        taken: the names of all bodies; those made here are added.
    """
    found: dict[str, Match] = {}
    for one in matches:
        found.setdefault(one.output, one)
    graphs: list[Graph] = []
    rewriter = Rewriter(graph)
    for node in graph:
        match = found.get(node.name)
        nodes = inside(graph, match) if match else None
        if not match or not nodes:
            rewriter.replace(node.name, rewriter.copy(node).name)
            continue
        attrs = dict(match.attrs)
        body = outline(_unused(f"{graph.name}.{match.op}", taken), nodes, graph, match.operands)
        graphs.append(body)
        for attribute, extra in match.graphs.items():
            extra.name = _unused(f"{body.name}.{attribute}", taken)
            graphs.append(extra)
            attrs[attribute] = extra.name
        made = node.with_(
            op=match.op,
            inputs=tuple(rewriter.to[name] for name in match.operands),
            attrs={"body": body.name, **attrs},
        )
        rewriter.replace(node.name, rewriter.new.add(made).name)
    return rewriter.done(), graphs


def _unused(name: str, taken: set[str]) -> str:
    number, unused = 1, name
    while unused in taken:
        number += 1
        unused = f"{name}.{number}"
    taken.add(unused)
    return unused
