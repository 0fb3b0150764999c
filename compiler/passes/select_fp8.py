"""select-fp8: which contractions run on quantised numbers, as the deployment's precision rules say.

A rule speaks of the source's equations, so this stands before anything is reordered. A contraction
that is chosen becomes a ``scaled_contract``, which quantises its own operands: no later pass takes
it for a product that could be multiplied in another order, or for a part of attention. Its
parameter is kept as codes (``Parameter.coding``); whoever else reads that gets what the codes stand
for. Formats are data here: elements, tiles and scales come with the rule.

A contraction that `order` takes apart in any of its programs (weight absorption) is left, its
weight as the codes stand for it, so that prefill and decode compute the same. A deployment that
trains takes none apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from compiler import spec
from compiler.coding import Coding
from compiler.errors import UserError
from compiler.ir import Dim, Graph, Node, Parameter, Program, Rewriter
from compiler.passes import order
from compiler.precision import CONTRACTIONS, excepts, names_of, selects
from compiler.tensors import Place, places
from dsl.deploy.typed import Deployment, PrecisionRule, Stored

Key = tuple[str, str, str]  # module, body, node
VIEWS = frozenset({"cast", "flatten", "part", "rename", "select", "unflatten"})


@dataclass(frozen=True)
class Weight:
    """An operand that is a parameter, or a view of one.

    ``rows`` and ``columns`` are the dims that the view has in the place of the stored matrix's
    rows and columns, in the stored order; None where the view leaves some of either out.
    """

    operand: int
    parameter: str
    rows: tuple[Dim, ...] | None
    columns: tuple[Dim, ...] | None

    @property
    def whole(self) -> bool:
        return self.rows is not None and self.columns is not None


@dataclass(frozen=True)
class Choice:
    """What becomes of one contraction of the source.

    Attributes:
        places: where in the model it stands, arrays as patterns.
        rule: that it runs by; None if it is left.
        reason: why it is left, or what keeps it from being run on codes alone.
    """

    key: Key
    node: Node
    weight: Weight | None
    places: tuple[Place, ...]
    rule: PrecisionRule | None
    reason: str = ""


def run(program: Program) -> Program:
    chosen = choices(program)
    cast = {c.key: c for c in chosen if c.rule is not None and not c.reason}
    if not any(c.rule for c in chosen):
        return program
    codings = _stored(chosen)
    modules = {
        name: replace(
            module,
            parameters=tuple(
                replace(p, coding=codings.get((name, p.name), p.coding)) for p in module.parameters
            ),
        )
        for name, module in program.modules.items()
    }
    bodies = dict(program.bodies)
    marked = {key[1:]: choice for key, choice in cast.items()}
    for name in {body for _, body, _ in cast}:
        bodies[name] = _marked(program, program.bodies[name], marked)
    return replace(program, modules=modules).with_bodies(bodies)


def choices(program: Program) -> list[Choice]:
    """What becomes of each contraction in which an index is summed; none without such a rule.

    Args:
        program: before `order`, with its deployment.

    Raises:
        UserError: rules ask for what cannot be done.
    """
    deployment = program.deployment
    rules = _rules(deployment) if deployment else []
    if deployment is None or not rules:
        return []
    found = list(_decided(program, rules))
    _check_shards(program, deployment, found)
    apart = set[Key]() if deployment.train else _taken_apart(program, found)
    return [
        replace(c, reason="is multiplied in another order where that costs less")
        if c.key in apart
        else c
        for c in found
    ]


def _rules(deployment: Deployment) -> list[PrecisionRule]:
    rules = [r for r in deployment.precision if r.selects in CONTRACTIONS]
    for rule in rules:
        tile = rule.roles["activations"].tile if "activations" in rule.roles else None
        if tile is not None and tile.rows != 1:
            raise UserError(
                f"{rule.span}: a tile of {tile} would give tokens a scale in common, and a "
                "sequence's result would depend on what is run beside it: activations = 1 x N"
            )
    return rules


# -- choosing --------------------------------------------------------------------------------------


def _decided(program: Program, rules: list[PrecisionRule]) -> Iterator[Choice]:
    everywhere = [p for p in places(program) if all(p.ranges)]
    blocks = {place.key: place.module.block for place in everywhere}
    reached = list(dict.fromkeys((s.module, g.name) for s, g in spec.scopes(program)))
    for module, body in reached:
        graph = program.bodies[body]
        here = [p for p in everywhere if p.module.name == module]
        for node in graph:
            if node.op != "contract" or not node.attrs["over"] or not here:
                continue
            weight = weight_of(program.modules[module].parameters, graph, node)
            made: dict[tuple[int, str], list[Place]] = {}
            for place in here:
                made.setdefault(_decision(rules, graph, node, weight, place, blocks), []).append(
                    place
                )
            if len(made) > 1:
                _differ(program, node, rules, made)
            (at, reason), where = next(iter(made.items()))
            rule = rules[at] if at >= 0 else None
            yield Choice((module, body, node.name), node, weight, tuple(where), rule, reason)


def _decision(
    rules: list[PrecisionRule],
    graph: Graph,
    node: Node,
    weight: Weight | None,
    place: Place,
    blocks: dict[tuple[str, tuple[range, ...]], str],
) -> tuple[int, str]:
    """Which rule decides (-1: none), and why the contraction is left."""
    parameter = weight.parameter if weight else None
    named = names_of(place, parameter, defines(graph, node), blocks)
    for at in reversed(range(len(rules))):
        if selects(rules[at], named, parameter):
            if len(node.inputs) != 2:
                return at, f"is a product of {len(node.inputs)} factors"
            return at, ""
    if any(excepts(rule, named) for rule in rules):
        return -1, "the rule excepts it"
    return -1, "no factor is a parameter" if weight is None else "no rule speaks of it"


def _differ(
    program: Program,
    node: Node,
    rules: list[PrecisionRule],
    made: dict[tuple[int, str], list[Place]],
) -> None:
    (first, one), (second, other) = list(made.items())[:2]
    rule = rules[max(first[0], second[0])]
    raise UserError(
        f"{node.span}: precision '{rule.label}' ({rule.span}) speaks of this contraction in "
        f"{one[0].path or program.name} and not in {other[0].path or program.name}, which are one "
        "module here; name the block, or both uses"
    )


def defines(graph: Graph, node: Node) -> str | None:
    """The name of the value whose equation the contraction stands in, if it has one."""
    seen = {node.name}
    todo = [node]
    while todo:
        here = todo.pop(0)
        if here.label:
            return here.label
        for user in graph.users(here.name):
            if user.name not in seen and _in_one_equation(user, node):
                seen.add(user.name)
                todo.append(user)
    return None


def _in_one_equation(one: Node, other: Node) -> bool:
    a, b = one.span, other.span
    if a is None or b is None or a.source.name != b.source.name:
        return False
    return a.line <= b.end_line and b.line <= a.end_line


def weight_of(parameters: tuple[Parameter, ...], graph: Graph, node: Node) -> Weight | None:
    """The operand that is a parameter, or a view of one; None if none or several are."""
    trained = {p.name for p in parameters if p.role == "param"}
    found = [
        weight
        for at, name in enumerate(node.inputs)
        if (weight := _viewed(graph, name, at)) is not None and weight.parameter in trained
    ]
    return found[0] if len(found) == 1 else None


def _viewed(graph: Graph, name: str, at: int) -> Weight | None:
    path = [graph[name]]
    while path[-1].op in VIEWS:
        path.append(graph[path[-1].inputs[0]])
    source = path[-1]
    if source.op != "param":
        return None
    dims = source.type.dims
    sides: list[list[Dim]] | None = [list(dims[:1]), list(dims[1:])]
    if len(dims) == 1:
        sides = [[], list(dims)]
    for view in reversed(path[:-1]):
        sides = _changed(sides, view) if sides is not None else None
    if sides is None:
        return Weight(at, str(source.attrs["param"]), None, None)
    return Weight(at, str(source.attrs["param"]), tuple(sides[0]), tuple(sides[1]))


def _changed(sides: list[list[Dim]], view: Node) -> list[list[Dim]] | None:
    """Rows and columns after a view; None if it leaves out some of the matrix."""
    a = view.attrs
    match view.op:
        case "cast":
            return sides
        case "rename":
            return [[a["to"] if d.name == a["dim"] else d for d in side] for side in sides]
        case "unflatten":
            return [
                [p for d in side for p in (a["into"] if d.name == a["dim"] else (d,))]
                for side in sides
            ]
        case "flatten":
            for side in sides:
                names = [d.name for d in side]
                for start in range(len(side)):
                    if tuple(names[start : start + len(a["dims"])]) == a["dims"]:
                        side[start : start + len(a["dims"])] = [a["into"]]
                        return sides
    return None


def _check_shards(program: Program, deployment: Deployment, found: list[Choice]) -> None:
    """Each rank's part of what is summed starts on a tile, so that its scales are its own.

    Raises:
        UserError: one does not.
    """
    for choice in found:
        if choice.rule is None or choice.reason:
            continue
        tile = choice.rule.roles["activations"].tile
        over = _summed(program.bodies[choice.key[1]], choice)
        block = program.modules[choice.key[0]].block
        for at, dim in enumerate(over):
            for rule in deployment.shard:
                ways = deployment.mesh.ways(rule.axes)
                if tile is None or ways == 1 or (block, dim.name, dim.size) not in rule.reaches:
                    continue
                whole = prod(program.size(d) for d in over[at:])
                if tile.columns is None or (whole // ways) % tile.columns:
                    name = choice.weight.parameter if choice.weight else dim.name
                    raise UserError(
                        f"{choice.node.span}: {ways} ranks ({rule.span}) share the {whole:,} "
                        f"elements along '{dim.name}' that the product with '{name}' sums, "
                        f"{whole // ways:,} each, and precision '{choice.rule.label}' has tiles of "
                        f"{tile}: a part would not start on a tile"
                    )


def _summed(graph: Graph, choice: Choice) -> list[Dim]:
    """The dims that a contraction sums, in the order in which tiles run along them."""
    over = choice.node.attrs["over"]
    if choice.weight is not None and choice.weight.columns is not None:
        columns = choice.weight.columns
        if {d.name for d in columns} == set(over):
            return list(columns)
    dims = {d.name: d for n in graph.operands(choice.node) for d in n.type.dims}
    return [dims[name] for name in over]


# -- what order takes apart ------------------------------------------------------------------------


def _taken_apart(program: Program, found: list[Choice]) -> set[Key]:
    """The chosen contractions that some program multiplies in another order than the source."""
    ordered = order.run(program)
    apart = set()
    for choice in found:
        if choice.rule is None or choice.reason:
            continue
        _, body, name = choice.key
        source = program.bodies[body][name]
        for graph in _sides(ordered, body):
            kept = next((n for n in graph if n.name == name), None)
            same = (
                kept is not None
                and kept.op == "contract"
                and _reads(graph, kept) == _reads(program.bodies[body], source)
            )
            if not same and _uses(graph, program.bodies[body], source):
                apart.add(choice.key)
    return apart


def _sides(ordered: Program, body: str) -> Iterator[Graph]:
    """A body and the branches that `order` made of parts of it."""
    yield ordered.bodies[body]
    for node in ordered.bodies[body]:
        if node.op == "branch":
            for side in ("then", "otherwise"):
                yield from _sides(ordered, node.attrs[side])


def _reads(graph: Graph, node: Node) -> list[str]:
    """What a contraction multiplies, whatever it is widened to."""

    def before(name: str) -> str:
        node = graph[name]
        return before(node.inputs[0]) if node.op == "cast" and not node.rounds else name

    return sorted(before(name) for name in node.inputs)


def _uses(graph: Graph, before: Graph, contraction: Node) -> bool:
    """Whether this part of the body holds the contraction's parameter, or the contraction would
    have to be in it."""
    parameters = {
        n.attrs["param"]
        for name in contraction.inputs
        for n in before
        if n.op == "param" and (n.name == name or name in _views(before, n.name))
    }
    if not parameters:
        return contraction.name not in graph and any(
            n.name in graph for n in before.users(contraction.name)
        )
    return any(n.op == "param" and n.attrs["param"] in parameters for n in graph)


def _views(graph: Graph, name: str) -> set[str]:
    found = set()
    for user in graph.users(name):
        if user.op in VIEWS:
            found |= {user.name} | _views(graph, user.name)
    return found


# -- marking ---------------------------------------------------------------------------------------


def _stored(chosen: list[Choice]) -> dict[tuple[str, str], Coding]:
    """How the parameters of chosen contractions are kept.

    Raises:
        UserError: two rules want one parameter in two ways.
    """
    found: dict[tuple[str, str], tuple[Coding, Choice]] = {}
    for choice in chosen:
        if choice.rule is None or choice.weight is None:
            continue
        coding = coding_of(choice.rule.roles.get("weights"))
        if coding is None:
            continue
        key = (choice.key[0], choice.weight.parameter)
        before = found.setdefault(key, (coding, choice))
        if before[0] != coding:
            raise UserError(
                f"'{choice.weight.parameter}' is wanted in {before[0]} ({before[1].node.span}) and "
                f"in {coding} ({choice.node.span}): a parameter is kept once"
            )
    return {key: coding for key, (coding, _) in found.items()}


def coding_of(stored: Stored | None) -> Coding | None:
    """A role of a rule as the graph carries it; None if values stay as they are."""
    if stored is None or stored.format is None:
        return None
    tile = stored.tile
    return Coding(stored.format, tile.rows if tile else None, tile.columns if tile else None)


def _marked(program: Program, graph: Graph, marked: dict[tuple[str, str], Choice]) -> Graph:
    rewriter = Rewriter(graph)
    for node in graph:
        choice = marked.get((graph.name, node.name))
        if choice is None:
            rewriter.replace(node.name, rewriter.copy(node).name)
            continue
        assert choice.rule is not None
        codings = _codings(graph, node, choice)
        if not any(codings):  # weights alone: multiplied with what they stand for
            rewriter.replace(node.name, rewriter.copy(node).name)
            continue
        attrs = {"over": node.attrs["over"], "quantises": codings}
        if choice.rule.promote is not None:
            attrs["promote"] = choice.rule.promote
        made = rewriter.copy(node, op="scaled_contract", attrs=attrs)
        rewriter.replace(node.name, made.name)
    return rewriter.done()


def _codings(graph: Graph, node: Node, choice: Choice) -> tuple[Coding | None, ...]:
    """How each operand is quantised; weights are already."""
    assert choice.rule is not None
    coding = coding_of(choice.rule.roles.get("activations"))
    over, weight = node.attrs["over"], choice.weight
    if weight is not None and weight.columns is not None:
        columns = tuple(d.name for d in weight.columns)
        over = columns if set(columns) == set(over) else over  # as the matrix lies
    found: list[Coding | None] = []
    for at, operand in enumerate(graph.operands(node)):
        own = tuple(name for name in over if name in operand.type.names)
        is_weight = weight is not None and at == weight.operand
        found.append(coding.along(*own) if coding and own and not is_weight else None)
    return tuple(found)
