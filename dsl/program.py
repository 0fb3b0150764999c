"""A checked program: the one thing that the compiler reads of the language.

``open_program`` reads a file and its imports, finds every mistake, settles the constants, and hands
out the typed form of each block under the conditions that the constants decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsl import syntax as ast
from dsl import typed
from dsl.check import ProgramChecker
from dsl.constants import Choices, ConstantError, Constants, check_requirements
from dsl.diagnostics import Diagnostic, DiagnosticError, Diagnostics, Span, near
from dsl.files import Library, Unit, load, locate
from dsl.instances import Instances
from dsl.scope import Failed
from dsl.variants import flatten, variants


@dataclass
class CheckedProgram:
    """A program without mistakes. ``model`` is None for a file that only declares blocks."""

    library: Library
    checker: ProgramChecker
    constants: Constants
    model: tuple[ast.Block, Unit] | None
    names: dict[str, ast.Names]

    @property
    def name(self) -> str:
        return self.model[0].name.text if self.model else self.library.root.path.stem

    def entries(self, model: typed.Block) -> list[str]:
        """The model's defs that users call: ``main``, and those that no other def of it calls."""
        equations = [e for d in model.defs.values() for e in d.equations]
        called = {
            e.method
            for equation in equations
            for e in typed.walk(equation.value)
            if isinstance(e, typed.CallBlock) and e.use is None
        }
        return [name for name in model.defs if name == "main" or name not in called]


def open_program(
    file: str, choices: Choices | None = None, model: str | None = None
) -> CheckedProgram:
    """Read and check ``file`` (a path or a shipped model's name) under the given choices.

    Raises:
        DiagnosticError: every mistake of the file and its imports, in the order of the text.
    """
    found = Diagnostics()
    program = check_program(file, choices or Choices(), model, found)
    found.raise_if_any()
    assert program is not None
    return program


def check_file(file: str) -> list[Diagnostic]:
    """Every mistake of a file, for ``dslc check``."""
    found = Diagnostics()
    try:
        check_program(file, Choices(), None, found)
    except DiagnosticError as error:
        return error.diagnostics
    return DiagnosticError(found.found).diagnostics


def check_program(
    file: str, choices: Choices, model: str | None, found: Diagnostics
) -> CheckedProgram | None:
    library = load(locate(file), found)
    checker = ProgramChecker(library, found)
    _check_recursion(library, found)
    before = len(found.found)
    for unit in library.units:
        for declaration in unit.file.declarations:
            if isinstance(declaration, (ast.Block, ast.Fn)):
                _check_variants(checker, declaration, unit)
    for unit in library.units:
        for name in unit.indices:
            checker.file_index(unit, name)
    functions = {
        d.name.text: d for d, _ in library.declarations(ast.ConstFn) if isinstance(d, ast.ConstFn)
    }
    presets = _presets(library, checker, choices, found)
    constants = Constants(checker.constants, functions, presets, choices, found)
    _check_constants(checker, constants, found)
    if len(found.found) == before:
        requirements = [
            d for d, _ in library.declarations(ast.Require) if isinstance(d, ast.Require)
        ]
        check_requirements(requirements, constants, found)
    names = _names(library, checker, found)
    chosen = _model(library, model, found)
    if chosen is not None and not found.found:
        _check_sizes(checker, constants, chosen, found)
    return CheckedProgram(library, checker, constants, chosen, names)


def _check_variants(checker: ProgramChecker, declaration: ast.Block | ast.Fn, unit: Unit) -> None:
    items = declaration.members if isinstance(declaration, ast.Block) else declaration.body
    for decide in variants(items):
        try:
            if isinstance(declaration, ast.Block):
                checker.block(declaration, unit, decide)
            else:
                checker.fn(declaration, unit, decide)
        except Failed:
            pass


