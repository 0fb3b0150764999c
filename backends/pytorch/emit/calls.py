"""Calls of other bodies: children, loops over layers, arrays indexed by data, guarded branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from backends.pytorch.emit import recurrences
from backends.pytorch.emit import turns as emit_turns
from backends.pytorch.emit.text import Text, call, stretch
from backends.pytorch.emit.values import BATCH, EmitError, Value, full, permuted
from compiler.ir import Dim, Graph, Node

if TYPE_CHECKING:
    from backends.pytorch.emit.body import Body, Method


def cache(body: Body, node: Node) -> Value:
    value = body.tensor(body.operand(node, 0))
    time = body.axis_of(value, "time")
    (history,) = (d.name for d in node.type.dims if d.kind == "history")
    if time is None:
        raise EmitError(f"%{node.name}: a value without time cannot be cached")
    value = permuted(value, [time if a == history else a for a in node.type.names])
    axis = value.axis(time)
    name = f'"{node.attrs["name"]}"'
    kept = recurrences.kept(body, node)
    text = call(
        f"{body.runtime_step}.{'recent' if kept else 'extend'}",
        "self",
        name,
        str(value),
        *kept,
        *([str(axis)] if axis else []),
    )
    return Value(text, (BATCH, *node.type.names), value.dtype)


def passed(
    body: Body, graph: Graph, values: Sequence[Value], names: dict[str, str]
) -> tuple[list[str], list[str]]:
    """Arguments as a body takes them, and the names of those that are per sequence though their
    types have no history."""
    given, batched = [], []
    for node, value in zip(graph.inputs, values, strict=True):
        order = [names.get(d, d) for d in node.type.names]
        value = body.tensor(value)
        if value.batched:
            order.insert(0, BATCH)
            if not body.has(node, "history"):
                batched.append(str(node.attrs["name"]))
        given.append(str(permuted(value, order)))
    return given, batched


def returned(graph: Graph, method: Method, names: dict[str, str], text: Text) -> Value:
    """What a call gives, under the caller's names."""
    type = graph.result.type
    axes = tuple(names.get(d, d) for d in type.names)
    history = any(d.kind == "history" for d in type.dims)
    return Value(text, (BATCH, *axes) if history or method.batched else axes, type.dtype)


def call_child(body: Body, node: Node) -> Value:
    child, names = str(node.attrs["child"]), dict(node.attrs["dims"])
    graph = body.owner.program.bodies[node.attrs["body"]]
    given, batched = passed(body, graph, body.operands(node), names)
    method = body.owner.child_method(child, None, graph.name, batched)
    target = body.owner.attribute(child) if child else "self"
    return returned(graph, method, names, _called(body, target, method, given))


def _called(body: Body, target: str, method: Method, given: Sequence[str]) -> Text:
    step = [body.runtime_step] if method.needs_step else []
    function = target if method.name == "forward" else f"{target}.{method.name}"
    return call(function, *step, *given)


def chain(body: Body, node: Node) -> Value:
    child, index = str(node.attrs["child"]), node.attrs["index"]
    names = dict(node.attrs.get("dims", ()))
    graph = body.owner.program.bodies[node.attrs["body"]]
    first, *extras = body.operands(node)
    for at, extra in enumerate(extras, 1):  # computed once, not in every turn
        if not extra.cheap:
            extras[at - 1] = body.bind(body.nodes[node.inputs[at]])
    name = body.variable(node)
    axes = (BATCH, *node.type.names) if first.batched else node.type.names
    carried = Value(Text(name), axes, node.type.dtype)
    given, batched = passed(body, graph, [carried, *extras], names)
    method = body.owner.child_method(child, index, graph.name, batched)
    body.line(f"{name} = {permuted(body.tensor(first), axes)}", node.span)
    item = body.loop_variable(child[:-1] if child.endswith("s") and len(child) > 2 else "block")
    result = returned(graph, method, names, _called(body, item, method, given))
    loop = f"for {item} in {_loop(body, child, index)}:"
    halves = graph.turns and not any(v.batched for v in (carried, *extras))
    if halves:
        turns = body.owner.child_turns(child, index, graph)
        emit_turns.chain(body, node, turns, graph, [carried, *extras], loop)
        body.indent += 4
    body.line(loop, node.span)
    body.indent += 4
    body.line(f"{name} = {permuted(result, axes)}", node.span)
    body.indent -= 8 if halves else 4
    return carried


