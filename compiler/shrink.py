"""A tiny instance of a program: the same graph with constants of 2 to 7 or so.

Sizes are polynomials in constants, so 671 billion parameters and a few thousand are the same
program. Here the constants are replaced, and nothing else, such that every extent that occurs is
still a whole number and every choice still has enough to choose from. Odd and different numbers
are preferred: two dims that are mixed up then do not fit.

Numbers that were computed from sizes and are no longer sizes (a softmax scale) stay as they are: a
pass must keep the meaning of the graph for any of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from math import prod

from compiler import spec
from compiler.ir import DYNAMIC, Dim, Graph, Module, Node, Program
from compiler.spec import with_parts
from dsl.extents import Extent, ExtentError

# Odd first: an odd extent cannot be a product of halves that agree by accident. Even numbers are
# there for rotary halves, the larger ones for products such as groups * members.
CANDIDATES = (3, 5, 7, 2, 4, 6, 9, 8, 10, 12, 14, 15, 16, 18, 20, 24, 30)
MOST_TRIES = 100_000
MOST_MESHES = 8


class ShrinkError(Exception):
    """No small constants fit."""


@dataclass(frozen=True)
class Rule:
    """A test that the constants called ``names`` must pass."""

    names: frozenset[str]
    holds: Callable[[Mapping[str, int]], bool]


def shrink(*programs: Program) -> dict[str, int]:
    """Small values of the constants that occur in sizes, the same for all the programs (a pass's
    before and after).

    Raises:
        ShrinkError: none were found.
    """
    sizes = {k: v for program in programs for k, v in program.sizes.items()}
    found = [rule for program in programs for rule in _rules(program, sizes)]
    meshes = _meshes({name: n for name, n in sizes.items() if name.startswith("ranks.")})
    refused: ShrinkError | None = None
    for ranks in meshes:
        try:
            return _with_ranks(ranks, found, sizes, _loops(programs))
        except ShrinkError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _meshes(ranks: Mapping[str, int]) -> list[dict[str, int]]:
    """Numbers of ranks to try. Two along each axis, if there are: they divide dims that have
    nothing else in common. Where an extent is a number in the source (7 entries on 7 ranks) or a
    choice needs more than two, divisors of what the mesh has, the fewest ranks first."""
    ways = [
        dict.fromkeys([min(2, size), *(n for n in range(2, size + 1) if size % n == 0)])
        for size in ranks.values()
    ]
    found = [dict(zip(ranks, sizes, strict=True)) for sizes in islice(product(*ways), 4096)]
    return sorted(found, key=lambda mesh: prod(mesh.values()))[:MOST_MESHES]


def _with_ranks(
    ranks: dict[str, int], found: Iterable[Rule], sizes: Mapping[str, int], loops: set[str]
) -> dict[str, int]:
    rules: dict[frozenset[str], list[Rule]] = defaultdict(list)
    for rule in found:
        rule = _with(rule, ranks)
        rules[rule.names].append(rule)
    if not all(rule.holds({}) for rule in rules.pop(frozenset(), [])):
        axes = ", ".join(f"{name.removeprefix('ranks.')} = {n}" for name, n in ranks.items())
        raise ShrinkError(f"numbers of the source do not divide over a mesh of {axes}")
    small: dict[str, int] = dict(ranks)
    used: Counter[int] = Counter()
    for names in _connected(rules):
        own = [r for key, many in rules.items() if key <= names for r in many]
        small |= _solve(sorted(names), own, sizes, used, loops)
        used.update(small[name] for name in names)
    return small


def shrunken(program: Program, small: Mapping[str, int]) -> Program:
    """The program with these constants."""
    return replace(program, constants={**program.constants, **small})


# -- what must hold --------------------------------------------------------------------------------


def _rules(program: Program, sizes: Mapping[str, int]) -> Iterator[Rule]:
    dims = {d for graph in program.bodies.values() for node in graph for d in spec.dims_of(node)}
    for module in program.modules.values():
        dims |= {d for p in module.parameters for d in with_parts(p.type.dims)}
        dims |= {c.array for c in module.children if c.array}
        yield from _tiled(module)
    for dim in dims:
        yield from _sized(dim, sizes)
    for graph in program.bodies.values():
        for node in graph:
            yield from _choices(graph, node, sizes)


def _sized(dim: Dim, sizes: Mapping[str, int]) -> Iterator[Rule]:
    if not dim.size.names & DYNAMIC:
        # What is empty may stay so (no shared experts, no dense layers). A dim of 1 would hide a
        # missing one, and a loop of 1 what it carries: what is longer stays longer.
        yield _between(dim.size, min(2, dim.size.at(sizes)))
    if not dim.start.names & DYNAMIC:
        yield _between(dim.start, 0)


def _tiled(module: Module) -> Iterator[Rule]:
    """A rank's part of a matrix in tiles begins at a tile, as select-fp8 and loading see to."""
    for parameter in module.parameters:
        if parameter.coding is None:
            continue
        rows, columns = parameter.type.dims[:1], parameter.type.dims[1:]
        for side, dims in ((parameter.coding.rows, rows), (parameter.coding.columns, columns)):
            for stretch in _stretches(dims, Extent.of(1)) if side else ():
                yield _multiple(stretch, side or 1)


