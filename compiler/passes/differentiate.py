"""The backward graph of each entry: ``--emit graph --after differentiate``.

Every body that a gradient goes through becomes three (``compiler/passes/partition.py``): what runs
forward and saves, the gradients of its operands, the gradients of its parameters. Loops stay loops:
``chain`` becomes a ``loop`` forward, one backward and one over the weights; ``apply`` a ``route``
of rows through the blocks they picked, three times. So the backward graph has the size of the
forward one, however many layers or experts there are.

An entry ``main(token) -> logits`` becomes ``main.gradients(token, grad)``: its result, the
gradients of its inputs and of all parameters that it reads. Of a training deployment it is the
entry ``loss`` instead, the cross-entropy of all entries (``compiler/passes/losses.py``).

The gradients of a body's parameters are a bundle with a name for each: a parameter's, or a child's,
whose bundle it then is. A name may occur twice: gradients of one parameter add up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from compiler.adjoints import ADJOINTS, BODIES, Emitter, Piece, flows, runs_body
from compiler.errors import UserError
from compiler.ir import Entry, EntryInput, Graph, Node, Program, Type
from compiler.passes import activity, losses, partition, tokenwise
from compiler.passes.activity import FLOATS
from compiler.passes.backward_calls import Call
from compiler.passes.partition import Parts
from compiler.passes.recompute import NOTHING, Recompute, of
from compiler.rules import Scope


@dataclass(frozen=True)
class Derived:
    """A program with its backward graph; ``source`` is what was differentiated, and ``parts`` what
    became of its bodies."""

    program: Program
    source: Program
    parts: dict[str, Parts]


def run(program: Program) -> Program:
    """The pass: from the loss that a training deployment means, or from the gradient of each
    entry's result; what the deployment names is computed again."""
    deployment = program.deployment
    again = of(program, deployment)
    if deployment is None or deployment.train is None:
        return differentiate(program, recompute=again).program
    with_loss = losses.add(program, deployment.train.weight)
    return differentiate(with_loss, [losses.NAME], again).program


def differentiate(
    program: Program, entries: Collection[str] | None = None, recompute: Recompute = NOTHING
) -> Derived:
    """The backward graphs of some entries; the others stay as they are.

    Args:
        program: as any pass left it; ``lifetimes`` is undone.
        entries: all that a parameter decides, unless given.
        recompute: forward values that are computed again in the backward parts rather than saved.

    Raises:
        UserError: an op has no adjoint, with its place in the source; or there is no gradient.
    """
    chosen = [e for e in program.entries.values() if entries is None or e.name in entries]
    asked = [
        (entry.body, i)
        for entry in chosen
        for i, node in enumerate(program.bodies[entry.body].inputs)
        if node.type.dtype in FLOATS
    ]
    source = tokenwise.run(program)
    work = _Differentiation(source, activity.analyse(source, asked), recompute)
    bodies = {name: _living(graph) for name, graph in program.bodies.items()}
    made: dict[str, Entry] = {}
    trained = [e for e in chosen if work.has_gradient(e)]
    if not trained:
        names = ", ".join(f"'{e.name}'" for e in chosen)
        raise UserError(f"nothing in the result of {names} depends on a parameter")
    for entry in trained:
        body, takes = work.entry(entry)
        bodies[body.name] = body
        name = f"{entry.name}.gradients"
        made[name] = Entry(name, body.name, (*entry.inputs, *map(EntryInput, takes)))
    for part in work.parts.values():
        for graph in (part.forward, part.input, part.weight):
            if graph is not None:
                bodies[graph.name] = graph
    reached = {n.attrs["body"] for g in bodies.values() for n in g if n.op == "loop"}
    bodies |= {name: source.bodies[name] for name in reached - bodies.keys()}
    after = replace(program, bodies=bodies, entries={**program.entries, **made})
    return Derived(after, source, work.parts)


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
            n.attrs["body"] for g in program.bodies.values() for n in g if n.op in ("chain", "loop")
        }

    def of(self, body: str) -> Parts:
        """A body's three parts, made when first asked for."""
        if body not in self.parts:
            joint = _Body(self, _living(self.program.bodies[body])).joint()
            self.parts[body] = partition.cut(joint)
        return self.parts[body]

    def has_gradient(self, entry: Entry) -> bool:
        """Does a parameter, or an input of numbers, decide the entry's result?"""
        return self.program.bodies[entry.body].output in self.active.carriers[entry.body]

    def entry(self, entry: Entry) -> tuple[Graph, list[str]]:
        """The body of the entry's gradients; and what it takes beside the entry's inputs."""
        body = self.program.bodies[entry.body]
        parts = self.of(entry.body)
        graph = Graph(f"{entry.body}.gradients")
        inputs = [graph.add(n) for n in body.inputs]
        taken = {n.attrs["name"] for n in inputs} | {n.name for n in inputs}
        name = "grad" if "grad" not in taken else "grad_of_result"
        grad = graph.add(Node(name, "input", (), body.result.type, {"name": name}))
        e = Emitter(graph, Scope(self.program, self.program.root))
        e.stem = "forward"
        call = Call(e, parts, "call", {"child": "", "dims": ()})
        first = call.forward(inputs)
        value = call.item(first, 0, body.result.type)
        saved = call.item(first, 1)
        e.stem = "input"
        found, kept, again = call.input(inputs, saved, [grad], [n.type for n in inputs])
        gives = [found[i] for i in parts.gives]
        names = [inputs[i].attrs["name"] for i in parts.gives]
        e.stem = "weight"
        gradients = call.weight(inputs, saved, kept, again)
        results = [value, *gives, *([gradients] if gradients else [])]
        labels = ("result", *names, *([""] if gradients else []))
        bundle = Type("bundle", (), bundle=f"{graph.name}:results")
        e.stem = "results"
        made = e.add("pack", results, bundle, names=labels)
        graph.output = made.name
        return graph, [name]


