"""Finds what a block declares and never reads: a term of the equations is likely forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from dsl import syntax as ast
from dsl import typed
from dsl.diagnostics import Diagnostics
from dsl.files import Unit
from dsl.walking import all_items


def check_unused(
    decl: ast.Block, unit: Unit, variants: Sequence[typed.Block], found: Diagnostics
) -> None:
    """Warn of parameters, states and uses that no def reads, however the conditions turn out.

    A parameter that nothing reads would be loaded and counted all the same.
    """
    equations = [e for v in variants for d in v.defs.values() for e in d.equations]
    if not equations or decl.name.text in unit.broken:
        return
    read: set[str] = set()
    for equation in equations:
        for e in typed.walk(equation.value):
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
