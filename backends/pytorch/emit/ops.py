"""Expressions: what each op is in torch.

A function per op gives a value whose axes stand in any order; ``Body.canonical`` then brings it
into the order, layout and dtype of the node's type. Axes are counted from the end, so that a body
reads the same however many dims it was lifted over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from backends.pytorch.emit import arithmetic, calls, coded, collectives, composites, recurrences
from backends.pytorch.emit.text import SUM, Text, arguments, call, method, stretch
from backends.pytorch.emit.values import (
    BATCH,
    EmitError,
    Matrix,
    Value,
    aligned,
    full,
    indexed,
    literal,
    permuted,
    union,
)
from compiler.ir import Dim, Node

if TYPE_CHECKING:
    from backends.pytorch.emit.body import Body


def emit(body: Body, node: Node) -> Value:
    """The value of a node, whose operands have theirs.

    Raises:
        EmitError: there is no code for it.
    """
    if node.op not in OPS:
        raise EmitError(f"%{node.name}: no code for the op '{node.op}'")
    return OPS[node.op](body, node)


# -- sources ---------------------------------------------------------------------------------------


def position(body: Body, node: Node) -> Value:
    (dim,) = node.type.dims
    if dim.kind == "history":
        return Value(Text(f"{body.runtime_step}.history_position"), (BATCH, dim.name), "i64")
    return Value(Text(f"{body.runtime_step}.position"), (dim.name,), "i64")


def param(body: Body, node: Node) -> Value:
    text, axes = Text(body.owner.attribute(str(node.attrs["param"]))), node.type.names
    matrix = Matrix(text, axes[:1], axes[1:]) if len(axes) == 2 else None
    return Value(text, axes, node.type.dtype, matrix=matrix)


def constant(body: Body, node: Node) -> Value:
    value = node.attrs["value"]
    name = body.owner.constant(str(node.attrs.get("name") or ""), value)
    return literal(value, node.type.dtype, name)


def iota(body: Body, node: Node) -> Value:
    (dim,) = node.type.dims
    if dim.kind == "history":
        return Value(Text(f"{body.runtime_step}.history_index"), (BATCH, dim.name), "i64")
    if dim.kind == "time":
        return Value(Text(f"{body.runtime_step}.offset"), (dim.name,), "i64")
    size = body.owner.size(dim)
    text = call("torch.arange", str(size), f"device={body.like()}.device")
    return Value(text, (dim.name,), "i64")


def cast(body: Body, node: Node) -> Value:
    return body.cast(body.values[node.inputs[0]], node.type.dtype)


def softmax(body: Body, node: Node) -> Value:
    over = node.attrs["over"]
    (value,) = body.together(body.operands(node), body.pads([over]))
    value = body.within(value, [over], "-inf")
    return value.with_(call("softmax", str(value), str(value.at(over))))


# -- choosing --------------------------------------------------------------------------------------


def _top(body: Body, node: Node, count: str) -> tuple[Value, list[str]]:
    over = node.attrs["over"]
    (value,) = body.together(body.operands(node), body.pads([over]))
    value = body.within(body.tensor(value), [over], "-inf")
    axis = value.at(over)
    return value, [str(value), count, *([str(axis)] if axis != -1 else [])]


def top(body: Body, node: Node) -> Value:
    to = node.type.dim(node.attrs["to"])
    value, given = _top(body, node, str(body.owner.size(to)))
    axes = tuple(to.name if a == node.attrs["over"] else a for a in value.axes)
    place = 0 if node.op == "top" else 1
    text = Text(f"{call('top', *given)}[{place}]")
    return Value(text, axes, value.dtype if node.op == "top" else "i64")


def in_top(body: Body, node: Node) -> Value:
    value, given = _top(body, node, str(body.owner.extent(node.attrs["count"])))
    return Value(call("in_top", *given), value.axes, "bool")


def gather(body: Body, node: Node) -> Value:
    dim = node.attrs["dim"]
    table, index = body.together(body.operands(node), body.pads([dim]))
    shared = [a for a in table.axes if a in index.axes and a != dim]
    own = [a for a in index.axes if a not in shared]
    rest = [a for a in table.axes if a not in shared and a != dim]
    if not shared:
        at = table.axis(dim)
        axes = (*table.axes[:at], *index.axes, *table.axes[at + 1 :])
        if at == 0 and table.matrix is not None:
            return Value(call("F.embedding", str(index), str(table)), axes, table.dtype)
        pattern = [":"] * len(table.axes)
        pattern[at] = str(index)
        chosen = indexed(table, pattern, table.axes)
        return chosen.with_(chosen.text, axes)
    table = permuted(table, [*shared, dim, *rest])
    index = permuted(index, [*shared, *own])
    axes = (*shared, *own, *rest)
    exact = BATCH not in shared  # a batch axis may have length 1
    if exact and not rest and len(own) == 1:
        return Value(method(table.text, "gather", "-1", str(index)), axes, table.dtype)
    text = call("gather", str(table), str(index), str(len(shared)))
    return Value(text, axes, table.dtype)


# -- views -----------------------------------------------------------------------------------------


def _same(body: Body, node: Node, value: Value, of: Callable[[Matrix], Matrix | None]) -> Value:
    """The value, as a view of a matrix where its operand is one and ``of`` knows how."""
    before = body.values[node.inputs[0]].matrix
    return replace(value, matrix=of(before) if before is not None else None)


def _on(matrix: Matrix, change: Callable[[tuple[str, ...]], tuple[str, ...]]) -> Matrix:
    return replace(matrix, rows=change(matrix.rows), columns=change(matrix.columns))


def flatten(body: Body, node: Node) -> Value:
    names, into = node.attrs["dims"], node.attrs["into"]
    value = body.tensor(body.operand(node, 0))
    if len(names) == 1:
        axes = [into.name if a == names[0] else a for a in value.axes]
        return replace(value, axes=tuple(axes), matrix=None)
    first = min(value.axis(n) for n in names)
    rest = [a for a in value.axes if a not in names]
    before = [a for a in value.axes[:first] if a not in names]
    value = permuted(value, [*before, *names, *rest[len(before) :]])
    begin, end = value.at(names[0]), value.at(names[-1])
    span = [str(begin)] if end == -1 else [str(begin), str(end)]
    axes = [*before, into.name, *rest[len(before) :]]
    return value.with_(method(value.text, "flatten", *span), axes)


def unflatten(body: Body, node: Node) -> Value:
    dim, into = node.attrs["dim"], node.attrs["into"]
    value = body.operand(node, 0)
    at = value.axis(dim)
    names = tuple(d.name for d in into)
    axes = (*value.axes[:at], *names, *value.axes[at + 1 :])
    if len(into) == 1:
        out = replace(value, axes=axes)
    else:
        place = at if value.matrix is not None else value.at(dim)
        text = method(value.text, "unflatten", str(place), body.shape(into))
        out = value.with_(text, axes)

    def split(own: tuple[str, ...]) -> tuple[str, ...]:
        if dim not in own:
            return own
        return (*own[: own.index(dim)], *names, *own[own.index(dim) + 1 :])

    return _same(body, node, out, lambda matrix: _on(matrix, split))


def part(body: Body, node: Node) -> Value:
    name, chosen = node.attrs["dim"], node.attrs["part"]
    whole = body.nodes[node.inputs[0]].type.dim(name)
    value = body.operand(node, 0)
    rows = _stretch(body, whole, chosen)
    axes = tuple(chosen if a == name else a for a in value.axes)
    out = indexed(value, [rows if a == name else ":" for a in value.axes], axes)

    def cut(matrix: Matrix) -> Matrix | None:
        own = (name,)
        if own not in (matrix.rows, matrix.columns):
            return None  # the rows of a part of a product do not adjoin
        whole_rows = matrix.rows == own
        pattern = [rows, ":"] if whole_rows else [":", rows]
        text = indexed(Value(matrix.text, ("", " "), "act"), pattern, ("", " ")).text
        if whole_rows:
            return Matrix(text, (chosen,), matrix.columns)
        return Matrix(text, matrix.rows, (chosen,))

    return _same(body, node, out, cut)


def _stretch(body: Body, whole: Dim, chosen: str) -> str:
    """``begin : end`` of a part of a sum."""
    place = [p.name for p in whole.parts].index(chosen)
    before = [body.owner.size(p) for p in whole.parts[:place]]
    begin = " + ".join(t.within(SUM) for t in before)
    if place == len(whole.parts) - 1:
        return stretch(begin, "")
    end = " + ".join(t.within(SUM) for t in [*before, body.owner.size(whole.parts[place])])
    return stretch(begin, end)


def select(body: Body, node: Node) -> Value:
    name = node.attrs["dim"]
    (value,) = body.together(body.operands(node), body.pads([name]))
    pattern = [str(node.attrs["at"]) if a == name else ":" for a in value.axes]
    chosen = indexed(value, pattern, value.axes)
    return chosen.with_(chosen.text, [a for a in value.axes if a != name])


def rename(body: Body, node: Node) -> Value:
    old, new = node.attrs["dim"], node.attrs["to"].name
    value = body.operand(node, 0)

    def renamed(axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new if a == old else a for a in axes)

    out = replace(value, axes=renamed(value.axes))
    return _same(body, node, out, lambda matrix: _on(matrix, renamed))


def expand(body: Body, node: Node) -> Value:
    value = body.tensor(body.operand(node, 0))
    new: Mapping[str, Dim] = {d.name: d for d in node.attrs["dims"]}
    kinds = {d.kind for d in new.values()}
    if "history" in kinds or (value.batched and "time" in kinds):
        value = body.padded(value)
        value = value if value.batched else full(value, (BATCH, *value.axes))
    axes = union([value, Value(Text(""), tuple(new), "act")], node.type.names)
    sizes = [_length(body, new[a], value.batched) if a in new else "-1" for a in axes]
    value = full(value, axes)
    return value.with_(method(value.text, "expand", *sizes), axes)


def _length(body: Body, dim: Dim, padded: bool) -> str:
    """The length of an axis, while the model runs."""
    if dim.kind == "history":
        return f"{body.runtime_step}.history"
    if dim.kind == "time":
        return f"{body.runtime_step}.{'time' if padded else 'total'}"
    if dim.kind == "rows":
        raise EmitError(f"cannot repeat a value along {dim.name}, whose length is not known")
    return str(body.owner.size(dim))


def select_rows(body: Body, node: Node) -> Value:
    value = body.operand(node, 0)
    time = body.axis_of(value, "time")
    (rows,) = (d.name for d in node.type.dims if d.kind == "rows" and d.name not in value.axes)
    if time is None:
        raise EmitError(f"%{node.name}: a value without time has no rows to select")
    axes = tuple(rows if a == time else a for a in value.axes)
    return body.on_step("select", value, axes, value.axis(time))


# -- joining ---------------------------------------------------------------------------------------


def _alike(body: Body, node: Node, values: Sequence[Value]) -> list[Value]:
    """Operands in one layout and in the result's dtype, numbers as tensors."""
    return body.together([body.cast(body.tensor(v), node.type.dtype) for v in values])


