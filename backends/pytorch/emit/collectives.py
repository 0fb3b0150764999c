"""What ranks do together, as calls of the model's mesh: ``MESH.all_reduce(x, "tp")``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backends.pytorch.emit.sizes import Constants
from backends.pytorch.emit.text import Text, call, method
from backends.pytorch.emit.values import EmitError, Value, full, permuted
from compiler.ir import Node, Program

if TYPE_CHECKING:
    from backends.pytorch.emit.body import Body

MESH = "MESH"
STARTED = {"dispatch": "rows_sent", "combine": "sums_sent"}  # what variables are called
__all__ = ["MESH", "OPS", "mesh"]


def mesh(program: Program, constants: Constants) -> list[str]:
    """The line that names the mesh of a program that has one."""
    if not program.mesh:
        return []
    sizes = (f'"{axis}": {constants.values[f"ranks.{axis}"]}' for axis in program.mesh)
    return [f"{MESH} = Mesh({{{', '.join(sizes)}}})"]


def _axes(node: Node) -> list[str]:
    return [f'"{axis}"' for axis in node.attrs["axes"]]


def called(body: Body, node: Node, name: str, value: Value, *given: str) -> Text:
    """A method of the mesh, or its start, which gets a variable."""
    if not node.attrs.get("starts"):
        return call(f"{MESH}.{name}", str(value), *given)
    return in_flight(body, node, call(f"{MESH}.start", f'"{name}"', str(value), *given))


def in_flight(body: Body, node: Node, text: Text) -> Text:
    """A variable for what is started; ``wait`` reads it."""
    name = body.variable(node, STARTED.get(node.op) or f"{body.stem(node)}_sent")
    body.line(f"{name} = {text}", node.span)
    return Text(name)


def wait(body: Body, node: Node) -> Value:
    value = body.operand(node, 0)
    return value.with_(method(value.text, "wait"))


def all_reduce(body: Body, node: Node) -> Value:
    value = body.tensor(body.operand(node, 0))
    fn = str(node.attrs["fn"])
    options = [] if fn == "sum" else [f'fn="{fn}"']
    return value.with_(called(body, node, "all_reduce", value, *_axes(node), *options))


def along(body: Body, node: Node) -> Value:
    """Ops that change one dim into another."""
    value = body.tensor(body.operand(node, 0))
    old = str(node.attrs["dim"])
    before = {d.name for d in body.nodes[node.inputs[0]].type.dims}
    (new,) = (d.name for d in node.type.dims if d.name not in before)
    name = {"part_of": "part"}.get(node.op, node.op)
    text = called(body, node, name, value, str(value.at(old)), *_axes(node))
    return value.with_(text, [new if a == old else a for a in value.axes])


def gather_part(body: Body, node: Node) -> Value:
    dim = str(node.attrs["dim"])
    table, index = body.together(body.operands(node))
    shared = [a for a in table.axes if a in index.axes]
    if not shared:
        rest = [a for a in table.axes if a != dim]
        table = permuted(table, [dim, *rest])
        text = call(f"{MESH}.embedding", str(index), str(table), *_axes(node))
        return Value(text, (*index.axes, *rest), table.dtype)
    own = [a for a in index.axes if a not in shared]
    if len(own) != 1 or set(table.axes) != {*shared, dim}:
        raise EmitError(f"%{node.name}: no code for looking {dim} up in a table {table.axes}")
    table, index = permuted(table, [*shared, dim]), permuted(index, [*shared, *own])
    text = call(f"{MESH}.gather", str(table), str(index), *_axes(node))
    return Value(text, (*shared, *own), table.dtype)


def route(body: Body, node: Node) -> Value:
    a = node.attrs
    pick, gate = body.together(body.operands(node))
    picks = str(a["picks"])
    rows = [*(n for n in pick.axes if n != picks), picks]
    weights = full(body.tensor(gate), rows)
    options = []
    if a["sent"] != a["axes"]:
        options.append(f"sent={a['sent']!r}")
    if a["per_node"]:
        options.append(f"per_node={a['per_node']}")
    dispatched = [n for n in body.nodes.values() if n.op == "dispatch" and n.inputs[0] == node.name]
    if any(picks in body.nodes[n.inputs[2]].type.names for n in dispatched):
        options.append("each=True")
    name = body.names.take("sent")
    given = [body.owner.attribute(str(a["child"])), str(permuted(pick, rows)), str(weights)]
    start = "start_route" if node.attrs.get("starts") else "route"
    text = call(f"{MESH}.{start}", *given, *_axes(node), *options)
    body.line(f"{name} = {text}", node.span)
    body.routings[node.name] = name
    return Value(Text(f"{name}.block"), node.type.names, "i64")


def dispatch(body: Body, node: Node) -> Value:
    route = body.nodes[node.inputs[0]]
    pick = body.nodes[node.inputs[1]].type.names
    picks = str(route.attrs["picks"])
    value = body.tensor(body.operand(node, 2))
    rest = [a for a in value.axes if a not in pick]
    value = full(value, [*(n for n in pick if n != picks), picks, *rest])
    text = _along(body, node, "dispatch", value)
    return Value(text, (*node.type.names[:1], *rest), value.dtype)


def combine(body: Body, node: Node) -> Value:
    pick, gate = (body.nodes[i].type for i in node.inputs[1:3])
    (rows,) = body.nodes[node.inputs[0]].type.names
    out = body.tensor(body.operand(node, 3))
    rest = [a for a in out.axes if a != rows]
    out = permuted(out, [rows, *rest])
    left = [n for n in pick.names if n != node.attrs["picks"]]
    dtype = "f32" if "f32" in (gate.dtype, out.dtype) else out.dtype
    return Value(_along(body, node, "combine", out), (*left, *rest), dtype)


def _along(body: Body, node: Node, name: str, value: Value) -> Text:
    """What is sent along a routing, or its start."""
    routing = Text(body.routings[node.inputs[0]])
    if not node.attrs.get("starts"):
        return method(routing, name, str(value))
    return in_flight(body, node, method(routing, f"start_{name}", str(value)))


OPS = {
    "all_reduce": all_reduce,
    "reduce_scatter": along,
    "all_gather": along,
    "part_of": along,
    "gather_part": gather_part,
    "routing": route,
    "dispatch": dispatch,
    "combine": combine,
    "wait": wait,
}
