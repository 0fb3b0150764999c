"""Which kernels a program takes on a GPU: by the structure of its graphs, never by names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from backends.pytorch.emit_body import Body
from backends.pytorch.emit_kernels import Group
from backends.triton.kernel import Operator
from backends.triton.patterns import norms
from backends.triton.patterns.context import Context
from backends.triton.targets import Target
from compiler.ir import Graph, Node, Program

# The first that fits is taken: what computes more at once stands before its parts.
PATTERNS: tuple[Callable[[Context, Node], Group | None], ...] = (norms.norm,)

# What is no work: views, names, and calls of what is looked at on its own.
FREE = frozenset(
    "input param state constant position iota unflatten flatten part select rename expand "
    "call chain branch".split()
)


@dataclass(frozen=True)
class Fallback:
    """A node that torch computes."""

    body: str
    op: str
    place: str
    text: str


class Selection:
    """The kernels of one program; see ``backends.pytorch.emit_kernels.Kernels``."""

    def __init__(self, target: Target, dtype: str):
        self.target = target
        self.dtype = dtype
        self.operators: dict[str, Operator] = {}
        self.fallbacks: dict[Fallback, None] = {}

    def use(self, operator: Operator) -> str:
        self.operators[operator.name] = operator
        return f"kernels.{operator.name}"

    def groups(self, program: Program, graph: Graph, taken: frozenset[str]) -> Iterator[Group]:
        context = Context(program, graph, self.target, self.dtype, self.use, taken)
        used = set(taken)
        for node in reversed(list(graph)):
            for pattern in PATTERNS:
                if node.name in used:
                    break
                group = pattern(context, node)
                if group is not None and not group.covered & used:
                    used |= group.covered
                    yield group

    def missed(self, body: Body, node: Node) -> None:
        if node.op in FREE or "/" in node.name:
            return
        place = str(node.span) if node.span else ""
        text = " ".join(node.span.text.split()) if node.span else ""
        op = f"{node.op} {node.attrs['fn']}" if node.op in ("map", "reduce") else node.op
        self.fallbacks[Fallback(body.graph.name, op, place, text)] = None
