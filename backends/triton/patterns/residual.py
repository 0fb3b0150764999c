"""RMS norms of a sum that is read elsewhere too: a residual added and normed in one kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.kernels import Group
from backends.pytorch.emit.text import Text, call
from backends.pytorch.emit.values import Value
from backends.pytorch.names import attribute
from backends.triton.families import rms_norm
from backends.triton.patterns.coded import format_of
from backends.triton.patterns.context import Context, packed
from backends.triton.patterns.norms import spec_of
from compiler.coding import Coding
from compiler.ir import Graph, Node


@dataclass(frozen=True)
class Norm:
    """A norm of rows, with the quantising behind it where there is one.

    Attributes:
        x: what is normed, and gain: by their names in the graph that holds the norm.
        coding: of the codes that the result is; None: numbers.
        between: nodes of that graph between ``x`` and the result.
    """

    x: str
    gain: str
    spec: rms_norm.RMSNorm
    coding: Coding | None
    between: frozenset[str]


def after_sum(context: Context, node: Node) -> Group | None:
    """A norm of ``a + b``: in this body, or that of a child whose whole work it is."""
    norm, child = _norm(context, node), ""
    if norm is None and node.op == "call" and node.attrs["child"] and len(node.inputs) == 1:
        child = str(node.attrs["child"])
        norm = _whole(context, context.program.bodies[node.attrs["body"]])
    if norm is None:
        return None
    total = context.graph[node.inputs[0] if child else norm.x]
    if not _adds(context, total):
        return None
    covered = {total.name, node.name} | (set() if child else norm.between)
    if covered & context.taken:
        return None
    order = [n.name for n in context.graph]
    later = {"", *order[order.index(node.name) :]}
    if not context.users(total.name) <= later | norm.between:
        return None
    try:
        to = None if norm.coding is None else format_of(norm.coding)
        spec = replace(norm.spec, residual=True, to=to)
        operator = rms_norm.generate(spec, context.target)
    except (ValueError, KeyError):
        return None
    reads = [*total.inputs, *([] if child else [norm.gain])]

    def write(body: Body, root: Node, prefix: str) -> Value | None:
        given = packed(body, prefix, *reads)
        if given is None:
            return None
        if child:
            gain = context.program.bodies[node.attrs["body"]][norm.gain].attrs["param"]
            given.append(f"{body.owner.attribute(child)}.{attribute(str(gain))}")
        inner = body.nodes[prefix + total.name]
        summed = body.variable(inner)
        body.values[inner.name] = Value(Text(summed), total.type.names, "act")
        text = call(context.use(operator), *given)
        if norm.coding is None:
            result = body.variable(root, f"{summed}_normed")
            body.line(f"{result}, {summed} = {text}", total.span)
            return Value(Text(result), node.type.names, "act")
        codes, scales = (body.names.take(f"{summed}_{what}") for what in ("codes", "scales"))
        body.line(f"{codes}, {scales}, {summed} = {text}", total.span)
        coding = body.owner.emitter.codings.name(norm.coding)
        return Value(call("Coded", codes, scales, coding), node.type.names, "coded")

    return Group(node.name, frozenset(covered), write, frozenset(reads))


def _norm(context: Context, node: Node) -> Norm | None:
    """The norm that a node of this body is, or the codes of one that nothing else reads."""
    coding, norm = None, node
    if node.op == "quantize":
        coding, norm = node.attrs["coding"], context.operand(node, 0)
        if coding.over != norm.type.names[1:] or context.users(norm.name) != {node.name}:
            return None
    spec = spec_of(context, norm)
    if spec is None or len(norm.type.dims) != 2 or norm.type.dims[0].kind == "plain":
        return None
    x, gain = norm.inputs[0], norm.inputs[norm.attrs["gain"]]
    return Norm(x, gain, spec, coding, frozenset({norm.name, node.name}))


def _whole(context: Context, body: Graph) -> Norm | None:
    """The norm of its argument that a body is, with a gain of its own, and nothing else."""
    inner = context.within(body)
    norm = _norm(inner, body.result)
    if norm is None or [n.name for n in body.inputs] != [norm.x]:
        return None
    if body[norm.gain].op != "param" or len(list(body)) != 2 + len(norm.between):
        return None
    return norm


def _adds(context: Context, node: Node) -> bool:
    """Is it the sum of two values of its own type?"""
    if node.op != "map" or node.attrs["fn"] != "add" or len(node.type.dims) != 2:
        return False
    types = [context.operand(node, i).type for i in range(2)]
    return node.type.dtype == "act" and all(
        t.names == node.type.names and t.dtype == "act" for t in types
    )
