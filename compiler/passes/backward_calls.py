"""How a backward graph runs the parts of a body: the way the forward graph runs the body.

Forward, input part and weight part of a body are run by one op: ``call``, or ``loop`` where a chain
or a recurrence runs the body round by round, or ``route`` where rows pick a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compiler.adjoints import Emitter
from compiler.ir import Dim, Graph, Node, Type
from compiler.passes.partition import Parts


@dataclass
class Call:
    """Runs the three parts of a body.

    Attributes:
        attrs: those that all three runs have.
        over, pick: of a ``route``, the dim of the blocks and what picks them.
        each: operands of the backward parts that differ from round to round of a loop.
        forward_each: those of the forward part.
    """

    e: Emitter
    parts: Parts
    op: str  # call, loop or route
    attrs: Mapping[str, object]
    over: tuple[Dim, ...] = ()
    pick: tuple[Node, ...] = ()
    each: frozenset[int] = frozenset()
    forward_each: tuple[int, ...] = ()

    @property
    def rounds(self) -> tuple[Dim, ...]:
        """The dim of what each round, or each block, gives one of."""
        if self.op == "loop":
            index = self.attrs["index"]
            assert isinstance(index, Dim)
            return (index,)
        return self.over

    @property
    def reads_carried(self) -> bool:
        """Does a backward part read what a loop carries forward, round by round?"""
        return self.op == "loop" and 0 in (*self.parts.input_reads, *self.parts.weight_reads)

    def _run(self, graph: Graph, operands: list[Node], **attrs: object) -> Node:
        if self.op == "call":
            attrs = {}
        elif self.op == "route":
            attrs = {"each": attrs["each"]}
        operands = [*self.pick, *operands]
        type = graph.result.type
        return self.e.add(self.op, operands, type, body=graph.name, **self.attrs, **attrs)

    def item(self, source: Node, at: int, type: Type | None = None) -> Node:
        """A result; without a type, a bundle."""
        if type is None:
            graphs = (self.parts.forward, self.parts.input, self.parts.weight)
            (graph,) = (g for g in graphs if g is not None and g.name == source.attrs["body"])
            inner = graph.operands(graph.result)[at].type
            type = Type("bundle", self.rounds, bundle=inner.bundle)
        return self.e.add("item", [source], type, at=at)

    def forward(self, operands: list[Node]) -> Node:
        """Its results; ``saved`` comes after them, then what each round of a loop began with."""
        carry = {"carry": ((0, 0),), "sum": (), "reverse": False}
        return self._run(self.parts.forward, operands, each=self.forward_each, **carry)

    def input(
        self, operands: list[Node], saved: Node, grads: list[Node], types: list[Type]
    ) -> tuple[dict[int, Node], Node | None, list[Node]]:
        """The input part.

        Args:
            grads: gradients of the results; the first of a loop's is that of the last round.
            types: of the operands' gradients.

        Returns:
            The gradients of operands by position; what the weight part reads; ``grads`` as the
            weight part reads them.
        """
        parts = self.parts
        if parts.input is None:
            return {}, None, grads
        reads, given = parts.input_reads, parts.gives
        args = [*(operands[i] for i in reads), saved, *grads]
        flags = [*(i in self.each for i in reads), True, *(i > 0 for i in range(len(grads)))]
        whole = {i for i in given if i not in self.each}
        attrs: dict[str, object] = {"each": _where(flags), "reverse": True}
        if self.op == "loop":
            attrs["carry"] = ((given.index(0), len(reads) + 1),)
            attrs["sum"] = tuple(n for n, i in enumerate(given) if i in whole)
        ran = self._run(parts.input, args, **attrs)
        found = {i: self.item(ran, n, types[i]) for n, i in enumerate(given)}
        kept = self.item(ran, len(given))
        if self.op == "loop" and 0 in parts.grads_read:
            stacked = Type(grads[0].type.dtype, (*self.rounds, *grads[0].type.dims))
            grads = [self.item(ran, len(given) + 1, stacked), *grads[1:]]
        return found, kept, grads

    def weight(
        self, operands: list[Node], saved: Node, kept: Node | None, grads: list[Node]
    ) -> Node | None:
        """The bundle of the parameters' gradients; None if there is no parameter."""
        parts = self.parts
        if parts.weight is None:
            return None
        reads = parts.weight_reads
        read = [grads[i] for i in parts.grads_read]
        rest = [saved, *([kept] if kept else [])]
        args = [*(operands[i] for i in reads), *read, *rest]
        flags = [*(i in self.each for i in reads), *(self.op == "loop" for _ in read)]
        each = _where([*flags, *(True for _ in rest)])
        none = {"carry": (), "sum": (), "reverse": False}
        return self.item(self._run(parts.weight, args, each=each, **none), 0)


def _where(flags: list[bool]) -> tuple[int, ...]:
    return tuple(i for i, flag in enumerate(flags) if flag)
