"""What a mask lets a position see, read off the expression that the model's author wrote.

A mask is any boolean expression over positions. Where it comes to "their distance lies in an
interval" a kernel can skip what is not seen and a cost model can count the rest; everything else
stays an expression.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from compiler.cost import is_square
from compiler.ir import Graph, Node, Rewriter, Type
from compiler.passes import probabilities

Interval = tuple[int | None, int | None]  # least <= position[time] - position[history] < beyond

OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


@dataclass(frozen=True)
class Line:
    """time * position[time] + history * position[history] + number."""

    time: float = 0
    history: float = 0
    number: float = 0

    def plus(self, other: Line, factor: float = 1) -> Line:
        return Line(
            self.time + factor * other.time,
            self.history + factor * other.history,
            self.number + factor * other.number,
        )

    def times(self, factor: float) -> Line:
        return Line(self.time * factor, self.history * factor, self.number * factor)


def interval(graph: Graph, name: str, wanted: bool = True) -> Interval | None:
    """The interval of distances between two positions for which a mask is ``wanted``, or None if
    that is no interval."""
    node = graph[name]
    fn = node.attrs.get("fn") if node.op == "map" else None
    if fn == "not":
        return interval(graph, node.inputs[0], not wanted)
    if fn == ("and" if wanted else "or"):
        return both(interval(graph, operand, wanted) for operand in node.inputs)
    if fn in OPPOSITE:
        left, right = (_line(graph, operand) for operand in node.inputs)
        if left is None or right is None:
            return None
        return _bound(left.plus(right, -1), fn if wanted else OPPOSITE[fn])
    return None


def both(intervals: Iterable[Interval | None]) -> Interval | None:
    """What lies in all of them; None if one is unknown."""
    low: int | None = None
    high: int | None = None
    for found in intervals:
        if found is None:
            return None
        least, beyond = found
        low = least if low is None else low if least is None else max(low, least)
        high = beyond if high is None else high if beyond is None else min(high, beyond)
    return low, high


def _bound(line: Line, fn: str) -> Interval | None:
    """``line`` compared with 0, as an interval of the distance."""
    if line.time == -line.history == -1:
        line, fn = line.times(-1), {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}[fn]
    if line.time != 1 or line.history != -1 or line.number != int(line.number):
        return None
    at = -int(line.number)
    return {"ge": (at, None), "gt": (at + 1, None), "lt": (None, at), "le": (None, at + 1)}[fn]


def _line(graph: Graph, name: str) -> Line | None:
    node = graph[name]
    if node.op == "position":
        (dim,) = node.type.dims
        return Line(time=1) if dim.kind == "time" else Line(history=1)
    if node.op == "constant":
        return Line(number=float(node.attrs["value"]))
    if node.op != "map" or node.attrs["fn"] not in ("add", "sub", "neg", "mul"):
        return None
    lines = [_line(graph, operand) for operand in node.inputs]
    if None in lines:
        return None
    return _arithmetic(node.attrs["fn"], [line for line in lines if line is not None])


def _arithmetic(fn: str, lines: list[Line]) -> Line | None:
    if fn == "neg":
        return lines[0].times(-1)
    left, right = lines
    if fn == "mul":
        if (left.time, left.history) == (0, 0):
            return right.times(left.number)
        return left.times(right.number) if (right.time, right.history) == (0, 0) else None
    return left.plus(right, 1 if fn == "add" else -1)


def leaves(graph: Graph, name: str) -> list[str]:
    """What a mask's expression reads, in order: positions, or values computed elsewhere."""
    node = graph[name]
    if node.op == "constant":
        return []
    if node.op != "map":
        return [name]
    return list(dict.fromkeys(leaf for operand in node.inputs for leaf in leaves(graph, operand)))


