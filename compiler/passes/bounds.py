"""How much of a history is ever read again.

What is cached is kept for every token, since attention may look back at any. Where only a shifted
index reads it (``u[t-1,d]``, a short convolution), a few tokens are enough: the cache, and what
reads it, say how many, and a backend keeps no more. It is part of ``elaborate``, so that whoever
counts the bytes of a cache knows.
"""

from __future__ import annotations

from compiler.ir import Graph, Node, Program, Rewriter
from dsl.extents import Extent


def run(program: Program) -> Program:
    """Give every cache that only shifts read, and these, the attribute ``last``: what is read ends
    at most so many tokens before a step, the largest of some extents."""
    return program.with_bodies({name: _bounded(g) for name, g in program.bodies.items()})


def _bounded(graph: Graph) -> Graph:
    last: dict[str, tuple[Extent, ...]] = {}
    for node in graph:
        users = graph.users(node.name)
        shifts = bool(users) and all(u.op == "shift" for u in users)
        if node.op == "cache" and shifts and node.name != graph.output:
            reach = tuple(dict.fromkeys(_reach(user) for user in users))
            last |= {n.name: reach for n in (node, *users)}
    if not last:
        return graph
    made = Rewriter(graph)
    for node in graph:
        attrs = {**node.attrs, "last": last[node.name]} if node.name in last else node.attrs
        made.replace(node.name, made.copy(node, attrs=attrs).name)
    return made.done()


def _reach(shift: Node) -> Extent:
    """How many tokens before its own the furthest is that a shift reads."""
    offset: Extent = shift.attrs["offset"]
    if shift.attrs.get("index") and shift.attrs["sign"] < 0:
        offset = offset - shift.type.dim(shift.attrs["index"]).size + 1
    return -offset


def kept(node: Node, sizes: dict[str, int]) -> int | None:
    """How many tokens before a step a bounded cache or shift needs; None if it is not bounded."""
    last = node.attrs.get("last")
    return None if last is None else max(extent.at(sizes) for extent in last)
