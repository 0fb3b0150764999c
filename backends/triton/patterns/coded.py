"""Quantised values: making codes, and products of codes with stored codes."""

from __future__ import annotations

from dataclasses import replace

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.kernels import Group
from backends.pytorch.emit.text import Text, call
from backends.pytorch.emit.values import Value
from backends.pytorch.names import attribute
from backends.triton.families import gated, gemm, grouped_gemm, quantise, rms_norm
from backends.triton.families.formats import Quantised, quantised
from backends.triton.families.grouped_gemm import GroupedGemm
from backends.triton.kernel import Operator
from backends.triton.patterns.context import Context, Experts, packed
from backends.triton.patterns.norms import spec_of
from compiler.coding import Coding
from compiler.ir import Node
from dsl.deploy.typed import Stored
from dsl.formats import Tile


def format_of(coding: Coding | None) -> Quantised:
    """What kernels call a coding.

    Raises:
        ValueError: no kernel reads or writes it; the message says why.
    """
    if coding is None:
        raise ValueError("not quantised")
    return quantised(Stored(coding.format, Tile(coding.rows, coding.columns)))


def quantize(context: Context, node: Node) -> Group | None:
    """Codes of rows."""
    if node.op != "quantize":
        return None
    x, coding = context.operand(node, 0), node.attrs["coding"]
    if len(x.type.dims) != 2 or coding.over != x.type.names[1:] or x.type.dims[0].kind == "plain":
        return None
    try:
        to = format_of(coding)
        found = _normed(context, x, to) or _gated(context, x, to)
        if found is None:
            spec = quantise.Quantise(context.size(x.type.dims[1]), to, context.dtype_of(x))
            found = quantise.generate(spec, context.target), [x.name], set()
    except (ValueError, KeyError):
        return None
    operator, reads, covered = found
    if not context.inner(covered, node.name):
        return None

    def write(body: Body, root: Node, prefix: str) -> Value | None:
        given = packed(body, prefix, *reads)
        if given is None:
            return None
        return coded(body, node, call(context.use(operator), *given))

    return Group(node.name, frozenset({node.name, *covered}), write, frozenset(reads))


Fused = tuple[Operator, list[str], set[str]]  # what it reads, and what it computes on the way


def _normed(context: Context, x: Node, to: Quantised) -> Fused | None:
    """The norm that makes the rows, where nothing else reads it."""
    spec = spec_of(context, x)
    if spec is None or len(context.users(x.name)) != 1:
        return None
    reads = [x.inputs[0], x.inputs[x.attrs["gain"]]]
    return rms_norm.generate(replace(spec, to=to), context.target), reads, {x.name}


def _gated(context: Context, x: Node, to: Quantised) -> Fused | None:
    """An activation of one value times another, where nothing else reads them."""
    if x.op != "map" or x.attrs["fn"] != "mul" or len(context.users(x.name)) != 1:
        return None
    activated, up = (context.operand(x, i) for i in range(2))
    if activated.op != "map":
        activated, up = up, activated
    if activated.op != "map" or activated.attrs["fn"] != "silu":
        return None
    gate = context.operand(activated, 0)
    same = gate.type.names == up.type.names == x.type.names
    if not same or not (gate.type.dtype == up.type.dtype == x.type.dtype == "act"):
        return None
    if context.users(activated.name) != {x.name}:
        return None
    spec = gated.Gated(context.size(x.type.dims[-1]), context.dtype, to=to)
    covered = {x.name, activated.name}
    return gated.generate(spec, context.target), [gate.name, up.name], covered


def coded(body: Body, node: Node, found: Text) -> Value:
    """The value of a call that gives codes and scales."""
    name = body.owner.emitter.codings.name(node.attrs["coding"])
    return Value(call("Coded", f"*{found}", name), node.type.names, "coded")


def product(context: Context, node: Node) -> Group | None:
    """Codes of tokens times a stored matrix of codes."""
    if node.op != "scaled_contract" or len(node.inputs) != 2 or "quantises" in node.attrs:
        return None
    x, w = (context.operand(node, i) for i in range(2))
    if not (x.type.dtype == w.type.dtype == "coded" and w.op == "param"):
        return None
    if len(x.type.dims) != 2 or len(w.type.dims) != 2 or x.type.dims[0].kind == "plain":
        return None
    row, over = x.type.names
    kept = w.type.names[0]
    if tuple(node.attrs["over"]) != (over,) or w.type.names[1] != over:
        return None
    if node.type.names != (row, kept):
        return None
    try:
        weights, activations = format_of(w.type.coding), format_of(x.type.coding)
        n, k = (context.size(d) for d in w.type.dims)
        formats = (weights, activations, context.dtype, context.dtype_of(node))
        if context.experts is not None:
            of_all = GroupedGemm(context.experts.count, n, k, None, *formats)
            operator = strided(grouped_gemm.generate(of_all, context.target))
        else:
            weights, activations, dtype, out = formats
            spec = gemm.Gemm(n, k, weights=weights, activations=activations, dtype=dtype, out=out)
            operator = strided(gemm.generate(spec, context.target))
    except (ValueError, KeyError):
        return None

    def write(body: Body, root: Node, prefix: str) -> Value | None:
        if packed(body, prefix, x.name) is None:
            return None
        codes = named(body, prefix + x.name)
        stored = body.owner.attribute(str(w.attrs["param"]))
        given = [f"{stored}.codes", f"{stored}.scale"]
        if context.experts is not None:
            given = [*stacked(body, context.experts, w), body.shared["offsets"]]
        text = call(context.use(operator), f"{codes}.codes", f"{codes}.scales", *given)
        return Value(text, node.type.names, node.type.dtype)

    return Group(node.name, frozenset({node.name}), write, frozenset({x.name}))


def strided(operator: Operator) -> Operator:
    """Codes lie row after row as they are made, and scales may lie tile after tile."""
    return replace(operator, dense=False)


def stacked(body: Body, experts: Experts, parameter: Node) -> list[str]:
    """A parameter of all blocks of an array as arguments."""
    array = body.owner.attribute(experts.child)
    text = f'stacked({array}, "{attribute(str(parameter.attrs["param"]))}")'
    if parameter.type.coding is None:
        return [text]
    name = body.names.take(f"all_{attribute(str(parameter.attrs['param']))}")
    body.line(f"{name} = {text}", parameter.span)
    return [f"{name}.codes", f"{name}.scale"]


def named(body: Body, name: str) -> str:
    """A value under a name, so that it can be read twice."""
    value = body.values[name]
    return str(value if value.cheap else body.bind(body.nodes[name]))
