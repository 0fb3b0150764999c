"""What a program is, in numbers: parameters, activated parameters, cache and FLOPs per token.

Everything is read off the elaborated program: parameters off the module tree, activated ones and
FLOPs off the bodies that an entry runs, with contractions in the order that `order` gives them at
the length asked for. Counted as papers count:

- *parameters* are those that ``main`` reads; what only another entry reads stands beside them, and
  states (a router's bias) are not counted;
- *activated* is what one token is multiplied with: of an array of blocks indexed by picks, as many
  as are picked; a table that is only looked up in is not counted;
- *FLOPs* are two per multiply-add of every contraction, for a whole sequence without a cache; of
  contractions over pairs of positions (scores, and what they weigh) the share of pairs that the
  mask lets see: half of them in causal attention, few in a sliding window;
- *training FLOPs* are those and the products of the backward graph (``training_costs.py``), without
  what is computed again: three times forward, but for what no gradient goes through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from compiler import spec, training_costs
from compiler.cost import flops_of, lengths, volume
from compiler.errors import UserError
from compiler.ir import Graph, Node, Program
from compiler.passes import masks, order
from compiler.passes.recompute import NOTHING
from compiler.tensors import VIEWS, CachePattern, Place, caches, called, patterns, places, shown

CACHE_WIDTH = {"act": 2, "f32": 4, "i64": 8, "bool": 1}  # bytes, of a model that runs in BF16


@dataclass(frozen=True)
class BlockRow:
    """A place of the module tree with all that is inside it, all ``count`` of them together."""

    path: str  # layers[3..61].mlp: half-open, as in the source
    block: str
    count: int
    parameters: int
    activated: int  # per token
    flops: float  # per token, forward
    span: str  # file:line


@dataclass(frozen=True)
class Report:
    """``dslc inspect``'s numbers; ``sequence`` is the length that FLOPs are counted at."""

    model: str
    parameters: int
    activated: int
    others: int  # parameters that only entries beside main read
    cache_bytes_per_token: int
    state_bytes_per_sequence: int  # however long it is: states of scans, the last few positions
    forward_flops: float
    training_flops: float | None  # None: nothing of it can be trained
    sequence: int
    blocks: tuple[BlockRow, ...]


Key = tuple[str, tuple[range, ...]]  # of a Place


@dataclass
class _Run:
    """What one entry does, by place."""

    activated: dict[tuple[Key, str], int] = field(default_factory=dict)  # by parameter, per token
    flops: dict[Key, float] = field(default_factory=dict)  # of the whole sequence


def report(program: Program, sequence: int = 4096) -> Report:
    """The numbers of a program at its constants.

    Args:
        program: as elaborated.
        sequence: tokens of the sequence that FLOPs are counted for.
    """
    main = "main" if "main" in program.entries else next(iter(program.entries))
    runs: dict[str, _Run] = {}
    root = Place(program.modules[program.root])
    at = {**lengths(program.sizes, sequence), "wanted": sequence}
    ordered = order.run(program)
    for entry in ordered.entries.values():
        run = runs[entry.name] = _Run()
        _visit(ordered, run, root, entry.body, at, 1, 1)
    rows = patterns(program)
    parameters = [p for p in rows if p.role == "param"]
    total = sum(p.elements for p in parameters if main in p.entries)
    flops = sum(runs[main].flops.values()) / sequence
    kept = [c for c in caches(program) if main in c.entries]
    return Report(
        model=program.name,
        parameters=total,
        activated=sum(runs[main].activated.values()),
        others=sum(p.elements for p in parameters) - total,
        cache_bytes_per_token=sum(_bytes(c) for c in kept if c.last is None),
        state_bytes_per_sequence=sum(_bytes(c) for c in kept if c.last is not None),
        forward_flops=flops,
        training_flops=_training(ordered, sequence, main),
        sequence=sequence,
        blocks=tuple(_blocks(program, runs, main, sequence)),
    )


def _training(program: Program, sequence: int, entry: str) -> float | None:
    """FLOPs of a training step per token; None where there is nothing that a gradient goes to, or
    an op that has no adjoint."""
    try:
        total = training_costs.costs(program, sequence, entry, NOTHING).total
    except UserError:
        return None
    return total.training / sequence


def _bytes(cache: CachePattern) -> int:
    return cache.elements * CACHE_WIDTH[cache.dtype]


