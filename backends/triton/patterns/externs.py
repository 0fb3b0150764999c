"""Functions of the source with a kernel of their author's own."""

from __future__ import annotations

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.kernels import Group
from backends.pytorch.emit.text import Text, call
from backends.pytorch.emit.values import Value
from backends.triton.own import serving
from backends.triton.patterns.context import Context, packed
from compiler.ir import Node


def extern(context: Context, node: Node) -> Group | None:
    """A call of the user's kernel: the function's own dims last, in its order, and what is lifted
    flattened in front; an argument that is the same for all is passed as it is."""
    if node.op != "extern":
        return None
    found = serving(node, context.target.name)
    if found is None:
        return None
    *own, result = node.attrs["own"]
    lifted = node.type.dims[: len(node.type.dims) - len(result)]
    if node.type.names[len(lifted) :] != tuple(result) or any(
        context.operand(node, i).type.names != (*(d.name for d in lifted), *mine)
        and context.operand(node, i).type.names != tuple(mine)
        for i, mine in enumerate(own)
    ):
        return None
    if not lifted:
        return None
    wide = [len(context.operand(node, i).type.dims) > len(mine) for i, mine in enumerate(own)]

    def write(body: Body, root: Node, prefix: str) -> Value | None:
        given = packed(body, prefix, *node.inputs)
        if given is None:
            return None
        if len(lifted) > 1:
            rows = f".flatten(0, {len(lifted) - 1})"
            given = [
                Text(text).atom + rows if one else text
                for text, one in zip(given, wide, strict=True)
            ]
        text = call(context.own(found, node), *given)
        if len(lifted) > 1:
            sizes = ", ".join(["-1", *(str(context.size(d)) for d in lifted[1:])])
            text = Text(f"{text}.unflatten(0, ({sizes}))")
        return Value(text, node.type.names, node.type.dtype)

    return Group(node.name, frozenset({node.name}), write)
