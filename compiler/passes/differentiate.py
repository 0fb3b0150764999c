"""The backward graph of each entry: ``--emit graph --after differentiate``.

Every body that a gradient goes through becomes three (``compiler/passes/partition.py``): what runs
forward and saves, the gradients of its operands, the gradients of its parameters. Loops stay loops:
``chain`` becomes a ``loop`` forward, one backward and one over the weights; ``apply`` a ``route``
of rows through the blocks they picked, three times. So the backward graph has the size of the
forward one, however many layers or experts there are.

An entry ``main(token) -> logits`` becomes ``main.gradients(token, grad)``: its result, the
gradients of its inputs and of all parameters that it reads. With a loss, a mean cross-entropy of
the next token, it takes a target instead of ``grad`` (``compiler/passes/losses.py``).

The gradients of a body's parameters are a bundle with a name for each: a parameter's, or a child's,
whose bundle it then is. A name may occur twice: gradients of one parameter add up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from compiler.adjoints import ADJOINTS, BODIES, Emitter, Piece, flows, runs_body
from compiler.errors import UserError
from compiler.ir import Dim, Entry, EntryInput, Graph, Node, Program, Type
from compiler.passes import activity, partition
from compiler.passes.activity import FLOATS
from compiler.passes.partition import Parts
from compiler.passes.recompute import NOTHING, Recompute, of
from compiler.rules import Scope


@dataclass(frozen=True)
class Derived:
    """A program with its backward graph, and which bodies came of which."""

    program: Program
    parts: dict[str, Parts]


def run(program: Program) -> Program:
    """The pass, from the gradient of each entry's result; what the deployment names is computed
    again."""
    return differentiate(program, recompute=of(program, program.deployment)).program


def differentiate(
    program: Program, entries: Collection[str] | None = None, recompute: Recompute = NOTHING
) -> Derived:
    """The backward graphs of some entries; the others stay as they are.

    Args:
        program: as any pass left it; ``lifetimes`` is undone.
        entries: all, unless given.
        recompute: forward values that are computed again in the backward parts rather than saved.

    Raises:
        UserError: an op has no adjoint, with its place in the source.
    """
    chosen = [e for e in program.entries.values() if entries is None or e.name in entries]
    asked = [
        (entry.body, i)
        for entry in chosen
        for i, node in enumerate(program.bodies[entry.body].inputs)
        if node.type.dtype in FLOATS
    ]
    work = _Differentiation(program, activity.analyse(program, asked), recompute)
    bodies = {name: _living(graph) for name, graph in program.bodies.items()}
    made: dict[str, Entry] = {}
    for entry in chosen:
        body, takes = work.entry(entry)
        bodies[body.name] = body
        name = f"{entry.name}.gradients"
        made[name] = Entry(name, body.name, (*entry.inputs, *map(EntryInput, takes)))
    for part in work.parts.values():
        for graph in (part.forward, part.input, part.weight):
            if graph is not None:
                bodies[graph.name] = graph
    after = replace(program, bodies=bodies, entries={**program.entries, **made})
    return Derived(after, work.parts)


def _runs(graph: Graph) -> bool:
    return any(runs_body(n) for n in graph)


def _living(graph: Graph) -> Graph:
    """Without what ``lifetimes`` found: values live on in other bodies."""
    if not any("frees" in n.attrs for n in graph):
        return graph
    out = Graph(graph.name)
    for node in graph:
        out.add(node.with_(attrs={k: v for k, v in node.attrs.items() if k != "frees"}))
    out.output = graph.output
    return out


class _Differentiation:
    def __init__(self, program: Program, active: activity.Activity, recompute: Recompute):
        self.program, self.active = program, active
        self.recompute = recompute
        self.parts: dict[str, Parts] = {}
        # Composites that run no other bodies: one kernel forward, one backward from its operands.
        self.kernels = {
            n.attrs["body"]
            for g in program.bodies.values()
            for n in g
            if runs_body(n) and n.op not in BODIES and not _runs(program.bodies[n.attrs["body"]])
        }
        self.chained = {
            n.attrs["body"] for g in program.bodies.values() for n in g if n.op == "chain"
        }

    def of(self, body: str) -> Parts:
        """A body's three parts, made when first asked for."""
        if body not in self.parts:
            joint = _Body(self, _living(self.program.bodies[body])).joint()
            self.parts[body] = partition.cut(joint)
        return self.parts[body]

    def entry(self, entry: Entry) -> tuple[Graph, list[str]]:
        """The body of the entry's gradients; and what it takes beside the entry's inputs."""
        body = self.program.bodies[entry.body]
        if body.output not in self.active.carriers[body.name]:
            raise UserError(f"entry '{entry.name}': nothing in its result depends on a parameter")
        parts = self.of(entry.body)
        graph = Graph(f"{entry.body}.gradients")
        inputs = [graph.add(n) for n in body.inputs]
        taken = {n.attrs["name"] for n in inputs} | {n.name for n in inputs}
        name = "grad" if "grad" not in taken else "grad_of_result"
        grad = graph.add(Node(name, "input", (), body.result.type, {"name": name}))
        e = Emitter(graph, Scope(self.program, self.program.root))
        e.stem = "main"
        call = _Call(e, parts, {"child": "", "dims": ()}, "call")
        first = call.forward(inputs)
        value = call.item(first, 0, body.result.type)
        saved = call.item(first, 1)
        found, kept, again = call.input(inputs, saved, grad, [n.type for n in inputs])
        gives = [found[i] for i in parts.gives]
        names = [inputs[i].attrs["name"] for i in parts.gives]
        gradients = call.weight(inputs, saved, kept, again)
        results = [value, *gives, *([gradients] if gradients else [])]
        labels = ("result", *names, *([""] if gradients else []))
        bundle = Type("bundle", (), bundle=f"{graph.name}:results")
        e.stem = "results"
        made = e.add("pack", results, bundle, names=labels)
        graph.output = made.name
        return graph, [name]


