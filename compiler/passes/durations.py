"""How long a rank takes for each node of a body: what orders are chosen by.

A roofline, with the costs of the spec table: max(FLOPs / rate, bytes / bandwidth) for what is
computed, latency + bytes / rate for what is sent, at the load that the deployment is for. Rates are
those of its cluster. Where none is named, or it lacks a figure, they are an H800's: only what they
are beside each other matters for an order.
"""

from __future__ import annotations

from math import prod

from compiler import spec
from compiler.errors import UserError
from compiler.ir import Graph, Node, Program
from compiler.planning.rates import Rates
from compiler.traffic import of_routing
from dsl.deploy.typed import Deployment

# FLOP/s in BF16 and bytes/s that good kernels reach on an H800, and a NIC's and a collective's
# figures there (models/clusters.arch gives the sources).
FLOPS, MEMORY, LINK, LATENCY = 600e12, 2.7e12, 40e9, 20e-6
PROMPT, SEQUENCES, CONTEXT = 4096, 128, 4096  # a load, where the deployment says none


class Durations:
    """Of the nodes of one program of ranks."""

    def __init__(self, program: Program, deployment: Deployment):
        self.program = program
        self.rates = None
        if deployment.cluster is not None:
            self.rates = Rates(deployment.cluster, ("bf16", "f32"))
        serve = deployment.serve
        if serve is not None and serve.phase == "decode":
            tokens, history = serve.batch_per_rank or SEQUENCES, serve.context or CONTEXT
        elif serve is not None:
            history = serve.prompt or PROMPT
            tokens = serve.tokens_per_rank or history
        else:
            tokens, history = PROMPT, PROMPT
        tokens = max(1, tokens // 2)  # of one of two micro-batches
        lengths = {"time": tokens, "history": history, "wanted": tokens, "rows": tokens}
        self.tokens = tokens
        self.at = {**program.sizes, **lengths}
        self.between_nodes = deployment.cluster is not None and (
            deployment.mesh.size > deployment.cluster.per_node
        )

    def _rate(self, what: str) -> float:
        rates = self.rates
        level = "scale_out" if self.between_nodes else "scale_up"
        if rates is not None:
            try:
                if what == "flops":
                    return rates.compute("gemm", None)
                if what == "memory":
                    return rates.memory()
                if what == "link":
                    return rates.bandwidth("dispatch", level)
                return rates.latency("dispatch", level) or LATENCY
            except UserError:
                pass
        return {"flops": FLOPS, "memory": MEMORY, "link": LINK, "latency": LATENCY}[what]

    def seconds(self, graph: Graph, node: Node) -> float:
        sent = self.sent(graph, node)
        if sent is not None:
            return self._rate("latency") + sent / self._rate("link")
        flops, moved = self._work(graph, node, self.at, {})
        return max(flops / self._rate("flops"), moved / self._rate("memory"))

    def size(self, graph: Graph, node: Node) -> float:
        """Bytes of a value."""
        if node.op == "routing":
            return 0.0
        count = prod(d.size.at(self.at) for d in node.type.dims)
        if node.type.coding is not None:
            return float(count)
        return float(count * spec.WIDTHS[node.type.dtype])

    def room(self) -> float:
        """Bytes of a device beside the weights that a rank holds; without end if unknown."""
        capacity = self.rates.capacity() if self.rates is not None else None
        return float("inf") if capacity is None else max(0.0, capacity - self._weights())

    def _weights(self) -> float:
        total = 0.0
        todo = [(self.program.root, 1)]
        while todo:
            name, times = todo.pop()
            module = self.program.modules[name]
            for p in module.parameters:
                width = 1 if p.coding is not None else spec.WIDTHS[p.type.dtype]
                total += times * width * prod(self.program.size(d) for d in p.type.dims)
            for child in module.children:
                count = self.program.size(child.array) if child.array is not None else 1
                todo.append((child.module, times * count))
        return total

    def sent(self, graph: Graph, node: Node) -> float | None:
        """Bytes that leave a rank; None of what computes."""
        if node.op in ("dispatch", "combine", "routing"):
            route = node if node.op == "routing" else graph[node.inputs[0]]
            if not route.attrs["sent"] or node.op == "routing":
                return 0.0
            row = of_routing(self.program, graph, route, "", 1)
            return self.tokens * (row.dispatch if node.op == "dispatch" else row.combine)
        if node.op in ("all_reduce", "reduce_scatter", "all_gather"):
            ways = prod(self.program.sizes[f"ranks.{axis}"] for axis in node.attrs["axes"])
            whole = max(self.size(graph, node), self.size(graph, graph[node.inputs[0]]))
            return whole * (ways - 1) / ways * (2 if node.op == "all_reduce" else 1)
        return None

    def _work(
        self, graph: Graph, node: Node, at: dict[str, int], known: dict[str, tuple[float, float]]
    ) -> tuple[float, float]:
        """FLOPs and bytes of a node, bodies that it runs included."""
        flops, moved = float(spec.flops(node, graph).at(at)), self._bytes(graph, node, at)
        for run in spec.runs(node, graph):
            if run.when is not None and spec.holds(run.when[0], at) is not run.when[1]:
                continue
            inner, times = at, float(run.times.at(at))
            blocks = 1
            if node.op == "apply" and run.over is not None:
                blocks = self.program.size(run.over)
                route = graph[node.inputs[0]]
                rows = self._rows(graph, route)
                inner = {**at, "rows": rows}
            body = self.program.bodies[run.body]
            for one in body:
                f, b = self._work(body, one, inner, known)
                flops += times * f
                moved += times * b * (blocks if one.op in ("param", "state") else 1)
        return flops, moved

    def _rows(self, graph: Graph, route: Node) -> int:
        """Rows that reach a rank: as many as its tokens pick, if all ranks are alike."""
        if route.op != "routing":
            return prod(d.size.at(self.at) for d in route.type.dims)
        pick = graph[route.inputs[0]]
        return prod(d.size.at(self.at) for d in pick.type.dims)

    def _bytes(self, graph: Graph, node: Node, at: dict[str, int]) -> float:
        """Parameters are counted where they stand, so that blocks of an array have their own."""
        if node.op in ("param", "state"):
            count = prod(d.size.at(at) for d in node.type.dims)
            return float(count * (1 if node.type.coding else spec.WIDTHS[node.type.dtype]))
        if spec.op(node).view or not node.inputs or node.op == "map" or spec.runs(node, graph):
            return 0.0  # a map is done with what makes or reads its operands
        values = [node, *(n for n in graph.operands(node) if n.op not in ("param", "state"))]
        if {"time", "history"} <= {d.kind for n in values for d in n.type.dims}:
            return 0.0  # scores stay on the chip
        total = 0.0
        for value in values:
            width = 1 if value.type.coding else spec.WIDTHS[value.type.dtype]
            total += width * prod(d.size.at(at) for d in value.type.dims)
        return total
