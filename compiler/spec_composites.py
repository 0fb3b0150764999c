"""Rows of the spec table for composites: a few nodes that a backend can run as one.

What these attributes mean stands with the pass that makes them, ``compiler/passes/recognise.py``.
"""

from __future__ import annotations

from typing import Any

from compiler import signatures
from compiler.ir import Node, Type
from compiler.rules import Scope, need
from compiler.spec import NAME, NAMES, NUMBER, PAIRS, POSITIONS, WHOLE, Attr, composite, optional


def attention(node: Node, operands: list[Node], scope: Scope) -> Type:
    """What its body gives. What is made of a score is a function of one number; a sink is one
    number of each head."""
    a = node.attrs
    named = [a["value"], *a["mask_operands"], *(i for q, k, _ in a["terms"] for i in (q, k))]
    sink = a.get("sink")
    named += [] if sink is None else [sink]
    need(all(0 <= i < len(operands) for i in named), f"there are {len(operands)} operands")
    if sink is not None:
        beside = set(operands[sink].type.names) - set(a["heads"])
        need(not beside, f"a sink is of heads alone, not of {', '.join(sorted(beside))}")
    if a.get("score") is not None:
        function = scope.body(a["score"])
        types = [n.type for n in function.inputs]
        number = Type("f32", ())
        need(
            types == [number] and function.result.type == number,
            f"{function.name} is no f32[] -> f32[]",
        )
    return signatures.composite(node, operands, scope)


def _terms(v: Any) -> bool:
    return isinstance(v, tuple) and all(isinstance(x, tuple) and len(x) == 3 for x in v)


composite(
    "attention",
    "a softmax over history of a sum of contractions, contracted with a value",
    rule=attention,
    terms=Attr("a tuple of (query, key, dims)", _terms),
    value=WHOLE,
    scale=NUMBER,
    mask=Attr("None, (least, beyond) or a body", lambda v: isinstance(v, tuple | str | None)),
    mask_operands=POSITIONS,
    time=NAME,
    history=NAME,
    heads=NAMES,
    values=NAMES,
    softmax_dtype=NAME,
    score=optional(NAME),
    sink=optional(WHOLE),
)
composite(
    "rms_norm",
    "x / sqrt(mean(x^2) + eps), times a gain if there is one",
    over=NAMES,
    eps=NUMBER,
    gain=Attr("an operand's position, or None", lambda v: v is None or isinstance(v, int)),
    rounds_before_gain=Attr("a bool", lambda v: isinstance(v, bool)),
)
composite(
    "experts",
    "an array of blocks indexed by picks, and the gate-weighted sum of what they give",
    block=NAME,
    child=NAME,
    over=NAME,
    rows=NAMES,
    dims=PAIRS,
    picks=NAME,
)
