"""Attention, found by its structure: `recognise` says what the composite's attributes mean.

    softmax over history of (sum of contract(query, key) * scale where the mask lets see)
    contracted with a value over history

Whatever order contractions are in: absorbed, the query has met the key's weight before, and the
value's weight comes after. Between scale and mask a function of the score may stand, and in the
softmax's denominator a sink (``probabilities``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

from compiler.ir import Dim, Graph, Node
from compiler.passes import masks, probabilities
from compiler.passes.composites import Match, narrow, number, rounds, wide, with_cast
from compiler.passes.probabilities import Probabilities


@dataclass
class Score:
    """What stands below a softmax, taken apart."""

    scale: float = 1.0
    masks: list[tuple[str, bool]] = field(default_factory=list)  # (value, what lets see)
    products: list[tuple[str, float]] = field(default_factory=list)  # contraction, its own scale
    function: Graph | None = None  # of the scaled sum, before the masks


@dataclass(frozen=True)
class Term:
    """One contraction of queries with keys."""

    query: str
    key: str
    over: tuple[str, ...]
    scale: float


def find(graph: Graph) -> Iterator[Match]:
    """Every attention of a body."""
    for found in probabilities.find(graph):
        match = _match(graph, found)
        if match is not None:
            yield match


def _match(graph: Graph, found: Probabilities) -> Match | None:
    softmax = found.node
    kinds = {dim.kind: dim for dim in softmax.type.dims}
    time, history = kinds.get("time"), kinds.get("history")
    if time is None or history is None or found.over != history.name:
        return None
    product = _value_product(graph, softmax, history)
    score = _score(graph, found.score)
    if product is None or score is None:
        return None
    terms = _terms(graph, score, time, history)
    value = _other(graph, product, softmax)
    if not terms or value is None or time.name in value.type.names:
        return None
    heads = tuple(d.name for d in softmax.type.dims if d not in (time, history))
    operands: list[str] = []

    def operand(name: str) -> int:
        if name not in operands:
            operands.append(name)
        return operands.index(name)

    structure = tuple((operand(t.query), operand(t.key), t.over) for t in terms)
    position = operand(value.name)
    mask = _mask(graph, score, time, history)
    if mask is None:
        return None
    interval, reads, expression = mask
    attrs = {
        "terms": structure,
        "value": position,
        "scale": score.scale * terms[0].scale,
        "mask": interval,
        "mask_operands": tuple(operand(name) for name in reads),
        "time": time.name,
        "history": history.name,
        "heads": heads,
        "values": tuple(n for n in value.type.names if n not in (*heads, history.name)),
        "softmax_dtype": softmax.type.dtype,
    }
    if found.sink is not None:
        sink = narrow(graph, found.sink)
        if sink.op == "constant" or not set(sink.type.names) <= set(heads):
            return None
        attrs["sink"] = operand(sink.name)
    output = with_cast(graph, product)
    graphs = {"mask": expression, "score": score.function}
    known = {name: made for name, made in graphs.items() if made is not None}
    return Match("attention", output.name, tuple(operands), attrs, known)


# -- the value -----------------------------------------------------------------------------------


def _value_product(graph: Graph, softmax: Node, history: Dim) -> Node | None:
    """The contraction over history that alone reads the probabilities."""
    node = softmax
    while not rounds(node):
        users = graph.users(node.name)
        if len(users) != 1 or node.name == graph.output:
            return None
        (node,) = users
        if node.op == "contract" and len(node.inputs) == 2:
            return node if node.attrs["over"] == (history.name,) else None
        if node.op != "cast":
            return None
    return None


def _other(graph: Graph, product: Node, softmax: Node) -> Node | None:
    others = [i for i in product.inputs if wide(graph, i).name != softmax.name]
    return narrow(graph, others[0]) if len(others) == 1 else None


# -- the scores ----------------------------------------------------------------------------------


def _score(graph: Graph, name: str) -> Score | None:
    """What stands below the softmax, taken apart: products, or a function of products."""
    plain = Score()
    if _take_apart(graph, name, 1.0, plain):
        return plain
    score = Score()
    found = probabilities.function(graph, _unmasked(graph, name, score))
    if found is None:
        return None
    below, score.function = found
    inner = Score()
    if not _take_apart(graph, below, 1.0, inner) or inner.masks:
        return None  # hidden is what is -inf, which a function makes something else of
    score.products = inner.products
    return score


def _unmasked(graph: Graph, name: str, score: Score) -> str:
    """What is left of a value without the masks around it, which are collected."""
    node = wide(graph, name)
    if node.op == "map" and not rounds(node):
        if node.attrs["fn"] == "where" and (shown := _shown(graph, node)):
            score.masks.append((node.inputs[0], shown[1]))
            return _unmasked(graph, shown[0], score)
        if node.attrs["fn"] == "add":
            for mask, other in (node.inputs, node.inputs[::-1]):
                if _added_mask(graph, mask, 1.0, score):
                    return _unmasked(graph, other, score)
    return name


def _shown(graph: Graph, node: Node) -> tuple[str, bool] | None:
    """Of where(seen, score, -inf), or the other way round, the score and what lets see."""
    _, then, otherwise = node.inputs
    for value, hidden, seen in ((then, otherwise, True), (otherwise, then, False)):
        if number(graph, hidden) == -inf:
            return value, seen
    return None


def _take_apart(graph: Graph, name: str, scale: float, score: Score) -> bool:
    """Collect scale, masks and products below a value; False if something else is there."""
    node = wide(graph, name)
    if rounds(node):
        return False
    if node.op == "contract" and len(node.inputs) == 2:
        score.products.append((node.name, scale))
        return True
    if node.op != "map":
        return False
    fn, inputs = node.attrs["fn"], node.inputs
    if fn in ("mul", "div"):
        factor = number(graph, inputs[1])
        if factor is None and fn == "mul":
            factor, inputs = number(graph, inputs[0]), inputs[::-1]
        if not factor:
            return False
        return _take_apart(
            graph, inputs[0], scale * factor if fn == "mul" else scale / factor, score
        )
    if fn == "where":
        return _masked(graph, node, scale, score)
    if fn == "add":
        return all(
            _added_mask(graph, operand, scale, score) or _take_apart(graph, operand, scale, score)
            for operand in inputs
        )
    return False


def _masked(graph: Graph, node: Node, scale: float, score: Score) -> bool:
    """where(seen, score, -inf), or the other way round; a negative scale would turn -inf over.
    Below a sum the mask would be one term's alone, which is the same: -inf stays -inf."""
    shown = _shown(graph, node)
    if shown is None or scale <= 0:
        return False
    score.masks.append((node.inputs[0], shown[1]))
    return _take_apart(graph, shown[0], scale, score)


