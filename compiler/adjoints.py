"""Adjoints: for each op, the gradients of its operands from that of its result, as nodes.

One function per op. It is given the node, its operands, the gradient ``grad`` of its result, and
which operands' gradients are wanted; it emits nodes and returns one for each of these. It may read
any value of the forward graph: which of them are saved and which computed again is not its concern
(``compiler/passes/partition.py``). A gradient has the dtype and the dims of its value, in any
order; ``Emitter.fit`` sums over dims that a value was repeated along.

Ops that run other bodies have backward bodies; ``compiler/passes/differentiate.py`` makes those.
Where a function has no derivative, the convention is that of automatic differentiation: of equal
values, ``min`` and ``max`` share the gradient evenly; ``abs`` has none at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from compiler import spec
from compiler.ir import Dim, DType, Graph, Node, Type
from compiler.rules import Scope
from dsl.diagnostics import Span


@dataclass(frozen=True)
class Piece:
    """The gradient of one part of a sum dim: zero for the other parts."""

    dim: Dim
    part: Dim
    value: Node


Gradients = Mapping[int, "Node | Piece"]


class Emitter:
    """Adds gradient nodes to a graph; their types are those of the ops' rules."""

    def __init__(self, graph: Graph, scope: Scope):
        self.graph, self.scope = graph, scope
        self.stem = "grad"
        self.span: Span | None = None

    def at(self, node: Node) -> None:
        """What is emitted from here on belongs to this node."""
        self.stem, self.span = f"{node.name}.grad", node.span

    def add(
        self, op: str, operands: Iterable[Node], type: Type | None = None, **attrs: Any
    ) -> Node:
        operands = list(operands)
        name = self.graph.fresh(self.stem)
        made = Node(name, op, tuple(n.name for n in operands), type or _ANY, attrs, self.span)
        if type is None:
            made = made.with_(type=spec.op(made).rule(made, operands, self.scope))
        return self.graph.add(made)

    def map(self, fn: str, *operands: Node) -> Node:
        return self.add("map", operands, fn=fn)

    def constant(self, value: float | int, dtype: DType = "act") -> Node:
        return self.add("constant", [], Type(dtype, ()), value=value)

    def sum(self, value: Node, over: Iterable[str], fn: str = "sum") -> Node:
        over = tuple(over)
        return self.add("reduce", [value], fn=fn, over=over) if over else value

    def expand(self, value: Node, dims: Iterable[Dim]) -> Node:
        dims = tuple(dims)
        return self.add("expand", [value], dims=dims) if dims else value

    def cast(self, value: Node, dtype: DType) -> Node:
        if value.type.dtype == dtype:
            return value
        return self.add("cast", [value], Type(dtype, value.type.dims))

    def fit(self, value: Node, type: Type) -> Node:
        """A gradient for a value of this type: summed over dims it lacks, the same along others."""
        value = self.sum(value, [d for d in value.type.names if d not in type.names])
        value = self.expand(value, [d for d in type.dims if d.name not in value.type.names])
        return self.cast(value, type.dtype)

    def zeros(self, type: Type) -> Node:
        return self.fit(self.constant(0.0), type)

    def total(self, found: list[Node | Piece], type: Type) -> Node:
        """The sum of a value's gradients; parts of one dim are laid side by side."""
        whole = [self.fit(v, type) for v in found if isinstance(v, Node)]
        pieces = [v for v in found if isinstance(v, Piece)]
        for dim in dict.fromkeys(p.dim for p in pieces):
            parts = []
            for part in dim.parts:
                rest = tuple(d for d in type.dims if d != dim)
                inner = Type(type.dtype, (*rest, part))
                own = [p.value for p in pieces if p.dim == dim and p.part == part]
                parts.append(self._added([self.fit(v, inner) for v in own]) or self.zeros(inner))
            whole.append(self.add("concat", parts, dim=dim))
        added = self._added(whole)
        return added or self.zeros(type)

    def _added(self, values: list[Node]) -> Node | None:
        if not values:
            return None
        result = values[0]
        for value in values[1:]:
            result = self.map("add", result, value)
        return result


_ANY = Type("act", ())
Adjoint = Callable[[Emitter, Node, list[Node], Node, Collection[int]], Gradients]

# -- elementwise -----------------------------------------------------------------------------------

# For each function, operand by operand: the factor that the gradient is multiplied with, as a
# function of (operands, result); or a function of the gradient as well.
Elementwise = Callable[[Emitter, Node, list[Node], Node, int], Node]


def _times(factor: Callable[[Emitter, list[Node], Node], Node]) -> Elementwise:
    return lambda e, grad, x, y, i: e.map("mul", grad, factor(e, x, y))


def _div(e: Emitter, grad: Node, x: list[Node], y: Node, i: int) -> Node:
    over = e.map("div", grad, x[1])
    return over if i == 0 else e.map("neg", e.map("mul", over, y))


