"""order: contractions are multiplied in the order that costs least.

A source says *what* is summed, not in which order. ``q * (W * c)`` may expand the keys, ``W * c``,
once for all queries, or absorb ``W`` into the query: the first is cheaper when many positions are
asked for at once, the second when few are (weight absorption: arXiv:2405.04434, section 2.1.2).
Nothing here knows that: chains are found (``chains.py``), every order of each
is priced, and where the best one depends on how many positions are asked for, both are kept behind
a ``branch`` on that number.

Chains of which one reads the other's scores through pointwise ops and softmax are decided together
and share one branch over everything between them, so that either side is an attention that
`recognise` can see whole.
The time of an order is max(FLOPs / peak, bytes / bandwidth) over all its contractions, at a history
of ``REPRESENTATIVE`` positions or, where more are asked for at once, as many as those.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from compiler.cost import BALANCE, REPRESENTATIVE, lengths
from compiler.ir import Graph, Program
from compiler.passes import chains, distribute, regions
from compiler.passes.chains import Chain, Prices, Tree

# A second body is worth its lines only if it saves some of the time.
WORTH = 0.05
SAMPLES = [1 << i for i in range(REPRESENTATIVE.bit_length())]

Choice = Mapping[str, Tree]  # by the chain's contraction


def run(program: Program) -> Program:
    bodies: dict[str, Graph] = {}
    for name, graph in program.bodies.items():
        normal = distribute.run_on(graph)
        ordered, sides = _order(normal, program.sizes)
        bodies[name] = ordered
        bodies.update((side.name, side) for side in sides)
    return program.with_bodies(bodies)


def _order(graph: Graph, sizes: Mapping[str, int]) -> tuple[Graph, list[Graph]]:
    """The body in its best order, and the two sides of each branch."""
    found = chains.find(graph)
    if not found:
        return graph, []
    options = {chain.contraction: _candidates(chain, sizes) for chain in found}
    best: dict[str, Tree] = {
        name: _best({name: trees}, found, lengths(sizes, REPRESENTATIVE))[name]
        for name, trees in options.items()
    }
    has_time = any(dim.kind == "time" for node in graph for dim in node.type.dims)
    open_chains = [c for c in found if has_time and len(options[c.contraction]) > 1]
    branches: list[regions.Branch] = []
    for region in regions.find(graph, open_chains, found):
        inside = {chain.contraction: options[chain.contraction] for chain in region.chains}
        few, many, limit = _crossing(inside, found, sizes)
        best.update(many)
        if limit is not None:
            branches.append(regions.Branch(region, {**best, **few}, {**best, **many}, limit))
    return regions.build(graph, found, best, branches)


# -- choosing ------------------------------------------------------------------------------------


def _candidates(chain: Chain, sizes: Mapping[str, int]) -> list[Tree]:
    """The trees that are best for some number of positions, whatever stands beside them: those that
    no other beats in both FLOPs and bytes at every number."""
    prices = [Prices(chain, _lengths(sizes, time)) for time in SAMPLES]
    best: list[tuple[Tree, list[int]]] = []
    for tree in chains.trees(tuple(range(len(chain.leaves)))):
        if not chains.allowed(chain, tree):
            continue
        cost = [number for price in prices for number in price(tree)]
        if not any(_beats(other, cost) for _, other in best):
            best = [(t, other) for t, other in best if not _beats(cost, other)]
            best.append((tree, cost))
    return [tree for tree, _ in best]


def _beats(cost: list[int], other: list[int]) -> bool:
    return all(a <= b for a, b in zip(cost, other, strict=True))


def _lengths(sizes: Mapping[str, int], time: int) -> dict[str, int]:
    return lengths(sizes, time, history=max(time, REPRESENTATIVE))


def _time(choice: Choice, found: list[Chain], at: Mapping[str, int]) -> int:
    """How long the chosen orders take together, in FLOPs of a busy device."""
    costs = [Prices(c, at)(choice[c.contraction]) for c in found if c.contraction in choice]
    return max(sum(flops for flops, _ in costs), BALANCE * sum(moved for _, moved in costs))


def _best(
    options: Mapping[str, list[Tree]], found: list[Chain], at: Mapping[str, int]
) -> dict[str, Tree]:
    choices = (dict(zip(options, trees, strict=True)) for trees in product(*options.values()))
    return min(choices, key=lambda choice: _time(choice, found, at))


def _crossing(
    options: Mapping[str, list[Tree]], found: list[Chain], sizes: Mapping[str, int]
) -> tuple[dict[str, Tree], dict[str, Tree], int | None]:
    """The best orders for few and for many positions, and the largest number of positions for
    which the first are no slower; None where one choice does for all."""

    def ahead(time: int) -> bool:
        at = _lengths(sizes, time)
        return _time(few, found, at) <= _time(many, found, at)

    few = _best(options, found, _lengths(sizes, 1))
    many = _best(options, found, _lengths(sizes, REPRESENTATIVE))
    one = _lengths(sizes, 1)
    if few == many or _time(few, found, one) > (1 - WORTH) * _time(many, found, one):
        return few, many, None
    least, beyond = 1, REPRESENTATIVE
    while beyond - least > 1:  # few is ahead at least, many at beyond
        middle = (least + beyond) // 2
        least, beyond = (middle, beyond) if ahead(middle) else (least, middle)
    return few, many, least
