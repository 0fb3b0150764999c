"""What is made of a score between scale and mask: statements within an attention kernel."""

from __future__ import annotations

from math import isfinite

from backends.triton.patterns.pointwise import CALLS, INFIX
from backends.triton.patterns.powers import power
from compiler.ir import Graph, Node

# One tile of scores stays in registers: no table, no path of its own for some numbers.
FUNCTIONS = frozenset(
    "add sub mul div exp log sqrt rsqrt sigmoid abs floor ceil neg silu tanh min max pow".split()
)


def statements(function: Graph) -> tuple[str, ...] | None:
    """A function f32[] -> f32[] as statements that change ``scores``; None if it is one that a
    kernel has no text for."""
    names: dict[str, str] = {}
    lines: list[str] = []
    for node in function:
        if node.op == "input":
            names[node.name] = "scores"
        elif node.op == "constant":
            names[node.name] = _number(node)
        elif node.op == "map" and node.attrs["fn"] in FUNCTIONS:
            fn, given = str(node.attrs["fn"]), [names[name] for name in node.inputs]
            if fn in INFIX:
                text = f" {INFIX[fn]} ".join(given)
            elif fn == "pow" and (found := power(*given)):
                text = found
            elif fn in CALLS:
                text = CALLS[fn].format(*given)
            else:
                return None
            last = node.name == function.output
            names[node.name] = "scores" if last else f"score_{len(lines)}"
            lines.append(f"{names[node.name]} = {text}")
        else:
            return None
    return tuple(lines)


def _number(node: Node) -> str:
    value = float(node.attrs["value"])
    return repr(value) if isfinite(value) else f'float("{value}")'