def _loop(body: Body, child: str, index: Dim) -> str:
    """The modules of an array that a loop runs over: all of it, or a slice."""
    array = body.owner.array(child)
    text = body.owner.attribute(child)
    place = array.place(index)
    begin = " + ".join(str(body.owner.size(d)) for d in array.dims[:place])
    last = place == len(array.dims) - 1
    if array.numbered:
        return f"{text}.values()" if not place and last else _numbered(body, text, index)
    if not place and last:
        return text
    end = "" if last else " + ".join(str(body.owner.size(d)) for d in array.dims[: place + 1])
    return f"{text}[{stretch(begin, end)}]"


def _numbered(body: Body, text: str, index: Dim) -> str:
    start = body.owner.extent(index.start)
    end = body.owner.extent(index.start + index.size)
    return f"({text}[number] for number in range({start}, {end}))"


def apply(body: Body, node: Node) -> Value:
    pick, *values = body.together(body.operands(node))
    rows = [a for a in (BATCH, *node.attrs["rows"]) if a in pick.axes]
    pick = permuted(pick, rows)
    given, result = blocks(body, node, node.attrs["body"], rows, values)
    if node.inputs[0] in body.routings:
        text = call(f"{body.routings[node.inputs[0]]}.apply", *given)
    else:
        text = call("apply", given[0], str(pick), *given[1:])
    return Value(text, (*rows, *result.axes), result.dtype)


def blocks(
    body: Body, node: Node, target: str, rows: Sequence[str], values: Sequence[Value]
) -> tuple[list[str], Value]:
    """What ``apply`` and ``experts`` are given: the array, arguments and options; and what a block
    gives for one row."""
    a, names = node.attrs, dict(node.attrs["dims"])
    graph = body.owner.program.bodies[target]
    over = body.nodes[node.inputs[0]].type.of
    assert over is not None
    options, given = [], []
    whole = []
    for at, (wanted, value) in enumerate(zip(graph.inputs, values, strict=True)):
        own = [d.name for d in wanted.type.dims if d.kind == "rows"]
        inner = [names.get(d, d) for d in wanted.type.names if d not in own]
        value = body.tensor(value)
        if not own:
            whole.append(at)
            given.append(str(permuted(value, inner)))
            continue
        if wanted.type.names[0] != own[0]:
            raise EmitError(f"{target}: the rows of '{wanted.attrs['name']}' must stand first")
        given.append(str(full(value, [*rows, *inner])))
    method = body.owner.child_method(str(a["child"]), over, target, [])
    if method.needs_step:
        raise EmitError(f"{target}: a block chosen by data cannot look at positions or history")
    if method.name != "forward":
        options.append(f'method="{method.name}"')
    if whole:
        options.append(f"whole=({', '.join(str(i) for i in whole)},)")
    array = body.owner.array(str(a["child"]))
    if array.numbered:
        options.append(f"start={body.owner.extent(over.start)}")
    elif array.place(over):
        raise EmitError(f"%{node.name}: '{a['child']}' is chosen from, so it must be one array")
    (row,) = {d.name for n in graph.inputs for d in n.type.dims if d.kind == "rows"}
    if graph.result.type.names[0] != row:
        raise EmitError(f"{target}: the rows of its result must stand first")
    left = tuple(names.get(d, d) for d in graph.result.type.names[1:])
    result = Value(Text(""), left, graph.result.type.dtype)
    return [body.owner.attribute(str(a["child"])), *given, *options], result


def branch(body: Body, node: Node) -> Value:
    length, relation, number = node.attrs["when"]
    values = body.operands(node)
    sides = []
    for side in ("then", "otherwise"):
        graph = body.owner.program.bodies[node.attrs[side]]
        given, batched = passed(body, graph, values, {})
        few = (side == "then") == relation.startswith("<")
        method = body.owner.private(graph, batched, few)
        sides.append(returned(graph, method, {}, _called(body, "self", method, given)))
    test = f"if {body.runtime_step}.{length} {relation} {number}:"
    order = tuple(a for a in (BATCH, *node.type.names) if a in sides[0].axes)
    then, otherwise = (permuted(side, order) for side in sides)
    if node.name == body.graph.output and body.uses[node.name] == 1:
        body.line(test, node.span)
        body.indent += 4
        body.line(f"return {then}", node.span)
        body.indent -= 4
        return otherwise
    name = body.variable(node)
    body.line(test, node.span)
    body.indent += 4
    body.line(f"{name} = {then}", node.span)
    body.indent -= 4
    body.line("else:", node.span)
    body.indent += 4
    body.line(f"{name} = {otherwise}", node.span)
    body.indent -= 4
    return Value(Text(name), order, node.type.dtype)
