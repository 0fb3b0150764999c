"""Checks what stands around the blocks: constants, functions of them, requirements, presets."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dsl import syntax as ast
from dsl.compile_time import Readable
from dsl.constants import NAMED, Choices, ConstantError, Constants
from dsl.diagnostics import Diagnostics, Span, near
from dsl.files import Library, Unit, exporter
from dsl.primitives import BUILTINS
from dsl.requirements import HISTORY, most_history
from dsl.walking import calls, walk


def readable(unit: Unit, constants: Collection[str], found: Diagnostics, place: str) -> Readable:
    """What a constant expression at a file's left margin may name."""
    return Readable(
        found,
        constants,
        {n: d for n, (d, _) in unit.visible.items() if isinstance(d, ast.ConstFn)},
        lambda name: name in unit.broken or "*" in unit.broken,
        place=place,
    )


def check_declarations(
    library: Library, constants: Collection[str], found: Diagnostics
) -> frozenset[str]:
    """Check the names in constants, const functions and requirements. Gives the constants that are
    wrong, whose values need not be asked for."""
    wrong: set[str] = set()
    _circles(library, found)
    for unit in library.units:
        check = readable(unit, constants, found, "outside a block").check
        for d in unit.file.declarations:
            if isinstance(d, ast.ConstDecl) and d.value is not None and not check(d.value):
                wrong.add(d.name.text)
            elif isinstance(d, (ast.Fn, ast.Block, ast.ConstFn)) and d.name.text in BUILTINS:
                found.error(
                    "E0203",
                    f"'{d.name.text}' is a function of the language",
                    d.name.span,
                    hint="choose another name",
                )
            elif isinstance(d, ast.Require) and d.condition is not None:
                needs = readable(unit, constants, found, "outside a block")
                if HISTORY not in constants:
                    needs.values = {HISTORY: None}
                    needs.instead = "how far sequences may go is written: require history <= N"
                needs.check(most_history(d, constants) or d.condition)
            elif isinstance(d, ast.Require) and d.items is not None:
                known = {*constants, d.items.number.text}
                readable(unit, known, found, "in what items must be").check(d.items.value)
            elif isinstance(d, ast.ConstFn):
                formals = _formals(d, found)
                readable(unit, {*constants, *formals}, found, "in a const function").check(d.value)
    return frozenset(wrong)


def const_functions(library: Library, found: Diagnostics) -> dict[str, ast.ConstFn]:
    """The const functions of all files, which share their names."""
    out: dict[str, ast.ConstFn] = {}
    for declaration, _ in library.declarations(ast.ConstFn):
        assert isinstance(declaration, ast.ConstFn)
        first = out.setdefault(declaration.name.text, declaration)
        if first is not declaration:
            found.error(
                "E0203",
                f"'{declaration.name.text}' is declared twice",
                declaration.name.span,
                notes=[(first.name.span, "first declared here")],
            )
    return out


def _circles(library: Library, found: Diagnostics) -> None:
    """Const functions may not reach themselves: nothing would end them. Those that do are left out
    of what their files can name."""
    circular: set[str] = set()
    for unit in library.units:
        for d in unit.file.declarations:
            if not isinstance(d, ast.ConstFn):
                continue
            reached: dict[str, Span] = {}
            queue = list(calls(d.value))
            while queue:
                name, span = queue.pop()
                target, _ = unit.visible.get(name, (None, unit))
                if name not in reached and isinstance(target, ast.ConstFn):
                    reached[name] = span
                    queue += calls(target.value)
            if d.name.text in reached and d.name.text not in circular:
                name = d.name.text
                found.error(
                    "E0302",
                    f"'{name}' calls itself without end",
                    reached[name],
                    notes=[(d.name.span, "declared here")],
                )
                circular |= reached.keys()
    for unit in library.units:
        for name in circular:
            if isinstance(unit.visible.get(name, (None, None))[0], ast.ConstFn):
                del unit.visible[name]
                unit.broken.add(name)


