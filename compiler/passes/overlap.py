"""overlap: what ranks send each other is on its way while other work is done.

Acts on deployments with ``overlap two_microbatches``. Bodies that send something are put together
with their callers, up to the body of a loop over layers; each transfer is started where its
operands are there and waited for where its result is read. A list scheduler
(``compiler/passes/turn_taking.py``) orders the nodes along the critical path, with the times of
``compiler/passes/durations.py``: once for a step that is run as it is, which is the order that the
nodes stand in, and once for a step whose sequences are dealt out to two micro-batches, which are
the body's ``turns``. The result is the same in either; docs/overlap.md shows both.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from compiler import spec
from compiler.ir import Graph, Module, Program, Rewriter
from compiler.passes.durations import Durations
from compiler.passes.inline import inlined
from compiler.passes.turn_taking import Scheduler, pieces, turns
from compiler.spec_collectives import BETWEEN_RANKS

MICRO_BATCHES = "two_microbatches"
# What two micro-batches cannot share a body with: rows of all sequences together, bundles.
WHOLE_STEP = frozenset({"select_rows", "scan", "shift"})


def run(program: Program) -> Program:
    deployment = program.deployment
    if deployment is None or deployment.overlap.schedule != MICRO_BATCHES or not program.mesh:
        return program
    loops = frozenset(
        n.attrs["body"] for g in program.bodies.values() for n in g if n.op == "chain"
    )
    durations = Durations(program, deployment)
    made: dict[str, Graph] = {}
    for name, graph in program.bodies.items():
        whole = inlined(program, graph, loops)
        if any(n.op in BETWEEN_RANKS for n in whole):
            whole = _scheduled(program, whole, durations, name in loops)
        made[name] = whole
    return _reached(replace(program, bodies=made))


def _scheduled(program: Program, graph: Graph, durations: Durations, loops: bool) -> Graph:
    """The body with its nodes in an order for one micro-batch, and turns for two if it is that of
    a loop and its values can be dealt out by sequences."""
    graph = _started(graph)
    seconds = {n.name: durations.seconds(graph, n) for n in graph}
    work = pieces(graph, seconds, lambda node: durations.size(graph, node))
    order = Scheduler(work, 1).best()
    graph = _ordered(graph, [name for _, i in order.items for name in work[i].nodes])
    apart = not any(n.op in WHOLE_STEP for n in graph) and not any(
        d.kind == "history" for n in graph.inputs for d in n.type.dims
    )
    if not loops or not apart:
        return _merged(graph)
    graph.turns = turns(work, Scheduler(work, 2).best(durations.room()))
    return graph


def _started(graph: Graph) -> Graph:
    """The graph with each transfer started, and a wait behind it."""
    made = Rewriter(graph)
    for node in graph:
        if node.op not in BETWEEN_RANKS:
            made.replace(node.name, made.copy(node).name)
            continue
        attrs = {**node.attrs, "starts": True}
        if node.op == "routing":
            made.replace(node.name, made.copy(node, attrs=attrs).name)
            continue
        stem = made.new.fresh(f"{node.name}.sent")
        sent = made.copy(node, name=stem, attrs=attrs, label=None, rounds=False)
        more = {"span": node.span, "label": node.label, "rounds": node.rounds}
        wait = made.emit(node.name, "wait", [sent.name], node.type, **more)
        made.replace(node.name, wait.name)
    return made.done()


def _ordered(graph: Graph, names: list[str]) -> Graph:
    """The graph with its nodes in this order, behind those that all micro-batches share."""
    own = set(names)
    made = Graph(graph.name)
    for name in [*(n.name for n in graph if n.name not in own), *names]:
        made.add(graph[name])
    made.output = graph.output
    return made


def _merged(graph: Graph) -> Graph:
    """The graph without the starts that are waited for at once."""
    nodes = [n for n in graph if n.op != "input"]
    behind = {b.name: a.name for a, b in pairwise(nodes) if b.op == "wait"}
    at_once = {a for b, a in behind.items() if graph[b].inputs == (a,)}
    made = Rewriter(graph)
    for node in graph:
        attrs = {k: v for k, v in node.attrs.items() if k != "starts"}
        if node.name in at_once:
            wait = next(n for n in graph.users(node.name))
            more = {"name": wait.name, "label": wait.label, "rounds": wait.rounds}
            made.replace(node.name, made.copy(node, attrs=attrs, **more).name)
        elif node.op == "wait" and node.inputs[0] in at_once:
            made.replace(node.name, made.to[node.inputs[0]])
        else:
            made.replace(node.name, made.copy(node).name)
    return made.done()


def _reached(program: Program) -> Program:
    """The program without bodies that became parts of others."""
    live = {graph.name for _, graph in spec.scopes(program)}
    kept = {name: graph for name, graph in program.bodies.items() if name in live}

    def methods(module: Module) -> Module:
        own = {k: v for k, v in module.methods.items() if v in kept}
        return replace(module, methods=own)

    modules = {name: methods(module) for name, module in program.modules.items()}
    return replace(program, modules=modules, bodies=kept)
