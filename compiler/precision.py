"""Which stored tensors a precision rule of a deployment speaks of."""

from __future__ import annotations

from compiler.ir import Graph, Node, Program
from compiler.tensors import VIEWS, Place, places
from dsl.deploy import PrecisionRule, Target

Stored = tuple[str, tuple[range, ...]]  # path and ranges of a compiler.tensors.Pattern


def weights_of(program: Program, rule: PrecisionRule) -> set[Stored]:
    """The parameters that the rule's contractions read, those that it excepts left out.

    Args:
        program: as elaborated: contractions must not have become composites.
    """
    if rule.selects not in ("contractions", "parameter", "named"):
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
