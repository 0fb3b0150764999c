"""Rotary position embedding: pairs of a head's numbers turned by angles that tables hold."""

from __future__ import annotations

from dataclasses import dataclass

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.kernels import Group
from backends.pytorch.emit.text import Text, call
from backends.pytorch.emit.values import Value
from backends.triton.families.rotary import RotarySpec, generate
from backends.triton.patterns.context import Context, packed
from compiler.ir import Dim, Node

VIEWS = frozenset({"part", "unflatten", "rename"})


class Other(Exception):
    """It is something else than a rotation."""


@dataclass(frozen=True)
class Rows:
    """Where a view of heads lies in the rows of a value that is no view.

    Attributes:
        base: ``[tokens, ...]``, without gaps.
        steps: numbers from one place of each dim to the next.
    """

    base: Node
    offset: int
    steps: dict[str, int]


def rotary(context: Context, node: Node) -> Group | None:
    """``(a cos - b sin, b cos + a sin)`` of the pairs (a, b), side by side or by halves."""
    try:
        found = _found(context, node)
    except (Other, KeyError, ValueError):
        return None
    spec, rows, cosine, sine, covered = found
    if not context.inner(covered, node.name):
        return None
    operator = generate(spec, context.target)
    reads = [rows.base.name, cosine.name, sine.name]
    sizes = ", ".join(str(context.size(d)) for d in node.type.dims[1:])

    def write(body: Body, root: Node, prefix: str) -> Value | None:
        given = packed(body, prefix, *reads)
        if given is None:
            return None
        text = call(context.use(operator), *given)
        if len(node.type.dims) != 3:
            text = Text(f"{text}.view(-1, {sizes})")
        return Value(text, node.type.names, node.type.dtype)

    return Group(node.name, frozenset({node.name, *covered}), write, frozenset(reads))


def _found(context: Context, node: Node) -> tuple[RotarySpec, Rows, Node, Node, set[str]]:
    """The rotation that a node is, what it reads, and what it computes on the way.

    Raises:
        Other: it is none.
    """
    _must(node.op == "cast" and node.type.dtype == "act" and len(node.type.dims) > 1)
    _must(node.type.dims[0].kind != "plain")
    _must(all(d.kind == "plain" for d in node.type.dims[1:]))
    flat = _of(context, node, 0, "flatten")
    stack = _of(context, flat, 0, "stack")
    _must(len(stack.inputs) == 2 and stack.type.dtype == "f32")
    minus, plus = _of(context, stack, 0, "map", "sub"), _of(context, stack, 1, "map", "add")
    pair = stack.attrs["dim"].name
    order = tuple(flat.attrs["dims"])
    _must(len(order) == 2 and pair in order and flat.attrs["into"].name == node.type.names[-1])
    halves = order[0] == pair
    (number,) = (name for name in order if name != pair)

    products = [_of(context, one, i, "map", "mul") for one in (minus, plus) for i in range(2)]
    a, cosine = _factors(context, products[0], number)
    b, sine = _factors(context, products[1], number)
    for first, second in ((products[2], products[3]), (products[3], products[2])):
        if _factors(context, first, number) == (b, cosine):
            _must(_factors(context, second, number) == (a, sine))
            break
    else:
        raise Other
    one, other = _selected(context, a, 0), _selected(context, b, 1)
    _must(one == other)
    split = context.graph[one]
    _must(split.op == "unflatten" and len(split.attrs["into"]) == 2)
    names = [d.name for d in split.attrs["into"]]
    _must(names.index(number) == (1 if halves else 0))
    source = context.operand(split, 0)
    _must(source.type.dtype == "act" and source.type.names[:-1] == node.type.names[:-1])
    _must(source.type.names[-1] == split.attrs["dim"])

    rows, views = _rows(context, source)
    heads = node.type.dims[1:-1]
    _must(rows.steps[source.type.names[-1]] == 1)
    spec = RotarySpec(
        heads=context.sizes(heads),
        dim=context.size(node.type.dims[-1]),
        halves=halves,
        token_stride=context.sizes(rows.base.type.dims[1:]),
        head_stride=_together(context, heads, rows.steps),
        dtype=context.dtype,
        offset=rows.offset,
    )
    met = {n.name for n in (flat, stack, minus, plus, *products, a, b, split)}
    own = {*met, node.name}
    for view in views:  # views that only this reads
        if context.users(view) <= own:
            own.add(view)
    return spec, rows, cosine, sine, own - {node.name}


def _must(condition: bool) -> None:
    if not condition:
        raise Other


def _of(context: Context, node: Node, at: int, op: str, fn: str = "") -> Node:
    found = context.operand(node, at)
    _must(found.op == op and (not fn or found.attrs["fn"] == fn))
    return found


def _factors(context: Context, product: Node, number: str) -> tuple[Node, Node]:
    """What is turned, and the table ``[tokens, pairs]``."""
    x, table = (context.operand(product, i) for i in range(2))
    if x.type.dtype == "f32":
        x, table = table, x
    _must(x.op == "select" and x.type.dtype == "act" and table.type.dtype == "f32")
    _must(table.type.names == (product.type.names[0], number))
    return x, table


def _selected(context: Context, node: Node, at: int) -> str:
    _must(node.op == "select" and int(node.attrs["at"]) == at)
    return node.inputs[0]


def _rows(context: Context, node: Node) -> tuple[Rows, list[str]]:
    """Where a value lies in what it is a view of, and the views, the last first."""
    if node.op not in VIEWS or node.type.dims[0].kind == "plain":
        steps, below = {}, 1
        for dim in reversed(node.type.dims[1:]):
            _must(dim.kind == "plain")
            steps[dim.name] = below
            below *= context.size(dim)
        return Rows(node, 0, steps), []
    source = context.operand(node, 0)
    _must(source.type.names[0] == node.type.names[0])
    before, views = _rows(context, source)
    a, steps, offset = node.attrs, dict(before.steps), before.offset
    below = steps.pop(a["dim"])
    if node.op == "unflatten":
        for dim in reversed(a["into"]):
            steps[dim.name] = below
            below *= context.size(dim)
    elif node.op == "rename":
        steps[a["to"].name] = below
    else:
        place = source.type.dim(a["dim"]).offset(a["part"]).at(context.program.sizes)
        offset += place * below
        steps[a["part"]] = below
    return Rows(before.base, offset, steps), [node.name, *views]


def _together(context: Context, dims: tuple[Dim, ...], steps: dict[str, int]) -> int:
    """The step of several dims as one; 0 where there are none.

    Raises:
        Other: they do not adjoin.
    """
    length = step = 0
    for dim in reversed(dims):
        if length:
            _must(steps[dim.name] == step * length)
        step, length = step if length else steps[dim.name], max(1, length) * context.size(dim)
    return step
