"""How much a step holds for each pair of a token and a position of its history.

A composite op that runs over pairs (attention) is run a stretch of tokens at a time, and holds few
of them. What other equations say of pairs is held whole: how many tokens one step may take then
depends on how long their history is.
"""

from __future__ import annotations

from math import prod

from compiler.ir import Program


def most_pairs(program: Program) -> int:
    """The numbers of the largest value per pair, outside of attention; 0 if there is none.

    Args:
        program: after its last pass, with its composites.
    """
    within = {
        attr
        for body in program.bodies.values()
        for node in body
        if node.op == "attention"
        for attr in (node.attrs["body"], node.attrs.get("mask"))
    }
    largest = 0
    for name, body in program.bodies.items():
        if name in within:
            continue
        for node in body:
            if {d.kind for d in node.type.dims} >= {"time", "history"}:
                plain = [d for d in node.type.dims if d.kind == "plain"]
                largest = max(largest, prod(program.size(d) for d in plain))
    return largest