def _stretches(dims: Sequence[Dim], inner: Extent) -> Iterator[Extent]:
    """How many places of a flattened row a rank has behind one another, for each divided dim."""
    for dim in reversed(dims):
        if dim.form == "sum":
            for part in dim.parts:
                yield from _stretches([part], inner)
        else:
            yield from _stretches(dim.parts, inner)
        if dim.axes:
            yield dim.size * inner
        inner = dim.size * inner


def _choices(graph: Graph, node: Node, sizes: Mapping[str, int]) -> Iterator[Rule]:
    if node.op in ("top", "argtop", "in_top"):
        size = graph.operands(node)[0].type.dim(node.attrs["over"]).size
        count = node.attrs["count"] if node.op == "in_top" else node.type.dim(node.attrs["to"]).size
        if (size - count).names & DYNAMIC:
            return
        # A choice of some stays one of some: of all, it would hide what chooses wrongly.
        yield _between(size - count, min(1, (size - count).at(sizes)))
    elif node.op == "shift":  # no token ahead of the last one
        furthest = node.attrs["offset"]
        if node.attrs.get("index") and node.attrs["sign"] > 0:
            furthest = furthest + node.type.dim(node.attrs["index"]).size - 1
        yield _between(-furthest, 0)
    elif node.op == "select":
        size = graph.operands(node)[0].type.dim(node.attrs["dim"]).size
        if not size.names & DYNAMIC:
            yield _between(size, node.attrs["at"] + 1)


def _loops(programs: Iterable[Program]) -> set[str]:
    """Constants that say how often a loop runs, and nothing about a value."""
    nodes = [n for program in programs for graph in program.bodies.values() for n in graph]
    found = {name for n in nodes if n.op == "chain" for name in n.attrs["index"].size.names}
    return found - {name for n in nodes for d in n.type.dims for name in d.size.names}


def _with(rule: Rule, known: Mapping[str, int]) -> Rule:
    """The rule as a test of the other constants."""
    return Rule(
        frozenset(rule.names - known.keys()), lambda values: rule.holds({**known, **values})
    )


def _between(extent: Extent, least: int) -> Rule:
    def holds(values: Mapping[str, int]) -> bool:
        try:
            return extent.at(values) >= least
        except ExtentError:
            return False

    return Rule(extent.names, holds)


def _multiple(extent: Extent, of: int) -> Rule:
    def holds(values: Mapping[str, int]) -> bool:
        try:
            return extent.at(values) % of == 0
        except ExtentError:
            return False

    return Rule(extent.names, holds)


# -- the search ------------------------------------------------------------------------------------


def _connected(rules: Iterable[frozenset[str]]) -> list[frozenset[str]]:
    """Names that occur in one rule belong together; the groups can be solved apart."""
    groups: list[frozenset[str]] = []
    for names in rules:
        touching = [g for g in groups if g & names]
        merged = names.union(*touching)
        groups = [g for g in groups if not g & names]
        if merged:
            groups.append(merged)
    return sorted(groups, key=lambda g: (len(g), sorted(g)))


def _solve(
    names: list[str],
    rules: list[Rule],
    sizes: Mapping[str, int],
    used: Counter[int],
    loops: set[str],
) -> dict[str, int]:
    """Values for names that depend on each other: depth first, each rule tested as soon as all its
    names have a value."""
    tries = 0

    def search(chosen: dict[str, int], taken: Counter[int]) -> dict[str, int] | None:
        nonlocal tries
        if len(chosen) == len(names):
            return chosen
        name = names[len(chosen)]
        ready = [r for r in rules if name in r.names and r.names <= chosen.keys() | {name}]
        for value in _candidates(sizes[name], taken, name in loops):
            tries += 1
            if tries > MOST_TRIES:
                raise ShrinkError(f"no small values fit for {', '.join(names)}")
            trial = {**chosen, name: value}
            if all(rule.holds(trial) for rule in ready):
                found = search(trial, taken + Counter([value]))
                if found:
                    return found
        return None

    found = search({}, used)
    if found is None:
        raise ShrinkError(f"no small values fit for {', '.join(names)}")
    return found


def _candidates(value: int, taken: Counter[int], loop: bool) -> list[int]:
    """Up to 7, values that others have least; 0 and 1 mean something and stay; nothing grows. A
    loop costs time, so the fewer rounds the better."""
    if value <= 1:
        return [value]
    smaller = [c for c in CANDIDATES if c <= value]
    if loop:
        return sorted(smaller)
    return sorted(smaller, key=lambda c: (c > 7, taken[c]))
