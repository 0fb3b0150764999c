"""What training costs, body by body: FLOPs forward, backward to operands, backward to weights, of
what is computed again; and the bytes that a forward pass saves.

Counted as papers count: two FLOPs per multiply-add of contractions, maps and reductions nothing
beside them. Contractions over pairs of positions count the share of pairs that the mask lets see,
backward as forward: attention's two products forward (scores, values) are four backward (of
probabilities, values, queries, keys), so that input-backward is twice forward there and
weight-backward nothing. For a parameter's product, each of the two is once forward. So a model's
backward FLOPs are twice its forward ones, and training is three times forward, as MFU counts it.
What is computed again (scores in an attention's backward kernel, what a deployment's ``recompute``
names) is a fourth number and not part of the three.

costs(program, sequence=4096).total                        # of one sequence through ``main``
{c.place: c.own for c in costs(program, 4096).walk()}      # each body alone
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from compiler import spec
from compiler.cost import WIDTH, flops_of, is_square, lengths, volume
from compiler.ir import Graph, Node, Program, Rewriter
from compiler.passes import masks, recompute
from compiler.passes.activity import bodies_run
from compiler.passes.differentiate import Derived, differentiate
from compiler.passes.partition import Parts
from compiler.passes.recompute import Recompute
from dsl.diagnostics import Span

Product = tuple[str, Span | None]  # a block, and its expression in the source


@dataclass(frozen=True)
class Work:
    """FLOPs: ``forward``, ``input`` and ``weight`` backward, and what backward computes ``again``.
    Bytes, at two for the activation dtype: ``saved`` by forward for backward, ``kept`` by the input
    part for the weight part."""

    forward: float = 0.0
    input: float = 0.0
    weight: float = 0.0
    again: float = 0.0
    saved: float = 0.0
    kept: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.all, other.all, strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(a * times for a in self.all))

    @property
    def all(self) -> tuple[float, ...]:
        return self.forward, self.input, self.weight, self.again, self.saved, self.kept

    @property
    def training(self) -> float:
        """FLOPs as MFU counts them: without what is computed again."""
        return self.forward + self.input + self.weight


@dataclass(frozen=True)
class Cost:
    """One run of a body.

    Attributes:
        body: its name; ``block`` owns it.
        kind: the composite that it defines (attention, rms_norm, experts), or "".
        child: what the caller calls the module, "" for its own.
        times: how often the caller runs it; the rows of a routed block are those of all blocks.
        saves: False where the caller runs it once more instead of keeping what it saved.
        own: without the bodies it runs.
        coded: the FLOPs of ``own`` that run on quantised numbers: the products that ``coded``
            names, and their backward products.
        inside: those.
        products: the FLOPs of ``own`` by expression in the source, without bodies that run again.
        repeated: bodies that the backward parts run forward once more.
    """

    body: str
    block: str
    kind: str
    child: str
    times: int
    saves: bool
    own: Work
    coded: Work
    inside: tuple[Cost, ...]
    products: Mapping[Span | None, Work]
    repeated: tuple[Cost, ...]

    @property
    def total(self) -> Work:
        """With the bodies it runs, each as often as it does; of one run."""
        found = self.own
        for cost in self.inside:
            work = cost.total * cost.times
            found += work if cost.saves else replace(work, saved=0.0)
        return found

    def walk(self, times: int = 1) -> Iterator[tuple[Cost, int]]:
        """This and every cost inside, with how often each runs altogether."""
        yield self, times * self.times
        for cost in self.inside:
            yield from cost.walk(times * self.times)


def coded(program: Program) -> frozenset[Product]:
    """The products that run on quantised numbers.

    Args:
        program: as ``select-fp8`` left it.
    """
    return frozenset(
        (program.modules[scope.module].block, node.span)
        for scope, graph in spec.scopes(program)
        for node in graph
        if node.op == "scaled_contract"
    )


def costs(
    program: Program,
    sequence: int,
    entry: str = "main",
    again: Recompute | None = None,
    coded: frozenset[Product] = frozenset(),
) -> Cost:
    """What one sequence through an entry costs, with its deployment's recomputation.

    Args:
        program: ``Compiled.trained``, as ``recognise`` leaves it without number formats.
        sequence: tokens of the sequence.
        again: what is computed again, if it is not what the deployment says.
        coded: products on quantised numbers (``coded``); their backward products are too.

    Raises:
        UserError: an op has no adjoint.
    """
    again = again or recompute.of(program, program.deployment)
    derived = differentiate(program, [entry], again)
    at = {**lengths(program.sizes, sequence), "wanted": sequence}
    return _Counting(derived, coded).cost(program.entries[entry].body, at, Run())


Expression = tuple[str, Span | None]  # a body, and an expression in it


@dataclass(frozen=True)
class Backward:
    """What backward graphs compute, by expression of the source.

    Attributes:
        products: FLOPs, of one run of the body.
        repeated: by body, how often the backward parts run it forward once more (a mean, where
            some of the places that run it are computed again and some are not).
        reached: expressions whose values have an adjoint.
    """

    products: Mapping[Expression, Work]
    repeated: Mapping[str, float]
    reached: frozenset[Expression]

    def of(self, body: str) -> Work:
        """All products of a body together: of an attention, the two or three that it is."""
        return sum((w for key, w in self.products.items() if key[0] == body), Work())


def backward(
    program: Program, sequence: int, entries: Collection[str], again: Recompute
) -> Backward:
    """What the backward graphs of these entries compute.

    Args: as ``costs`` has them.
    """
    derived = differentiate(program, entries, again)
    counting = _Counting(derived, frozenset())
    at = {**lengths(program.sizes, sequence), "wanted": sequence}
    products: dict[Expression, Work] = {}
    runs: dict[str, float] = {}
    repeated: dict[str, float] = {}

    def visit(cost: Cost, times: float) -> None:
        runs[cost.body] = runs.get(cost.body, 0.0) + times
        products.update({(cost.body, span): work for span, work in cost.products.items()})
        for inner in cost.inside:
            visit(inner, times * inner.times)
        for inner in cost.repeated:
            for one, number in inner.walk(round(times)):
                repeated[one.body] = repeated.get(one.body, 0.0) + number

    for name in entries:
        visit(counting.cost(program.entries[name].body, at, Run()), 1.0)
    reached = {
        (body, node.span)
        for body, parts in derived.parts.items()
        for graph in (parts.input, parts.weight)
        for node in graph or ()
        if node.name not in parts.again and node.op not in ("input", "item", "pack")
    }
    often = {body: number / runs[body] for body, number in repeated.items()}
    return Backward(products, often, frozenset(reached))


class _Counting:
    def __init__(self, derived: Derived, coded: frozenset[Product]):
        self.coded = coded
        self.derived, self.program = derived, derived.source
        self.blocks = {
            graph.name: self.program.modules[scope.module].block
            for scope, graph in spec.scopes(self.program)
        }

    def cost(self, body: str, at: Mapping[str, int], run: Run) -> Cost:
        """One run of a body at these lengths."""
        parts = self.derived.parts.get(body) if run.trained else None
        original = self.program.bodies[body]
        seen = masks.shares(original, at) if run.seen is None else run.seen
        inside = {n.name: tuple(self._inside(n, original, parts, at)) for n in original}
        block = self.blocks[body]
        products = self._products(original, parts, at, seen)
        repeated = () if parts is None else tuple(_repeated(parts, inside))
        own = sum(products.values(), Work())
        if parts is not None:
            own += Work(
                again=sum(c.total.forward * c.times for c in repeated),
                saved=_bytes(parts.saved, at),
                kept=_bytes(parts.kept, at),
            )
        coded = sum((w for span, w in products.items() if (block, span) in self.coded), Work())
        ran = tuple(cost for some in inside.values() for cost in some)
        return Cost(
            body,
            block,
            run.kind,
            run.child,
            run.times,
            run.saves,
            own,
            coded,
            ran,
            products,
            repeated,
        )

    def _inside(
        self, node: Node, graph: Graph, parts: Parts | None, at: Mapping[str, int]
    ) -> Iterator[Cost]:
        """The bodies that a node of a forward body runs."""
        is_composite = spec.op(node).composite
        for body, _ in bodies_run(node):
            (ran, *_) = (r for r in spec.runs(node, graph) if r.body == body)
            inner = {**at, **{k: v.at(at) for k, v in ran.lengths.items()}}
            run = Run(
                times=ran.times.at(at),
                child=ran.child,
                kind=node.op if is_composite else "",
                trained=parts is not None and node.name in parts.runs,
                saves=parts is not None and parts.runs.get(node.name, ("", ""))[1] in parts.holds,
            )
            if is_composite:
                run = replace(run, seen=_seen_inside(graph, node, self.program.bodies[body], at))
            yield self.cost(body, inner, run)

    def _products(
        self, graph: Graph, parts: Parts | None, at: Mapping[str, int], seen: Mapping[str, float]
    ) -> dict[Span | None, Work]:
        """FLOPs of a body's own products, by expression: an adjoint stands where the product does
        that it belongs to."""
        found: dict[Span | None, Work] = {}

        def add(part: Graph | None, kind: str) -> None:
            for node, flops in () if part is None else _flops(part, at, seen):
                once_more = parts is not None and kind != "forward" and node.name in parts.again
                work = Work(**{"again" if once_more else kind: flops})
                found[node.span] = found.get(node.span, Work()) + work

        add(graph if parts is None else parts.forward, "forward")
        if parts is not None:
            add(parts.input, "input")
            add(parts.weight, "weight")
        return found


def _repeated(parts: Parts, inside: Mapping[str, tuple[Cost, ...]]) -> Iterator[Cost]:
    """Bodies that backward parts run forward once more."""
    bodies = dict(inside)
    for name, (ran, _) in parts.runs.items():
        bodies[ran] = bodies.pop(name)
    for graph in (parts.input, parts.weight):
        for node in graph or ():
            yield from bodies.get(node.name, ())


@dataclass(frozen=True)
class Run:
    """How a node runs a body: see ``Cost``. ``trained``: with its backward parts; ``seen``: the
    share of pairs that its contractions need, of a composite: its masks are the caller's values."""

    times: int = 1
    child: str = ""
    kind: str = ""
    trained: bool = True
    saves: bool = True
    seen: Mapping[str, float] | None = None


