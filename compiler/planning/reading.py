"""What the cost of a node needs to know, read off the graph around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import networkx as nx

from compiler.cost import flops_of, is_square
from compiler.ir import Graph, Node, Program
from compiler.planning.routing import Router
from compiler.planning.sharding import Placed


def attention_flops(
    body: Graph, at: Mapping[str, int], seen: Callable[[int], float]
) -> tuple[float, float]:
    """FLOPs of scores and of values of one sequence: of the pairs that the mask lets see.

    Args:
        body: the composite's; ``seen``: of pairs of so many positions with themselves, the share.
    """
    time, history = at["time"], at["history"]
    pairs = seen(history) * history**2
    if history > time:  # the step's positions are the last ones
        pairs -= seen(history - time) * (history - time) ** 2
    share = min(1.0, pairs / (time * history))
    scores = values = 0.0
    for node in body:
        if node.op == "contract" and node.attrs["over"]:
            flops = flops_of(body, node, at) * share
            if is_square(node.type.dims):
                scores += flops
            else:
                values += flops
    return scores, values


def router_of(graph: Graph, node: Node, program: Program, placed: Placed) -> Router:
    """How picks fall: of how many blocks, within which groups. Groups are read off the graph: what
    is picked comes through a choice (``in_top``) of one factor of the blocks' index. Copies of
    blocks are blocks of their own, dealt out evenly over the groups where that comes out even."""
    pick = graph[node.inputs[0]]
    assert pick.type.of is not None
    picks = prod(program.size(d) for d in pick.type.dims if d.kind == "plain")
    blocks = program.size(pick.type.of) + placed.redundant
    for name in nx.ancestors(graph.nx, pick.name):
        choice = graph[name]
        if choice.op != "in_top":
            continue
        groups = program.size(choice.type.dim(choice.attrs["over"]))
        opened = choice.attrs["count"].at(program.sizes)
        if groups > 1 and blocks % groups == 0 and opened * (blocks // groups) >= picks:
            return Router(blocks, picks, groups, min(opened, groups))
    return Router(blocks, min(picks, blocks))
