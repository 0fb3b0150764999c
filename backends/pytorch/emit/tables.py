"""Values that depend on nothing that a run brings: computed once, when they are first needed.

Frequencies of a rotary embedding, say. Parameters are not among them, since they may be trained.
"""

from __future__ import annotations

from compiler.ir import Graph

NEVER = frozenset(
    "input position param state cache scan call chain apply branch select_rows attention "
    "experts".split()
)
DYNAMIC = frozenset({"time", "history", "rows"})


def roots(graph: Graph) -> frozenset[str]:
    """The values of a body that are computed once: those with no input in them, that others which
    have one (or the body's result) read."""
    fixed: set[str] = set()
    for node in graph:
        dynamic = any(d.kind in DYNAMIC for d in node.type.dims)
        if node.op not in NEVER and not dynamic and all(i in fixed for i in node.inputs):
            fixed.add(node.name)
    found = set()
    for node in graph:
        if node.name in fixed and node.type.dims:
            users = graph.users(node.name)
            if node.name == graph.output or any(u.name not in fixed for u in users):
                found.add(node.name)
    return frozenset(found)


def table(graph: Graph, root: str) -> Graph:
    """The body of one of them alone."""
    needed = {root}
    for node in reversed(list(graph)):
        if node.name in needed:
            needed.update(node.inputs)
    alone = Graph(graph.name)
    for node in graph:
        if node.name in needed:
            alone.add(node)
    alone.output = root
    return alone
