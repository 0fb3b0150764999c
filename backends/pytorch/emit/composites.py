"""Composites that the runtime, or torch, has one function for; others are what they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backends.pytorch.emit import calls
from backends.pytorch.emit.text import PRODUCT, Text, binary, call
from backends.pytorch.emit.values import BATCH, Value, full, letters, permuted
from compiler.ir import Node

if TYPE_CHECKING:
    from backends.pytorch.emit.body import Body


def replaced(body: Body, node: Node) -> Value:
    """The nodes that a composite stands for, written in its place."""
    graph = body.owner.program.bodies[node.attrs["body"]]
    return body.inline(graph, node, body.operands(node))


def rms_norm(body: Body, node: Node) -> Value:
    a = node.attrs
    values = body.operands(node)
    x, over = values[0], tuple(a["over"])
    gain = None if a["gain"] is None else values[a["gain"]]
    if x.axes[-len(over) :] != over or (gain is not None and gain.axes != over):
        return replaced(body, node)
    dims = [body.dims[name] for name in over]
    eps = body.owner.number("eps", a["eps"])
    shape = body.shape(dims, inferred=False)
    together = gain is not None and gain.dtype == x.dtype and not a["rounds_before_gain"]
    if together and gain is not None:
        text = call("F.rms_norm", str(x), shape, str(gain), eps)
        return Value(text, x.axes, x.dtype)
    text = call("F.rms_norm", str(x), shape, f"eps={eps}")
    if gain is None:
        return Value(text, x.axes, x.dtype)
    unit = Value(text, x.axes, x.dtype)
    if not a["rounds_before_gain"]:
        # One rounding, at the result: the norm itself in f32.
        wide = call("F.rms_norm", str(body.cast(x, "f32")), shape, f"eps={eps}")
        unit = Value(wide, x.axes, "f32")
    dtype = "f32" if "f32" in (unit.dtype, gain.dtype) else x.dtype
    return Value(binary(unit.text, "*", gain.text, PRODUCT), x.axes, dtype)


def attention(body: Body, node: Node) -> Value:
    a = node.attrs
    time, history = str(a["time"]), str(a["history"])
    terms = [(node.inputs[q], node.inputs[k], over) for q, k, over in a["terms"]]
    held = body.values[node.inputs[a["value"]]]
    fits = held.batched and history in held.axes
    for q, k, _ in terms:
        query, key = body.values[q], body.values[k]
        fits = fits and time in query.axes and not query.batched
        fits = fits and key.batched and history in key.axes and time not in key.axes
    interval = isinstance(a["mask"], tuple)
    if interval:
        fits = fits and all(body.nodes[node.inputs[i]].op == "position" for i in a["mask_operands"])
    if not fits:
        return replaced(body, node)
    heads = [*a["heads"]]
    axes = dict.fromkeys(n for i in node.inputs for n in body.values[i].axes if n != BATCH)
    names = letters([*axes], body.kinds())

    def written(some: tuple[str, ...] | list[str]) -> str:
        return "".join(names[name] for name in some if name != BATCH)

    scores = written([*heads, time, history])
    items = []
    for q, k, _ in terms:
        query, key = body.values[q], body.values[k]
        items.append(f'("{written(query.axes)},{written(key.axes)}->{scores}", {query}, {key})')
    value = f'("{scores},{written(held.axes)}->{written(node.type.names)}", {held})'
    scale = body.owner.number("scale", a["scale"], named=True)
    options = [f"scale={scale}"] if a["scale"] != 1 else []
    if interval:
        options.append(f"visible={a['mask']}")
    elif a["mask"] is not None:
        options.append(f"mask={_mask(body, node, time, history)}")
    if a.get("score") is not None:
        options.append(f"score={_function(body, node)}")
    if a.get("sink") is not None:
        sink = body.values[node.inputs[a["sink"]]]
        options.append(f'sink=("{written(sink.axes)}", {sink})')
    if node.type.dtype != held.dtype:
        options.append("dtype=torch.float32")
    text = call("attention", body.runtime_step, f"[{', '.join(items)}]", value, *options)
    return Value(text, node.type.names, node.type.dtype)


def _function(body: Body, node: Node) -> str:
    """A function of one number, which is written for tensors: a lambda, or one with a name."""
    graph = body.owner.program.bodies[node.attrs["score"]]
    x, indent, before = body.names.take("score"), body.indent, body.lines
    body.indent, body.lines = indent + 4, []
    result = body.inline(graph, node, [Value(Text(x), (), "f32")])
    lines, body.indent, body.lines = body.lines, indent, before
    if not lines:
        return f"lambda {x}: {result}"
    name = body.names.take("scored")
    body.line(f"def {name}({x}):", node.span)
    body.lines += [*lines, f"{' ' * (indent + 4)}return {result}"]
    return name


def _mask(body: Body, node: Node, time: str, history: str) -> Value:
    """bool ``[batch, time, history]`` of a predicate that is no interval."""
    graph = body.owner.program.bodies[node.attrs["mask"]]
    given = [body.values[node.inputs[i]] for i in node.attrs["mask_operands"]]
    mask = body.padded(body.inline(graph, node, given))
    lacking = {BATCH, time, history} - set(mask.axes)
    mask = full(mask, (BATCH, time, history))
    if lacking:
        step = body.runtime_step
        lengths = {BATCH: f"{step}.batch", time: f"{step}.time", history: f"{step}.history"}
        sizes = ", ".join(lengths[n] if n in lacking else "-1" for n in mask.axes)
        mask = mask.with_(Text(f"{mask.text.atom}.expand({sizes})"))
    return mask


def experts(body: Body, node: Node) -> Value:
    a = node.attrs
    pick, gate, *values = body.together(body.operands(node))
    picks = str(a["picks"])
    rows = [n for n in (BATCH, *a["rows"]) if n in pick.axes and n != picks] + [picks]
    if set(gate.axes) - set(rows):
        return replaced(body, node)
    given, result = calls.blocks(body, node, a["block"], rows, values)
    weights = str(full(body.tensor(gate), rows))
    text = call("experts", given[0], str(permuted(pick, rows)), weights, *given[1:])
    dtype = "f32" if "f32" in (gate.dtype, result.dtype) else result.dtype
    return Value(text, (*rows[:-1], *result.axes), dtype)
