"""What a deployment's precision rules made of each contraction: cast, left, and why."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from compiler.ir import Program
from compiler.passes.select_fp8 import Choice, choices, coding_of, defines
from compiler.tensors import shown

PART = "reads a part of the matrix: multiplied as its codes stand for it"


@dataclass(frozen=True)
class Cast:
    """One contraction of the source, at all its places together.

    Attributes:
        path: one of its places, arrays as half-open ranges; ``count`` contractions stand there and
            at the others.
        value: what its equation defines.
        parameter: the factor that is a parameter, if one is.
        cast: whether its operands are quantised.
        activations, weights: format and tile of either factor; None: as it is. Weights may be kept
            as codes although the contraction is left.
        reason: why it is left, or how it is done if not on codes alone.
    """

    path: str
    value: str | None
    parameter: str | None
    source: str
    count: int
    cast: bool
    activations: str | None
    weights: str | None
    promote: int | None
    reason: str


def casts(program: Program) -> list[Cast]:
    """A row for each contraction in which an index is summed; none without a rule for them.

    Args:
        program: as elaborated, with its deployment.
    """
    return [_row(program, choice) for choice in choices(program)]


def _row(program: Program, choice: Choice) -> Cast:
    rule, weight = choice.rule, choice.weight
    place = choice.places[0]
    is_cast = rule is not None and not choice.reason
    codings = {
        role: coding_of(rule.roles.get(role)) if rule else None
        for role in ("activations", "weights")
    }
    reason = choice.reason
    if is_cast and weight is not None and not weight.whole and codings["weights"]:
        reason = PART
    if is_cast and not codings["activations"]:
        reason = "the rule leaves activations: multiplied as the codes stand for the weight"
    return Cast(
        path=shown(place.path, place.ranges),
        value=defines(program.bodies[choice.key[1]], choice.node),
        parameter=weight.parameter if weight else None,
        source=str(choice.node.span or ""),
        count=sum(prod(len(r) for r in p.ranges) for p in choice.places),
        cast=is_cast,
        activations=str(codings["activations"]) if is_cast and codings["activations"] else None,
        weights=str(codings["weights"]) if weight and codings["weights"] else None,
        promote=rule.promote if rule and is_cast else None,
        reason=reason,
    )


def comments(rows: list[Cast]) -> str:
    """The table as lines that the text form of a graph may hold."""
    out = []
    for row in rows:
        what = "cast" if row.cast else "left"
        named = " * ".join(n for n in (row.value, row.parameter) if n)
        why = f": {row.reason}" if row.reason else ""
        place = row.path or "the model"
        out.append(f"// {what} {named} at {place}, x {row.count:,} ({row.source}){why}\n")
    return "".join(out)
