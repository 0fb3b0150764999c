"""Probabilities over a history, and what is made of a score before them: read off the graph.

A softmax may stand as one node, or be written out, which is how one more term gets into its
denominator:

    e / (sum over history of e + exp(sink - high)),  e = exp(score - high)

``high`` is whatever does not tell positions of the history apart: it cancels, so that a kernel
subtracts what it likes. The term is a *sink*: one more logit, which takes attention from every
position and gives no value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compiler.cost import is_square
from compiler.ir import Graph, Node, Rewriter, Type
from compiler.passes.composites import is_float, number, rounds, wide


@dataclass(frozen=True)
class Probabilities:
    """``node`` is a softmax of ``score`` over a history, with a sink or without."""

    node: Node
    score: str
    over: str
    sink: str | None = None


def find(graph: Graph) -> Iterator[Probabilities]:
    """All softmaxes over a history, of one node or written out with a sink."""
    for node in graph:
        if node.op == "softmax":
            yield Probabilities(node, node.inputs[0], node.attrs["over"])
        elif node.op == "map" and node.attrs["fn"] == "div" and is_square(node.type.dims):
            written = _written_out(graph, node)
            if written is not None:
                yield written


def _written_out(graph: Graph, node: Node) -> Probabilities | None:
    (history,) = (d.name for d in node.type.dims if d.kind == "history")
    shared, below = (_same_along(graph, name, history) for name in node.inputs)
    e, denominator = graph[shared], graph[below]
    if _fn(e) != "exp" or _fn(denominator) != "add" or rounds(e) or rounds(denominator):
        return None
    first, second = (graph[_same_along(graph, name, history)] for name in denominator.inputs)
    for total, term in ((first, second), (second, first)):
        if (
            total.op == "reduce"
            and (total.attrs["fn"], total.attrs["over"]) == ("sum", (history,))
            and wide(graph, total.inputs[0]).name == e.name
            and _fn(term) == "exp"
            and not rounds(total)
            and not rounds(term)
        ):
            score, high = _less(graph, e.inputs[0], history)
            sink, also = _less(graph, term.inputs[0], history)
            if high == also and history not in graph[sink].type.names:
                return Probabilities(node, score, history, sink)
    return None


def _fn(node: Node) -> str:
    return str(node.attrs["fn"]) if node.op == "map" else ""


def _less(graph: Graph, name: str, history: str) -> tuple[str, str | None]:
    """``a - b`` as the two, where b is the same all along the history; else (the value, None)."""
    node = wide(graph, name)
    if _fn(node) == "sub" and not rounds(node):
        high = _same_along(graph, node.inputs[1], history)
        if history not in graph[high].type.names:
            return node.inputs[0], high
    return name, None


def _same_along(graph: Graph, name: str, history: str) -> str:
    """What a value repeats along the history, or the value."""
    node = wide(graph, name)
    while node.op == "expand" and [d.name for d in node.attrs["dims"]] == [history]:
        node = wide(graph, node.inputs[0])
    return node.name


# -- what is made of a score -----------------------------------------------------------------------


def function(graph: Graph, name: str) -> tuple[str, Graph] | None:
    """An elementwise function of one value and of numbers, as the innermost value that it may be
    read as a function of, and its graph, f32[] -> f32[]; None if it is one of several values.

    The innermost is where arithmetic with numbers alone, ``a * x``, ``x / b``, leads on to a
    product of values: that is a scale, and the score's own.
    """
    order: list[Node] = []
    leaves: set[str] = set()

    def visit(name: str) -> bool:
        node = wide(graph, name)
        if node.op == "constant" or node in order or node.name in leaves:
            return True
        elementwise = node.op == "map" and _fn(node) != "where" and is_float(node)
        if not elementwise or rounds(node) or _scaled(graph, node):
            leaves.add(node.name)
            return True
        if not all(visit(operand) for operand in node.inputs):
            return False
        order.append(node)
        return True

    visit(name)
    if len(leaves) != 1 or not order:
        return None
    (leaf,) = leaves
    return leaf, _alone(graph, leaf, order)


def _scaled(graph: Graph, node: Node) -> bool:
    """Numbers times and over products of two values, and sums of these."""
    if node.op == "contract":
        return True
    if _fn(node) not in ("mul", "div", "add") or rounds(node):
        return False
    found = [wide(graph, operand) for operand in node.inputs]
    if _fn(node) == "add":
        return all(_scaled(graph, operand) for operand in found)
    if number(graph, node.inputs[1]) is not None:
        return _scaled(graph, found[0])
    return (
        _fn(node) == "mul"
        and number(graph, node.inputs[0]) is not None
        and _scaled(graph, found[1])
    )


def _alone(graph: Graph, leaf: str, order: list[Node]) -> Graph:
    """The function of one number: its dims, casts and names are the caller's affair."""
    made = Rewriter(graph, "score")
    scalar = Type("f32", ())
    given = Node("x", "input", (), scalar, {"name": "x"}, graph[leaf].span)
    made.replace(leaf, made.new.add(given).name)

    def operand(name: str) -> str:
        node = wide(graph, name)
        if node.name not in made.to:
            made.replace(node.name, made.copy(node).name)  # a number
        return made.to[node.name]

    for node in order:
        inputs = [operand(name) for name in node.inputs]
        new = made.emit(
            str(node.attrs["fn"]), "map", inputs, scalar, attrs=node.attrs, span=node.span
        )
        made.replace(node.name, new.name)
    return made.done(made.to[order[-1].name])
