"""Finds what a block declares and never reads: a term of the equations is likely forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from dsl import syntax as ast
from dsl import typed
from dsl.diagnostics import Diagnostics, Span
from dsl.files import Unit
from dsl.walking import all_items


def check_unused(
    decl: ast.Block, unit: Unit, variants: Sequence[typed.Block], found: Diagnostics
) -> None:
    """Warn of parameters, states, uses and values that no equation reads, however the conditions
    turn out.

    A parameter that nothing reads would be loaded and counted all the same; a value that nothing
    reads is often a layer's output lost by naming the one before it.
    """
    equations = [e for v in variants for d in v.defs.values() for e in d.equations]
    if not equations or decl.name.text in unit.broken:
        return
    read: set[str] = set()
    for equation in equations:
        for e in equation.expressions():
            match e:
                case typed.Value(name=name, role="param" | "state"):
                    read.add(name)
                case typed.CallBlock(use=str(name)) | typed.Chain(use=name):
                    read.add(name)
    for member in all_items(decl.members):
        if not isinstance(member, (ast.ParamDecl, ast.UseDecl)):
            continue
        name = member.name.text
        if name not in read:
            stored = isinstance(member, ast.ParamDecl)
            found.error(
                "W0511",
                f"'{name}' is {'stored' if stored else 'used'}, and no equation reads it",
                member.name.span,
                hint='a tensor of a checkpoint that the model does without is named: ignore "..."'
                if stored
                else f"call it, {name}(...), or leave it out",
            )
            read.add(name)
    _check_values(variants, found)


def _check_values(variants: Sequence[typed.Block], found: Diagnostics) -> None:
    defined: dict[tuple[str, str], typed.Equation] = {}
    read: set[tuple[str, str]] = set()
    for definition in (d for v in variants for d in v.defs.values()):
        read.add((definition.name, definition.result))
        for equation in definition.equations:
            defined.setdefault((definition.name, equation.name), equation)
            for e in equation.expressions():
                if isinstance(e, typed.Value) and e.role == "value":
                    read.add((definition.name, e.name))
    for key, equation in defined.items():
        if key not in read:
            found.error(
                "W0511",
                f"'{equation.name}' is computed, and no equation reads it",
                _name_of(equation),
                hint="does a later equation name another value by mistake?",
            )


def _name_of(equation: typed.Equation) -> Span:
    """The equation's name, of its span."""
    span = equation.span
    column = span.column + max(0, span.text.find(equation.name))
    return Span(span.source, span.line, column, span.line, column + len(equation.name))