def concat(body: Body, node: Node) -> Value:
    dim: Dim = node.attrs["dim"]
    values = _alike(body, node, body.operands(node))
    parts = [p.name for p in dim.parts]
    order = [a for a in union(values, [*node.type.names, *parts]) if a not in parts]
    place = [a for a in order if a in (BATCH, *node.type.names)]
    at = node.type.names.index(dim.name) + (BATCH in place)
    lined = [
        str(permuted(v, [*order[:at], p, *order[at:]])) for v, p in zip(values, parts, strict=True)
    ]
    axes = (*order[:at], dim.name, *order[at:])
    text = call("torch.cat", arguments(lined), str(at - len(axes)))
    return Value(text, axes, node.type.dtype)


def stack(body: Body, node: Node) -> Value:
    dim: Dim = node.attrs["dim"]
    values = _alike(body, node, body.operands(node))
    order = union(values, node.type.names)
    at = node.type.names.index(dim.name) + (BATCH in order)
    axes = (*order[:at], dim.name, *order[at:])
    lined = [str(aligned(v, order)) for v in values]
    text = call("torch.stack", arguments(lined), str(at - len(axes)))
    return Value(text, axes, node.type.dtype)


OPS: Mapping[str, Callable[[Body, Node], Value]] = {
    "position": position,
    "param": param,
    "state": param,
    "constant": constant,
    "iota": iota,
    "map": arithmetic.map,
    "contract": arithmetic.contract,
    "quantize": coded.quantize,
    "dequantize": coded.dequantize,
    "scaled_contract": coded.scaled_contract,
    "reduce": arithmetic.reduce,
    "softmax": softmax,
    "cast": cast,
    "top": top,
    "argtop": top,
    "in_top": in_top,
    "gather": gather,
    "flatten": flatten,
    "unflatten": unflatten,
    "part": part,
    "select": select,
    "rename": rename,
    "expand": expand,
    "select_rows": select_rows,
    "concat": concat,
    "stack": stack,
    "cache": calls.cache,
    "shift": recurrences.shift,
    "scan": recurrences.scan,
    "call": calls.call_child,
    "chain": calls.chain,
    "apply": calls.apply,
    "branch": calls.branch,
    "attention": composites.attention,
    "rms_norm": composites.rms_norm,
    "extern": composites.replaced,
    "experts": composites.experts,
    **collectives.OPS,
}