def body(graph: Graph, parts: Sequence[tuple[str, bool]]) -> Graph:
    """A graph that is true where all these values are as wanted; its inputs are what they read."""
    rewriter = Rewriter(graph, "mask")
    for leaf in dict.fromkeys(leaf for name, _ in parts for leaf in leaves(graph, name)):
        node = graph[leaf]
        known = {"name": node.label or f"at_{node.type.names[0]}"}
        given = Node(leaf, "input", (), node.type, known, node.span)
        rewriter.replace(leaf, rewriter.new.add(given).name)

    def emit(node: Node) -> str:
        if node.name not in rewriter.to:
            for operand in graph.operands(node):
                emit(operand)
            rewriter.replace(node.name, rewriter.copy(node).name)
        return rewriter.to[node.name]

    result = ""
    for name, wanted in parts:
        value = emit(graph[name])
        if not wanted:
            type = graph[name].type
            value = rewriter.emit("hidden", "map", [value], type, attrs={"fn": "not"}).name
        if result:
            dims = {d.name: d for n in (result, value) for d in rewriter.new[n].type.dims}
            type = Type("bool", tuple(dims.values()))
            value = rewriter.emit("seen", "map", [result, value], type, attrs={"fn": "and"}).name
        result = value
    return rewriter.done(result)


# -- how much is seen ----------------------------------------------------------------------------


def visible(mask: Interval, length: int) -> float:
    """The share of the pairs of ``length`` positions with themselves that an interval lets see:
    for a causal mask (length + 1) / (2 * length)."""
    least, beyond = mask

    def closer(distance: int) -> int:
        """Pairs at a distance of 0 .. ``distance``: at each, ``length`` less that distance."""
        reach = min(max(distance, 0), length)
        return reach * length - reach * (reach - 1) // 2

    low = -length if least is None else least
    high = length if beyond is None else beyond
    if high <= low:
        return 0.0
    ahead = closer(high) - closer(max(low, 0))
    behind = closer(1 - low) - closer(max(1 - high, 1)) if low < 0 else 0
    return (ahead + behind) / length**2


def shares(graph: Graph, at: Mapping[str, int]) -> dict[str, float]:
    """For each contraction of an attention, scores and values, the share of its pairs that the mask
    lets see where time and history are ``at["time"]`` positions."""
    found: dict[str, float] = {}
    for softmax in probabilities.find(graph):
        if not is_square(softmax.node.type.dims):
            continue
        conditions, products = _below(graph, softmax.score)
        seen = _conditions_at_most(graph, conditions, at)
        share = visible(seen, at["time"])
        found |= dict.fromkeys([*products, *_above(graph, softmax.node.name)], share)
    return found


def _conditions_at_most(
    graph: Graph, conditions: Iterable[tuple[str, bool]], at: Mapping[str, int]
) -> Interval:
    seen = both(_at_most(graph, name, wanted, at) for name, wanted in conditions)
    assert seen is not None
    return seen


def _at_most(graph: Graph, name: str, wanted: bool, at: Mapping[str, int]) -> Interval:
    """An interval of at least as many pairs as those for which a mask is ``wanted``: of a choice of
    some, the nearest so many; everything where nothing is known."""
    exact = interval(graph, name, wanted)
    if exact is not None:
        return exact
    node = graph[name]
    fn = node.attrs.get("fn") if node.op == "map" else None
    if fn == "not":
        return _at_most(graph, node.inputs[0], not wanted, at)
    if fn == ("and" if wanted else "or"):
        return _conditions_at_most(graph, [(operand, wanted) for operand in node.inputs], at)
    if node.op == "in_top" and wanted and is_square(node.type.dims):
        least, beyond = _conditions_at_most(graph, _below(graph, node.inputs[0])[0], at)
        reach = (least or 0) + node.attrs["count"].at(at)
        return least, reach if beyond is None else min(beyond, reach)
    return None, None


def _below(graph: Graph, name: str) -> tuple[list[tuple[str, bool]], list[str]]:
    """The masks and the contractions that scores come from, through arithmetic."""
    node = graph[name]
    if node.op == "contract":
        return [], [name]
    conditions: list[tuple[str, bool]] = []
    products: list[str] = []
    values = node.inputs if node.op in ("map", "cast") else ()
    if node.op == "map" and node.attrs["fn"] == "where":
        condition, values = node.inputs[0], node.inputs[1:]
        hidden = [graph[v].attrs.get("value") == -inf for v in values]
        if any(hidden):
            conditions.append((condition, hidden[1]))
    for value in values:
        masks, below = _below(graph, value)
        conditions += masks
        products += below
    return conditions, products


def _above(graph: Graph, name: str) -> list[str]:
    """The contractions that read probabilities, through arithmetic."""
    found: list[str] = []
    for user in graph.users(name):
        if user.op == "contract":
            found.append(user.name)
        elif user.op in ("map", "cast"):
            found += _above(graph, user.name)
    return found