def _check_recursion(library: Library, found: Diagnostics) -> None:
    """Blocks use blocks and functions call functions, but none reaches itself."""
    state: dict[int, int] = {}  # 1: being looked at, 2: done

    def visit(declaration: ast.Block | ast.Fn, unit: Unit) -> None:
        state[id(declaration)] = 1
        for name, span in _reached(declaration):
            visible = unit.visible.get(name)
            if visible is None or not isinstance(visible[0], (ast.Block, ast.Fn)):
                continue
            target, home = visible
            if state.get(id(target)) == 1:
                found.error(
                    "E0509",
                    f"'{target.name.text}' reaches itself here",
                    span,
                    notes=[(target.name.span, "declared here")],
                    hint="layers are an array of blocks: use layers[a] = Block[d], run by chain[a](layers, ...)",
                )
                raise DiagnosticError(found.found)
            if id(target) not in state:
                visit(target, home)  # type: ignore[arg-type]
        state[id(declaration)] = 2

    for unit in library.units:
        for declaration in unit.file.declarations:
            if isinstance(declaration, (ast.Block, ast.Fn)) and id(declaration) not in state:
                try:
                    visit(declaration, unit)
                except RecursionError:
                    found.error("E0509", "blocks use each other too deeply", declaration.name.span)


def _reached(declaration: ast.Block | ast.Fn) -> Iterator[tuple[str, Span]]:
    if isinstance(declaration, ast.Block):
        for decide in variants(declaration.members)[:2] or [lambda _: True]:
            for member in flatten(declaration.members, decide):
                if isinstance(member, ast.UseDecl):
                    yield member.block.text, member.block.span
    else:
        for decide in (lambda _: True), (lambda _: False):
            for item in flatten(declaration.body, decide):
                if isinstance(item, ast.Equation):
                    yield from calls(item.value)


def calls(expr: ast.Expr) -> Iterator[tuple[str, Span]]:
    """Names called in an expression."""
    match expr:
        case ast.Call():
            yield expr.name.text, expr.name.span
            for argument in expr.arguments:
                yield from calls(argument)
        case ast.Unary(operand=operand):
            yield from calls(operand)
        case ast.Binary(left=left, right=right):
            yield from calls(left)
            yield from calls(right)
        case ast.Choose(condition=c, then=a, otherwise=b):
            for part in (c, a, b):
                yield from calls(part)
        case ast.Group(items=items):
            for item in items:
                for part in item.parts:
                    yield from calls(part)
    if isinstance(expr, (ast.Ref, ast.Call)):
        for subscript in expr.subscripts or ():
            for part in subscript.parts:
                yield from calls(part)


# -- what stands around the blocks -----------------------------------------------------------------


def _presets(
    library: Library, checker: ProgramChecker, choices: Choices, found: Diagnostics
) -> dict[str, ast.Dims]:
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
        presets[name] = declaration
        for setting in declaration.settings:
            if setting.name.text not in checker.constants and "*" not in unit.broken:
                found.error(
                    "E0306",
                    f"no constant is called '{setting.name.text}'",
                    setting.name.span,
                    hint=near(setting.name.text, checker.constants),
                )
    for preset in presets.values():
        if preset.base is not None and preset.base.text not in presets:
            found.error(
                "E0306",
                f"no preset is called '{preset.base.text}'",
                preset.base.span,
                hint=near(preset.base.text, presets),
            )
    if choices.preset is not None and choices.preset not in presets:
        hint = near(choices.preset, presets) or (
            f"presets: {', '.join(presets)}" if presets else "the file has none"
        )
        found.error("E0306", f"no preset is called '{choices.preset}'", None, hint=hint)
    return presets


def _check_constants(checker: ProgramChecker, constants: Constants, found: Diagnostics) -> None:
    """Every constant that can be computed is; one that waits for a checkpoint is no mistake."""
    for name, declaration in checker.constants.items():
        try:
            constants.value(name, declaration.name.span)
        except ConstantError as error:
            waits = (
                error.code == "E0301"
                and constants.choices.config is None
                and error.message.endswith("no value")
            )
            if not waits:
                error.report(found)


