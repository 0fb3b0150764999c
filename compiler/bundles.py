"""Bundles: several values as one, and the loops that take and give them.

A body has one result. A backward graph needs more: what a forward body saves, the gradients of all
operands, those of all parameters. ``pack`` makes one value of several, ``item`` takes one out. A
bundle's type names its ``pack`` (``body:node``), which says what is in it, so dims inside one body
never clash with those of a body that hands the bundle on. What a loop gave in each round is the
same bundle with the loop's dim: ``bundle[l] of "Layer.call.forward:saved"``, as a parameter of an
array of blocks is stored once for each.

``loop`` is ``chain`` with any number of values carried, ``route`` is ``apply`` with any number of
results. The last four ops are adjoints of ops that move rows; ``compiler/adjoints.py`` emits them.
"""

from __future__ import annotations

from compiler.ir import Dim, Graph, Node, Type
from compiler.rules import RuleError, Scope, agrees, dim_of, need, product, without
from compiler.signatures import arguments
from compiler.spec import (
    DIM,
    NAME,
    NAMES,
    PAIRS,
    POSITIONS,
    RAN,
    WHOLE,
    Attr,
    Op,
    Run,
    composite,
    optional,
    per_operand_element,
    register,
)
from dsl.extents import Extent


def packed(scope: Scope, bundle: str) -> list[Node]:
    """The values that a bundle holds, as nodes of the body that packs them.

    Raises:
        RuleError: the name is not that of a ``pack``.
    """
    body, _, name = bundle.rpartition(":")
    graph = scope.body(body)
    if name not in graph or graph[name].op != "pack":
        raise RuleError(f"there is no pack %{name} in {body}")
    return graph.operands(graph[name])


# -- rules -----------------------------------------------------------------------------------------


def pack(node: Node, operands: list[Node], scope: Scope) -> Type:
    need(
        node.type.bundle.endswith(f":{node.name}"),
        f"a bundle is named by its pack, not '{node.type.bundle}'",
    )
    names = node.attrs.get("names")
    need(names is None or len(names) == len(operands), "there is one name for each value")
    return Type("bundle", (), bundle=node.type.bundle)


def item(node: Node, operands: list[Node], scope: Scope) -> Type:
    (source,) = operands
    need(source.type.dtype == "bundle", f"{source.type} is no bundle")
    need(not source.type.dims, f"{source.type} is one bundle for each round, not one")
    values, at = packed(scope, source.type.bundle), node.attrs["at"]
    need(0 <= at < len(values), f"{source.type.bundle} has {len(values)} values")
    inner, own = values[at].type, node.type
    names = dict(source.attrs.get("dims", ()))
    expected = {names.get(d, d) for d in inner.names}
    if source.op == "loop" and at not in _whole(source):
        expected.add(source.attrs["index"].name)
    elif source.op == "route":
        rows = {names.get(d.name, d.name) for d in inner.dims if d.kind == "rows"}
        if rows:
            expected = (expected - rows) | set(source.attrs["rows"])
        elif inner.dtype == "bundle":
            expected.add(source.attrs["over"])
    need(
        (own.dtype, own.bundle, set(own.names)) == (inner.dtype, inner.bundle, expected),
        f"value {at} of {source.type.bundle} is {Type(inner.dtype, (), bundle=inner.bundle)} over "
        f"({', '.join(sorted(expected))}), not {own}",
    )
    return own


def _whole(loop: Node) -> set[int]:
    """Positions of results that the rounds do not give one each of."""
    return {result for result, _ in loop.attrs["carry"]} | set(loop.attrs["sum"])


def _one_round(node: Node, dim: str) -> Node:
    return node.with_(
        type=Type(node.type.dtype, without(node.type, dim), node.type.of, node.type.bundle)
    )


def loop(node: Node, operands: list[Node], scope: Scope) -> Type:
    a, index = node.attrs, node.attrs["index"]
    if a["child"]:
        scope.child(a["child"], index)
    body = scope.body(a["body"])
    given = [_one_round(n, index.name) if i in a["each"] else n for i, n in enumerate(operands)]
    arguments(body, given, dict(a["dims"]))
    results = packed(scope, body.result.type.bundle)
    for result, operand in a["carry"]:
        before, after = body.inputs[operand].type, results[result].type
        need(agrees(before, after), f"{body.name} takes {before} and gives {after}")
    return body.result.type


def route(node: Node, operands: list[Node], scope: Scope) -> Type:
    pick, *given = operands
    a, of = node.attrs, pick.type.of
    if of is None or of.name != a["over"]:
        raise RuleError(f"a pick indexes {a['over']}, not {pick.type}")
    scope.child(a["child"], of)
    need(set(a["rows"]) == set(pick.type.names), f"rows are all dims of the pick {pick.type}")
    body = scope.body(a["body"])
    need(len(body.inputs) == len(given), f"{body.name} takes {len(body.inputs)} values")
    names = dict(a["dims"])
    one_of, one_for = [], []
    for position, (wanted, value) in enumerate(zip(body.inputs, given, strict=True)):
        rows = [d.name for d in wanted.type.dims if d.kind == "rows"]
        if position in a["each"]:
            value = _one_round(value, of.name)
        if rows:  # which rows an argument has is its own affair: it is broadcast
            wanted = _without_dims(wanted, rows)
            value = _without_dims(value, a["rows"])
        one_of.append(wanted)
        one_for.append(value)
    arguments(_Inputs(body.name, one_of), one_for, names)
    packed(scope, body.result.type.bundle)
    return body.result.type


