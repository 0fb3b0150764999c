"""A body and its gradients, cut in three: forward, input part, weight part.

The gradients of a body's operands are on the critical path of a backward pass, those of its
parameters are not: schedules such as ZB1P and DualPipe run them apart (arXiv:2401.10241). So a body
``B`` becomes

    B.forward(operands...)                      -> result, saved
    B.input(operands..., saved, grad)           -> gradients of operands..., kept
    B.weight(operands..., grad, saved, kept)    -> gradients of parameters

(one ``grad`` for each result; only the body of a recurrence has two, its state and what it gives).

``saved`` holds values of the forward body that the other two read; ``kept`` gradients of the input
part that the weight part reads. Operands and the result's gradient are the caller's values: who
calls hands them in again where they are read, and saves them once for all that read them.

What is cheap is computed again rather than saved: views, wider copies, whatever pairs time with
history (attention kernels never write scores), what is inside a composite, elementwise values
without a name of their own where they can be made from what is saved anyway, and what the
deployment names (``compiler/passes/recompute.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from compiler.cost import WIDTH, is_square
from compiler.ir import Graph, Node, Type
from compiler.passes import cse

SOURCES = frozenset({"param", "state", "constant", "position", "iota"})
VIEWS = frozenset("flatten unflatten part select rename expand select_rows as_history".split())

Where = Literal["copy", "operand", "saved", "kept", "grad"]


@dataclass(frozen=True)
class Joint:
    """A body with its gradients, one graph.

    Attributes:
        graph: forward values first; ``grads`` are inputs, the gradients of the results.
        results: of the forward body.
        forward: names of forward values.
        operands: gradients of operands, by position of the input.
        weights: (parameter's or child's name, gradient); of a child, a bundle.
        steps: nodes that run the input parts of other bodies.
        again: forward values that are computed again, not saved.
        chained: a loop runs the body, carrying its first input: what the backward parts read of it,
            and of its first result's gradient, the loop hands back for each round.
        runs: by node that runs a body: what runs its forward part, and what that saves.
    """

    name: str
    graph: Graph
    results: tuple[str, ...]
    grads: tuple[str, ...]
    forward: frozenset[str]
    operands: dict[int, str]
    weights: tuple[tuple[str, str], ...]
    steps: frozenset[str]
    again: frozenset[str]
    chained: bool
    runs: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Parts:
    """The three bodies, and how to call them.

    Attributes:
        input, weight: None where there is nothing to compute.
        gives: positions of the operands whose gradients the input part gives, in order; ``kept``
            comes after them, and after that, for a loop, the first of ``grads_read`` if that is 0.
        input_reads, weight_reads: positions of operands that the parts take.
        grads_read: which results' gradients the weight part takes.
        results: how many there are; ``saved`` comes after them.
        runs: as ``Joint`` has them.
    """

    forward: Graph
    input: Graph | None
    weight: Graph | None
    gives: tuple[int, ...]
    input_reads: tuple[int, ...]
    weight_reads: tuple[int, ...]
    grads_read: tuple[int, ...]
    results: int
    saved: tuple[Node, ...]
    kept: tuple[Node, ...]
    again: frozenset[str]  # forward values that the backward parts compute once more
    runs: Mapping[str, tuple[str, str]]

    @property
    def holds(self) -> frozenset[str]:
        """Names of what forward saves."""
        return frozenset(n.name for n in self.saved)


def recomputed(graph: Graph, forward: Iterable[str], named: Callable[[Node], bool]) -> set[str]:
    """Forward values that are computed again where a backward part reads them.

    Args:
        named: whether a value's author wants it computed again.
    """
    again: set[str] = set()
    for name in forward:
        node = graph[name]
        if node.op == "input":
            continue
        sources = graph.operands(node)
        wider = node.op == "cast" and WIDTH[node.type.dtype] >= WIDTH[sources[0].type.dtype]
        given = node.op == "item" and sources[0].op in ("call", "loop", "route")
        is_cheap = node.op in SOURCES | VIEWS or wider or is_square(node.type.dims)
        if is_cheap or named(node) or (node.type.dtype == "bundle" and not given):
            again.add(name)
    return again


def cut(joint: Joint) -> Parts:
    """The three bodies of a joint graph."""
    return _Cut(joint).parts()


class _Cut:
    def __init__(self, joint: Joint):
        self.joint, self.graph = joint, joint.graph
        self.backward = {n.name for n in joint.graph} - joint.forward
        roots = {*joint.operands.values(), *joint.steps}
        self.early = self._reached(roots)
        self.inputs = [n.name for n in self.graph.inputs if n.name not in joint.grads]
        self.repeated: frozenset[str] = frozenset()
        self.repeated = self._repeated()
        self.saved: list[str] = []
        self.kept: list[str] = []
        self.saved_type = Type("bundle", (), bundle=f"{joint.name}.forward:saved")
        self.kept_type = Type("bundle", (), bundle=f"{joint.name}.input:kept")

    def _reached(self, roots: Iterable[str]) -> set[str]:
        """Gradients that these are made of."""
        found: set[str] = set()
        stack = list(roots)
        while stack:
            name = stack.pop()
            if name in self.backward and name not in found:
                found.add(name)
                stack += self.graph[name].inputs
        # What is taken out of a bundle is as early as the bundle.
        for node in self.graph:
            if node.op == "item" and node.inputs[0] in found:
                found.add(node.name)
        return found

    def _repeated(self) -> frozenset[str]:
        """Forward values that the input part computes again, and that are not cheap: where the
        weight part reads them too, they are kept for it, not computed a third time."""
        first = self.needs([*self.joint.operands.values(), *self.joint.steps], weight=False)
        nodes = [self.graph[n] for n, where in first.items() if where == "copy"]
        runs = {n.name for n in nodes if n.op in ("call", "loop", "route", "contract")}
        return frozenset(
            n.name
            for n in nodes
            if n.name in self.joint.forward
            and not is_square(n.type.dims)
            and (n.op == "contract" or (n.op == "item" and n.inputs[0] in runs))
        )

    def where(self, name: str, weight: bool) -> Where:
        """How the input part, or the weight part, comes by a value."""
        if name in self.joint.grads:
            return "grad"
        if weight and name in self.repeated:
            return "kept"
        if name in self.joint.forward:
            if self.graph[name].op == "input":
                return "operand"
            return "copy" if name in self.joint.again else "saved"
        # A constant or a count is made twice, not handed on.
        if weight and name in self.early and self.graph[name].op not in SOURCES:
            return "kept"
        return "copy"

    def needs(self, roots: Iterable[str], weight: bool) -> dict[str, Where]:
        """Every value that a part reads or computes, in the order of the graph."""
        found: dict[str, Where] = {}
        stack = list(roots)
        while stack:
            name = stack.pop()
            if name not in found:
                found[name] = self.where(name, weight)
                if found[name] == "copy":
                    stack += self.graph[name].inputs
        return {n.name: found[n.name] for n in self.graph if n.name in found}

    def parts(self) -> Parts:
        joint = self.joint
        late = [name for _, name in joint.weights]
        read = self.needs(late, weight=True)
        # A weight's gradient may be an operand's as well: then it is kept like any other.
        self.kept = [n for n, where in read.items() if where == "kept"]
        roots = [*joint.operands.values(), *joint.steps, *self.kept]
        first = self.needs(roots, weight=False)
        both = {**first, **read}
        self.saved = [
            n.name for n in self.graph if "saved" in (first.get(n.name), read.get(n.name))
        ]
        spared = self._spared()
        if spared:
            return _Cut(replace(joint, again=joint.again | spared)).parts()
        copied = [n for n, where in both.items() if where == "copy" and n in joint.forward]
        has_input = bool(joint.operands or self.kept or joint.steps)
        weight_reads = self._positions(read)
        input_reads = self._positions(first)
        echo = joint.chained and 0 in (*weight_reads, *input_reads)
        grads_read = tuple(i for i, name in enumerate(joint.grads) if name in read)
        return Parts(
            forward=self._forward(echo),
            input=self._input(first, 0 in grads_read) if has_input else None,
            weight=self._weight(read, has_input) if joint.weights else None,
            gives=tuple(joint.operands),
            input_reads=input_reads,
            weight_reads=weight_reads,
            grads_read=grads_read,
            results=len(joint.results),
            saved=tuple(self.graph[n] for n in self.saved),
            kept=tuple(self.graph[n] for n in self.kept),
            again=frozenset(copied),
            runs=joint.runs,
        )

    def _spared(self) -> set[str]:
        """Saved values that nobody named, elementwise in what is at hand without them."""
        at_hand = {*self.saved, *self.joint.again, *self.inputs}
        spared: set[str] = set()
        for name in reversed(self.saved):
            node = self.graph[name]
            if node.op in ("map", "cast") and not node.label and at_hand.issuperset(node.inputs):
                spared.add(name)
        return spared

    def _positions(self, read: dict[str, Where]) -> tuple[int, ...]:
        return tuple(i for i, name in enumerate(self.inputs) if name in read)

    def _forward(self, echo: bool) -> Graph:
        out = Graph(f"{self.joint.name}.forward")
        for node in self.graph:
            if node.name in self.joint.forward:
                out.add(node)
        saved = _pack(out, "saved", self.saved)
        first = [self.inputs[0]] if echo else []
        _pack(out, "results", [*self.joint.results, saved.name, *first])
        return _pruned(out)

    def _start(self, out: Graph, read: dict[str, Where]) -> None:
        for name in self.inputs:
            if name in read:
                out.add(self.graph[name])

    def _fill(self, out: Graph, read: dict[str, Where], saved: str, kept: str = "") -> None:
        for name, where in read.items():
            node = self.graph[name]
            plain = node.with_(attrs={"at": 0}, op="item", label=None, rounds=False)
            if where == "saved":
                at = self.saved.index(name)
                out.add(plain.with_(inputs=(saved,), attrs={"at": at}))
            elif where == "kept":
                at = self.kept.index(name)
                out.add(plain.with_(inputs=(kept,), attrs={"at": at}))
            elif where == "copy":
                out.add(node)

    def _input(self, read: dict[str, Where], weight_reads_first: bool) -> Graph:
        joint = self.joint
        out = Graph(f"{joint.name}.input")
        self._start(out, read)
        out.add(Node("saved", "input", (), self.saved_type, {"name": "saved"}))
        for name in joint.grads:
            out.add(self.graph[name])
        self._fill(out, read, "saved")
        kept = _pack(out, "kept", self.kept)
        echo = [joint.grads[0]] if joint.chained and weight_reads_first else []
        _pack(out, "results", [*joint.operands.values(), kept.name, *echo])
        return _pruned(out)

    def _weight(self, read: dict[str, Where], has_input: bool) -> Graph:
        joint = self.joint
        out = Graph(f"{joint.name}.weight")
        self._start(out, read)
        for name in joint.grads:
            if name in read:
                out.add(self.graph[name])
        out.add(Node("saved", "input", (), self.saved_type, {"name": "saved"}))
        if has_input:
            out.add(Node("kept", "input", (), self.kept_type, {"name": "kept"}))
        self._fill(out, read, "saved", "kept")
        names = tuple(name for name, _ in joint.weights)
        found = _pack(out, "gradients", [name for _, name in joint.weights], names=names)
        _pack(out, "results", [found.name])
        return _pruned(out)


RESERVED = ("saved", "kept", "gradients", "results")


def _pack(out: Graph, name: str, values: list[str], **attrs: tuple[str, ...]) -> Node:
    type = Type("bundle", (), bundle=f"{out.name}:{name}")
    out.output = name
    return out.add(Node(name, "pack", tuple(values), type, attrs))


def _pruned(graph: Graph) -> Graph:
    return cse.run_on(graph)
