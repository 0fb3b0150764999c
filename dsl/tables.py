"""Devices, clusters and number formats as tables of figures, inherited ones included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsl import syntax as ast
from dsl.deploy.syntax import Deploy, Figure, Table
from dsl.diagnostics import Diagnostics, Span, near
from dsl.files import Library, Unit

KINDS = {"device": "device", "cluster": "cluster", "format": "number format"}
MOST_BASES = 16  # a longer chain of inheritance is a slip
Key = tuple[str, ...]  # a figure's name and what stands in its brackets


@dataclass(frozen=True)
class Merged:
    """A table and the figures it inherits; its own have the last word."""

    table: Table
    figures: Mapping[Key, Figure]
    bases: tuple[str, ...]  # nearest first

    @property
    def name(self) -> str:
        return self.table.name.text


class Tables:
    """Every table that a file and its imports declare, by kind and name."""

    def __init__(self, library: Library, found: Diagnostics):
        self.found = found
        self.broken = {name for unit in library.units for name in unit.broken}
        self.declared: dict[str, dict[str, tuple[Table, Unit]]] = {kind: {} for kind in KINDS}
        self._merged: dict[tuple[str, str], Merged | None] = {}
        for declaration, unit in library.declarations(Table):
            assert isinstance(declaration, Table)
            self._declare(declaration, unit, unit is library.root)

    def _declare(self, table: Table, unit: Unit, is_root: bool) -> None:
        known, name = self.declared[table.kind], table.name.text
        before = known.get(name)
        if before is not None and (before[1] is unit or not is_root):
            self.found.error(
                "E0203",
                f"{KINDS[table.kind]} '{name}' is declared twice",
                table.name.span,
                notes=[(before[0].name.span, "first declared here")],
            )
            return
        known[name] = (table, unit)

    def all(self, kind: str) -> list[Merged]:
        """Every table of a kind that has no mistake in its inheritance."""
        tables = [self.merged(kind, table.name) for table, _ in self.declared[kind].values()]
        return [t for t in tables if t is not None]

    def merged(self, kind: str, name: ast.Name, hint: str = "") -> Merged | None:
        """The table called ``name``; None after a diagnostic."""
        if name.text not in self.declared[kind]:
            if name.text not in self.broken and "*" not in self.broken:
                near_hint = near(name.text, self.declared[kind])
                self.found.error(
                    "E0806",
                    f"no {KINDS[kind]} is called '{name.text}'",
                    name.span,
                    hint=near_hint or hint or "is an import missing?",
                )
            return None
        key = (kind, name.text)
        if key not in self._merged:
            self._merged[key] = self._merge(kind, self.declared[kind][name.text][0])
        return self._merged[key]

    def _merge(self, kind: str, table: Table) -> Merged | None:
        chain = [table]
        while chain[-1].base is not None:
            base = chain[-1].base
            if base.text not in self.declared[kind]:
                return self.merged(kind, base)
            following = self.declared[kind][base.text][0]
            if following in chain:
                circle = chain[chain.index(following) :]
                report_circle(KINDS[kind], circle, self.found)
                return None
            if len(chain) > MOST_BASES:
                report_depth(KINDS[kind], table, self.found)
                return None
            chain.append(following)
        figures: dict[Key, Figure] = {}
        for one in reversed(chain):
            figures |= self._own(one)
        return Merged(table, figures, tuple(t.name.text for t in chain[1:]))

    def _own(self, table: Table) -> dict[Key, Figure]:
        own: dict[Key, Figure] = {}
        for figure in table.figures:
            key = key_of(figure)
            if key in own:
                self.found.error(
                    "E0809",
                    f"'{spelled(key)}' is given twice",
                    figure.span,
                    notes=[(own[key].span, "first given here")],
                )
                continue
            own[key] = figure
        return own


def key_of(figure: Figure) -> Key:
    return (figure.name.text, *(k.text for k in figure.keys))


def spelled(key: Key) -> str:
    """``rate[gemm, e4m3]``."""
    return key[0] + (f"[{', '.join(key[1:])}]" if len(key) > 1 else "")


def number(
    value: object, least: float, most: float, name: str, span: Span, found: Diagnostics
) -> int | float | None:
    """A plain number between two bounds; None after a diagnostic."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        found.error("E0805", f"'{name}' must be a number", span)
        return None
    if not least <= value <= most:
        bounds = f"at least {least:g}" if value < least else f"at most {most:g}"
        found.error("E0805", f"'{name}' must be {bounds}", span)
        return None
    return value


def count(
    value: object, least: int, most: int, name: str, span: Span, found: Diagnostics
) -> int | None:
    """A whole number between two bounds; None after a diagnostic."""
    if isinstance(value, float):
        found.error("E0805", f"'{name}' must be a whole number", span)
        return None
    checked = number(value, least, most, name, span, found)
    return None if checked is None else int(checked)


def report_circle(what: str, circle: Sequence[Table | Deploy], found: Diagnostics) -> None:
    """Declarations that inherit from each other, at the one that comes first."""
    first = min(circle, key=lambda d: (d.span.source.name, d.span.line))
    assert first.base is not None
    at = circle.index(first)
    shown = " from ".join(d.name.text for d in [*circle[at:], *circle[:at], first])
    found.error("E0808", f"{what} '{first.name.text}' inherits from itself", first.base.span, shown)


def report_depth(what: str, declaration: Table | Deploy, found: Diagnostics) -> None:
    message = f"{what} '{declaration.name.text}' inherits through more than {MOST_BASES} others"
    found.error("E0808", message, declaration.name.span)
