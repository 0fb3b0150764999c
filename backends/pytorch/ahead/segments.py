"""A traced graph, cut where blocks are called: what lies before, between and behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from backends.pytorch.ahead.trace import HISTORY, Traced, fresh


@dataclass
class Segment:
    """Some nodes of a graph as a program of their own.

    Attributes:
        values: nodes of the whole graph that it is given.
        caches, weights: paths of what else it is given, in this order.
        results: the nodes that it gives.
    """

    graph: fx.GraphModule
    examples: list[Tensor]
    values: list[fx.Node]
    caches: list[str]
    weights: list[str]
    results: list[fx.Node]

    def export(self) -> ExportedProgram:
        given, caches = len(self.values), len(self.caches)
        shapes = tuple(
            HISTORY if given <= i < given + caches else None for i in range(len(self.examples))
        )
        with torch.no_grad():
            return torch.export.export(
                self.graph, tuple(self.examples), dynamic_shapes=shapes, strict=False
            )


class Segments:
    """The parts of a trace.

    Attributes:
        values: the nodes of the trace's own values, the token's place last.
        output: the node of its result.
    """

    def __init__(self, traced: Traced, program: ExportedProgram, cut_at: object):
        """
        Args:
            cut_at: the operation that stands for a block.
        """
        # Decomposed, so that no vmap, which cannot be cut, is left in it.
        self._module = program.run_decompositions({}).module(check_guards=False)
        self._cut_at = cut_at
        graph = self._module.graph
        for node in graph.nodes:
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                graph.erase_node(node)  # it would read weights where nothing else does
        graph.eliminate_dead_code()
        given = graph.find_nodes(op="placeholder")
        values, caches, _ = traced.examples()
        self.values: list[fx.Node] = given[: len(values)]
        rest = given[len(values) :]
        self._caches = dict(zip(rest, traced.caches, strict=False))
        self._weights = dict(zip(rest[len(caches) :], traced.weights, strict=True))
        self._examples = dict(
            zip(given, [x for some in traced.examples() for x in some], strict=True)
        )
        self.output = _single(next(iter(graph.find_nodes(op="output"))).args[0])
        self._place = self._places(graph)

    def _places(self, graph: fx.Graph) -> dict[fx.Node, int]:
        """By node, how many blocks are called before it.

        As few as can be; but what is made of weights alone waits for its first use, as it may be
        as large as they are.
        """
        places: dict[fx.Node, int] = {}
        of_weights = {*self._weights}
        blocks = 0
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            before = max((places.get(n, 0) for n in node.all_input_nodes), default=0)
            if node.target is self._cut_at:
                blocks += 1
                before = blocks
            elif all(n in of_weights for n in node.all_input_nodes) and node.all_input_nodes:
                of_weights.add(node)
            places[node] = before
        for node in reversed(places):
            if node in of_weights:
                users = [places[user] for user in node.users if user in places]
                places[node] = min(users, default=places[node])
        return places

    def parts(self) -> Iterator[fx.Node | Segment]:
        """Segments, and the calls of blocks between them, in order."""
        blocks = [n for n in self._place if n.target is self._cut_at]
        for number in range(len(blocks) + 1):
            if number:
                yield blocks[number - 1]
            nodes = [n for n, at in self._place.items() if at == number and n not in blocks]
            if nodes:
                yield self._segment(nodes)

    def _segment(self, nodes: Sequence[fx.Node]) -> Segment:
        inside = set(nodes)
        used = {n: None for node in nodes for n in node.all_input_nodes if n not in inside}
        values = [n for n in used if n in self._place or n in self.values]
        caches = [n for n in used if n in self._caches]
        weights = [n for n in used if n in self._weights]
        results = [n for n in nodes if n is self.output or any(u not in inside for u in n.users)]
        results = [n for n in results if any(u.op != "output" for u in n.users) or n is self.output]
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for number, node in enumerate([*values, *caches, *weights]):
            made[node] = graph.placeholder(f"given_{number}")
        for node in used:
            if node.op == "get_attr":
                made[node] = graph.node_copy(node)
        for node in nodes:
            made[node] = graph.node_copy(node, lambda n: made[n])
        graph.output(tuple(made[n] for n in results))
        return Segment(
            graph=fx.GraphModule(self._module, graph),
            examples=[self._example(n) for n in [*values, *caches, *weights]],
            values=values,
            caches=[self._caches[n] for n in caches],
            weights=[self._weights[n] for n in weights],
            results=results,
        )

    def _example(self, node: fx.Node) -> Tensor:
        return self._examples[node] if node in self._examples else fresh(node.meta["val"])


def _single(result: object) -> fx.Node:
    while isinstance(result, tuple | list):
        (result,) = result
    assert isinstance(result, fx.Node)
    return result
