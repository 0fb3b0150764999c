"""What a deployment's ``recompute`` clause means for backward graphs: which values are not saved.

A value is computed again where a backward part reads it. Of a block, a use or an array nothing is
saved, its result included; what goes into it is. Of blocks that a ``chain`` runs, each layer's
input is saved, and the layer runs again before its backward part: activation checkpointing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from compiler import spec
from compiler.ir import Graph, Node, Program
from dsl.deploy.typed import Deployment


@dataclass(frozen=True)
class Recompute:
    """Which values are computed again.

    Attributes:
        values: (body, source name).
        bodies: of which nothing is saved.
        uses: (body, child) whose result, and whatever it saves, is computed again.
    """

    values: frozenset[tuple[str, str]] = frozenset()
    bodies: frozenset[str] = frozenset()
    uses: frozenset[tuple[str, str]] = frozenset()

    def again(self, body: str, graph: Graph, node: Node) -> bool:
        """Whether a value of a body's forward graph is computed again."""
        if body in self.bodies or (body, node.label or "") in self.values:
            return True
        source = graph[node.inputs[0]] if node.op == "item" else node
        if source.op != "call":
            return False
        child, ran = source.attrs["child"], source.attrs["body"].removesuffix(".forward")
        return (body, child) in self.uses or (bool(child) and ran in self.bodies)


NOTHING = Recompute()


@dataclass
class _Named:
    """The names of a clause."""

    blocks: set[str] = field(default_factory=set)
    members: set[tuple[str, str]] = field(default_factory=set)


def of(program: Program, deployment: Deployment | None) -> Recompute:
    """What a deployment's clause names, in the bodies of a program."""
    if deployment is None or not deployment.recompute:
        return NOTHING
    named = _Named()
    for target in deployment.recompute:
        if target.kind == "block":
            named.blocks.add(target.name)
        else:
            named.members.add((target.block or "", target.name))
    blocks: dict[str, set[str]] = defaultdict(set)
    whole: dict[str, set[bool]] = defaultdict(set)  # by body: whether each place it runs is named
    values: set[tuple[str, str]] = set()
    uses: set[tuple[str, str]] = set()
    for scope, graph in spec.scopes(program):
        block = program.modules[scope.module].block
        blocks[graph.name].add(block)
        for node in graph:
            if node.label and (block, node.label) in named.members:
                values.add((graph.name, node.label))
            for ran in spec.runs(node, graph):
                if not ran.child:
                    continue
                is_named = (block, ran.child) in named.members
                whole[ran.body].add(is_named)
                if is_named:
                    uses.add((graph.name, ran.child))
    bodies = {b for b, owners in blocks.items() if owners <= named.blocks}
    bodies |= {b for b, places in whole.items() if places == {True}}
    return Recompute(frozenset(values), frozenset(bodies), frozenset(uses))
