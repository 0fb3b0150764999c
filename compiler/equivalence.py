"""Do two programs compute the same? ``--verify``: each pass checked as a translation.

Both run on a tiny instance (``compiler/shrink.py``) with the same random weights in float64, where
another order of summation moves a result by 1e-14 and a wrong one by a lot: a whole prompt, the
same in chunks and single tokens on a cache, the last row alone, every entry, and both sides of
each branch.

What needs more than seven positions to show, such as a window of 4,096, is not seen here: the pass
that touches it has its own test.

Quantised products are run as they are, with small tiles: both programs make the same codes, because
they quantise in float32 what they have computed to 1e-16, so the tolerance needs no widening. Only
`select-fp8` itself changes results, which is what it is for: its choice is checked as a change of
nothing else, by taking the marks off again.

This module imports torch; only ``--verify`` and tests import it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compiler.codings import is_coded, with_small_tiles, without_codings
from compiler.interpret import Branches, CacheState, Interpreter, random_weights, shifted
from compiler.ir import Node, Program
from compiler.shrink import shrink, shrunken

TOLERANCE = 1e-9
POSITIONS = 7
# A prompt's chunk, a second one that sees a history, then single tokens.
CHUNKS = (3, 2, 1, 1)


class NotEquivalent(Exception):
    """The programs differ; the message says where first, and by how much."""


@dataclass(frozen=True)
class Case:
    """One run of an entry: these positions, of which ``rows`` are wanted (None: all)."""

    entry: str
    start: int
    stop: int
    rows: tuple[int, ...] | None
    branches: Branches

    def __str__(self) -> str:
        rows = "" if self.rows is None else ", last row only"
        side = "" if self.branches == "guard" else f", '{self.branches}' of each branch"
        return f"entry {self.entry}, positions {self.start} .. {self.stop}{rows}{side}"


def equivalent(before: Program, after: Program, seed: int = 0) -> None:
    """Run both programs on a small random instance and compare.

    Raises:
        NotEquivalent: a result differs by more than 1e-9 of its largest value.
        ShrinkError: no small instance was found.
        RunError: a program does not run.
    """
    if before.entries.keys() != after.entries.keys():
        raise NotEquivalent(f"entries {list(before.entries)} became {list(after.entries)}")
    if is_coded(after):
        if is_coded(before):
            before, after = with_small_tiles(before), with_small_tiles(after)
        else:
            after = without_codings(after)
    small = shrink(before, after)
    if after.mesh:
        _equivalent_ranks(before, after, small, seed)
        return
    before, after = shrunken(before, small), shrunken(after, small)
    weights = random_weights(before, seed, torch.float64)
    old = Interpreter(before, weights, torch.float64)
    new = Interpreter(after, weights, torch.float64)
    both = any(n.op == "branch" for p in (before, after) for g in p.bodies.values() for n in g)
    for entry in before.entries:
        inputs = _inputs(before, entry, small, seed)
        for cases in _sequences(entry, both):
            states = CacheState(), CacheState()
            for case in cases:
                _compare(case, inputs, (old, new), states)


def _equivalent_ranks(before: Program, after: Program, small: dict[str, int], seed: int) -> None:
    """Every rank of the second program gives what the first gives for the rank's sequence."""
    from compiler.ranked import interpreters, run_all

    before, after = shrunken(before, small), shrunken(after, small)
    old, new, world = interpreters(before, after, seed)
    both = any(n.op == "branch" for p in (before, after) for g in p.bodies.values() for n in g)

    def work(entry: str, cases: list[Case], number: int) -> None:
        """One rank's sequence."""
        member = new[number].member
        assert member is not None
        inputs = _inputs(before, entry, small, seed + member.index(after.batch))
        states = CacheState(), CacheState()
        for case in cases:
            _compare(case, inputs, (old[number], new[number]), states)

    for entry in before.entries:
        for cases in _sequences(entry, both):
            run_all([partial(work, entry, cases, number) for number in range(len(new))], world)


