"""The graph IR: everything that passes, backends and planners know of a model, on one page.

A **program** is a tree of modules (who owns which parameter), a set of bodies (what is computed)
and the constants that give its symbolic sizes numbers. A **body** is a dataflow graph in SSA form:
one ``Node`` per value, held in a ``networkx.MultiDiGraph``. Dims are aligned *by name*: within a
body a dim's name is its identity, and no op cares about the order of dims except views and the
emitter.

    program  = modules, bodies, entries, constants
    module   = parameters, children (arrays of modules included), methods -> bodies
    body     = inputs, nodes, one output
    node     = name, op, operands, attributes, type, span
    type     = dtype, (dim, ...), optionally "of" the dim whose positions it holds
    dim      = name, size (a polynomial), kind; sums ``n|j`` and products ``(h,n)`` keep their parts

A body never mentions how many layers, experts or ranks there are: ``chain`` runs a body once per
layer, ``apply`` once per chosen block, and both hold the body's name. What each op requires and
means stands in ``compiler/spec.py``, one row per op.

There is no batch: a body is written for *one* sequence, with ``time`` (the positions asked for in
this step) and ``history`` (all positions so far, those included). Backends lift it over sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import networkx as nx

from dsl.diagnostics import Span
from dsl.extents import Extent

if TYPE_CHECKING:
    from compiler.coding import Coding
    from dsl.deploy.placed import PlacedBlock
    from dsl.deploy.typed import Deployment

# Reserved names of lengths that are known only when a step runs.
TIME = Extent.name("time")  # positions asked for in this step, of one sequence
HISTORY = Extent.name("history")  # positions so far, this step's included
WANTED = Extent.name("wanted")  # rows of the step whose result is wanted (``select_rows``)
ROWS = Extent.name("rows")  # rows that chose one block of an array (``apply``)
DYNAMIC = frozenset({"time", "history", "wanted", "rows"})

# Ops that keep something from step to step, under their name in their module.
KEPT = frozenset({"cache", "scan"})

Who = Literal["first", "second", "before", "later"]  # see Turn
DimKind = Literal["plain", "time", "history", "rows"]
# act: the activation dtype the model runs in; bundle: several values as one (compiler/bundles.py);
# coded: codes and scales (compiler/coding.py)
DType = Literal["act", "f32", "i64", "bool", "bundle", "coded"]


@dataclass(frozen=True)
class Dim:
    """One named axis. ``name`` is unique in its body; ``size`` may name constants.

    A *sum* ``n|j`` stacks the rows of its parts; a *product* ``(h,n)`` is row-major. ``start`` is
    the first number of a loop dim (layers keep absolute numbers): it runs start .. start + size.
    With ``axes`` it is one rank's part of a dim that is divided over these mesh axes, the first
    outermost, and ``size`` is that part's: ``h/tp`` of size ``heads / ranks.tp``.
    """

    name: str
    size: Extent
    kind: DimKind = "plain"
    form: Literal["atom", "sum", "product"] = "atom"
    parts: tuple[Dim, ...] = ()
    start: Extent = field(default_factory=lambda: Extent.of(0))
    axes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def sum(parts: Iterable[Dim]) -> Dim:
        parts = tuple(parts)
        size = sum((p.size for p in parts), Extent.of(0))
        return Dim("|".join(p.name for p in parts), size, form="sum", parts=parts)

    @staticmethod
    def product(parts: Iterable[Dim]) -> Dim:
        parts = tuple(parts)
        size = Extent.of(1)
        for part in parts:
            size = size * part.size
        return Dim(f"({','.join(p.name for p in parts)})", size, form="product", parts=parts)

    def offset(self, part: str) -> Extent:
        """Where the rows of a sum's part begin."""
        at = Extent.of(0)
        for p in self.parts:
            if p.name == part:
                return at
            at = at + p.size
        raise KeyError(part)


@dataclass(frozen=True)
class Type:
    """What a value is: element type and named dims, in the order of the source (lifted dims first).

    ``of`` is set for index values (dtype i64): the dim whose positions the elements are.
    ``bundle`` is set for bundles: the ``pack`` that says what is in it, as ``body:node``; the dims
    of a bundle are the loops that gave one each time. ``coding`` is set for coded values.
    """

    dtype: DType
    dims: tuple[Dim, ...]
    of: Dim | None = None
    bundle: str = ""
    coding: Coding | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.dims)

    def dim(self, name: str) -> Dim:
        for d in self.dims:
            if d.name == name:
                return d
        raise KeyError(name)

    def __str__(self) -> str:
        of = f" of {self.of.name if self.of else self.bundle}" if self.of or self.bundle else ""
        coding = f" {{{self.coding}}}" if self.coding else ""
        return f"{self.dtype}[{', '.join(self.names)}]{of}{coding}"