@dataclass
class _Call:
    """Runs the parts of a body, the way the forward graph runs the body.

    ``attrs`` are those that all three share; ``op`` is call, loop or route. For a loop, operands
    and gradient are handed in for each round.
    """

    e: Emitter
    parts: Parts
    attrs: dict[str, object]
    op: str

    def _run(self, graph: Graph, operands: list[Node], **attrs: object) -> Node:
        type = graph.result.type
        return self.e.add(self.op, operands, type, body=graph.name, **self.attrs, **attrs)

    def item(self, source: Node, at: int, type: Type | None = None) -> Node:
        """A result; without a type, a bundle."""
        if type is None:
            graphs = (self.parts.forward, self.parts.input, self.parts.weight)
            (graph,) = (g for g in graphs if g is not None and g.name == source.attrs["body"])
            inner = graph.operands(graph.result)[at].type
            type = Type("bundle", self._round(), bundle=inner.bundle)
        return self.e.add("item", [source], type, at=at)

    def _round(self) -> tuple[Dim, ...]:
        if self.op == "loop":
            index = self.attrs["index"]
            assert isinstance(index, Dim)
            return (index,)
        return self.over if self.op == "route" else ()

    over: tuple[Dim, ...] = ()
    pick: tuple[Node, ...] = ()
    each: frozenset[int] = frozenset()  # operands that differ from round to round

    def _each(self, reads: tuple[int, ...], *more: bool) -> dict[str, object]:
        if self.op == "call":
            return {}
        flags = [*(i in self.each for i in reads), *more]
        return {"each": tuple(i for i, is_each in enumerate(flags) if is_each)}

    def forward(self, operands: list[Node]) -> Node:
        attrs: dict[str, object] = {"each": ()} if self.op != "call" else {}
        if self.op == "loop":
            attrs |= {"carry": ((0, 0),), "sum": (), "reverse": False}
        return self._run(self.parts.forward, [*self.pick, *operands], **attrs)

    def input(
        self, operands: list[Node], saved: Node, grad: Node, types: list[Type]
    ) -> tuple[dict[int, Node], Node | None, Node]:
        """Gradients of operands, which have these types; what the weight part reads; the gradient
        as it reads that."""
        parts = self.parts
        if parts.input is None:
            return {}, None, grad
        reads, given = parts.input_reads, parts.gives
        args = [*(operands[i] for i in reads), saved, grad]
        attrs = self._each(reads, True, False)
        if self.op == "loop":
            attrs |= {
                "carry": ((given.index(0), len(reads) + 1),),
                "sum": tuple(n for n, i in enumerate(given) if i != 0),
                "reverse": True,
            }
        ran = self._run(parts.input, [*self.pick, *args], **attrs)
        found = {i: self.item(ran, n, types[i]) for n, i in enumerate(given)}
        kept = self.item(ran, len(given))
        if self.op == "loop" and parts.weight_reads_grad:
            stacked = Type(grad.type.dtype, (*self._round(), *grad.type.dims))
            grad = self.item(ran, len(given) + 1, stacked)
        return found, kept, grad

    def weight(
        self, operands: list[Node], saved: Node, kept: Node | None, grad: Node
    ) -> Node | None:
        """The bundle of the parameters' gradients."""
        parts = self.parts
        if parts.weight is None:
            return None
        reads = parts.weight_reads
        args = [operands[i] for i in reads]
        more = []
        if parts.weight_reads_grad:
            args.append(grad)
            more.append(self.op == "loop")
        args += [saved, *([kept] if kept else [])]
        attrs = self._each(reads, *more, *[True] * (2 if kept else 1))
        if self.op == "loop":
            attrs |= {"carry": (), "sum": (), "reverse": False}
        return self.item(self._run(parts.weight, [*self.pick, *args], **attrs), 0)


