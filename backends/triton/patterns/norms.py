"""RMS norms of rows."""

from __future__ import annotations

from backends.pytorch.emit_body import Body
from backends.pytorch.emit_kernels import Group
from backends.triton.families import rms_norm
from backends.triton.patterns.context import Context, calls, packed
from compiler.ir import Node


def norm(context: Context, node: Node) -> Group | None:
    """A norm over the last dim, with a gain."""
    if node.op != "rms_norm" or node.attrs["gain"] is None or node.attrs["rounds_before_gain"]:
        return None
    x, gain = context.operand(node, 0), context.operand(node, node.attrs["gain"])
    over = tuple(node.attrs["over"])
    if len(over) != 1 or x.type.names[-1:] != over or gain.type.names != over:
        return None
    if not (x.type.dtype == gain.type.dtype == node.type.dtype == "act"):
        return None
    width = context.size(x.type.dims[-1])
    spec = rms_norm.RMSNorm(width, float(node.attrs["eps"]), context.dtype)

    def arguments(body: Body, prefix: str) -> list[str] | None:
        return packed(body, prefix, x.name, gain.name)

    return calls(context, node, (), arguments, rms_norm.generate(spec, context.target))