def _sequences(entry: str, both: bool) -> list[list[Case]]:
    """Runs that share a cache. Sides take turns, because what one caches the other must read."""
    sides: tuple[Branches, ...] = ("otherwise", "then") if both else ("guard",)
    steps, start = [], 0
    for i, length in enumerate(CHUNKS):
        steps.append(Case(entry, start, start + length, None, sides[i % len(sides)]))
        start += length
    whole = [[Case(entry, 0, POSITIONS, None, side)] for side in sides]
    return [*whole, [Case(entry, 0, POSITIONS, (POSITIONS - 1,), "guard")], steps]


def _inputs(program: Program, entry: str, sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
    """Random arguments for ``POSITIONS`` positions, shifted ones made from the others."""
    generator = torch.Generator().manual_seed(seed)
    point = program.entries[entry]
    body = program.bodies[point.body]
    most = max([0, *(item.shift for item in point.inputs)])
    lengths = {**program.sizes, **sizes, "time": POSITIONS + most, "history": POSITIONS + most}
    derived = {item.name for item in point.inputs if item.shift_of is not None}
    given = {}
    for node in body.inputs:
        if node.attrs["name"] in derived:
            continue
        shape = [d.size.at(lengths) for d in node.type.dims]
        if node.type.dtype == "i64":
            bound = node.type.of.size.at(lengths) if node.type.of else 2
            value = torch.randint(bound, shape, generator=generator)
        elif node.type.dtype == "bool":
            value = torch.rand(shape, generator=generator) < 0.5
        else:
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
        given[node.attrs["name"]] = value
    return {
        name: _positions(node, tensor, 0, POSITIONS)
        for name, tensor in shifted(point, body, given).items()
        for node in body.inputs
        if node.attrs["name"] == name
    }


def _positions(node: Node, tensor: Tensor, start: int, stop: int) -> Tensor:
    """These positions of an argument, if it runs over time."""
    for axis, dim in enumerate(node.type.dims):
        if dim.kind == "time":
            return tensor.narrow(axis, start, stop - start)
    return tensor


def _compare(
    case: Case,
    inputs: dict[str, Tensor],
    interpreters: tuple[Interpreter, Interpreter],
    states: tuple[CacheState, CacheState],
) -> None:
    old, new = interpreters
    graph = old.program.bodies[old.program.entries[case.entry].body]
    nodes = {n.attrs["name"]: n for n in graph.inputs}
    given = {k: _positions(nodes[k], v, case.start, case.stop) for k, v in inputs.items()}
    traces: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    # The original runs as it is; what is asked is whether every program of the new one agrees.
    wanted = old.run(case.entry, given, state=states[0], rows=case.rows, trace=traces[0])
    found = new.run(
        case.entry, given, state=states[1], rows=case.rows, trace=traces[1], branches=case.branches
    )
    error = difference(found, wanted)
    if error <= TOLERANCE:
        return
    message = f"{case}: the results differ by {error:.1e} of the largest value"
    for path, value in traces[0].items():
        if path in traces[1] and (own := difference(traces[1][path], value)) > TOLERANCE:
            span = old.spans.get(path)
            message += f"; the first named value that differs is {path}, by {own:.1e}"
            message += f" ({span})" if span else ""
            break
    raise NotEquivalent(message)


def difference(found: Tensor, wanted: Tensor) -> float:
    """max|found - wanted| / max|wanted|, over finite values; infinite where shapes differ, or where
    one value is not finite and the other is not the same."""
    if found.shape != wanted.shape:
        return math.inf
    if not wanted.numel():
        return 0.0
    found, wanted = found.double(), wanted.double()
    finite = wanted.isfinite()
    same = torch.equal(found.isfinite(), finite)
    if not same or not torch.equal(found[~finite].nan_to_num(), wanted[~finite].nan_to_num()):
        return math.inf
    if not finite.any():
        return 0.0
    size = float(wanted[finite].abs().max())
    error = float((found - wanted)[finite].abs().max())
    return error / size if size else (math.inf if error else 0.0)