def _formals(fn: ast.ConstFn, found: Diagnostics) -> list[str]:
    seen: dict[str, Span] = {}
    for formal in fn.formals:
        if formal.text in seen:
            first = [(seen[formal.text], "first declared here")]
            found.error("E0203", f"'{formal.text}' is declared twice", formal.span, notes=first)
        seen.setdefault(formal.text, formal.span)
    return list(seen)


def check_values(constants: Constants, wrong: Collection[str], found: Diagnostics) -> None:
    """Every constant that can be computed is; one that waits for a checkpoint is no mistake."""
    for name in _innermost_first(constants.declared):
        if name in wrong:
            continue
        try:
            constants.value(name, constants.declared[name].name.span)
        except ConstantError as error:
            if not (error.waits and constants.choices.config is None):
                error.report(found)


def _innermost_first(declared: Mapping[str, ast.ConstDecl]) -> list[str]:
    """Constants after those that they read, so that a long chain of them nests nowhere."""
    done: dict[str, None] = {}
    seen: set[str] = set()
    for name in declared:
        stack = [name]
        while stack:
            at = stack[-1]
            value = declared[at].value
            reads = (e.name.text for e in walk(value) if isinstance(e, ast.Ref)) if value else ()
            inner = [r for r in reads if r in declared and r not in seen]
            seen.update((at, *inner))
            if inner:
                stack += inner
            else:
                done[stack.pop()] = None
    return list(done)


# -- presets ---------------------------------------------------------------------------------------


def check_presets(
    library: Library, constants: Collection[str], choices: Choices, found: Diagnostics
) -> dict[str, ast.Dims]:
    """The presets by name."""
    presets: dict[str, ast.Dims] = {}
    for declaration, unit in library.declarations(ast.Dims):
        assert isinstance(declaration, ast.Dims)
        name = declaration.name.text
        if name in presets:
            found.error(
                "E0203",
                f"preset '{name}' is declared twice",
                declaration.name.span,
                notes=[(presets[name].name.span, "first declared here")],
            )
            continue
        presets[name] = declaration
        _settings(declaration, unit, constants, found)
    _bases(presets, found)
    default: ast.Dims | None = None
    for preset in presets.values():
        if preset.default and default is not None:
            found.error(
                "E0203",
                "two presets are the default",
                preset.name.span,
                notes=[(default.name.span, "this is one already")],
            )
        elif preset.default:
            default = preset
    if choices.preset is not None and choices.preset not in presets:
        listed = f"presets: {', '.join(presets)}" if presets else "the file has none"
        hint = near(choices.preset, presets) or listed
        found.error("E0306", f"no preset is called '{choices.preset}'", None, hint=hint)
    return presets


def _settings(preset: ast.Dims, unit: Unit, constants: Collection[str], found: Diagnostics) -> None:
    seen: dict[str, Span] = {}
    values = readable(unit, constants, found, "in a preset")
    for setting in preset.settings:
        name, span = setting.name.text, setting.name.span
        if name in seen:
            found.error(
                "E0203", f"'{name}' is set twice", span, notes=[(seen[name], "first set here")]
            )
        seen.setdefault(name, span)
        if name not in constants:
            if not values.broken(name):
                hint = f"'{name}' is a number" if name in NAMED else exporter(name, "const")
                hint = hint or near(name, constants)
                found.error("E0306", f"no constant is called '{name}'", span, hint=hint)
            continue
        values.check(setting.value)


def _bases(presets: dict[str, ast.Dims], found: Diagnostics) -> None:
    """Each base is a preset, and none reaches itself."""
    for preset in presets.values():
        base = preset.base
        if base is not None and base.text not in presets:
            found.error(
                "E0306",
                f"no preset is called '{base.text}'",
                base.span,
                hint=near(base.text, presets),
            )
    done: set[str] = set()
    for name in presets:
        path: list[str] = []
        at: str | None = name
        while at in presets and at not in done and at not in path:
            path.append(at)
            base = presets[at].base
            at = base.text if base is not None else None
        if at in path:
            circle = [*path[path.index(at) :], at]
            span = presets[circle[-2]].name.span
            found.error("E0302", f"preset '{at}' builds on itself", span, " of ".join(circle))
        done.update(path)
