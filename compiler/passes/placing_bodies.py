"""Placements of ops that run other bodies: calls, loops, branches, composites, arrays of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from compiler.collectives import divided
from compiler.ir import ROWS, Dim, Graph, Node, Type
from compiler.passes.placing import (
    NotBuilt,
    Operands,
    Placed,
    Placer,
    attributes,
    axes_of,
    communicates,
    is_divided,
    like,
)
from compiler.passes.placing_rules import result
from compiler.spec_collectives import BETWEEN_RANKS
from dsl.deploy.placed import PlacedUse

Rule = Callable[[Placer, Node], Placed]
Pairs = dict[str, str]  # a body's dim, the caller's
Names = tuple[tuple[str, str], ...]  # the same, as an attribute


def _inner(graph: Graph, given: Iterable[Placed], pairs: Pairs) -> list[Type]:
    """The types of a body's arguments, divided as what they are given."""
    types = []
    for node, value in zip(graph.inputs, given, strict=True):
        outer = _outer(value.type)
        dims = tuple(_as(d, outer.get(pairs.get(d.name, d.name))) for d in node.type.dims)
        types.append(replace(node.type, dims=dims))
    return types


def _outer(type: Type) -> dict[str, Dim]:
    """Dims by the names that they had when they were whole."""
    return {_plain(d): d for d in type.dims}


def _plain(dim: Dim) -> str:
    """What a dim was called before any of it was divided."""
    if dim.axes:
        return dim.name.removesuffix(f"/{'.'.join(dim.axes)}")
    if dim.parts:
        names = [_plain(p) for p in dim.parts]
        return "|".join(names) if dim.form == "sum" else f"({','.join(names)})"
    return dim.name


def _as(own: Dim, other: Dim | None) -> Dim:
    return own if other is None else like(own, other)


def _pairs(node: Node, types: Iterable[Type], gives: Type, outer: Iterable[Type]) -> Names:
    """The pairs of names as they are now. A dim that comes divided and is given back whole has two,
    inside and outside."""
    inner: dict[str, dict[Dim, None]] = {}
    for dim in (d for t in [*types, gives] for d in t.dims):
        inner.setdefault(_plain(dim), {})[dim] = None
    names = {(_plain(d), axes_of([d])): d.name for t in outer for d in t.dims}
    old: Pairs = dict(node.attrs.get("dims", ()))
    found = dict[tuple[str, str], None]()
    for body, caller in old.items():
        if body not in inner:
            found[body, caller] = None
        for dim in inner.get(body, ()):
            found[dim.name, names.get((caller, axes_of([dim])), caller)] = None
    return tuple(found)


def _given_back(old: Type, gives: Type, pairs: Pairs) -> Type:
    """A node's type: divided as what its body gives."""
    made = {pairs.get(_plain(d), _plain(d)): d for d in gives.dims}
    return replace(old, dims=tuple(_as(d, made.get(d.name)) for d in old.dims))


def call(placer: Placer, node: Node) -> Placed:
    given = placer.all_summed(placer.unified(node))
    child = str(node.attrs["child"])
    module = placer.sharder.use(placer.module, child, None)[0] if child else placer.module
    return _run(placer, node, given, module)


def _run(placer: Placer, node: Node, given: Operands, module: str) -> Placed:
    graph = placer.sharder.program.bodies[node.attrs["body"]]
    pairs = dict(node.attrs.get("dims", ()))
    types = _inner(graph, given.values, pairs)
    body, gives = placer.sharder.body(graph.name, module, types)
    type = _given_back(node.type, gives.type, pairs)
    attrs = {**node.attrs, "body": body}
    outer = [v.type for v in given.values]
    attrs["dims"] = _pairs(node, types, gives.type, [*outer, type])
    made = placer.emit(node, given.names, type, attrs=attrs)
    return replace(made, partial=gives.partial)