def _without_dims(node: Node, names: list[str] | tuple[str, ...]) -> Node:
    left = tuple(d for d in node.type.dims if d.name not in names)
    return node.with_(type=Type(node.type.dtype, left, node.type.of, node.type.bundle))


class _Inputs(Graph):
    """A body's arguments alone."""

    def __init__(self, name: str, inputs: list[Node]):
        super().__init__(name)
        for node in inputs:
            self.add(node)


def _moved(node: Node, operands: list[Node], old: str, new: str) -> Type:
    """The operand with its dim of one kind replaced by the result's of another."""
    (source,) = operands
    before = [d for d in source.type.dims if d.kind == old]
    after = [d for d in node.type.dims if d.kind == new]
    need(
        len(before) == 1 and len(after) == 1,
        f"{source.type} must have one dim of kind {old}, and {node.type} one of {new}",
    )
    return Type(source.type.dtype, (*without(source.type, before[0].name), *after), source.type.of)


def as_history(node: Node, operands: list[Node], scope: Scope) -> Type:
    return _moved(node, operands, "time", "history")


def as_time(node: Node, operands: list[Node], scope: Scope) -> Type:
    return _moved(node, operands, "history", "time")


def spread_rows(node: Node, operands: list[Node], scope: Scope) -> Type:
    return _moved(node, operands, "rows", "time")


def spread_shift(node: Node, operands: list[Node], scope: Scope) -> Type:
    type = _moved(node, operands, "time", "history")
    index = node.attrs.get("index")
    return Type(type.dtype, tuple(d for d in type.dims if d.name != index))


def scatter(node: Node, operands: list[Node], scope: Scope) -> Type:
    value, index = operands
    need(index.type.dtype == "i64" and index.type.of is not None, "the index is not typed")
    into: Dim = node.attrs["into"]
    of = index.type.of
    need(of is not None and of.size == into.size, f"{index.type} does not index {into.name}")
    summed = [d.name for d in index.type.dims if d.name not in node.type.names]
    for name in summed:
        dim_of(value.type, name)
    return Type(value.type.dtype, (*without(value.type, *summed), into))


# -- rows of the table -----------------------------------------------------------------------------


def _runs_loop(node: Node, graph: Graph) -> list[Run]:
    index: Dim = node.attrs["index"]
    child = node.attrs["child"]
    return [Run(node.attrs["body"], child, index if child else None, times=index.size)]


def _runs_route(node: Node, graph: Graph) -> list[Run]:
    pick = graph[node.inputs[0]].type
    rows: Extent = product(pick.dims)
    return [Run(node.attrs["body"], node.attrs["child"], pick.of, lengths={"rows": rows})]


TRUTH = Attr("a bool", lambda v: isinstance(v, bool))
CARRIED = Attr(
    "a tuple of (result, operand) positions",
    lambda v: (
        isinstance(v, tuple)
        and all(isinstance(p, tuple) and len(p) == 2 and all(type(x) is int for x in p) for p in v)
    ),
)
HERE = "semantics_bundles."

# fmt: off
for _row in [
    Op("pack", "several values as one", 0, None, pack, {"names": optional(NAMES)}, HERE + "pack",
       view=True),
    Op("item", "one value of a bundle", 1, 1, item, {"at": WHOLE}, HERE + "item", view=True),
    Op("loop", "results = body(operands...) for each number of a dim: `carry`ied from round to "
       "round, `sum`med, or one `each`", 0, None, loop,
       {**RAN, "index": DIM, "dims": PAIRS, "each": POSITIONS, "carry": CARRIED, "sum": POSITIONS,
        "reverse": TRUTH}, HERE + "loop", runs=_runs_loop),
    Op("route", "rows through the blocks they picked, with several results; what has no rows is "
       "summed, bundles are one `each` block", 1, None, route,
       {**RAN, "over": NAME, "rows": NAMES, "dims": PAIRS, "each": POSITIONS}, HERE + "route",
       runs=_runs_route),
    Op("as_history", "this step's positions as the whole history: nothing came before", 1, 1,
       as_history, {}, HERE + "as_history", view=True),
    Op("as_time", "a history's positions that are this step's", 1, 1, as_time, {},
       HERE + "as_time", view=True),
    Op("spread_rows", "wanted rows at their positions of the step, zeros elsewhere", 1, 1,
       spread_rows, {}, HERE + "spread_rows"),
    Op("spread_shift", "each value added to the position of history that a shift reads it from",
       1, 1, spread_shift, {"index": optional(NAME), "sign": WHOLE,
                            "offset": Attr("an extent", lambda v: isinstance(v, Extent))},
       HERE + "spread_shift", flops=per_operand_element),
    Op("scatter", "each value added to the row of a table that its index names", 2, 2, scatter,
       {"into": DIM}, HERE + "scatter", flops=per_operand_element),
]:
    register(_row)
# fmt: on

composite(
    "cross_entropy",
    "minus the logarithm of the softmax along a dim at a target: losses have it",
    over=NAME,
)
