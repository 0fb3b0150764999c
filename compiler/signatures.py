"""Type rules of the ops that run other bodies: arguments and result under the caller's names.

A body knows its dims by its own names; a ``call`` maps them to the caller's. Sizes are polynomials
in the program's constants on both sides, so they are compared as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from compiler.ir import Dim, Graph, Node, Type
from compiler.rules import RuleError, Scope, agrees, describe, dim_of, need, without

if TYPE_CHECKING:
    from compiler.interpret import Frame


def result(body: Graph, found: Mapping[str, Dim], names: Mapping[str, str]) -> Type:
    """A body's result under the caller's names.

    Args:
        found: the caller's dims, from ``arguments``.
        names: the caller's names, for dims that no argument has.
    """

    def outside(dim: Dim) -> Dim:
        return found.get(dim.name) or replace(dim, name=names.get(dim.name, dim.name))

    type = body.result.type
    of = outside(type.of) if type.of else None
    called = {d.name: outside(d).name for d in type.dims}
    coding = type.coding and type.coding.along(*(called.get(n, n) for n in type.coding.over))
    dims = tuple(outside(d) for d in type.dims)
    return Type(type.dtype, dims, of, type.bundle, coding)


def arguments(body: Graph, operands: list[Node], names: Mapping[str, str]) -> dict[str, Dim]:
    """Checks a body's arguments; returns the caller's dim for each of the body's.

    Args:
        names: the caller's name of a body's dim, where it is another one.

    Raises:
        RuleError: the number of arguments, a dtype or a dim differs.
    """
    inputs = body.inputs
    need(
        len(inputs) == len(operands), f"{body.name} takes {len(inputs)} values, not {len(operands)}"
    )
    found: dict[str, Dim] = {}
    for wanted, given in zip(inputs, operands, strict=True):
        what = f"argument '{wanted.attrs['name']}' of {body.name}"
        need(
            wanted.type.dtype == given.type.dtype,
            f"{what} is {wanted.type.dtype}, not {given.type.dtype}",
        )
        need(
            wanted.type.bundle == given.type.bundle,
            f"{what} is a bundle of {wanted.type.bundle}, not of {given.type.bundle}",
        )
        coding, own = wanted.type.coding, given.type.coding
        inside = coding and coding.along(*(names.get(n, n) for n in coding.over))
        need(inside == own, f"{what} is coded {{{inside}}}, not {{{own}}}")
        expected = {names.get(d.name, d.name): d for d in wanted.type.dims}
        need(
            expected.keys() == set(given.type.names),
            f"{what} has dims ({', '.join(expected)}), not ({', '.join(given.type.names)})",
        )
        for name, dim in expected.items():
            own_dim = given.type.dim(name)
            need(
                (own_dim.size, own_dim.kind) == (dim.size, dim.kind),
                f"{what}: {describe(dim)} is given {describe(own_dim)}",
            )
            found[dim.name] = own_dim
    return found


def call(node: Node, operands: list[Node], scope: Scope) -> Type:
    scope.child(node.attrs["child"])
    return _run(scope.body(node.attrs["body"]), operands, node.attrs["dims"])


def _run(body: Graph, operands: list[Node], dims: Iterable[tuple[str, str]]) -> Type:
    names = dict(dims)
    return result(body, arguments(body, operands, names), names)


def chain(node: Node, operands: list[Node], scope: Scope) -> Type:
    scope.child(node.attrs["child"], node.attrs["index"])
    body = scope.body(node.attrs["body"])
    carried, given = operands[0].type, _run(body, operands, node.attrs.get("dims", ()))
    need(
        agrees(carried, given),
        f"{body.name} takes {carried} and gives {given}: a chain keeps its type",
    )
    return carried


def apply(node: Node, operands: list[Node], scope: Scope) -> Type:
    pick, *given = operands
    of = pick.type.of
    if of is None or of.name != node.attrs["over"]:
        raise RuleError(f"a pick indexes {node.attrs['over']}, not {pick.type}")
    scope.child(node.attrs["child"], of)
    rows = tuple(dim_of(pick.type, name) for name in node.attrs["rows"])
    need(set(rows) == set(pick.type.dims), f"rows are all dims of the pick {pick.type}")
    body = scope.body(node.attrs["body"])
    names, own = dict(node.attrs["dims"]), block_rows(body)
    # Compared as for one row: which rows an argument has is its own affair, it is broadcast.
    one = _Signature(body, [_one_row(n, own) for n in body.inputs])
    for wanted, value in zip(body.inputs, given, strict=False):
        if own not in wanted.type.names:
            need(
                not set(value.type.names) & {d.name for d in rows},
                f"argument '{wanted.attrs['name']}' of {body.name} is the same for all rows",
            )
    found = arguments(one, [_one_row(n, *(d.name for d in rows)) for n in given], names)
    inner = result(body, found, names)
    return Type(inner.dtype, (*rows, *without(inner, own)), of=inner.of)


def block_rows(body: Graph) -> str:
    """The dim along which an applied block's rows lie."""
    for node in body.inputs:
        for dim in node.type.dims:
            if dim.kind == "rows":
                return dim.name
    raise RuleError(f"no argument of {body.name} has a dim of kind rows")