def chain(placer: Placer, node: Node) -> Placed:
    """A loop keeps its value's type: one that would be divided, or summed, differently after a turn
    is whole."""
    given = placer.all_summed(placer.unified(node))
    index: Dim = node.attrs["index"]
    module, use = placer.sharder.use(placer.module, str(node.attrs["child"]), index)
    if use.axes:
        raise _in_turn(placer, node, use)
    graph = placer.sharder.program.bodies[node.attrs["body"]]
    pairs = dict(node.attrs.get("dims", ()))
    types = _inner(graph, given.values, pairs)
    body, gives = placer.sharder.body(graph.name, module, types)
    if gives.partial or set(gives.type.dims) != set(types[0].dims):
        first = placer.entire(given.values[0])
        given = Operands([first, *given.values[1:]], given.dims)
        types = _inner(graph, given.values, pairs)
        body, gives = placer.sharder.body(graph.name, module, types, plain=True)
    attrs = {**node.attrs, "body": body}
    outer = [v.type for v in given.values]
    attrs["dims"] = _pairs(node, types, gives.type, outer)
    return placer.emit(node, given.names, given.values[0].type, attrs=attrs)


def _in_turn(placer: Placer, node: Node, use: PlacedUse) -> NotBuilt:
    deployment = placer.sharder.program.deployment
    rules = deployment.shard if deployment is not None else ()
    found = [
        r for r in rules if r.axes == use.axes and r.target.kind in ("index", "array", "extent")
    ]
    found.sort(key=lambda r: r.target.name not in (use.name, node.attrs["index"].name))
    message = (
        f"the blocks of '{use.name}' run one after the other: stages place them, no shard rule"
    )
    return NotBuilt(f"{found[0].span if found else node.span}: {message}")


def branch(placer: Placer, node: Node) -> Placed:
    """Two bodies that compute the same: their results are divided alike, or whole."""
    given = placer.all_summed(placer.unified(node))
    bodies = placer.sharder.program.bodies
    graphs = [bodies[node.attrs[side]] for side in ("then", "otherwise")]
    types = _inner(graphs[0], given.values, {})
    sharder = placer.sharder
    made = [sharder.body(g.name, placer.module, types) for g in graphs]
    (_, one), (_, other) = made
    if (set(one.type.dims), one.partial) != (set(other.type.dims), other.partial):
        made = [sharder.body(g.name, placer.module, types, plain=True) for g in graphs]
    if any(_sends(placer, name) for name, _ in made):
        # Ranks ask for different numbers of positions: they would not meet.
        raise placer.fails(node, "tokens cannot be sent to blocks within one side of a branch")
    gives = made[0][1]
    attrs = {**node.attrs, "then": made[0][0], "otherwise": made[1][0]}
    placed = placer.emit(node, given.names, _given_back(node.type, gives.type, {}), attrs=attrs)
    return replace(placed, partial=gives.partial)


def _sends(placer: Placer, body: str) -> bool:
    """Whether a body, or one that it runs, communicates along axes that sequences are spread
    over."""
    graph = placer.sharder.bodies[body]
    for node in graph:
        axes = {*node.attrs.get("sent", ()), *node.attrs.get("axes", ())}
        if node.op in BETWEEN_RANKS and axes & set(placer.sharder.batch):
            return True
        runs = {v for v in node.attrs.values() if isinstance(v, str)} - {body}
        if any(_sends(placer, run) for run in runs & placer.sharder.bodies.keys()):
            return True
    return False


def composite(placer: Placer, node: Node) -> Placed:
    """What a kernel computes by itself has no communication within: what it sums over is whole."""
    given = placer.all_summed(placer.unified(node))
    if node.op == "attention":
        names = [name for _, _, over in node.attrs["terms"] for name in over]
    else:
        names = list(node.attrs.get("over", ()))
    given = placer.made_whole(node, given, names)
    made = _composed(placer, node, given)
    if made is None:
        wide = Operands([placer.entire(v) for v in given.values])
        made = _composed(placer, node, wide)
        assert made is not None
    return made


def _composed(placer: Placer, node: Node, given: Operands) -> Placed | None:
    bodies = placer.sharder.program.bodies
    types = _inner(bodies[node.attrs["body"]], given.values, {})
    body, gives = placer.sharder.body(node.attrs["body"], placer.module, types)
    if gives.partial or communicates(placer.sharder.bodies[body]):
        return None
    attrs = attributes(node, given.dims) | {"body": body}
    mask = node.attrs.get("mask")
    if isinstance(mask, str):
        asked = [given.values[i] for i in node.attrs["mask_operands"]]
        inner = _inner(bodies[mask], asked, {})
        attrs["mask"], _ = placer.sharder.body(mask, placer.module, inner, plain=True)
    if function := node.attrs.get("score"):
        types = [n.type for n in bodies[function].inputs]
        attrs["score"], _ = placer.sharder.body(function, placer.module, types, plain=True)
    return placer.emit(node, given.names, _given_back(node.type, gives.type, {}), attrs=attrs)


