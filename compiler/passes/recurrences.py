"""Lowers a ``scan``: what depends on the state becomes a body that is run token by token.

While its equation is lowered, the state at the token before is a value over time like any other.
Then the nodes between it and the state after it are taken out, and lose their time: they are the
scan's body. Everything else that the equation reads is an operand, computed for all tokens at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import networkx as nx

from compiler.ir import Dim, Node, Type
from compiler.passes.build import Builder
from compiler.rules import product
from dsl import typed
from dsl.instances import fail

if TYPE_CHECKING:
    from compiler.passes.lower import BodyLowering

BEFORE = "before"  # stands for the state while the equation is lowered: no op of the IR
COPIED = ("constant", "iota")
# What may be computed again for each token.
ELEMENTWISE = frozenset("map cast expand rename part select flatten unflatten stack concat".split())
INSIDE, OUTSIDE = "inside", "outside"


def before(lower: BodyLowering, e: typed.Value) -> str:
    """The state at the token before, along the same dims as the scan's value."""
    states = lower.frame.states
    if e.name not in states:
        equation = next(q for q in lower.definition.equations if q.name == e.name)
        if lower.lifting.rows:
            raise fail(
                "E0512",
                f"'{e.name}' is kept from token to token, and its block is chosen by data",
                equation.span,
                hint="a scan stands in a block that every token runs",
            )
        own = [lower.dim(a) for a in equation.written]
        carried = [d for d in lower.lifted.values() if d.kind != "time" and d not in own]
        type = Type("act" if equation.dtype == "act" else "f32", (*carried, *own))
        states[e.name] = lower.builder.add(BEFORE, (), type, equation.span, name=e.name)
    return states[e.name]


def scan(lower: BodyLowering, e: typed.Equation, after: str) -> str:
    """The scan's value, the states after each token; ``after`` is what its right side gives."""
    state = lower.frame.states[e.name]
    type = lower.type(state)
    time = next(d for d in type.dims if d.kind == "time")
    after = lower.ordered(lower.cast(after, type.dtype, e.span), type.dims)
    inside = _between(lower.builder, state, after)
    inside |= _cheaper(lower, inside, state, time)
    operands = dict.fromkeys(
        i
        for n in lower.builder.nodes  # in the order of the source
        if n in inside
        for i in lower.builder[n].inputs
        if i not in inside and lower.builder[i].op not in COPIED
    )
    moving = [o for o in operands if time in lower.type(o).dims]
    given = [*moving, *(o for o in operands if o not in moving)]
    body = _body(lower, e, state, after, inside, given, time)
    start = _start(lower, e, Type(type.dtype, _without(type.dims, time)))
    attrs: dict[str, Any] = {"name": e.name, "body": body}
    attrs["given"] = tuple(range(1, len(given) + 1))
    return lower.emit("scan", (start, *given), type.dims, type.dtype, e.span, **attrs)


def _between(builder: Builder, state: str, after: str) -> set[str]:
    """What depends on the state, and on which the state after it depends."""
    reached = {state}
    for name, node in builder.nodes.items():  # in order: operands first
        if reached.intersection(node.inputs):
            reached.add(name)
    needed, todo = set[str](), [after]
    while todo:
        name = todo.pop()
        if name in reached and name not in needed:
            needed.add(name)
            todo += builder[name].inputs
    return needed


def _cheaper(lower: BodyLowering, inside: set[str], state: str, time: Dim) -> set[str]:
    """What is computed token by token too, though no state decides it, so that the operands of all
    tokens take as little memory as they can: the product of a key and a value is as large as the
    state, and its factors are not. Where it makes no difference, all tokens are done at once.
    """
    builder, sizes = lower.builder, lower.elaborator.instances.sizes
    flow: nx.DiGraph[Any] = nx.DiGraph()
    todo = list(dict.fromkeys(i for n in inside for i in builder[n].inputs if i not in inside))
    for name in todo:
        flow.add_edge(INSIDE, (name, "read"))
    seen = set(todo)
    while todo:
        name = todo.pop()
        node = builder[name]
        volume = product(d for d in node.type.dims if d.kind != "time").at(sizes)
        moves = time in node.type.dims
        flow.add_edge((name, "read"), (name, "made"), capacity=volume if moves else 0)
        if not moves or node.op not in ELEMENTWISE or node.label is not None or node.rounds:
            flow.add_edge((name, "made"), OUTSIDE)
            continue
        for operand in node.inputs:
            flow.add_edge((name, "made"), (operand, "read"))
            if operand not in seen:
                seen.add(operand)
                todo.append(operand)
    if INSIDE not in flow or OUTSIDE not in flow:
        return set()
    # Of several cuts, networkx gives the one nearest to where it is told to arrive.
    _, (_, near) = nx.minimum_cut(flow.reverse(), OUTSIDE, INSIDE)
    return {name for name in seen if (name, "made") in near and builder[name].op not in COPIED}


def _body(
    lower: BodyLowering,
    e: typed.Equation,
    state: str,
    after: str,
    inside: set[str],
    given: list[str],
    time: Dim,
) -> str:
    """The graph of one token: the state and one token of each operand to the state after."""
    bodies = lower.elaborator.bodies
    name, number = f"{lower.builder.name}.{e.name}", 1
    while name in bodies:
        name, number = f"{lower.builder.name}.{e.name}.{number}", number + 1
    inner = Builder(name)
    outer = lower.builder
    taken = {e.name}
    for source in (state, *given):
        known = e.name if source == state else _word(outer, source)
        if source != state:
            stem, count = known, 1
            while known in taken:
                known, count = f"{stem}_{count}", count + 1
            taken.add(known)
        old = outer[source].type
        one = Type(old.dtype, _without(old.dims, time), old.of)
        inner.nodes[source] = Node(source, "input", (), one, {"name": known}, outer[source].span)
    for key, node in outer.nodes.items():
        copied = node.op in COPIED and any(key in outer[n].inputs for n in inside)
        if key == state or not (copied or key in inside):
            continue
        attrs = {k: _without(v, time) if k == "dims" else v for k, v in node.attrs.items()}
        one = Type(node.type.dtype, _without(node.type.dims, time), node.type.of)
        # A trace stacks what a token gives along time, in front.
        label = node.label if node.type.dims[:1] == (time,) and key != after else None
        inner.nodes[key] = node.with_(type=one, attrs=attrs, label=label)
        if outer.hint(key):
            inner.call(key, outer.hint(key))
    bodies[name] = inner.finish(after)
    return name


def _word(builder: Builder, name: str) -> str:
    """What an operand is called: by the value that it is a view of."""
    while True:
        node = builder[name]
        known = node.label or builder.hint(name) or node.attrs.get("param")
        if known:
            return str(known)
        if len(node.inputs) != 1:
            return "x"
        (name,) = node.inputs


def _without(dims: tuple[Any, ...], time: Dim) -> tuple[Any, ...]:
    return tuple(d for d in dims if d != time)


def _start(lower: BodyLowering, e: typed.Equation, type: Type) -> str:
    """What the scan begins with: one number, or a value along all dims of the state."""
    assert e.start is not None
    node = lower.expr(e.start)
    if lower.type(node).dtype != type.dtype:
        node = lower.emit("cast", (node,), lower.type(node).dims, type.dtype, e.start.span)
    missing = tuple(d for d in type.dims if d.name not in lower.type(node).names)
    if len(missing) == len(type.dims):
        return node
    if missing:
        dims = (*missing, *lower.type(node).dims)
        node = lower.emit("expand", (node,), dims, type.dtype, e.start.span, dims=missing)
    return lower.ordered(node, type.dims)
