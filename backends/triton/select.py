"""Which kernels a program takes on a GPU: by the structure of its graphs, never by names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.kernels import Group
from backends.triton.kernel import Operator
from backends.triton.own import Extern
from backends.triton.patterns import (
    coded,
    experts,
    externs,
    histories,
    norms,
    pointwise,
    products,
    residual,
    rotary,
    routing,
)
from backends.triton.patterns.context import Context, Experts
from backends.triton.targets import Target
from compiler.ir import Graph, Node, Program

# The first that fits is taken: what computes more at once stands before its parts.
PATTERNS: tuple[Callable[[Context, Node], Group | None], ...] = (
    externs.extern,
    histories.attention,
    histories.cache,
    histories.gather,
    histories.select_rows,
    experts.routed,
    routing.router,
    residual.after_sum,
    norms.norm,
    coded.product,
    coded.quantize,
    products.product,
    rotary.rotary,
    pointwise.pointwise,
)

# What is no work: views, names, and calls of what is looked at on its own.
FREE = frozenset(
    "input param state constant position iota unflatten flatten part select rename expand "
    "call chain branch dequantize".split()  # what a stored matrix is widened for is told itself
)


@dataclass(frozen=True)
class Fallback:
    """A node that torch computes."""

    body: str
    op: str
    place: str
    text: str


class Selection:
    """The kernels of one program; see ``backends.pytorch.emit.kernels.Kernels``."""

    def __init__(self, target: Target, dtype: str):
        self.target = target
        self.dtype = dtype
        self.operators: dict[str, Operator] = {}
        self.fallbacks: dict[Fallback, None] = {}
        self.externs: dict[Extern, str] = {}  # and their files' texts
        self._names: dict[object, str] = {}
        self._stems: Counter[str] = Counter()

    def use(self, operator: Operator) -> str:
        self.operators[operator.name] = operator
        return f"kernels.{operator.name}"

    def own(self, found: Extern, node: Node) -> str:
        if found not in self.externs:
            others = {one.module for one in self.externs if one.path != found.path}
            while found.module in others:  # another folder's file of that name
                found = replace(found, module=f"{found.module}_")
            self.externs[found] = found.text(str(node.span))
        return f"kernels.{found.name}"

    def name(self, stem: str, what: object) -> str:
        """The same name for the same thing, another one for another."""
        if what not in self._names:
            self._stems[stem] += 1
            same = self._stems[stem]
            self._names[what] = f"{stem}_{same}" if same > 1 else stem
        return self._names[what]

    def groups(
        self, program: Program, graph: Graph, taken: frozenset[str], inline: bool
    ) -> Iterator[Group]:
        blocks = _blocks(program)
        block = blocks.get(graph.name)
        if graph.name in blocks and not (inline and block):
            return  # no rows of many blocks at once: what runs it is looked at as a whole
        yield from self._groups(
            Context(
                program,
                graph,
                self.target,
                self.dtype,
                self.use,
                self.name,
                self._groups,
                blocks,
                taken,
                block,
                self.own,
            )
        )

    def _groups(self, context: Context) -> Iterator[Group]:
        used = set(context.taken)
        for node in reversed(list(context.graph)):
            for pattern in PATTERNS:
                if node.name in used:
                    break
                group = pattern(context, node)
                if group is not None and not group.covered & used:
                    used |= group.covered
                    yield group

    def missed(self, body: Body, node: Node) -> None:
        if node.op in FREE or "/" in node.name or body.graph.name in _blocks(body.owner.program):
            return
        place = str(node.span) if node.span else ""
        text = " ".join(node.span.text.split()) if node.span else ""
        op = f"{node.op} {node.attrs['fn']}" if node.op in ("map", "reduce") else node.op
        self.fallbacks[Fallback(body.graph.name, op, place, text)] = None


def _blocks(program: Program) -> dict[str, Experts | None]:
    """The bodies of blocks that data choose, each with its array; None where it has several."""
    found: dict[str, Experts | None] = {}
    for graph in program.bodies.values():
        for node in graph:
            if node.op not in ("experts", "apply"):
                continue
            over = graph[node.inputs[0]].type.of
            assert over is not None
            array = Experts(program.size(over), str(node.attrs["child"]))
            name = str(node.attrs["block" if node.op == "experts" else "body"])
            found[name] = array if found.get(name, array) == array else None
    return found