def scan(placer: Placer, node: Node) -> Placed:
    """A state is whole on every rank that has its sequence."""
    given = [placer.entire(placer.values[i]) for i in node.inputs]
    attrs = dict(node.attrs)
    bodies = placer.sharder.program.bodies
    for key in ("body", "read"):
        if attrs.get(key):
            types = [n.type for n in bodies[attrs[key]].inputs]
            attrs[key], _ = placer.sharder.body(attrs[key], placer.module, types, plain=True)
    return placer.emit(node, [v.name for v in given], node.type, attrs=attrs)


# -- arrays of blocks indexed by data --------------------------------------------------------------


def apply(placer: Placer, node: Node) -> Placed:
    given, use, _ = _array(placer, node)
    if use.axes:
        raise placer.fails(
            node, f"'{use.name}' is dealt out, so that what its blocks give must be summed over "
            "the picks in the same equation: gate[k] * expert[pick[k]](x)"
        )  # fmt: skip
    block, gives, pairs = _block(placer, node, node.attrs["body"], given.values[1:])
    type = _given_back(node.type, gives.type, dict(node.attrs["dims"]))
    attrs = attributes(node, given.dims) | {"body": block, "dims": pairs}
    made = placer.emit(node, given.names, type, attrs=attrs)
    return replace(made, partial=gives.partial)


def _array(placer: Placer, node: Node) -> tuple[Operands, PlacedUse, Dim]:
    given = placer.all_summed(placer.unified(node))
    over = given.values[0].type.of
    assert over is not None
    _, use = placer.sharder.use(placer.module, str(node.attrs["child"]), over)
    given = placer.made_whole(node, given, list(node.attrs["rows"]))
    return given, use, over


def _block(placer: Placer, node: Node, block: str, args: list[Placed]) -> tuple[str, Placed, Names]:
    """What one block is, for rows of these arguments."""
    over = placer.values[node.inputs[0]].type.of
    module, _ = placer.sharder.use(placer.module, str(node.attrs["child"]), over)
    graph = placer.sharder.program.bodies[block]
    pairs = dict(node.attrs["dims"])
    types = _inner(graph, args, pairs)
    body, gives = placer.sharder.body(block, module, types)
    return body, gives, _pairs(node, types, gives.type, [v.type for v in args])


def experts(placer: Placer, node: Node) -> Placed:
    given, use, over = _array(placer, node)
    pick, gate, *args = given.values
    block, gives, pairs = _block(placer, node, node.attrs["block"], args)
    if not use.axes:
        types = _inner(placer.sharder.program.bodies[node.attrs["body"]], given.values, {})
        body, gives = placer.sharder.body(node.attrs["body"], placer.module, types)
        attrs = attributes(node, given.dims) | {"body": body, "block": block, "dims": pairs}
        type = _given_back(node.type, gives.type, {})
        made = placer.emit(node, given.names, type, attrs=attrs)
        return replace(made, partial=gives.partial)
    return _sent(placer, node, (pick, gate, args), use, over, (block, gives, pairs))