def _pow(e: Emitter, grad: Node, x: list[Node], y: Node, i: int) -> Node:
    base, exponent = x
    if i == 1:
        return e.map("mul", grad, e.map("mul", y, e.map("log", base)))
    if exponent.op == "constant":
        less = e.constant(exponent.attrs["value"] - 1, exponent.type.dtype)
    else:
        less = e.map("sub", exponent, e.constant(1.0))
    return e.map("mul", grad, e.map("mul", e.map("pow", base, less), exponent))


def _abs(e: Emitter, grad: Node, x: list[Node], y: Node, i: int) -> Node:
    zero = e.constant(0.0)
    below = e.map("where", e.map("lt", x[0], zero), e.map("neg", grad), zero)
    return e.map("where", e.map("gt", x[0], zero), grad, below)


def _silu(e: Emitter, x: list[Node], y: Node) -> Node:
    """s + y (1 - s), where s = sigmoid(x)."""
    s = e.map("sigmoid", x[0])
    return e.map("add", s, e.map("mul", y, e.map("sub", e.constant(1.0), s)))


def _chosen(e: Emitter, grad: Node, x: list[Node], y: Node, i: int) -> Node:
    """min and max: to the operand that the result is; half to each where both are."""
    half, zero = e.map("mul", grad, e.constant(0.5)), e.constant(0.0)
    mine, other = x[i], x[1 - i]
    is_mine = e.map("eq", mine, y)
    both = e.map("eq", mine, other)
    return e.map("where", is_mine, e.map("where", both, half, grad), zero)


def _where(e: Emitter, grad: Node, x: list[Node], y: Node, i: int) -> Node:
    zero = e.constant(0.0)
    return e.map("where", x[0], grad, zero) if i == 1 else e.map("where", x[0], zero, grad)


def _minus_half_cubed(e: Emitter, x: list[Node], y: Node) -> Node:
    return e.map("mul", e.map("mul", y, y), e.map("mul", y, e.constant(-0.5)))


def _one_less_square(e: Emitter, x: list[Node], y: Node) -> Node:
    return e.map("sub", e.constant(1.0), e.map("mul", y, y))


def _logistic(e: Emitter, x: list[Node], y: Node) -> Node:
    return e.map("mul", y, e.map("sub", e.constant(1.0), y))


ELEMENTWISE: Mapping[str, Elementwise] = {
    "add": lambda e, grad, x, y, i: grad,
    "sub": lambda e, grad, x, y, i: grad if i == 0 else e.map("neg", grad),
    "mul": lambda e, grad, x, y, i: e.map("mul", grad, x[1 - i]),
    "div": _div,
    "pow": _pow,
    "neg": lambda e, grad, x, y, i: e.map("neg", grad),
    "exp": _times(lambda e, x, y: y),
    "log": lambda e, grad, x, y, i: e.map("div", grad, x[0]),
    "sqrt": lambda e, grad, x, y, i: e.map("div", e.map("mul", grad, e.constant(0.5)), y),
    "rsqrt": _times(_minus_half_cubed),
    "sin": _times(lambda e, x, y: e.map("cos", x[0])),
    "cos": _times(lambda e, x, y: e.map("neg", e.map("sin", x[0]))),
    "tanh": _times(_one_less_square),
    "sigmoid": _times(_logistic),
    "silu": _times(_silu),
    "abs": _abs,
    "min": _chosen,
    "max": _chosen,
    "where": _where,
}

# Functions that have no gradient: their results are steps, or truth values.
STEPS = frozenset("floor ceil not lt le gt ge eq ne and or".split())


def _map(e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]) -> Gradients:
    of = ELEMENTWISE[node.attrs["fn"]]
    return {i: of(e, grad, x, node, i) for i in wanted}


# -- sums and choices ------------------------------------------------------------------------------


def _contract(
    e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]
) -> Gradients:
    """The same product with the gradient in an operand's place, summed over what that lacks."""
    found = {}
    for i in wanted:
        factors = [grad, *(n for j, n in enumerate(x) if j != i)]
        names = dict.fromkeys(name for n in factors for name in n.type.names)
        over = tuple(name for name in names if name not in x[i].type.names)
        found[i] = e.add("contract", factors, over=over) if len(factors) > 1 else grad
    return found


def _reduce(
    e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]
) -> Gradients:
    (value,) = x
    fn, over = node.attrs["fn"], node.attrs["over"]
    dims = [d for d in value.type.dims if d.name in over]
    if fn == "sum" or not dims:
        return {0: grad}
    if fn == "mean":
        ones = e.expand(e.constant(1.0), dims)
        return {0: e.map("div", grad, e.sum(ones, over))}
    equal = e.map("where", e.map("eq", value, node), e.constant(1.0), e.constant(0.0))
    return {0: e.map("mul", equal, e.map("div", grad, e.sum(equal, over)))}


def _softmax(
    e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]
) -> Gradients:
    weighed = e.map("mul", node, grad)
    total = e.sum(weighed, [node.attrs["over"]])
    return {0: e.map("sub", weighed, e.map("mul", node, total))}


def _top(e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]) -> Gradients:
    over, to = node.attrs["over"], node.attrs["to"]
    of = x[0].type.dim(over)
    places = e.add("argtop", x, Type("i64", node.type.dims, of), over=over, to=to)
    return {0: e.add("scatter", [grad, places], x[0].type, into=of)}


