"""Checks ``names``: where a checkpoint keeps the tensors of a block."""

from __future__ import annotations

import re
from collections.abc import Collection

from dsl import syntax as ast
from dsl.diagnostics import Diagnostics, Span, near
from dsl.files import Library, Unit, exporter
from dsl.walking import all_items


def check_names(
    library: Library, constants: Collection[str], found: Diagnostics
) -> dict[str, ast.Names]:
    """The names of each block type. The file that was asked for has the last word."""
    out: dict[str, tuple[ast.Names, Unit]] = {}
    for declaration, unit in library.declarations(ast.Names):
        assert isinstance(declaration, ast.Names)
        name = declaration.block.text
        target, home = unit.visible.get(name, (None, unit))
        if not isinstance(target, ast.Block):
            if name not in unit.broken and "*" not in unit.broken:
                blocks = [n for n, (d, _) in unit.visible.items() if isinstance(d, ast.Block)]
                hint = exporter(name) or near(name, blocks)
                found.error("E0205", f"'{name}' is no block", declaration.block.span, hint=hint)
            continue
        before = out.get(name)
        if before is not None and before[1] is unit:
            found.error(
                "E0203",
                f"the names of '{name}' are declared twice",
                declaration.block.span,
                notes=[(before[0].block.span, "first declared here")],
            )
        _entries(declaration, target, home, constants, found)
        for literal in declaration.ignored:
            _placeholders(literal, {""}, constants, found)  # {}: any number
        out[name] = (declaration, unit)
    return {name: declaration for name, (declaration, _) in out.items()}


def _entries(
    names: ast.Names, block: ast.Block, home: Unit, constants: Collection[str], found: Diagnostics
) -> None:
    members = {
        m.name.text: isinstance(m, ast.UseDecl) and m.array is not None
        for m in all_items(block.members)
        if isinstance(m, (ast.ParamDecl, ast.UseDecl))
    }
    seen: dict[str, Span] = {}
    for entry in names.entries:
        name, span = entry.name.text, entry.name.span
        if name in seen:
            first = [(seen[name], "first named here")]
            found.error("E0203", f"'{name}' is named twice", span, notes=first)
        seen[name] = span
        if name not in members:
            if name not in home.broken:
                found.error(
                    "E0701",
                    f"'{block.name.text}' has no parameter or use called '{name}'",
                    span,
                    notes=[(block.name.span, "declared here")],
                    hint=near(name, members),
                )
            continue
        if members[name] != (entry.array is not None):
            wanted = f'{name}[i] = "...{{i}}"' if members[name] else f'{name} = "..."'
            what = "is an array of blocks" if members[name] else "is not an array of blocks"
            found.error("E0702", f"'{name}' {what}", span, hint=f"write {wanted}")
            continue
        number = entry.array.text if entry.array else None
        _placeholders(entry.template, {number} if number else set(), constants, found)
        if number and f"{{{number}}}" not in str(entry.template.value):
            found.error(
                "E0702",
                f"this name does not say where the number of '{name}' stands",
                entry.template.span,
                hint=f"write {{{number}}} in it",
            )


def _placeholders(
    literal: ast.Literal, numbers: set[str], constants: Collection[str], found: Diagnostics
) -> None:
    template = str(literal.value)
    if not re.fullmatch(r"[^{}]*(\{[^{}]*\}[^{}]*)*", template):
        found.error("E0702", "the braces of this name do not pair up", literal.span)
        return
    for placeholder in placeholders(template):
        if placeholder not in numbers and placeholder not in constants:
            found.error(
                "E0702",
                f"'{{{placeholder}}}' is neither the array's number nor a constant",
                literal.span,
                hint=near(placeholder, [*numbers, *constants]),
            )


def placeholders(template: str) -> list[str]:
    """The names in braces of a checkpoint name."""
    return re.findall(r"\{([^{}]*)\}", template)
