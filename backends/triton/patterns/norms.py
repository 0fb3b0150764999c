"""RMS norms of rows."""

from __future__ import annotations

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.kernels import Group
from backends.triton.families import rms_norm
from backends.triton.patterns.context import Context, calls, packed
from compiler.ir import Node


def spec_of(context: Context, node: Node) -> rms_norm.RMSNorm | None:
    """The norm of rows that a node is: over the last dim, with a gain."""
    if node.op != "rms_norm" or node.attrs["gain"] is None:
        return None
    x, gain = context.operand(node, 0), context.operand(node, node.attrs["gain"])
    over = tuple(node.attrs["over"])
    if len(over) != 1 or x.type.names[-1:] != over or gain.type.names != over:
        return None
    if not (x.type.dtype == gain.type.dtype == node.type.dtype == "act"):
        return None
    return rms_norm.RMSNorm(
        context.size(x.type.dims[-1]),
        float(node.attrs["eps"]),
        context.dtype,
        rounds_before_gain=bool(node.attrs["rounds_before_gain"]),
    )


def norm(context: Context, node: Node) -> Group | None:
    """A norm over the last dim, with a gain."""
    spec = spec_of(context, node)
    if spec is None:
        return None
    x, gain = context.operand(node, 0), context.operand(node, node.attrs["gain"])

    def arguments(body: Body, prefix: str) -> list[str] | None:
        return packed(body, prefix, x.name, gain.name)

    return calls(context, node, (), arguments, rms_norm.generate(spec, context.target))
