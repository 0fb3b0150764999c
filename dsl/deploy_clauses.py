"""The clauses of a deployment that need no mesh: precision, recompute, train, serve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dsl import deploy_syntax as written
from dsl import syntax as ast
from dsl.constants import Constant, ConstantError, Constants, evaluate
from dsl.deploy import PrecisionRule, Serve, Stored, Target, Train
from dsl.deploy_names import Anatomy, kept_target, selected_target
from dsl.diagnostics import Diagnostics, Span, near
from dsl.formats import Formats, NumberFormat, checked_tile, word
from dsl.tables import count, number
from dsl.units import example, measure

OPERANDS = ("weights", "activations", "gradients")
MOST = 1 << 40

TRAIN = "batch sequence micro_batch gradients master moments imbalance casts".split()
PREFILL = "prompt tokens_per_rank cache_hits utilisation imbalance casts".split()
DECODE = "context batch_per_rank tpot utilisation draft accepted imbalance casts".split()
CASTS = ("fused", "separate")


class Values:
    """Values of expressions in deployments. What waits for a checkpoint's sizes is no mistake."""

    def __init__(self, constants: Constants, problems: Diagnostics):
        self.constants = constants
        self.problems = problems
        self.waiting = False

    def of(self, expr: ast.Expr) -> Constant:
        """The value of an expression.

        Raises:
            ConstantError: it has none.
        """

        def no_size(name: str, span: Span) -> Constant:
            raise ConstantError("E0206", f"no index '{name}' is known here", span)

        return evaluate(expr, self.constants.value, no_size, self.constants.functions)

    def count(self, expr: ast.Expr, least: int, most: int, name: str) -> int | None:
        """A whole number; None if it waits, or after a diagnostic."""
        value = self._value(expr)
        if value is None:
            return None
        return count(value, least, most, name, expr.span, self.problems)

    def number(self, expr: ast.Expr, least: float, most: float, name: str) -> float | None:
        value = self._value(expr)
        if value is None:
            return None
        return number(value, least, most, name, expr.span, self.problems)

    def _value(self, expr: ast.Expr) -> Constant:
        try:
            value = self.of(expr)
        except ConstantError as error:
            if error.code == "E0301" and self.constants.choices.config is None:
                self.waiting = True
            else:
                error.report(self.problems)
            return None
        if value is None:
            self.problems.error("E0805", "null is no number", expr.span)
        return value


# -- precision -------------------------------------------------------------------------------------


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
    if role is not None and role.count is not None:
        found.error("E0820", "this is a format, a tile, or both", span, hint="weights = 128 x 128")
    elif format.scale is not None and tile is None:
        found.error(
            "E0820",
            f"'{format}' has a scale per tile, and nothing says how large a tile is",
            span,
            hint="activations = 1 x 128, weights = 128 x 128; all x all is one scale per tensor",
        )
    return Stored(format, tile)


def _promote(
    clause: written.Precision, roles: Mapping[str, Stored], whole: bool, found: Diagnostics
) -> int | None:
    role = next((r for r in clause.roles if r.name is not None and r.name.text == "promote"), None)
    if role is None:
        return None
    if whole or role.count is None:
        what = "only contractions sum anything" if whole else "'promote' is a number of elements"
        found.error("E0820", what, role.span, hint="promote = 128")
        return None
    promote = count(role.count.value, 1, MOST, "promote", role.span, found)
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


# -- recompute -------------------------------------------------------------------------------------


def recomputed(
    clause: written.Recompute, anatomy: Anatomy, found: Diagnostics
) -> tuple[Target, ...]:
    if [str(p) for p in clause.places] == ["none"]:
        return ()
    targets = [kept_target(place, anatomy, found) for place in clause.places]
    return tuple(t for t in targets if t is not None)


# -- train and serve -------------------------------------------------------------------------------