def _added_mask(graph: Graph, name: str, scale: float, score: Score) -> bool:
    """+ where(seen, 0, -inf)."""
    node = wide(graph, name)
    if node.op != "map" or node.attrs["fn"] != "where" or scale <= 0 or rounds(node):
        return False
    condition, then, otherwise = node.inputs
    for shown, hidden, seen in ((then, otherwise, True), (otherwise, then, False)):
        if number(graph, shown) == 0 and number(graph, hidden) == -inf:
            score.masks.append((condition, seen))
            return True
    return False


def _terms(graph: Graph, score: Score, time: Dim, history: Dim) -> list[Term]:
    """The products as terms of one scale; none if they are not queries with keys."""
    for through_factors in (True, False):
        terms = [
            _term(graph, graph[name], scale, time, history, through_factors)
            for name, scale in score.products
        ]
        found = [term for term in terms if term is not None]
        if len(found) == len(terms) and len({term.scale for term in found}) == 1:
            return found
    return []


def _term(
    graph: Graph, product: Node, scale: float, time: Dim, history: Dim, through_factors: bool
) -> Term | None:
    """One contraction; a number that multiplies a factor counts as the product's, if asked."""
    sides: dict[str, str] = {}
    for name in product.inputs:
        node = narrow(graph, name)
        if through_factors:
            node, factor = _unscaled(graph, node)
            scale *= factor
        names = node.type.names
        if (time.name in names) == (history.name in names):
            return None
        if not set(product.attrs["over"]) <= set(names):
            return None
        sides["query" if time.name in names else "key"] = node.name
    if len(sides) < 2:
        return None
    return Term(sides["query"], sides["key"], product.attrs["over"], scale)


def _unscaled(graph: Graph, node: Node) -> tuple[Node, float]:
    if node.op == "map" and node.attrs["fn"] in ("mul", "div") and not rounds(node):
        left, right = node.inputs
        factor = number(graph, right)
        if factor is None and node.attrs["fn"] == "mul":
            factor, left = number(graph, left), right
        if factor and len(graph.users(node.name)) == 1:
            factor = factor if node.attrs["fn"] == "mul" else 1 / factor
            return narrow(graph, left), factor
    return node, 1.0


# -- the mask ------------------------------------------------------------------------------------

Mask = tuple[masks.Interval | None, list[str], Graph | None]


def _mask(graph: Graph, score: Score, time: Dim, history: Dim) -> Mask | None:
    """The interval or the outlined expression, and what it reads; None for a mask that tells more
    apart than time and history."""
    if not score.masks:
        return None, [], None
    allowed = {time.name, history.name}
    if any(not allowed.issuperset(graph[name].type.names) for name, _ in score.masks):
        return None
    reads = [leaf for name, _ in score.masks for leaf in masks.leaves(graph, name)]
    interval = masks.both(masks.interval(graph, name, seen) for name, seen in score.masks)
    if interval is None:
        return None, list(dict.fromkeys(reads)), masks.body(graph, score.masks)
    positions = {graph[leaf].type.names[0]: leaf for leaf in reversed(reads)}
    return interval, [positions[time.name], positions[history.name]], None
