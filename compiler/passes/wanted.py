"""Where the rows whose result is wanted are chosen.

Generation needs the logits of each sequence's last position only. Whatever stands between the last
value that mixes positions and an entry's result is computed for those rows alone: ``select_rows``
is put as early as that allows. It is part of ``elaborate``: every later pass sees it.
"""

from __future__ import annotations

from collections.abc import Mapping

from compiler.ir import WANTED, Dim, Graph, Node, Program, Rewriter, Type
from compiler.passes import sink
from compiler.passes.sink import POINTWISE


def run(program: Program) -> Program:
    """Each entry's result for the wanted rows of the step."""
    bodies = dict(program.bodies)
    for entry in program.entries.values():
        bodies[entry.body] = _select(bodies[entry.body], program)
    return program.with_bodies(bodies)


def _select(graph: Graph, program: Program) -> Graph:
    if _time(graph.result) is None:
        return graph
    inside = _tail(graph, program.sizes)
    rewriter = Rewriter(graph)
    chosen: dict[str, str] = {}
    taken = {d.name for n in graph for d in n.type.dims}
    row = Dim("row" if "row" not in taken else "wanted row", WANTED, "rows")

    def rows(name: str) -> str:
        """The wanted rows of a value outside the tail."""
        time = _time(graph[name])
        if time is None:
            return rewriter.to[name]
        if name not in chosen:
            type = _with(graph[name].type, time, row)
            chosen[name] = rewriter.emit(
                "wanted", "select_rows", [rewriter.to[name]], type, span=graph[name].span
            ).name
        return chosen[name]

    for node in graph:
        if node.name not in inside:
            rewriter.to[node.name] = rewriter.copy(node).name
            continue
        time = _time(node)
        assert time is not None
        inputs = tuple(rewriter.to[i] if i in inside else rows(i) for i in node.inputs)
        attrs = _renamed(node.attrs, time, row)
        new = node.with_(inputs=inputs, type=_with(node.type, time, row), attrs=attrs)
        rewriter.to[node.name] = rewriter.new.add(new).name
    if graph.output not in inside:
        rewriter.to[graph.output] = rows(graph.output)
    return rewriter.done()


def _tail(graph: Graph, sizes: Mapping[str, int]) -> set[str]:
    """The nodes over time whose every use leads to the result through ops that treat positions one
    by one. What reads a scan's states is done where they are, so that they are not stored."""
    inside: set[str] = set()
    readers: set[str] = set()
    for scan in (n for n in graph if n.op == "scan"):
        found = sink.reader(graph, scan, sizes)
        readers |= {n.name for n in found.inside} if found is not None else set()
    for node in reversed(list(graph)):
        users = graph.users(node.name)
        wanted = node.name == graph.output or (users and all(u.name in inside for u in users))
        if (
            wanted
            and _time(node) is not None
            and node.op in POINTWISE
            and node.name not in readers
            and not _along_time(node, graph)
        ):
            inside.add(node.name)
    return inside


def _along_time(node: Node, graph: Graph) -> bool:
    """Does the node work along time, or make it?"""
    time = _time(node)
    assert time is not None
    if any(d.kind == "time" for d in node.attrs.get("dims", ()) if isinstance(d, Dim)):
        return True  # broadcast along time
    over = node.attrs.get("over", ())
    names = (over,) if isinstance(over, str) else over
    operands = graph.operands(node)
    return time.name in names or any(d.kind == "history" for o in operands for d in o.type.dims)


def _time(node: Node) -> Dim | None:
    return next((d for d in node.type.dims if d.kind == "time"), None)


def _with(type: Type, time: Dim, row: Dim) -> Type:
    return Type(type.dtype, tuple(row if d == time else d for d in type.dims), type.of)


def _renamed(attrs: Mapping[str, object], time: Dim, row: Dim) -> dict[str, object]:
    """Attributes with the row dim where they name time (the dims of a call)."""

    def new(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(new(v) for v in value)
        return row.name if value == time.name else value

    return {k: new(v) if k == "dims" else v for k, v in attrs.items()}