class _Options:
    """The settings of a clause, each read once by its kind."""

    def __init__(
        self,
        figures: Iterable[written.Figure],
        known: list[str],
        what: str,
        span: Span,
        values: Values,
        found: Diagnostics,
    ):
        self.what, self.span, self.values, self.found = what, span, values, found
        self.figures = {f.name.text: f for f in figures}
        self.unknown = [name for name in self.figures if name not in known]
        for name, figure in self.figures.items():
            if name not in known or figure.keys:
                found.error(
                    "E0803",
                    f"'{what}' has no setting '{name}'",
                    figure.name.span,
                    hint=near(name, known) or f"settings are {', '.join(known)}",
                )
        self.sources = {
            name: str(f.source.value) for name, f in self.figures.items() if f.source is not None
        }

    def need(self, name: str, example: str) -> None:
        if name not in self.figures and not any(near(n, [name]) for n in self.unknown):
            self.found.error(
                "E0804", f"'{self.what}' does not say its '{name}'", self.span, hint=example
            )

    def count(self, name: str) -> int | None:
        return self._expression(name, lambda e: self.values.count(e, 1, MOST, name))

    def factor(self, name: str) -> float | None:
        return self._expression(name, lambda e: self.values.number(e, 1.0, 1e6, name))

    def _expression(self, name: str, read: Callable[[ast.Expr], Any]) -> Any:
        figure = self.figures.get(name)
        if figure is None:
            return None
        if isinstance(figure.value, (written.Quantity, written.TileSize)):
            self.found.error("E0801", f"'{name}' is a number without a unit", figure.value.span)
            return None
        return read(figure.value)

    def seconds(self, name: str) -> float | None:
        figure = self.figures.get(name)
        if figure is None:
            return None
        if not isinstance(figure.value, written.Quantity):
            hint = example(("time",))
            self.found.error("E0801", f"'{name}' has no unit", figure.value.span, hint=hint)
            return None
        measured = measure(figure.value, ("time",), name, self.found)
        if measured is not None and measured.value <= 0:
            self.found.error("E0805", f"'{name}' must be above 0", figure.value.span)
        return None if measured is None else measured.value

    def share(self, name: str) -> float | None:
        """``56.3%`` or ``0.563``."""
        figure = self.figures.get(name)
        if figure is None:
            return None
        if isinstance(figure.value, written.Quantity):
            measured = measure(figure.value, ("fraction",), name, self.found)
            if measured is None:
                return None
            checked = number(measured.value, 0.0, 1.0, name, figure.value.span, self.found)
            return None if checked is None else float(checked)
        return self._expression(name, lambda e: self.values.number(e, 0.0, 1.0, name))

    def format(self, name: str, formats: Formats) -> NumberFormat | None:
        figure = self.figures.get(name)
        named = ast.Name("f32", self.span) if figure is None else word(figure)
        if named is None:
            assert figure is not None
            self.found.error("E0805", f"'{name}' must name a number format", figure.span)
            return None
        return formats.named(named)

    def one_of(self, name: str, known: Iterable[str], what: str = "") -> str | None:
        figure = self.figures.get(name)
        if figure is None:
            return None
        named = word(figure)
        if named is None or named.text not in known:
            self.found.error(
                "E0805",
                f"'{name}' must be {what or ' or '.join(known)}",
                figure.value.span,
                hint=near(named.text if named else "", known),
            )
            return None
        return named.text


def train(
    figures: Iterable[written.Figure],
    span: Span,
    values: Values,
    formats: Formats,
    found: Diagnostics,
) -> Train | None:
    """A training step; None after a diagnostic."""
    options = _Options(figures, TRAIN, "train", span, values, found)
    options.need("batch", "batch = 15360, in sequences per step")
    options.need("sequence", "sequence = 4096, in tokens")
    made = [options.format(name, formats) for name in ("gradients", "master", "moments")]
    gradients, master, moments = made
    if gradients is None or master is None or moments is None:
        return None
    return Train(
        options.count("batch") or 1,
        options.count("sequence") or 1,
        options.count("micro_batch") or 1,
        gradients,
        master,
        moments,
        options.factor("imbalance") or 1.0,
        options.one_of("casts", CASTS) or "fused",
        options.sources,
        span,
    )


def serve(
    phase: ast.Name,
    figures: Iterable[written.Figure],
    anatomy: Anatomy,
    values: Values,
    found: Diagnostics,
) -> Serve | None:
    """The load of an inference deployment; None after a diagnostic."""
    if phase.text not in ("prefill", "decode"):
        hint = near(phase.text, ("prefill", "decode"))
        found.error("E0821", "a deployment serves prefill or decode", phase.span, hint=hint)
        return None
    decodes = phase.text == "decode"
    what = f"serve {phase.text}"
    known = DECODE if decodes else PREFILL
    options = _Options(figures, known, what, phase.span, values, found)
    if decodes:
        options.need("context", "context = 4096, in cached positions per sequence")
    else:
        options.need("prompt", "prompt = 4096, in tokens")
    if decodes and not {"batch_per_rank", "tpot"} & options.figures.keys():
        options.need("batch_per_rank", "batch_per_rank = 128, or a limit: tpot = 50 ms")
    entries = [n for n, (kind, _) in anatomy.own.names.items() if kind == "def"]
    draft = options.one_of("draft", entries, "an entry point of the model")
    hits, used, accepted = (options.share(n) for n in ("cache_hits", "utilisation", "accepted"))
    return Serve(
        phase.text,
        options.count("batch_per_rank"),
        options.count("tokens_per_rank"),
        options.seconds("tpot"),
        options.count("prompt"),
        options.count("context"),
        hits or 0.0,
        1.0 if used is None else used,
        draft,
        accepted or 0.0,
        options.factor("imbalance") or 1.0,
        options.one_of("casts", CASTS) or "fused",
        options.sources,
        phase.span,
    )