def shape_of(type: Type, found: Iterable[int], frame: Frame) -> list[int]:
    """The shape that a value of this type has in a run; what is found, of rows that were sent here:
    no one knows how many. Rows of a block that is run for some are those of its arguments."""
    known = frame.sizes.keys()
    given = frame.arguments.values()

    def counted(dim: Dim) -> bool:
        inside = "rows" not in dim.size.names or any(dim.name in a.dims for a in given)
        return inside and dim.size.names <= known

    return [frame.size(d) if counted(d) else n for d, n in zip(type.dims, found, strict=True)]


def _one_row(node: Node, *rows: str) -> Node:
    type = node.type
    return node.with_(type=replace(type, dims=tuple(d for d in type.dims if d.name not in rows)))


class _Signature(Graph):
    """A body's arguments alone, changed."""

    def __init__(self, body: Graph, inputs: list[Node]):
        super().__init__(body.name)
        for node in inputs:
            self.add(node)


def branch(node: Node, operands: list[Node], scope: Scope) -> Type:
    then, otherwise = (
        _run(scope.body(node.attrs[side]), operands, ()) for side in ("then", "otherwise")
    )
    need(agrees(then, otherwise), f"the sides give {then} and {otherwise}")
    return then


def scan(node: Node, operands: list[Node], scope: Scope) -> Type:
    """The first operand is what the state begins with, or one number for all of it; bodies take the
    state and one token of the others."""
    times = [d for d in node.type.dims if d.kind == "time"]
    need(len(times) == 1, f"{node.type} has {len(times)} dims of time, not one")
    (time,) = times
    body = scope.body(node.attrs["body"])
    need(bool(body.inputs), f"{body.name} takes no state")
    before = body.inputs[0]
    need(time.name not in before.type.names, "a state has no time")
    start = operands[0].type
    wanted = before.type if start.dims else replace(before.type, dims=())
    need(agrees(start, wanted), f"a state {before.type} cannot begin with {start}")

    def run(body: str, positions: tuple[int, ...]) -> Type:
        need(all(0 < p < len(operands) for p in positions), f"no operands {positions}")
        one = [_one_row(operands[p], time.name) for p in positions]
        return _run(scope.body(body), [before, *one], ())

    state = run(node.attrs["body"], node.attrs["given"])
    need(agrees(before.type, state), f"a state {before.type} becomes {state}")
    if node.attrs.get("read"):
        state = run(node.attrs["read"], node.attrs.get("asked", ()))
    need(time.name not in state.names, "a token's result has no time")
    return Type(state.dtype, (*state.dims, time), of=state.of)


def composite(node: Node, operands: list[Node], scope: Scope) -> Type:
    """What the body that defines the composite gives; it uses the caller's names for dims."""
    return _run(scope.body(node.attrs["body"]), operands, ())
