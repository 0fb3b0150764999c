"""What tokens send to blocks that are dealt out over ranks, if a router picks uniformly.

Read off the program that ``shard`` made: where its blocks are, what is dispatched and what comes
back. Copies count as blocks of their own. The expectation is exact (``planning/routing.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

from compiler.ir import DType, Graph, Node, Program, Type
from compiler.planning.reading import router_of
from compiler.planning.routing import spread
from compiler.planning.sharding import Placed
from compiler.tensors import places

WIDTHS: dict[DType, int] = {"act": 2, "f32": 4, "i64": 8, "bool": 1}
PER_PICK = 8  # bytes: a place as int32 and a gate as float32


@dataclass(frozen=True)
class Traffic:
    """Of one array of blocks.

    Attributes:
        path: of the array, layers as patterns; ``count`` of them.
        ranks: that the blocks are dealt out to and tokens are sent among.
        others: ranks but its own that a token reaches, on average.
        other_nodes: nodes but its own, where it is sent to nodes and forwarded inside; else None.
        dispatch, combine: bytes per token that leave a rank and that come back, on average,
            forwarding included.
    """

    path: str
    count: int
    ranks: int
    others: float
    other_nodes: float | None
    dispatch: float
    combine: float


def traffic(program: Program) -> list[Traffic]:
    """Every array of blocks that tokens are sent to, in the order of the source; none in a program
    that is not one of ranks."""
    found = []
    for place in places(program):
        for name in place.module.methods.values():
            graph = program.bodies.get(name)
            for node in graph or ():
                if node.op == "routing" and node.attrs["sent"] and graph is not None:
                    path = f"{place.path}.{node.attrs['child']}" if place.path else ""
                    count = prod(len(r) for r in place.ranges)
                    found.append(of_routing(program, graph, node, path, count))
    return found


def of_routing(program: Program, graph: Graph, node: Node, path: str, count: int) -> Traffic:
    """What goes along one routing of a body."""
    axes, sent = node.attrs["axes"], node.attrs["sent"]
    sizes = {axis: program.sizes[f"ranks.{axis}"] for axis in axes}
    assert node.type.of is not None
    each = program.size(node.type.of)
    ranks = prod(sizes.values())
    placed = Placed(axes, ranks, each, node.attrs["redundant"])
    router = router_of(graph, node, program, placed)
    runs = []
    for at in product(*(range(sizes[axis]) for axis in sent)):  # others are where the sender is
        where = {**dict.fromkeys(axes, 0), **dict(zip(sent, at, strict=True))}
        number = 0
        for axis in axes:
            number = number * sizes[axis] + where[axis]
        runs.append(range(number * each, (number + 1) * each))
    per_node = node.attrs["per_node"]
    found = spread(router, [i // (per_node or len(runs)) for i in range(len(runs))], runs)
    nodes = found.other_nodes if per_node else None
    hops = found.other_nodes + found.forwarded
    users = [n for n in graph if node.name in n.inputs]
    row = sum(_bytes(program, n.type) for n in users if n.op == "dispatch")
    back = sum(_bytes(program, n.type) for n in users if n.op == "apply")
    picks = router.picks * PER_PICK
    dispatch, combine = hops * (row + picks), hops * back
    return Traffic(path, count, len(runs), found.other_ranks, nodes, dispatch, combine)


def _bytes(program: Program, type: Type) -> int:
    """Of one row; of a coded one, codes and scales."""
    own = [d for d in type.dims if d.kind != "rows"]
    if type.coding is not None:
        columns = prod(program.size(d) for d in own if d.name in type.coding.over)
        rows = prod(program.size(d) for d in own if d.name not in type.coding.over)
        return round(type.coding.bytes(rows, columns))
    return prod(program.size(d) for d in type.dims if d.kind != "rows") * WIDTHS[type.dtype]
