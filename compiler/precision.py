"""Which stored tensors, and which contractions, a precision rule of a deployment speaks of."""

from __future__ import annotations

from compiler.ir import Graph, Node, Program
from compiler.tensors import VIEWS, Place, places
from dsl.deploy.typed import PrecisionRule, Target

CONTRACTIONS = frozenset({"contractions", "parameter", "named"})  # what such rules are for

Stored = tuple[str, tuple[range, ...]]  # path and ranges of a compiler.tensors.Pattern


def weights_of(program: Program, rule: PrecisionRule) -> set[Stored]:
    """The parameters that the rule's contractions read, those that it excepts left out.

    Args:
        program: as elaborated: contractions must not have become composites.
    """
    if rule.selects not in CONTRACTIONS:
        return set()
    everywhere = list(places(program))
    blocks = {place.key: place.module.block for place in everywhere}
    out: set[Stored] = set()
    for place in everywhere:
        bodies = [program.bodies[b] for b in place.module.methods.values() if b in program.bodies]
        for parameter in place.module.parameters:
            named = _named(place, parameter.name, blocks)
            if (
                parameter.role == "param"
                and any(_is_contracted(body, parameter.name) for body in bodies)
                and (rule.selects != "named" or any(_is(t, named) for t in rule.targets))
                and not any(_is(target, named) for target in rule.exceptions)
            ):
                path = f"{place.path}.{parameter.name}" if place.path else parameter.name
                out.add((path, place.ranges))
    return out


def names_of(
    place: Place, parameter: str | None, value: str | None, blocks: dict[Stored, str]
) -> set[tuple[str | None, str]]:
    """What targets may call a contraction: its parameter, the value it defines, and all uses,
    arrays and blocks it is in."""
    named = _named(place, parameter or "", blocks)
    return named | {(place.module.block, value)} if value else named


def selects(rule: PrecisionRule, named: set[tuple[str | None, str]], parameter: str | None) -> bool:
    """Whether a rule speaks of a contraction that goes by these names."""
    if rule.selects == "parameter" and parameter is None:
        return False
    if rule.selects == "named" and not any(_is(target, named) for target in rule.targets):
        return False
    return rule.selects in CONTRACTIONS and not excepts(rule, named)


def excepts(rule: PrecisionRule, named: set[tuple[str | None, str]]) -> bool:
    """Whether a rule takes it out by name."""
    return any(_is(target, named) for target in rule.exceptions)


def _named(place: Place, parameter: str, blocks: dict[Stored, str]) -> set[tuple[str | None, str]]:
    """What targets call a parameter and all it is in: (block, member), or (None, block)."""
    found: set[tuple[str | None, str]] = {(place.module.block, parameter)}
    path, ranges = place.path, place.ranges
    found.add((None, place.module.block))
    while path:
        path, _, member = path.rpartition(".")
        if member.endswith("]"):
            ranges = ranges[:-1]
        block = blocks[path, ranges]
        found |= {(block, member.partition("[")[0]), (None, block)}
    return found


def _is(target: Target, named: set[tuple[str | None, str]]) -> bool:
    return (target.block, target.name) in named


def _is_contracted(body: Graph, parameter: str) -> bool:
    def leads(node: Node) -> bool:
        return any(
            user.op == "contract" or (user.op in VIEWS and leads(user))
            for user in body.users(node.name)
        )

    return any(n.op == "param" and n.attrs["param"] == parameter and leads(n) for n in body)