@dataclass(frozen=True)
class Node:
    """One value. ``inputs`` are names of earlier nodes; ``attrs`` are the op's own (see the spec).

    ``label`` is the source name this value carries in the block (``c_kv``), if it has one: it is
    what ``trace`` finds and what generated code calls it. ``rounds`` is False for a ``let`` name
    and for anonymous values, which later passes may compute in another order.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    type: Type
    attrs: Mapping[str, Any] = field(default_factory=dict)
    span: Span | None = None
    label: str | None = None
    rounds: bool = False

    def with_(self, **changes: Any) -> Node:
        return replace(self, **changes)


@dataclass(frozen=True)
class Turn:
    """Nodes of one micro-batch that run one after the other.

    ``who`` is "first" or "second", of two micro-batches; or "later": nodes of the second one that
    run in the *next* run of the body, at the turn "before", which lists none.
    """

    who: Who
    nodes: tuple[str, ...] = ()


class Graph:
    """A body: nodes in SSA form, in a topological order that is also the order of the source.

    The edges are a ``networkx.MultiDiGraph`` (``g.nx``), so that reachability, longest paths and
    cuts come from the library; an edge runs from operand to user, with the operand's position as
    its key. Graphs are built once through ``add`` and then only read; a pass makes a new graph
    (``rewrite``).
    """

    def __init__(self, name: str):
        self.name = name
        self.nx: nx.MultiDiGraph = nx.MultiDiGraph()
        self._nodes: dict[str, Node] = {}
        self.output: str = ""
        # How two micro-batches take turns in it; () runs one after the other (compiler/turns.py).
        self.turns: tuple[Turn, ...] = ()

    # -- reading ---------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, name: str) -> bool:
        return name in self._nodes

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    @property
    def inputs(self) -> list[Node]:
        """The body's arguments, in order."""
        return [n for n in self if n.op == "input"]

    @property
    def result(self) -> Node:
        return self._nodes[self.output]

    def operands(self, node: Node) -> list[Node]:
        return [self._nodes[i] for i in node.inputs]

    def users(self, name: str) -> list[Node]:
        """The nodes that read ``name``, each once, in order."""
        users = set(self.nx.successors(name))
        return [n for n in self if n.name in users]

    # -- building --------------------------------------------------------------------------------

    def add(self, node: Node) -> Node:
        """Append a node whose operands are there already."""
        if node.name in self._nodes:
            raise ValueError(f"{self.name}: %{node.name} is defined twice")
        for operand in node.inputs:
            if operand not in self._nodes:
                raise ValueError(f"{self.name}: %{node.name} reads %{operand} before it is defined")
        self._nodes[node.name] = node
        self.nx.add_node(node.name)
        for position, operand in enumerate(node.inputs):
            self.nx.add_edge(operand, node.name, key=position)
        return node

    def fresh(self, stem: str) -> str:
        """A node name that is not taken, close to ``stem``."""
        if stem not in self._nodes:
            return stem
        number = 1
        while f"{stem}.{number}" in self._nodes:
            number += 1
        return f"{stem}.{number}"


@dataclass(frozen=True)
class Parameter:
    """A stored tensor of a module, exactly as the checkpoint holds it.

    With ``coding`` it is kept as codes and scales: who reads it as ``type`` gets what these stand
    for. Rows are the first axis, columns all others.
    """

    name: str
    type: Type
    role: Literal["param", "state"] = "param"
    span: Span | None = None
    coding: Coding | None = None


@dataclass(frozen=True)
class Child:
    """A module used by another. With ``array``, one module per number of that dim.

    Several children of one name with adjoining arrays are one array in pieces: ``layers[a]`` dense,
    ``layers[z]`` sparse.
    """

    name: str
    module: str
    array: Dim | None = None


@dataclass(frozen=True)
class NamePart:
    """A member's part of checkpoint names: a template of ``dsl/templates.py``.

    ``number`` is what the number of a child that is an array is called in it, and in the parts of
    all that is below.
    """

    template: str
    number: str | None = None
    span: Span | None = None


