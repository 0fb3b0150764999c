"""lifetimes: after which node each value is dead, and how much is alive at once.

Attribute ``frees`` of a node names the values that nothing reads after it: emitted code may let go
of them there. Arguments, parameters, and what is computed once when the model is loaded are not the
body's to free.

A view shares the memory of what it looks at, so memory is live as long as any view of it is.
What lives in the cache is counted by the cache.
"""

from __future__ import annotations

from collections.abc import Mapping

from compiler import spec
from compiler.ir import Graph, Node, Program, Rewriter
from compiler.passes.hoist import load_time
from compiler.rules import product
from dsl.extents import Extent

# Not the body's own memory: its caller's, the model's, the cache's; and numbers.
NOT_OWNED = frozenset({"input", "param", "state", "constant", "cache"})
# Composites that one kernel keeps on the chip: only operands and result are in memory.
ON_CHIP = frozenset({"attention", "rms_norm"})


def run(program: Program) -> Program:
    return program.with_bodies({name: _annotated(g) for name, g in program.bodies.items()})


def _annotated(graph: Graph) -> Graph:
    frees: dict[str, list[str]] = {}
    at_load = load_time(graph)
    for name, reader in last_reads(graph).items():
        if graph[name].op not in NOT_OWNED and name not in at_load:
            frees.setdefault(reader, []).append(name)
    rewriter = Rewriter(graph)
    for node in graph:
        attrs = dict(node.attrs)
        attrs.pop("frees", None)
        if node.name in frees:
            attrs["frees"] = tuple(frees[node.name])
        rewriter.replace(node.name, rewriter.copy(node, attrs=attrs).name)
    return rewriter.done()


def last_reads(graph: Graph) -> dict[str, str]:
    """For each value that is read, and is not the body's result, the node that reads it last."""
    last = {operand: node.name for node in graph for operand in node.inputs}
    last.pop(graph.output, None)
    return last


def live(graph: Graph) -> dict[str, Extent]:
    """Bytes alive while each node runs, its operands and result included, without what the bodies
    that it runs need; polynomials in the constants and lengths of a step."""
    last = last_reads(graph)
    memory: dict[str, str] = {}  # a value's memory goes by the name of the value that made it
    readers: dict[str, int] = {}  # how many views of a memory are yet to die
    alive: dict[str, Extent] = {}
    found: dict[str, Extent] = {}
    total, at_load = Extent.of(0), load_time(graph)
    for node in graph:
        owner = memory[node.inputs[0]] if spec.op(node).view else node.name
        memory[node.name] = owner
        readers[owner] = readers.get(owner, 0) + 1
        if owner == node.name and node.op not in NOT_OWNED and owner not in at_load:
            alive[owner] = product(node.type.dims) * spec.WIDTHS[node.type.dtype]
            total = total + alive[owner]
        found[node.name] = total
        for operand in dict.fromkeys(node.inputs):
            if last.get(operand) == node.name:
                readers[memory[operand]] -= 1
                if not readers[memory[operand]]:
                    total = total - alive.pop(memory[operand], 0)
    return found


def peak(program: Program, body: str, at: Mapping[str, int]) -> int:
    """The most bytes that one run of a body holds at once, those of the bodies it runs included:
    activations, without arguments, parameters and caches.

    Args:
        at: constants, and the step's lengths (``time``, ``history``, ``wanted``, ``rows``).
    """
    graph = program.bodies[body]
    return max(
        extent.at(at) + _inside(program, graph, graph[name], at)
        for name, extent in live(graph).items()
    )


def _inside(program: Program, graph: Graph, node: Node, at: Mapping[str, int]) -> int:
    most = 0
    for inner in spec.runs(node, graph) if node.op not in ON_CHIP else ():
        if inner.when is None or spec.holds(inner.when[0], at) is inner.when[1]:
            lengths = {**at, **{name: extent.at(at) for name, extent in inner.lengths.items()}}
            most = max(most, peak(program, inner.body, lengths))
    return most