def _gather(
    e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]
) -> Gradients:
    table, index = x
    into = table.type.dim(node.attrs["dim"])
    return {0: e.add("scatter", [grad, index], table.type, into=into)}


# -- views -----------------------------------------------------------------------------------------


def _flatten(
    e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]
) -> Gradients:
    into = tuple(x[0].type.dim(name) for name in node.attrs["dims"])
    return {0: e.add("unflatten", [grad], dim=node.attrs["into"].name, into=into)}


def _unflatten(
    e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]
) -> Gradients:
    names = tuple(d.name for d in node.attrs["into"])
    return {0: e.add("flatten", [grad], dims=names, into=x[0].type.dim(node.attrs["dim"]))}


def _part(e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]) -> Gradients:
    dim = x[0].type.dim(node.attrs["dim"])
    (part,) = (p for p in dim.parts if p.name == node.attrs["part"])
    return {0: Piece(dim, part, grad)}


def _select(
    e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]
) -> Gradients:
    dim = x[0].type.dim(node.attrs["dim"])
    here = e.map(
        "eq", e.add("iota", [], Type("i64", (dim,), dim)), e.constant(node.attrs["at"], "i64")
    )
    return {0: e.map("where", here, grad, e.constant(0.0))}


def _rename(
    e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]
) -> Gradients:
    old = x[0].type.dim(node.attrs["dim"])
    return {0: e.add("rename", [grad], dim=node.attrs["to"].name, to=old)}


def _as_it_is(
    e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]
) -> Gradients:
    return {0: grad}


def _concat(
    e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]
) -> Gradients:
    dim = node.attrs["dim"]
    return {i: e.add("part", [grad], dim=dim.name, part=dim.parts[i].name) for i in wanted}


def _stack(e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]) -> Gradients:
    return {i: e.add("select", [grad], dim=node.attrs["dim"].name, at=i) for i in wanted}


def _select_rows(
    e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]
) -> Gradients:
    return {0: e.add("spread_rows", [grad], x[0].type)}


def _as_history(
    e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]
) -> Gradients:
    return {0: e.add("as_time", [grad], x[0].type)}


def _shift(e: Emitter, node: Node, x: list[Node], grad: Node, wanted: Collection[int]) -> Gradients:
    attrs = {k: node.attrs[k] for k in ("index", "sign", "offset") if node.attrs.get(k) is not None}
    return {0: e.add("spread_shift", [grad], x[0].type, **attrs)}


# -- the table -------------------------------------------------------------------------------------

ADJOINTS: Mapping[str, Adjoint] = {
    "map": _map,
    "contract": _contract,
    "reduce": _reduce,
    "softmax": _softmax,
    "cast": _as_it_is,
    "top": _top,
    "gather": _gather,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "part": _part,
    "select": _select,
    "rename": _rename,
    "expand": _as_it_is,
    "select_rows": _select_rows,
    "concat": _concat,
    "stack": _stack,
    "as_history": _as_history,
    "shift": _shift,
}

# Ops whose gradients are a backward body's, made with that of the body they run; and composites.
BODIES = frozenset({"call", "chain", "apply", "branch", "scan", "loop"})

# Ops without an adjoint, and why.
NONE: Mapping[str, str] = {
    "input": "gives its gradient to who calls the body",
    "param": "its gradient is a result",
    "state": "is not trained",
    "position": "a whole number",
    "constant": "a number",
    "iota": "a whole number",
    "argtop": "a choice has no gradient; the values chosen have",
    "in_top": "a choice has no gradient; the values chosen have",
    "quantize": "codes have none: what is trained are master weights",
    "dequantize": "codes have none: what is trained are master weights",
    "scaled_contract": "codes have none: what is trained are master weights",
    **dict.fromkeys(
        (
            "all_reduce reduce_scatter all_gather part_of gather_part routing dispatch combine wait"
        ).split(),
        "is of one rank's program: whole models are differentiated",
    ),
    "cache": "training takes whole sequences: it is as_history, which has one",
    "pack": "its values' gradients are results",
    "item": "hands its gradient to the loop that gives it",
    "route": "occurs in backward graphs only: there are no second derivatives",
    "as_time": "occurs in backward graphs only: there are no second derivatives",
    "spread_rows": "occurs in backward graphs only: there are no second derivatives",
    "spread_shift": "occurs in backward graphs only: there are no second derivatives",
    "scatter": "occurs in backward graphs only: there are no second derivatives",
}


# Where gradients end, as they should.
ENDS = frozenset("input param state position constant iota argtop in_top".split())


def runs_body(node: Node) -> bool:
    """Does the node run a body that defines it: a structured op, or a composite?"""
    return node.op in BODIES or spec.op(node).composite


def flows(node: Node, position: int) -> bool:
    """Does a gradient go from the node's result to this operand?"""
    if node.op == "map":
        fn = node.attrs["fn"]
        return fn not in STEPS and not (fn == "where" and position == 0)
    if node.op in ("apply", "gather"):
        return position != (0 if node.op == "apply" else 1)
    return node.op not in ENDS  # an op that has no adjoint and is no end is refused where it occurs
