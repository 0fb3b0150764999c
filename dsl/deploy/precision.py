"""The precision rules of a deployment: which contractions run, and which values are kept, in which
number format."""

from __future__ import annotations

from collections.abc import Mapping

from dsl import syntax as ast
from dsl.deploy import syntax as written
from dsl.deploy.names import Anatomy, selected_target
from dsl.deploy.typed import PrecisionRule, Stored, Target
from dsl.diagnostics import Diagnostics, Span, near
from dsl.formats import Formats, checked_tile
from dsl.tables import count

OPERANDS = ("weights", "activations", "gradients")
MOST_PROMOTED = 1 << 40


def precision_rule(
    clause: written.Precision, anatomy: Anatomy, formats: Formats, found: Diagnostics
) -> PrecisionRule | None:
    """A rule; None after a diagnostic."""
    before = len(found.found)
    targets: list[Target] = []
    exceptions: list[Target] = []
    kinds: dict[str, Span] = {}
    into = targets
    for selected in clause.selected:
        if selected.kind == "except":
            into = exceptions
        place = selected.place
        if place is None:
            kinds.setdefault(selected.kind, selected.span)
        elif into is targets and str(place) == "act":
            kinds.setdefault("act", selected.span)
        else:
            if into is targets:
                kinds.setdefault("named", selected.span)
            target = selected_target(place, anatomy, found)
            into += [] if target is None else [target]
    formats_alone = not clause.roles and clause.label.text in formats.tables.declared["format"]
    selects = next(iter(kinds), "act" if formats_alone else "parameter")
    if len(kinds) > 1:
        found.error(
            "E0820",
            "a rule is for contractions, for cached values, for act or for what it names",
            list(kinds.values())[1],
            notes=[(next(iter(kinds.values())), "it is for this already")],
            hint="write a second precision rule",
        )
    whole = selects in ("cached", "act")
    if exceptions and whole:
        found.error("E0820", "only contractions are excepted", clause.span)
    roles = _roles(clause, ("values",) if whole else OPERANDS, formats, found)
    promote = _promote(clause, roles, whole, found)
    if len(found.found) > before:
        return None
    return PrecisionRule(
        clause.label.text, selects, tuple(targets), tuple(exceptions), roles, promote, clause.span
    )


def _roles(
    clause: written.Precision, known: tuple[str, ...], formats: Formats, found: Diagnostics
) -> dict[str, Stored]:
    given: dict[str, written.Role] = {}
    default: ast.Name | None = None
    for role in clause.roles:
        if role.name is None:
            default = role.format
            continue
        name = role.name.text
        if name in given:
            found.error(
                "E0809",
                f"'{name}' is given twice",
                role.span,
                notes=[(given[name].span, "first given here")],
            )
        given[name] = role
        if name not in (*known, "promote"):
            found.error(
                "E0803",
                f"a rule for {'values' if known == ('values',) else 'contractions'}"
                f" has no '{name}'",
                role.name.span,
                hint=near(name, [*known, "promote"]) or f"it has {', '.join(known)}",
            )
    if not given.keys() <= {*known, "promote"}:
        return {}
    if default is None and not any(r.format for r in given.values()):
        default = clause.label  # precision mxfp8 for ...
    roles = {
        name: _stored(given.get(name), default, formats, found)
        for name in known
        if name in given or name != "gradients"
    }
    if "gradients" in known:
        roles.setdefault("gradients", roles["activations"])
    return roles


def _stored(
    role: written.Role | None,
    default: ast.Name | None,
    formats: Formats,
    found: Diagnostics,
) -> Stored:
    name = role.format if role is not None and role.format is not None else default
    if name is None or name.text == "act":
        return Stored(None)
    format = formats.named(name)
    if format is None:
        return Stored(None)
    tile = format.tile
    span = name.span if role is None else role.span
    if role is not None and role.tile is not None:
        tile = checked_tile(role.tile, found)
        if format.scale is None:
            found.error("E0820", f"'{format}' has no scales, so it has no tiles", span)
    if role is not None and role.number is not None:
        found.error("E0820", "this is a format, a tile, or both", span, hint="weights = 128 x 128")
    elif format.scale is not None and tile is None:
        found.error(
            "E0820",
            f"'{format}' has a scale per tile, and nothing says how large a tile is",
            span,
            hint=f"{_tiled(role)}; all x all is one scale per tensor",
        )
    return Stored(format, tile)


def _tiled(role: written.Role | None) -> str:
    """How a role says a tile, with the format that it names, if it does."""
    if role is None or role.name is None or role.format is None:
        return "activations = 1 x 128, weights = 128 x 128"
    tile = "128 x 128" if role.name.text == "weights" else "1 x 128"
    return f"{role.name.text} = {role.format.text} {tile}"


def _promote(
    clause: written.Precision, roles: Mapping[str, Stored], whole: bool, found: Diagnostics
) -> int | None:
    role = next((r for r in clause.roles if r.name is not None and r.name.text == "promote"), None)
    if role is None:
        return None
    if whole or role.number is None:
        what = "only contractions sum anything" if whole else "'promote' is a number of elements"
        found.error("E0820", what, role.span, hint="promote = 128")
        return None
    promote = count(role.number.value, 1, MOST_PROMOTED, "promote", role.span, found)
    sides = [(s.tile.columns, name) for name, s in roles.items() if s.tile and s.tile.columns]
    for side, name in sides:
        if promote and promote % side and side % promote:
            found.error(
                "E0820",
                f"sums are promoted every {promote} elements, and a tile of {name} has {side}",
                role.span,
                hint="one is a multiple of the other, so that no partial sum mixes two scales",
            )
            return None
    return promote
