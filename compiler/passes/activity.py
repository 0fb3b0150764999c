"""What has a gradient: values that depend on a parameter (or an input asked for) and that the
result depends on, through ops that hand gradients on.

A body is differentiated once, for every place that runs it, so an input of it has a gradient if it
has one at any of these places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from compiler.adjoints import flows, runs_body
from compiler.ir import Graph, Node, Program

FLOATS = frozenset({"act", "f32"})


@dataclass
class Activity:
    """``inputs``: by body, positions of inputs with a gradient; ``results``: bodies whose result
    has one; ``carriers``: by body, its values with one."""

    inputs: dict[str, set[int]] = field(default_factory=dict)
    results: set[str] = field(default_factory=set)
    carriers: dict[str, frozenset[str]] = field(default_factory=dict)


def bodies_run(node: Node) -> Iterator[tuple[str, dict[int, int]]]:
    """The bodies that define a node, with the operand that each of their inputs is.

    Of a branch it is the side for many positions: both compute the same, and training takes whole
    sequences.
    """
    count = len(node.inputs)
    if node.op == "branch":
        yield taken(node), {i: i for i in range(count)}
    elif runs_body(node):
        first = 1 if node.op == "apply" else 0
        yield node.attrs["body"], {i: i + first for i in range(count - first)}


def results(graph: Graph) -> list[Node]:
    """What a body gives: one value, or those that it packs."""
    return graph.operands(graph.result) if graph.result.op == "pack" else [graph.result]


def taken(branch: Node) -> str:
    """The side of a branch that runs for many positions."""
    _, relation, _ = branch.attrs["when"]
    return str(branch.attrs["then" if relation in (">", ">=") else "otherwise"])


def analyse(program: Program, asked: Iterable[tuple[str, int]]) -> Activity:
    """Every body of the program.

    Args:
        asked: (body, position) of inputs that have a gradient because someone wants it.
    """
    found = Activity({name: set() for name in program.bodies})
    for body, position in asked:
        found.inputs[body].add(position)
    before = None
    while before != (before := _size(found)):
        for graph in program.bodies.values():
            active = _active(program, graph, found)
            if any(n.name in active for n in results(graph)):
                found.results.add(graph.name)
            found.carriers[graph.name] = carriers = active & _useful(graph)
            for node in graph:
                if node.name in carriers:
                    _hand_down(node, carriers, found)
    return found


def _size(found: Activity) -> tuple[int, int]:
    return sum(len(i) for i in found.inputs.values()), len(found.results)


def _active(program: Program, graph: Graph, found: Activity) -> frozenset[str]:
    active: set[str] = set()
    position = {n.name: i for i, n in enumerate(graph.inputs)}
    for node in graph:
        if node.type.dtype not in FLOATS and node.type.dtype != "bundle":
            continue
        if node.op == "input":
            is_active = position[node.name] in found.inputs[graph.name]
        else:
            is_active = node.op == "param"
            is_active |= any(x in active and flows(node, i) for i, x in enumerate(node.inputs))
            if runs_body(node):
                is_active |= any(body in found.results for body, _ in bodies_run(node))
        if is_active:
            active.add(node.name)
    return frozenset(active)


def _useful(graph: Graph) -> frozenset[str]:
    useful = {graph.output}
    for node in reversed(list(graph)):
        if node.name in useful:
            useful |= {x for i, x in enumerate(node.inputs) if flows(node, i)}
    return frozenset(useful)


def _hand_down(node: Node, carriers: frozenset[str], found: Activity) -> None:
    for body, operands in bodies_run(node):
        found.inputs[body] |= {i for i, p in operands.items() if node.inputs[p] in carriers}
        if node.op in ("chain", "loop") and body in found.results:
            found.inputs[body].add(0)  # what is carried has one from the second round on