class _Body:
    """One body with its gradients, as one graph."""

    def __init__(self, work: _Differentiation, body: Graph):
        self.work, self.body = work, body
        self.carriers = work.active.carriers[body.name]
        self.asked = work.active.inputs[body.name]
        self.graph = Graph(body.name)
        self.e = Emitter(self.graph, Scope(work.program, work.program.root))
        self.to: dict[str, str] = {}
        self.calls: dict[str, tuple[_Call, list[Node], list[Node], Node]] = {}
        self.found: dict[str, list[Node | Piece]] = {}
        self.weights: list[tuple[str, str]] = []
        self.steps: set[str] = set()

    def joint(self) -> partition.Joint:
        for node in self.body:
            self._forward(node)
        forward = frozenset(n.name for n in self.graph)
        result = self.to[self.body.output]
        grad = self.graph.fresh("grad")
        type = self.body.result.type
        given = self.graph.add(Node(grad, "input", (), type, {"name": "grad"}))
        self.found[result] = [given]
        for node in reversed(list(self.body)):
            self._backward(node)
        return partition.Joint(
            name=self.body.name,
            graph=self.graph,
            result=result,
            grad=grad,
            forward=forward,
            operands=self._operands(),
            weights=tuple(self.weights),
            steps=frozenset(self.steps),
            again=frozenset(partition.recomputed(self.graph, forward, self._is_again)),
            chained=self.body.name in self.work.chained,
        )

    def _is_again(self, node: Node) -> bool:
        if self.body.name in self.work.kernels:
            return True
        return self.work.recompute.again(self.body.name, self.graph, node)

    def _operands(self) -> dict[int, str]:
        found = {}
        for position, node in enumerate(self.body.inputs):
            if position in self.asked:
                self.e.at(node)
                own = self.graph[self.to[node.name]]
                found[position] = self.e.total(self.found.get(own.name, []), own.type).name
        return found

    # -- forward -------------------------------------------------------------------------------

    def _forward(self, node: Node) -> None:
        inputs = tuple(self.to[i] for i in node.inputs)
        name = f"{node.name}_" if node.name in partition.RESERVED else node.name
        own = node.with_(name=self.graph.fresh(name), inputs=inputs)
        if node.op == "cache":
            own = own.with_(op="as_history", attrs={})
        elif node.name in self.carriers and runs_body(node):
            own = self._called(own)
        self.to[node.name] = (own if own.name in self.graph else self.graph.add(own)).name

    def _called(self, node: Node) -> Node:
        """The forward part of the body that the node runs; returns the node's value."""
        operands = [self.graph[i] for i in node.inputs]
        call = self._call(node)
        given = operands[len(call.pick) :]
        self.e.stem, self.e.span = f"{node.name}.run", node.span
        ran = call.forward(given)
        kept = {"label": node.label, "rounds": node.rounds, "span": node.span}
        value = self.graph.add(
            Node(node.name, "item", (ran.name,), node.type, {"at": 0}, **kept)  # type: ignore[arg-type]
        )
        self.e.stem = f"{node.name}.saved"
        saved = call.item(ran, 1)
        if call.op == "loop" and 0 in (*call.parts.input_reads, *call.parts.weight_reads):
            self.e.stem = f"{node.name}.rounds"
            stacked = Type(node.type.dtype, (node.attrs["index"], *given[0].type.dims))
            rounds = call.item(ran, 2, stacked)
            given = [rounds, *given[1:]]
        self.calls[value.name] = (call, operands[len(call.pick) :], given, saved)
        return value

    def _call(self, node: Node) -> _Call:
        a = node.attrs
        if node.op == "branch":
            return _Call(
                self.e, self.work.of(activity.taken(node)), {"child": "", "dims": ()}, "call"
            )
        if node.op == "scan":
            raise UserError(
                f"{node.span}: the recurrence '{a['name']}' has no backward graph: differentiate "
                "does not build the adjoint of a scan"
            )
        parts = self.work.of(a["body"])
        if node.op == "chain":
            attrs = {"child": a["child"], "index": a["index"], "dims": a.get("dims", ())}
            return _Call(self.e, parts, attrs, "loop", each=frozenset({0}))
        if node.op == "apply":
            pick = self.graph[node.inputs[0]]
            assert pick.type.of is not None
            attrs = {k: a[k] for k in ("child", "over", "rows", "dims")}
            return _Call(self.e, parts, attrs, "route", over=(pick.type.of,), pick=(pick,))
        attrs = {"child": "", "dims": ()}  # a composite's body runs in the same module
        if node.op == "call":
            attrs = {"child": a["child"], "dims": a["dims"]}
        return _Call(self.e, parts, attrs, "call")

    # -- backward ------------------------------------------------------------------------------

    def _backward(self, node: Node) -> None:
        own = self.graph[self.to[node.name]]
        if node.name not in self.carriers or own.name not in self.found or own.op == "input":
            return
        self.e.at(own)
        grad = self.e.total(self.found[own.name], own.type)
        if own.op == "param":
            self.weights.append((own.attrs["param"], grad.name))
        elif own.name in self.calls:
            self._called_back(own, grad)
        else:
            self._adjoint(node, own, grad)

    def _adjoint(self, node: Node, own: Node, grad: Node) -> None:
        if own.op not in ADJOINTS:
            place = f"{node.span}: " if node.span else ""
            raise UserError(f"{place}the op {own.op} has no adjoint")
        operands = self.graph.operands(own)
        wanted = [i for i, x in enumerate(node.inputs) if x in self.carriers and flows(node, i)]
        found = ADJOINTS[own.op](self.e, own, operands, grad, wanted)
        for i, value in found.items():
            self.found.setdefault(operands[i].name, []).append(value)

    def _called_back(self, node: Node, grad: Node) -> None:
        call, before, operands, saved = self.calls[node.name]
        types = [self._gradient_type(call, i, n) for i, n in enumerate(before)]
        found, kept, again = call.input(operands, saved, grad, types)
        for i, value in found.items():
            self.found.setdefault(before[i].name, []).append(value)
        if kept is not None:
            self.steps.add(kept.name)
            if again is not grad:
                self.steps.add(again.name)
        gradients = call.weight(operands, saved, kept, again)
        if gradients is not None:
            self.weights.append((str(call.attrs["child"]), gradients.name))

    def _gradient_type(self, call: _Call, position: int, operand: Node) -> Type:
        """What the input part gives for an operand: for a routed one that has rows, one for each
        row, however few of the rows' dims the operand has itself."""
        wanted = call.parts.forward.inputs[position].type
        if call.op != "route" or not any(d.kind == "rows" for d in wanted.dims):
            return operand.type
        (pick,) = call.pick
        left = tuple(d for d in operand.type.dims if d not in pick.type.dims)
        return Type(operand.type.dtype, (*pick.type.dims, *left))