def _visit(
    program: Program,
    run: _Run,
    place: Place,
    body: str,
    at: Mapping[str, int],
    instances: int,
    loops: int,
) -> None:
    """Count a body's run, and those of the bodies it runs.

    Args:
        at: constants and lengths; ``rows`` are those of all picked blocks together.
        instances: how many modules of this place one token goes through.
        loops: how often the body runs, each time at these lengths.
    """
    graph = program.bodies[body]
    flops, seen = 0.0, masks.shares(graph, at)
    for node in graph:
        if node.op == "contract" and node.attrs["over"]:
            flops += flops_of(graph, node, at) * seen.get(node.name, 1.0)
        elif node.op == "param" and (read := _read(graph, node, at)):
            key = (place.key, str(node.attrs["param"]))
            run.activated[key] = instances * read
        for inner, inner_body in called(program, place, node):
            if node.op == "branch" and not _is_taken(node, inner_body, at):
                continue
            times, picked, inside = 1, 1, at
            if node.op == "scan":
                times = at["time"]
            elif node.op == "chain":
                times = picked = len(inner.ranges[-1])
            elif node.op == "apply":
                pick = graph[node.inputs[0]].type.dims
                plain = [d for d in pick if d.kind not in ("time", "rows")]
                picked = min(volume(plain, at), len(inner.ranges[-1]))
                inside = {**at, "rows": volume(pick, at)}
            _visit(program, run, inner, inner_body, inside, instances * picked, loops * times)
    run.flops[place.key] = run.flops.get(place.key, 0.0) + flops * loops


def _is_taken(branch: Node, side: str, at: Mapping[str, int]) -> bool:
    holds = spec.holds(branch.attrs["when"], at)
    return side == branch.attrs["then" if holds else "otherwise"]


def _read(graph: Graph, node: Node, at: Mapping[str, int]) -> int:
    """How many numbers of a parameter one token is multiplied with.

    Of one that is only looked up in, the rows that are then factors of a product, as the matrices
    of picked experts are where they stand in one tensor, and what is looked up with them. An
    embedding's row is not one: it is the token.
    """
    lookups = list(_lookups(graph, node))
    if None in lookups:
        return volume(node.type.dims, at)
    picks = {n.inputs[1] for n in graph if n.op == "gather" and _is_factor(graph, n)}
    read = 0
    for lookup in lookups:
        if lookup is not None and lookup.inputs[1] in picks:
            dims = [d for d in lookup.type.dims if d.kind not in ("time", "rows")]
            read = max(read, min(volume(dims, at), volume(node.type.dims, at)))
    return read


def _lookups(graph: Graph, node: Node) -> Iterator[Node | None]:
    """Where a parameter, or a view of it, is looked up in; None where it is read whole."""
    users = graph.users(node.name)
    if not users:
        yield None
    for user in users:
        if user.op == "gather" and user.inputs[0] == node.name:
            yield user
        elif user.op in VIEWS:
            yield from _lookups(graph, user)
        else:
            yield None


def _is_factor(graph: Graph, node: Node) -> bool:
    """Is a looked-up value summed over with something that is no parameter?"""
    for user in graph.users(node.name):
        if user.op in VIEWS and _is_factor(graph, user):
            return True
        if (
            user.op == "contract"
            and user.attrs["over"]
            and not any(_is_parameter(graph, name) for name in user.inputs if name != node.name)
        ):
            return True
    return False


def _is_parameter(graph: Graph, name: str) -> bool:
    node = graph[name]
    return node.op == "param" or (node.op in VIEWS and _is_parameter(graph, node.inputs[0]))


def _blocks(
    program: Program, runs: Mapping[str, _Run], main: str, sequence: int
) -> Iterator[BlockRow]:
    order = [main, *(name for name in runs if name != main)]
    tree = [place for place in places(program) if all(place.ranges)]
    for place in tree:
        inside = [p for p in tree if _is_inside(p, place)]
        # A place that main does not reach is counted as the entry counts it that does.
        run = next((runs[name] for name in order if place.key in runs[name].flops), _Run())
        keys = {p.key for p in inside}
        yield BlockRow(
            path=shown(place.path, place.ranges),
            block=place.module.block,
            count=prod(len(r) for r in place.ranges),
            parameters=sum(_stored(program, p) for p in inside if _is_read(runs[main], p, place)),
            activated=sum(n for (key, _), n in run.activated.items() if key in keys),
            flops=sum(n for key, n in run.flops.items() if key in keys) / sequence,
            span=str(place.module.span or ""),
        )


def _is_inside(place: Place, outer: Place) -> bool:
    within = place.path == outer.path or place.path.startswith(f"{outer.path}.") or not outer.path
    return within and place.ranges[: len(outer.ranges)] == outer.ranges


def _is_read(main: _Run, place: Place, outer: Place) -> bool:
    """The model's own row counts what ``main`` reads, as its total does."""
    return place.key in main.flops or outer.key not in main.flops


def _stored(program: Program, place: Place) -> int:
    one = sum(
        volume(p.type.dims, program.sizes) for p in place.module.parameters if p.role == "param"
    )
    return one * prod(len(r) for r in place.ranges)