def _check_sizes(
    checker: ProgramChecker, constants: Constants, model: tuple[ast.Block, Unit], found: Diagnostics
) -> None:
    """The extents of every block of the model, where the constants have values."""
    try:
        Instances(checker, constants).walk(*model)
    except DiagnosticError as error:
        if constants.choices.config is None and any(d.code == "E0301" for d in error.diagnostics):
            return  # sizes come with a checkpoint
        found.found += error.diagnostics


def _names(library: Library, checker: ProgramChecker, found: Diagnostics) -> dict[str, ast.Names]:
    out: dict[str, ast.Names] = {}
    for declaration, unit in library.declarations(ast.Names):
        assert isinstance(declaration, ast.Names)
        name = declaration.block.text
        visible = unit.visible.get(name)
        if visible is None or not isinstance(visible[0], ast.Block):
            if name not in unit.broken and "*" not in unit.broken:
                blocks = [n for n, (d, _) in unit.visible.items() if isinstance(d, ast.Block)]
                found.error(
                    "E0205",
                    f"'{name}' is no block",
                    declaration.block.span,
                    hint=near(name, blocks),
                )
            continue
        _check_names(declaration, visible[0], checker, found)
        out[name] = declaration
    return out


def _check_names(
    names: ast.Names, block: ast.Block, checker: ProgramChecker, found: Diagnostics
) -> None:
    members: dict[str, bool] = {}
    for decide in variants(block.members):
        for member in flatten(block.members, decide):
            if isinstance(member, ast.ParamDecl):
                members[member.name.text] = False
            elif isinstance(member, ast.UseDecl):
                members[member.name.text] = member.array is not None
    for entry in names.entries:
        name = entry.name.text
        if name not in members:
            found.error(
                "E0701",
                f"'{block.name.text}' has no parameter or use called '{name}'",
                entry.name.span,
                notes=[(block.name.span, "declared here")],
                hint=near(name, members),
            )
            continue
        if members[name] != (entry.array is not None):
            wanted = f'{name}[i] = "...{{i}}"' if members[name] else f'{name} = "..."'
            what = "is an array of blocks" if members[name] else "is not an array"
            found.error("E0702", f"'{name}' {what}", entry.name.span, hint=wanted)
            continue
        known = {entry.array.text} if entry.array else set()
        for placeholder in placeholders(str(entry.template.value)):
            if placeholder not in known and placeholder not in checker.constants:
                found.error(
                    "E0702",
                    f"'{{{placeholder}}}' is neither the array's number nor a constant",
                    entry.template.span,
                    hint=near(placeholder, [*known, *checker.constants]),
                )
        if entry.array and f"{{{entry.array.text}}}" not in str(entry.template.value):
            found.error(
                "E0702",
                f"this name does not say where the number of '{name}' stands",
                entry.template.span,
                hint=f"write {{{entry.array.text}}} in it",
            )


def placeholders(template: str) -> list[str]:
    """The names in braces of a checkpoint name."""
    return [part.split("}")[0] for part in template.split("{")[1:]]


def _model(
    library: Library, wanted: str | None, found: Diagnostics
) -> tuple[ast.Block, Unit] | None:
    models = {
        d.name.text: (d, library.root)
        for d in library.root.file.declarations
        if isinstance(d, ast.Block) and d.is_model
    }
    if not models:  # a file of deployments names a model that it imports
        for d, u in library.declarations(ast.Block):
            if isinstance(d, ast.Block) and d.is_model:
                models[d.name.text] = (d, u)
    if wanted is not None:
        if wanted not in models:
            found.error("E0205", f"no model is called '{wanted}'", None, hint=near(wanted, models))
            return None
        return models[wanted]
    if len(models) > 1:
        return None
    chosen = next(iter(models.values()), None)
    if chosen is not None and not any(
        isinstance(m, ast.Def) and m.name.text == "main"
        for choice in (True, False)
        for m in flatten(chosen[0].members, lambda _, choice=choice: choice)
    ):
        found.error(
            "E0507",
            f"the model '{chosen[0].name.text}' has no entry point 'main'",
            chosen[0].name.span,
            hint="def main(token[t] of w) -> logits[t,w] { ... }",
        )
    return chosen
