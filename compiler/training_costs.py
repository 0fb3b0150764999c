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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from compiler import signatures, spec
from compiler.cost import WIDTH, flops_of, is_square, lengths, volume
from compiler.ir import Dim, Graph, Node, Program, Rewriter, Type
from compiler.passes import masks, recompute
from compiler.passes.activity import bodies_run
from compiler.passes.differentiate import Derived, differentiate
from compiler.passes.partition import Parts


@dataclass(frozen=True)
class Work:
    """FLOPs: ``forward``, ``input`` and ``weight`` backward, and what backward computes ``again``;
    ``saved`` are the bytes that forward keeps for backward, at two for the activation dtype."""

    forward: float = 0.0
    input: float = 0.0
    weight: float = 0.0
    again: float = 0.0
    saved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.all, other.all, strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(a * times for a in self.all))

    @property
    def all(self) -> tuple[float, ...]:
        return self.forward, self.input, self.weight, self.again, self.saved

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
        own: without the bodies it runs.
        inside: those.
    """

    body: str
    block: str
    kind: str
    child: str
    times: int
    own: Work
    inside: tuple[Cost, ...]

    @property
    def total(self) -> Work:
        """With the bodies it runs, each as often as it does; of one run."""
        return sum((c.total * c.times for c in self.inside), self.own)

    def walk(self, times: int = 1) -> Iterator[tuple[Cost, int]]:
        """This and every cost inside, with how often each runs altogether."""
        yield self, times * self.times
        for cost in self.inside:
            yield from cost.walk(times * self.times)


def costs(program: Program, sequence: int, entry: str = "main") -> Cost:
    """What one sequence through an entry costs, with its deployment's recomputation.

    Args:
        program: as ``recognise`` left it.
        sequence: tokens of the sequence.

    Raises:
        UserError: an op has no adjoint.
    """
    again = recompute.of(program, program.deployment)
    derived = differentiate(program, [entry], again)
    at = {**lengths(program.sizes, sequence), "wanted": sequence}
    return _Counting(derived).cost(program.entries[entry].body, at)


class _Counting:
    def __init__(self, derived: Derived):
        self.derived, self.program = derived, derived.source
        self.blocks = {
            graph.name: self.program.modules[scope.module].block
            for scope, graph in spec.scopes(self.program)
        }

    def cost(
        self,
        body: str,
        at: Mapping[str, int],
        kind: str = "",
        child: str = "",
        times: int = 1,
        seen: Mapping[str, float] | None = None,
    ) -> Cost:
        """One run of a body at these lengths.

        Args:
            seen: the share of pairs that its contractions need, of a composite: its masks are
                the caller's values.
        """
        parts = self.derived.parts.get(body)
        original = self.program.bodies[body]
        seen = masks.shares(original, at) if seen is None else seen
        own = Work(forward=_flops(parts.forward if parts else original, at, seen))
        if parts:
            own += self._backward(parts, at, seen)
        inside = [c for node in original for c in self._inside(node, original, at)]
        return Cost(body, self.blocks[body], kind, child, times, own, tuple(inside))

    def _inside(self, node: Node, graph: Graph, at: Mapping[str, int]) -> Iterator[Cost]:
        """The bodies that a node of a forward body runs."""
        is_composite = spec.op(node).rule is signatures.composite
        for body, _ in bodies_run(node):
            (run, *_) = (r for r in spec.runs(node, graph) if r.body == body)
            times = run.times.at(at)
            inner = {**at, **{k: v.at(at) for k, v in run.lengths.items()}}
            if is_composite:
                seen = _seen_inside(graph, node, self.program.bodies[body], at)
                yield self.cost(body, inner, node.op, "", times, seen)
            else:
                yield self.cost(body, inner, "", run.child, times)

    def _backward(self, parts: Parts, at: Mapping[str, int], seen: Mapping[str, float]) -> Work:
        again = 0.0
        flops = {"input": 0.0, "weight": 0.0}
        for name, graph in (("input", parts.input), ("weight", parts.weight)):
            if graph is None:
                continue
            flops[name] = _flops(graph, at, seen, lambda n: n not in parts.again)
            again += _flops(graph, at, seen, lambda n: n in parts.again)
            for node in graph:
                if node.name in parts.again and node.op == "call":
                    body = str(node.attrs["body"]).removesuffix(".forward")
                    again += self.cost(body, at).total.forward
        saved = sum(_bytes(node.type, at) for node in parts.saved if node.type.dtype != "bundle")
        return Work(0.0, flops["input"], flops["weight"], again, saved)


def _flops(
    graph: Graph,
    at: Mapping[str, int],
    seen: Mapping[str, float],
    counts: Callable[[str], bool] = lambda name: True,
) -> float:
    """FLOPs of a body's own contractions, of those that count."""
    shares = _shares(graph, seen)
    return sum(
        flops_of(graph, node, at) * shares.get(node.name, 1.0)
        for node in graph
        if node.op == "contract" and node.attrs["over"] and counts(node.name)
    )


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


def _bytes(type: Type, at: Mapping[str, int]) -> int:
    dims: tuple[Dim, ...] = type.dims
    return volume(dims, at) * WIDTH[type.dtype]
