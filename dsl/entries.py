"""The entry points of a model: which of its defs users call, and whether these can be run."""

from __future__ import annotations

from dsl import typed
from dsl.diagnostics import Diagnostics
from dsl.scope import atoms


def entries(model: typed.Block) -> list[str]:
    """``main``, and the defs that no other def of the model calls."""
    called = _called(model)
    return [name for name in model.defs if name == "main" or name not in called]


def check_entries(model: typed.Block, found: Diagnostics) -> None:
    """Report entry points that cannot be run: nothing over time drives them, or defs call them."""
    for name in entries(model):
        entry, calls = model.defs[name], _called(model)
        if not any(i.kind == "time" for f in entry.formals for a in f.axes for i in atoms(a)):
            found.error(
                "E0507",
                f"no input of the entry point '{name}' runs over time",
                entry.span,
                hint="def main(token[t] of w) -> logits[t,w] { ... }",
            )
        for formal in entry.formals:
            if formal.dtype != "act":
                found.error(
                    "E0507",
                    f"an input of the entry point '{name}' has the type that the model runs in",
                    formal.span,
                    hint="leave the type out; a block may take f32",
                )
        if name in calls:  # main: an entry point gives the rows that are wanted, a call all of them
            found.error(
                "E0507",
                f"'{name}' is an entry point, and no other def can call it",
                calls[name].span,
                notes=[(entry.span, "declared here")],
                hint="what both compute goes into a def of its own, which both call",
            )


def _called(model: typed.Block) -> dict[str, typed.Expr]:
    """The defs that others of the model call, each with one call."""
    return {
        e.method: e
        for definition in model.defs.values()
        for equation in definition.equations
        for e in equation.expressions()
        if isinstance(e, typed.CallBlock) and e.use is None
    }
