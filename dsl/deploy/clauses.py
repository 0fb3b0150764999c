"""The clauses of a deployment that need no mesh: recompute, train, serve."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dsl import syntax as ast
from dsl.constants import Constant, ConstantError, Constants, evaluate
from dsl.deploy import syntax as written
from dsl.deploy.names import Anatomy, kept_target
from dsl.deploy.typed import Serve, Target, Train
from dsl.diagnostics import Diagnostics, Span, near
from dsl.formats import Formats, NumberFormat, word
from dsl.tables import count, key_of, number, spelled
from dsl.units import example, measure

MOST = 1 << 40

TRAIN = "batch sequence micro_batch weight gradients master moments imbalance casts".split()
PREFILL = "prompt tokens_per_rank cache_hits utilisation imbalance casts".split()
DECODE = "context batch_per_rank tpot utilisation draft accepted imbalance casts".split()
KEYED = ("weight",)
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
        self.figures: dict[str, written.Figure] = {}
        self.keyed: list[written.Figure] = []  # weight[mtp] = 0.3
        self.unknown: list[str] = []
        for figure in figures:
            name = figure.name.text
            if name in known and name in KEYED and len(figure.keys) == 1:
                self.keyed.append(figure)
            elif name in known and name not in KEYED and not figure.keys:
                self.figures[name] = figure
            else:
                self.unknown.append(name)
                shown = [f"{n}[main]" if n in KEYED else n for n in known]
                found.error(
                    "E0803",
                    f"'{what}' has no setting '{name}'",
                    figure.name.span,
                    hint=near(name, shown) or f"settings are {', '.join(shown)}",
                )
        self.sources = {
            spelled(key_of(f)): str(f.source.value)
            for f in [*self.figures.values(), *self.keyed]
            if f.source is not None
        }

    def need(self, name: str, example: str) -> None:
        if name not in self.figures and not any(near(n, [name]) for n in self.unknown):
            self.found.error(
                "E0804", f"'{self.what}' does not say its '{name}'", self.span, hint=example
            )

    def count(self, name: str) -> int | None:
        return self._expression(name, lambda e: self.values.count(e, 1, MOST, name))

    def factor(self, name: str, least: float = 1.0) -> float | None:
        return self._expression(name, lambda e: self.values.number(e, least, 1e6, name))

    def weights(self, anatomy: Anatomy) -> dict[str, float]:
        """What each entry point's loss is multiplied by, where it is said."""
        entries = [n for n, (kind, _) in anatomy.own.names.items() if kind == "def"]
        out: dict[str, float] = {}
        for figure in self.keyed:
            entry = figure.keys[0]
            if entry.text not in entries:
                self.found.error(
                    "E0811",
                    f"'{anatomy.model.name.text}' has no entry point called '{entry.text}'",
                    entry.span,
                    hint=near(entry.text, entries) or f"it has {', '.join(entries)}",
                )
                continue
            name = spelled(key_of(figure))
            self.figures[name] = figure
            weight = self.factor(name, 0.0)
            out[entry.text] = 1.0 if weight is None else weight
        return out

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
    anatomy: Anatomy,
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
        options.weights(anatomy),
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