def _flops(
    graph: Graph, at: Mapping[str, int], seen: Mapping[str, float]
) -> Iterator[tuple[Node, float]]:
    """A body's own products with their FLOPs."""
    shares = _shares(graph, seen)
    for node in graph:
        if node.op == "contract" and node.attrs["over"]:
            yield node, flops_of(graph, node, at) * shares.get(node.name, 1.0)


# -- contractions over pairs of positions ----------------------------------------------------------


def _seen_inside(caller: Graph, node: Node, body: Graph, at: Mapping[str, int]) -> dict[str, float]:
    """The shares of a composite's contractions, with its arguments in their places."""
    whole = Rewriter(caller)
    for each in caller:
        whole.replace(each.name, whole.copy(each).name)
    inner = Rewriter(body)
    inner.new = whole.new
    for argument, operand in zip(body.inputs, node.inputs, strict=True):
        inner.replace(argument.name, whole.to[operand])
    for each in body:
        if each.op != "input":
            inner.replace(each.name, inner.copy(each).name)
    found = masks.shares(whole.new, at)
    return {name: found[new] for name, new in inner.to.items() if new in found}


def _shares(graph: Graph, seen: Mapping[str, float]) -> dict[str, float]:
    """The share of pairs that each contraction of a backward part needs: of one that reads values
    over pairs, as many as they have; of one that gives them, as many as who reads it needs."""
    values: dict[str, float] = {}
    for node in graph:
        pairs = [n for n in graph.operands(node) if is_square(n.type.dims)]
        known = [values[n.name] for n in pairs if n.name in values]
        if node.name in seen:
            values[node.name] = seen[node.name]
        elif known:
            values[node.name] = min(known)
    for node in reversed(list(graph)):
        if node.name not in values and is_square(node.type.dims):
            known = [values[user.name] for user in graph.users(node.name) if user.name in values]
            if known:
                values[node.name] = max(known)
    return values


def _bytes(values: Iterable[Node], at: Mapping[str, int]) -> int:
    types = [node.type for node in values if node.type.dtype != "bundle"]
    return sum(volume(type.dims, at) * WIDTH[type.dtype] for type in types)