@dataclass(frozen=True)
class Module:
    """One block at one set of sizes.

    ``names`` maps parameters and children to their part of a checkpoint's tensor names; parts are
    joined with dots, empty ones left out. ``methods`` maps a ``def``'s name (and how it is lifted)
    to its body.
    """

    name: str
    block: str
    parameters: tuple[Parameter, ...] = ()
    children: tuple[Child, ...] = ()
    names: Mapping[str, NamePart] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)
    span: Span | None = None


@dataclass(frozen=True)
class EntryInput:
    """An argument of an entry point. ``shift_of``/``shift`` say that it is another input moved
    along time (``next[t] = token[t + 1]``); rows for which there is none are dropped."""

    name: str
    shift_of: str | None = None
    shift: int = 0


@dataclass(frozen=True)
class Entry:
    """A function that users call: ``main`` is what generates."""

    name: str
    body: str
    inputs: tuple[EntryInput, ...]


@dataclass(frozen=True)
class Program:
    """A whole model, at one set of constants.

    ``constants`` gives the symbolic sizes their numbers. ``ignored`` are checkpoint tensors that
    the model knows of and does not need (second copies). ``deployment`` is what passes act on; the
    text form shows what they made of it, not the deployment itself. ``placed`` is what its shard
    rules place.

    With a ``mesh`` it is what *each* rank runs (compiler/passes/shard.py): ``mesh`` names the axes,
    whose sizes are the constants ``ranks.NAME``, and sequences are spread over the axes ``batch``.
    """

    name: str
    constants: Mapping[str, int | float | bool | str | None]
    root: str  # the module that is the model
    modules: Mapping[str, Module]
    bodies: Mapping[str, Graph]
    entries: Mapping[str, Entry]
    ignored: tuple[str, ...] = ()
    deployment: Deployment | None = None
    placed: PlacedBlock | None = None
    mesh: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """The constants that are whole numbers: what extents are evaluated with."""
        return {
            k: int(v)
            for k, v in self.constants.items()
            if isinstance(v, int) and not isinstance(v, bool)
        }

    def size(self, dim: Dim) -> int:
        return dim.size.at(self.sizes)

    def with_bodies(self, bodies: Mapping[str, Graph]) -> Program:
        return replace(self, bodies=dict(bodies))


# -- rewriting -----------------------------------------------------------------------------------


class Rewriter:
    """Builds a new graph from an old one, node by node: the one helper that passes use.

    ``copy`` takes a node over with its operands renamed; ``replace`` says which new value stands
    for an old one. Whatever nothing reads is left out by ``done``.
    """

    def __init__(self, old: Graph, name: str | None = None):
        self.old = old
        self.new = Graph(name or old.name)
        self.to: dict[str, str] = {}

    def operand(self, old: str) -> str:
        return self.to[old]

    def copy(self, node: Node, **changes: Any) -> Node:
        node = node.with_(inputs=tuple(self.to[i] for i in node.inputs), **changes)
        if node.name in self.new:
            node = node.with_(name=self.new.fresh(node.name))
        return self.new.add(node)

    def emit(self, stem: str, op: str, inputs: Iterable[str], type: Type, **rest: Any) -> Node:
        """A node that the old graph did not have; ``inputs`` are names in the *new* graph."""
        return self.new.add(Node(self.new.fresh(stem), op, tuple(inputs), type, **rest))

    def replace(self, old: str, new: str) -> None:
        self.to[old] = new

    def done(self, output: str | None = None) -> Graph:
        self.new.output = output or self.to[self.old.output]
        self.new.turns = tuple(
            replace(turn, nodes=tuple(self.to[n] for n in turn.nodes if n in self.to))
            for turn in self.old.turns
        )
        return prune(self.new)


def prune(graph: Graph) -> Graph:
    """The same graph without values that nothing reads; inputs and what is kept stay."""
    live = {graph.output} | {n.name for n in graph if n.op == "input" or n.op in KEPT}
    for root in list(live):
        live |= nx.ancestors(graph.nx, root)
    if len(live) == len(graph):
        return graph
    out = Graph(graph.name)
    for node in graph:
        if node.name in live:
            out.add(node)
    out.output = graph.output
    out.turns = tuple(
        replace(turn, nodes=tuple(n for n in turn.nodes if n in live)) for turn in graph.turns
    )
    return out
