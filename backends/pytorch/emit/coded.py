"""Products of quantised values, and the formats that a model's text declares for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from backends.pytorch.emit import arithmetic
from backends.pytorch.emit.text import call, wrapped
from backends.pytorch.emit.values import EmitError, Value, permuted
from compiler.coding import Coding, declared
from compiler.ir import Node
from dsl.formats import NumberFormat

if TYPE_CHECKING:
    from backends.pytorch.emit.body import Body
    from backends.pytorch.names import Scope


class Codings:
    """The formats and codings that a model's text names, in capitals."""

    def __init__(self, scope: Scope):
        self.scope = scope
        self.lines: list[str] = []
        self._known: dict[Coding | NumberFormat, str] = {}

    def name(self, coding: Coding) -> str:
        """``E4M3_1X128``."""
        alone = coding.along()
        if alone not in self._known:
            format = self._format(coding.format)
            sides = ["all" if s is None else str(s) for s in (coding.rows, coding.columns)]
            stem = f"{coding.format.name}_{'x'.join(sides)}" if coding.format.scale else "plain"
            own = self._known[alone] = self.scope.take(stem.upper())
            self.lines.append(f"{own} = Coding({format}, {coding.rows}, {coding.columns})")
        return self._known[alone]

    def _format(self, format: NumberFormat) -> str:
        if format not in self._known:
            scale = self._format(format.scale) if format.scale else ""
            own = self._known[format] = self.scope.take(format.name.upper())
            fields = [json.dumps(format.name)]
            for key, text in declared(format):
                value = {"true": "True", "false": "False"}.get(text, text)
                if key == "rounding":
                    value = json.dumps(text)
                if key == "tile" or (key == "sign" and format.signed):
                    continue
                if key in ("infinities", "nans") and text == "false":
                    continue
                fields.append(f"{key}={scale if key == 'scale' else value}")
            self.lines += wrapped(f"{own} = number_format({', '.join(fields)})", 0)
        return self._known[format]


def quantize(body: Body, node: Node) -> Value:
    """Codes where rows of them can stand as the type says; else at once what they stand for."""
    coding = node.attrs["coding"]
    value = body.tensor(body.operand(node, 0))
    over = coding.over
    across = body.pads(over)  # along positions: each sequence by itself
    if across:
        value = body.within(body.padded(value), over)
    value = permuted(value, [*(a for a in value.axes if a not in over), *over])
    more = [f"columns={len(over)}"] if len(over) > 1 else []
    text = call("quantize", str(value), body.owner.emitter.codings.name(coding), *more)
    if across or node.type.names[-len(over) :] != over:
        text = call("wide", str(text))
    return Value(text, value.axes, "coded")


def dequantize(body: Body, node: Node) -> Value:
    return widened(body, body.values[node.inputs[0]], node)


def widened(body: Body, value: Value, node: Node) -> Value:
    """What a coded value stands for, in the node's dtype; a parameter read so is itself."""
    if value.dtype != "coded":
        return body.cast(value, "f32")
    if value.matrix is not None and node.type.dtype == "act" and node.op == "dequantize":
        return Value(value.text, value.axes, "act", matrix=value.matrix)
    more = [f"{body.like()}.dtype"] if node.op == "dequantize" and node.type.dtype == "act" else []
    text = call("wide", str(value), *more)
    return Value(text, value.axes, "act" if more else "f32")


def scaled_contract(body: Body, node: Node) -> Value:
    """A product with a stored matrix in its codes; any other is one of what codes stand for."""
    values = body.operands(node)
    over = tuple(node.attrs["over"])
    if len(values) == 2:
        x, stored = values
        lead = x.axes[: len(x.axes) - len(over)]
        fits = x.dtype == stored.dtype == "coded" and body.nodes[node.inputs[1]].op == "param"
        if fits and x.axes[len(lead) :] == over and stored.axes[1:] == over:
            options = [f"promote={node.attrs['promote']}"] if "promote" in node.attrs else []
            options += ["dtype=torch.float32"] if node.type.dtype == "f32" else []
            text = call("scaled_linear", str(x), str(stored), *options)
            return Value(text, (*lead, stored.axes[0]), node.type.dtype)
    wide = [widened(body, value, node) for value in values]
    if any(body.kind(name) in ("time", "history") for name in over):
        wide = [
            body.within(v, [n for n in over if n in v.axes])
            for v in body.together(wide, body.pads(over))
        ]
    else:
        wide = body.together(wide)
    if any(v.number is not None for v in wide):
        raise EmitError(f"%{node.name}: a quantised product of a number")
    product = arithmetic.product(body, node, wide, over)
    return Value(product.text, product.axes, "f32")


def annotation(dtype: str) -> str:
    return "Coded" if dtype == "coded" else "Tensor"
