"""A checked program: the one thing that the compiler reads of the language.

``open_program`` reads a file and its imports, finds every mistake, settles the constants, and hands
out the typed form of each block under the conditions that the constants decide.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace

from dsl import syntax as ast
from dsl.check import ProgramChecker
from dsl.checkpoint_names import check_names, check_tensors
from dsl.clusters import Cluster
from dsl.constants import Choices, Constants
from dsl.declarations import check_declarations, check_presets, check_values, const_functions
from dsl.deploy.check import check_deployments
from dsl.deploy.typed import Deployment
from dsl.diagnostics import Diagnostic, DiagnosticError, Diagnostics, Note, in_order, near
from dsl.entries import check_entries
from dsl.files import Library, Unit, load, locate
from dsl.formats import NumberFormat
from dsl.instances import Instances
from dsl.recursion import check_recursion
from dsl.requirements import check_requirements
from dsl.scope import Failed
from dsl.tensor_names import check_clashes
from dsl.unused import check_unused
from dsl.variants import variants
from dsl.walking import all_items


@dataclass
class CheckedProgram:
    """A program without mistakes. ``model`` is None for a file that only declares blocks, or
    several models none of which was chosen; ``deployments`` are those of the model."""

    library: Library
    checker: ProgramChecker
    constants: Constants
    model: tuple[ast.Block, Unit] | None
    names: dict[str, ast.Names]
    formats: dict[str, NumberFormat] = field(default_factory=dict)
    clusters: dict[str, Cluster] = field(default_factory=dict)
    deployments: dict[str, Deployment] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.model[0].name.text if self.model else self.library.root.path.stem


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


def check_file(
    file: str,
    warnings: bool = False,
    choices: Choices | None = None,
    model: str | None = None,
) -> list[Diagnostic]:
    """Every mistake of a file, for ``dslc check``; with ``warnings``, what is likely one too.

    Args:
        choices: the sizes at which deployments are looked at, those of the default preset unless
            given; the model is looked at with every preset.
        model: one of several.
    """
    found = Diagnostics()
    try:
        program = check_program(file, choices or Choices(), model, found)
    except DiagnosticError as error:
        return error.diagnostics
    if program is not None:
        for deployment in program.deployments.values():
            own = deployment.span.source is program.library.root.source
            if own or choices is None:  # an imported one may be written for other sizes
                found.found += deployment.problems
        if not found.found:
            _check_presets(program, found)
    return in_order([*found.found, *(found.warnings if warnings else ())])


def check_program(
    file: str, choices: Choices, model: str | None, found: Diagnostics
) -> CheckedProgram | None:
    library = load(locate(file), found)
    preset = [
        s for d, _ in library.declarations(ast.Dims) if isinstance(d, ast.Dims) for s in d.settings
    ]
    checker = ProgramChecker(library, found, {*choices.set, *(s.name.text for s in preset)})
    check_recursion(library, found)
    before = len(found.found)
    for unit in library.units:
        for declaration in unit.file.declarations:
            if isinstance(declaration, (ast.Block, ast.Fn)):
                _check_variants(checker, declaration, unit)
    for unit in library.units:
        for name in unit.indices:
            checker.file_index(unit, name)
    wrong = check_declarations(library, checker.constants, found)
    presets = check_presets(library, checker.constants, choices, found)
    functions = const_functions(library, found)
    constants = Constants(checker.constants, functions, presets, choices, found)
    check_values(constants, wrong, found)
    if len(found.found) == before:
        check_requirements(library, constants, found)
    names = check_names(library, checker.constants, found)
    chosen = _model(library, model, found)
    instances = Instances(checker, constants)
    if chosen is not None and not found.found:
        _check_sizes(instances, chosen, names, found)
    beside = check_deployments(library, instances, chosen, found)
    return CheckedProgram(
        library,
        checker,
        constants,
        chosen,
        names,
        beside.formats,
        beside.clusters,
        beside.deployments,
    )


def _check_variants(checker: ProgramChecker, declaration: ast.Block | ast.Fn, unit: Unit) -> None:
    before = len(checker.found.found)
    checker.check_head(declaration, unit)
    if isinstance(declaration, ast.Fn):
        for decide in variants(declaration.body):
            with suppress(Failed):
                checker.fn(declaration, unit, decide)
        return
    blocks = [checker.block(declaration, unit, decide) for decide in variants(declaration.members)]
    if len(checker.found.found) == before:
        check_unused(declaration, unit, blocks, checker.found)


def _check_sizes(
    instances: Instances,
    model: tuple[ast.Block, Unit],
    names: dict[str, ast.Names],
    found: Diagnostics,
) -> None:
    """The extents of every block of the model, where the constants have values, and the names of
    its tensors."""
    try:
        instances.walk(*model)
        check_entries(instances.root(*model).block, found)
        before = len(found.found)
        check_tensors(instances, instances.root(*model), names, found)
        if len(found.found) == before:
            check_clashes(instances, instances.root(*model), names, found)
    except DiagnosticError as error:
        if instances.constants.choices.config is None and any(
            d.code == "E0301" for d in error.diagnostics
        ):
            return  # sizes come with a checkpoint
        found.found += error.diagnostics


def _check_presets(program: CheckedProgram, found: Diagnostics) -> None:
    """The extents under every preset of the file that was asked for."""
    declared = program.constants
    for preset in (d for d in program.library.root.file.declarations if isinstance(d, ast.Dims)):
        if program.model is None or preset.default:
            continue
        choices = Choices(preset=preset.name.text)
        constants = Constants(
            declared.declared, declared.functions, declared.presets, choices, Diagnostics()
        )
        before = len(found.found)
        instances = Instances(program.checker, constants)
        _check_sizes(instances, program.model, program.names, found)
        for number, diagnostic in enumerate(found.found[before:], before):
            note = Note(preset.name.span, "with this preset")
            found.found[number] = replace(diagnostic, notes=(*diagnostic.notes, note))


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
    if chosen is None:
        return None
    defs = [m.name.text for m in all_items(chosen[0].members) if isinstance(m, ast.Def)]
    if "main" not in defs and not chosen[1].broken & {"main", "*"}:
        close = near("main", defs)
        found.error(
            "E0507",
            f"the model '{chosen[0].name.text}' has no entry point 'main'",
            chosen[0].name.span,
            hint=close.replace("did you mean", "is 'main' what you call")
            or "def main(token[t] of w) -> logits[t,w] { ... }",
        )
    return chosen
