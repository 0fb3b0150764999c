"""Rows of the spec table for quantised products; ``docs/fp8.md`` tells them from end to end.

``select-fp8`` makes a ``scaled_contract`` of each contraction that a precision rule selects: it
quantises its own operands, as ``quantises`` says. ``fp8`` then gives it codes, from a ``quantize``
close to where the value is made, and from parameters as they are stored. Both compute the same.
"""

from __future__ import annotations

from typing import Any

from compiler import rules_coded
from compiler.coding import Coding
from compiler.ir import Graph, Node
from compiler.rules import product
from compiler.spec import NAMES, WHOLE, Attr, Op, contract_flops, optional, register
from dsl.extents import Extent

QUANTISE_FLOPS = 3  # magnitude, comparison, division


def _codings(v: Any) -> bool:
    return isinstance(v, tuple) and all(c is None or isinstance(c, Coding) for c in v)


CODING = Attr("a coding", lambda v: isinstance(v, Coding))
CODINGS = Attr("a tuple of codings or nulls", _codings)


def _elements(node: Node, graph: Graph) -> Extent:
    return product(node.type.dims)


def _quantise_flops(node: Node, graph: Graph) -> Extent:
    return _elements(node, graph) * QUANTISE_FLOPS


# fmt: off
_ROWS = [
    Op("quantize", "codes, and a scale for each tile along the coding's columns",
       1, 1, rules_coded.quantize, {"coding": CODING}, flops=_quantise_flops),
    Op("dequantize", "what codes and scales stand for", 1, 1, rules_coded.dequantize,
       flops=_elements),
    Op("scaled_contract", "a contraction of what coded operands stand for; operands that "
       "`quantises` names are quantised first; sums in f32, partial ones of `promote` elements",
       2, None, rules_coded.scaled_contract,
       {"over": NAMES, "quantises": optional(CODINGS), "promote": optional(WHOLE)},
       flops=contract_flops),
]
# fmt: on

for _row in _ROWS:
    register(_row)
