"""What reads other tokens: a history some tokens before, and a state replaced token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from backends.pytorch.emit.text import call, method
from backends.pytorch.emit.values import BATCH, EmitError, Value, permuted
from compiler.ir import Dim, Node

if TYPE_CHECKING:
    from backends.pytorch.emit.body import Body


def shift(body: Body, node: Node) -> Value:
    a = node.attrs
    value = body.padded(body.operand(node, 0))
    given = [str(value), str(value.axis(a["history"])), str(body.owner.extent(a["offset"]))]
    time = _time(node)
    axes = [time.name]
    if a.get("index"):
        given.append(str(body.owner.size(node.type.dim(a["index"]))))
        axes.append(a["index"])
        if a["sign"] < 0:
            given.append("-1")
    given += [f"kept={text}" for text in kept(body, node)]
    rest = [name for name in value.axes if name not in (BATCH, a["history"])]
    text = call(f"{body.runtime_step}.before", *given)
    return Value(text, (*axes, *rest), value.dtype)


def kept(body: Body, node: Node) -> list[str]:
    """How many tokens before a step a bounded cache keeps, as an argument; none if all."""
    if node.attrs.get("last") is None:
        return []
    each = [str(body.owner.extent(extent)) for extent in node.attrs["last"]]
    return [each[0] if len(each) == 1 else f"max({', '.join(each)})"]


def scan(body: Body, node: Node) -> Value:
    a, time = node.attrs, _time(node)
    start, *rest = body.operands(node)
    values = [start, *(body.tensor(v) for v in rest)]
    graph = body.owner.program.bodies[a["body"]]
    state = graph.inputs[0].type.names
    shape = body.shape(graph.inputs[0].type.dims, inferred=False)
    begins = permuted(start, state).text
    if start.number is not None:  # one for all of the state
        like, dtype = body.like(), graph.inputs[0].type.dtype
        given = [f"dtype={'torch.float32' if dtype == 'f32' else f'{like}.dtype'}"]
        begins = call("torch.full", shape, str(begins), *given, f"device={like}.device")
    elif not start.axes:
        begins = method(begins, "expand", shape)
    given = [f'"{a["name"]}"', str(begins)]
    given += _arguments(body, node, a["body"], values, a["given"], time, ("", "fixed"))
    result = state
    if a.get("read"):
        given += _arguments(body, node, a["read"], values, a["asked"], time, ("asked", "known"))
        result = body.owner.program.bodies[a["read"]].result.type.names
        given += ["linear=True"] * ("linear" in a)
    text = call(f"{body.runtime_step}.scan", "self", *given)
    return Value(text, (time.name, *result), node.type.dtype)


def _arguments(
    body: Body,
    node: Node,
    target: str,
    values: Sequence[Value],
    positions: Sequence[int],
    time: Dim,
    words: tuple[str, str],
) -> list[str]:
    """A method for one token, the packed values that it is given, and those it is given whole."""
    graph = body.owner.program.bodies[target]
    moving: list[str] = []
    fixed: list[str] = []
    batched = [str(graph.inputs[0].attrs["name"])]
    for wanted, position in zip(graph.inputs[1:], positions, strict=True):
        value = values[position]
        if time.name in value.axes:
            if fixed:
                raise EmitError(f"{target}: what differs from token to token must stand first")
            batched.append(str(wanted.attrs["name"]))
            moving.append(str(permuted(value, (time.name, *wanted.type.names))))
        elif value.batched:
            raise EmitError(f"{target}: '{wanted.attrs['name']}' is one value for each sequence")
        else:
            fixed.append(str(permuted(value, wanted.type.names)))
    method = body.owner.of_one_token(graph, batched)
    if method.needs_step:
        raise EmitError(f"{target}: what is done at one token cannot look at the step")
    first, second = words
    own = f"self.{method.name}"
    out = [f"read={own}" if first else own]
    if moving or not first:
        out.append(f"{f'{first}=' if first else ''}{_tuple(moving)}")
    if fixed:
        out.append(f"{second}={_tuple(fixed)}")
    return out


def _tuple(values: Sequence[str]) -> str:
    return f"({', '.join(values)}{',' if len(values) == 1 else ''})"


def _time(node: Node) -> Dim:
    return next(d for d in node.type.dims if d.kind == "time")