def _sent(
    placer: Placer,
    node: Node,
    given: tuple[Placed, Placed, list[Placed]],
    use: PlacedUse,
    over: Dim,
    made: tuple[str, Placed, Names],
) -> Placed:
    """Blocks that are dealt out over ranks: tokens go to them and back.

    Along axes that sequences are spread over, rows are sent. Along others every rank has all
    tokens: each does the work of its own blocks, and the results are partial sums.
    """
    pick, gate, args = given
    block, gives, pairs = made
    child = str(node.attrs["child"])
    batch = placer.sharder.batch
    sent = tuple(a for a in use.axes if a in batch)
    left = tuple(a for a in use.axes if a not in batch)
    if sent and any(d.kind == "rows" for i in placer.old.inputs for d in i.type.dims):
        # Ranks would wait for ranks on which nobody picked the block around them.
        raise placer.fails(
            node,
            f"the blocks of '{use.name}' cannot be dealt out over '{sent[0]}', which sequences are "
            "spread over: they stand in blocks that are picked themselves; deal those out instead",
        )
    for axis in left:
        if axis in gives.partial or any(is_divided(d) and axis in d.axes for d in gives.type.dims):
            raise placer.fails(node, f"'{axis}' divides '{use.name}' and the inside of its blocks")
    own = divided(over, use.axes, use.redundant)
    rows = Dim(f"{node.name}.rows", ROWS, "rows")

    def add(op: str, stem: str, inputs: list[str], type: Type, **attrs: object) -> Node:
        return placer.rewriter.emit(stem, op, inputs, type, attrs=attrs, span=node.span)

    at = {"axes": use.axes, "sent": sent, "redundant": use.redundant, "child": child}
    at |= {"picks": node.attrs["picks"], "per_node": _per_node(placer, use, sent)}
    type = Type("i64", (rows,), of=own)
    routed = add("routing", f"{node.name}.sent", [pick.name, gate.name], type, **at)
    graph = placer.sharder.program.bodies[node.attrs["block"]]
    picked, taken = set(pick.type.names), []
    for wanted, value in zip(graph.inputs, args, strict=True):
        if not any(d.kind == "rows" for d in wanted.type.dims):
            taken.append(value.name)
            continue
        rest = tuple(d for d in value.type.dims if d.name not in picked)
        type = Type(value.type.dtype, (rows, *rest), of=value.type.of)
        inputs = [routed.name, pick.name, value.name]
        taken.append(add("dispatch", f"{value.name}.rows", inputs, type).name)
    names = dict(node.attrs["dims"])
    rest = tuple(d for d in gives.type.dims if d.kind != "rows")
    back = {d.name: d for d in _given_back(node.type, gives.type, names).dims}
    rest = tuple(back.get(names.get(d.name, d.name), d) for d in rest)
    attrs = {"body": block, "child": child, "over": own.name, "rows": (rows.name,), "dims": pairs}
    type = Type(gives.type.dtype, (rows, *rest), of=gives.type.of)
    applied = add("apply", f"{node.name}.out", [routed.name, *taken], type, **attrs)
    inputs = [routed.name, pick.name, gate.name, applied.name]
    type = replace(node.type, dims=tuple(back.values()))
    partial = (*gives.partial, *left)
    # Sums are in the gate's type; what the composite rounds to is another node.
    summed = "f32" if "f32" in (gate.type.dtype, gives.type.dtype) else type.dtype
    if summed == type.dtype:
        placed = placer.emit(node, inputs, type, op="combine", attrs={"picks": node.attrs["picks"]})
        return replace(placed, partial=partial)
    wide = replace(type, dtype=summed)
    total = add("combine", f"{node.name}.sum", inputs, wide, picks=node.attrs["picks"])
    placed = placer.emit(node, [total.name], type, op="cast", attrs={})
    return replace(placed, partial=partial)


def _per_node(placer: Placer, use: PlacedUse, sent: tuple[str, ...]) -> int:
    """Ranks of a node, if tokens go to a node once and are forwarded inside it: where the nodes of
    a cluster hold whole groups of blocks, of which a token's picks are in few. Else 0."""
    deployment = placer.sharder.program.deployment
    if deployment is None or deployment.cluster is None or sent != use.axes or len(sent) != 1:
        return 0
    mesh, per_node = deployment.mesh, deployment.cluster.per_node
    ranks = mesh.sizes[sent[0]]
    if mesh.stride(sent[0]) != 1 or per_node < 2 or ranks % per_node or ranks == per_node:
        return 0
    groups_match = use.groups > 1 and use.groups % (ranks // per_node) == 0
    return per_node if groups_match else 0


RULES: dict[str, Rule] = {
    "call": call,
    "chain": chain,
    "branch": branch,
    "attention": composite,
    "rms_norm": composite,
    "extern": composite,
    "scan": scan,
    "apply": apply,
    "experts": experts,
}
__all__ = ["RULES", "result"]
