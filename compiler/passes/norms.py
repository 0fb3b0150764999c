"""RMS norms, found by their algebra: `recognise` says what the composite's attributes mean.

    x * rsqrt(mean(x * x) + eps) * gain

in any spelling of the reciprocal root (rsqrt, a power of -1/2, division by sqrt or by a power of
1/2), of the square (x * x, x ^ 2), in any order of factors, with or without eps and gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compiler.ir import Graph, Node
from compiler.passes.composites import Match, is_float, narrow, number, rounds, wide, with_cast


@dataclass(frozen=True)
class Root:
    """The root of a mean square; ``inverse`` if it is its reciprocal."""

    node: Node
    source: str  # what is squared
    over: tuple[str, ...]
    eps: float
    inverse: bool


def find(graph: Graph) -> Iterator[Match]:
    """Every RMS norm of a body, gains included."""
    for node in graph:
        root = _root(graph, node)
        normal = _normal(graph, root) if root else None
        if root and normal and is_float(graph[root.source]):
            yield _with_gain(graph, root, normal)


def _root(graph: Graph, node: Node) -> Root | None:
    if node.op != "map" or rounds(node):
        return None
    fn, inverse = node.attrs["fn"], False
    if fn == "pow":
        power = number(graph, node.inputs[1])
        if power not in (0.5, -0.5):
            return None
        inverse = power < 0
    elif fn not in ("sqrt", "rsqrt"):
        return None
    inverse = inverse or fn == "rsqrt"
    mean, eps = _plus_number(graph, wide(graph, node.inputs[0]))
    if mean.op != "reduce" or mean.attrs["fn"] != "mean" or rounds(mean):
        return None
    source = _squared(graph, wide(graph, mean.inputs[0]))
    return Root(node, source, mean.attrs["over"], eps, inverse) if source else None


def _plus_number(graph: Graph, node: Node) -> tuple[Node, float]:
    if node.op == "map" and node.attrs["fn"] == "add" and not rounds(node):
        for a, b in (node.inputs, node.inputs[::-1]):
            value = number(graph, b)
            if value is not None:
                return wide(graph, a), value
    return node, 0.0


def _squared(graph: Graph, node: Node) -> str | None:
    if node.op != "map" or rounds(node):
        return None
    left, right = (wide(graph, name).name for name in (node.inputs * 2)[:2])
    if node.attrs["fn"] == "mul" and left == right:
        return left
    if node.attrs["fn"] == "pow" and number(graph, node.inputs[1]) == 2:
        return left
    return None


def _normal(graph: Graph, root: Root) -> Node | None:
    """The node that divides the source by the root, and alone reads it."""
    node = root.node
    while True:
        users = graph.users(node.name)
        if len(users) != 1 or node.name == graph.output:
            return None
        (user,) = users
        if user.op == "cast" and not rounds(user):
            node = user
            continue
        if user.op != "map":
            return None
        others = [wide(graph, name).name for name in user.inputs if name != node.name]
        if user.attrs["fn"] == "div" and number(graph, user.inputs[0]) == 1 and not root.inverse:
            node, root = user, Root(user, root.source, root.over, root.eps, True)
            continue
        fits = user.attrs["fn"] == "mul" if root.inverse else _divides(user, node)
        return user if fits and others == [root.source] else None


def _divides(user: Node, node: Node) -> bool:
    return user.attrs["fn"] == "div" and user.inputs[1] == node.name


def _with_gain(graph: Graph, root: Root, normal: Node) -> Match:
    """The norm with the gain that alone reads it, where there is one."""
    attrs: dict[str, Any] = {
        "over": root.over,
        "eps": root.eps,
        "gain": None,
        "rounds_before_gain": False,
    }
    node = with_cast(graph, normal)
    product = _only_user(graph, node)
    if product and product.op == "cast":  # rounded, and widened again for the gain
        product = _only_user(graph, product)
    gain = _gain(graph, product, node, root.over) if product else None
    if product is None or gain is None:
        return Match("rms_norm", node.name, (root.source,), attrs)
    attrs |= {"gain": 1, "rounds_before_gain": rounds(node)}
    output = with_cast(graph, product)
    return Match("rms_norm", output.name, (root.source, gain), attrs, rounded=node.name)


def _only_user(graph: Graph, node: Node) -> Node | None:
    users = graph.users(node.name)
    return users[0] if len(users) == 1 and node.name != graph.output else None


def _gain(graph: Graph, user: Node, normal: Node, over: tuple[str, ...]) -> str | None:
    """The other factor of a product, if it runs over what is normalised and nothing else."""
    if user.op != "map" or user.attrs["fn"] != "mul":
        return None
    others = [name for name in user.inputs if wide(graph, name) is not wide(graph, normal.name)]
    if len(others) != 1 or set(graph[others[0]].type.names) != set(over):
        return None
    return narrow(graph, others[0]).name
