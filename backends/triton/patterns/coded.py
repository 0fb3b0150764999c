"""Quantised values: making codes, and products of codes with stored codes."""

from __future__ import annotations

from dataclasses import replace

from backends.pytorch.emit_body import Body
from backends.pytorch.emit_kernels import Group
from backends.pytorch.emit_text import Text, call
from backends.pytorch.emit_values import Value
from backends.pytorch.names import attribute
from backends.triton.families import gemm, grouped_gemm, quantise
from backends.triton.families.formats import Quantised, quantised
from backends.triton.families.grouped_gemm import GroupedGemm
from backends.triton.kernel import Operator
from backends.triton.patterns.context import Context, Experts, packed
from compiler.coding import Coding
from compiler.ir import Node
from dsl.deploy import Stored
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
        spec = quantise.Quantise(
            context.size(x.type.dims[1]), format_of(coding), context.dtype_of(x)
        )
        operator = quantise.generate(spec, context.target)
    except (ValueError, KeyError):
        return None

    def write(body: Body, root: Node, prefix: str) -> Value | None:
        given = packed(body, prefix, x.name)
        if given is None:
            return None
        return coded(body, node, call(context.use(operator), *given))

    return Group(node.name, frozenset({node.name}), write)


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
            given = [*stacked(body, context.experts, w), str(body.offsets)]  # type: ignore[attr-defined]
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