def _own(name: str) -> str:
    """A body's own name for a value or an argument: not one that its parts have a use for."""
    reserved = name in partition.RESERVED or name == "grad" or name.startswith("grad.")
    return f"{name}_" if reserved else name


class _Body:
    """One body with its gradients, as one graph."""

    def __init__(self, work: _Differentiation, body: Graph):
        self.work, self.body = work, body
        self.carriers = work.active.carriers[body.name]
        self.asked = work.active.inputs[body.name]
        self.graph = Graph(body.name)
        self.e = Emitter(self.graph, Scope(work.program, work.program.root))
        self.to: dict[str, str] = {}
        self.calls: dict[str, tuple[Call, list[Node], list[Node], Node]] = {}
        self.found: dict[str, list[Node | Piece]] = {}
        self.weights: list[tuple[str, str]] = []
        self.steps: set[str] = set()
        self.runs: dict[str, tuple[str, str]] = {}

    def joint(self) -> partition.Joint:
        for node in self.body:
            if node.op != "pack":
                self._forward(node)
        forward = frozenset(n.name for n in self.graph)
        results = [self.to[n.name] for n in activity.results(self.body)]
        grads = [self._grad(self.graph[name].type) for name in results]
        for result, grad in zip(results, grads, strict=True):
            self.found.setdefault(result, []).append(grad)
        for node in reversed(list(self.body)):
            self._backward(node)
        return partition.Joint(
            name=self.body.name,
            graph=self.graph,
            results=tuple(results),
            grads=tuple(n.name for n in grads),
            forward=forward,
            operands=self._operands(),
            weights=tuple(self.weights),
            steps=frozenset(self.steps),
            again=frozenset(partition.recomputed(self.graph, forward, self._is_again)),
            chained=self.body.name in self.work.chained,
            runs=self.runs,
        )

    def _grad(self, type: Type) -> Node:
        """The gradient of a result, an argument of the backward parts."""
        name = self.graph.fresh("grad")
        return self.graph.add(Node(name, "input", (), type, {"name": name}))

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
        own = node.with_(name=self.graph.fresh(_own(node.name)), inputs=inputs)
        if node.op == "input":  # an argument of this name is given beside the body's own
            own = own.with_(attrs={"name": _own(node.attrs["name"])})
        elif node.op == "cache":
            own = own.with_(op="as_history", attrs={})
        elif node.name in self.carriers and runs_body(node):
            own = self._called(own, node.name)
        self.to[node.name] = (own if own.name in self.graph else self.graph.add(own)).name

    def _called(self, node: Node, source: str) -> Node:
        """The forward part of the body that the node runs; returns the node's value, of a loop the
        bundle of its results."""
        operands = [self.graph[i] for i in node.inputs]
        call = self._call(node)
        given = before = operands[len(call.pick) :]
        self.e.stem, self.e.span = f"{node.name}.run", node.span
        value = ran = call.forward(given)
        if node.type.dtype != "bundle":
            rest = {"label": node.label, "rounds": node.rounds, "span": node.span}
            one = Node(node.name, "item", (ran.name,), node.type, {"at": 0})
            value = self.graph.add(one.with_(**rest))
        self.e.stem = f"{node.name}.saved"
        saved = call.item(ran, call.parts.results)
        if call.reads_carried:
            self.e.stem = f"{node.name}.rounds"
            first = given[0].type
            stacked = Type(first.dtype, (*call.rounds, *first.dims))
            given = [call.item(ran, call.parts.results + 1, stacked), *given[1:]]
        self.calls[value.name] = (call, before, given, saved)
        self.runs[source] = (ran.name, saved.name)
        return value

    def _call(self, node: Node) -> Call:
        a = node.attrs
        here = {"child": "", "dims": ()}  # a composite's body, a branch's: of the same module
        if node.op == "branch":
            return Call(self.e, self.work.of(activity.taken(node)), "call", here)
        parts = self.work.of(a["body"])
        if node.op in ("chain", "loop"):
            attrs = {"child": a["child"], "index": a["index"], "dims": a.get("dims", ())}
            each = frozenset({0, *a.get("each", ())})
            forward_each = a.get("each", ())
            return Call(self.e, parts, "loop", attrs, each=each, forward_each=forward_each)
        if node.op == "apply":
            pick = self.graph[node.inputs[0]]
            assert pick.type.of is not None
            attrs = {k: a[k] for k in ("child", "over", "rows", "dims")}
            return Call(self.e, parts, "route", attrs, over=(pick.type.of,), pick=(pick,))
        if node.op == "call":
            return Call(self.e, parts, "call", {"child": a["child"], "dims": a["dims"]})
        return Call(self.e, parts, "call", here)

    # -- backward ------------------------------------------------------------------------------

    def _backward(self, node: Node) -> None:
        if node.name not in self.carriers or node.op in ("input", "pack"):
            return
        own = self.graph[self.to[node.name]]
        self.e.at(node)
        if own.name in self.calls and own.type.dtype == "bundle":
            results = self.body.users(node.name)
            if any(n.name in self.carriers for n in results):
                self._called_back(own, self._grads_of_loop(node, own))
            return
        if own.name not in self.found:
            return
        if node.op == "item":
            return  # its gradient waits for the loop that gives it
        grad = self.e.total(self.found[own.name], own.type)
        if own.op == "param":
            self.weights.append((own.attrs["param"], grad.name))
        elif own.name in self.calls:
            self._called_back(own, [grad])
        else:
            self._adjoint(node, own, grad)

    def _grads_of_loop(self, node: Node, own: Node) -> list[Node]:
        """The gradients of a loop's results: zeros of those that nothing reads."""
        call, operands, _, _ = self.calls[own.name]
        forward = call.parts.forward
        grads = []
        for at, result in enumerate(forward.operands(forward.result)[: call.parts.results]):
            dims = operands[0].type.dims if at == 0 else (*call.rounds, *result.type.dims)
            read = [n for n in self.body.users(node.name) if n.attrs["at"] == at]
            found = [v for n in read for v in self.found.get(self.to[n.name], [])]
            grads.append(self.e.total(found, Type(result.type.dtype, dims)))
        return grads

    def _adjoint(self, node: Node, own: Node, grad: Node) -> None:
        if own.op not in ADJOINTS:
            place = f"{node.span}: " if node.span else ""
            raise UserError(f"{place}the op {own.op} has no adjoint")
        operands = self.graph.operands(own)
        wanted = [i for i, x in enumerate(node.inputs) if x in self.carriers and flows(node, i)]
        found = ADJOINTS[own.op](self.e, own, operands, grad, wanted)
        for i, value in found.items():
            self.found.setdefault(operands[i].name, []).append(value)

    def _called_back(self, node: Node, grads: list[Node]) -> None:
        call, before, operands, saved = self.calls[node.name]
        types = [self._gradient_type(call, i, n) for i, n in enumerate(before)]
        found, kept, again = call.input(operands, saved, grads, types)
        for i, value in found.items():
            self.found.setdefault(before[i].name, []).append(value)
        if kept is not None:
            self.steps.add(kept.name)
        gradients = call.weight(operands, saved, kept, again)
        if gradients is not None:
            self.weights.append((str(call.attrs["child"]), gradients.name))

    def _gradient_type(self, call: Call, position: int, operand: Node) -> Type:
        """What the input part gives for an operand: for a routed one that has rows, one for each
        row, however few of the rows' dims the operand has itself."""
        wanted = call.parts.forward.inputs[position].type
        if call.op != "route" or not any(d.kind == "rows" for d in wanted.dims):
            return operand.type
        (pick,) = call.pick
        left = tuple(d for d in operand.type.dims if d not in pick.type.dims)
        return Type(operand.type.dtype, (*pick.type.dims, *left))
