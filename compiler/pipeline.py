"""From a file to a program: the passes in order, each by name, each alone if wanted.

compiled = compile_model("model.arch", Choices(preset="small"))
compiled.after("elaborate")          # the program as that pass left it
compiled.program                     # the last one
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

from compiler.ir import Program
from compiler.verify import verify
from dsl.constants import Choices
from dsl.deploy.check import choose
from dsl.deploy.placed import placed
from dsl.program import CheckedProgram, open_program

# In order. Names are those of interface.md; a pass is a module with ``run(program) -> program``.
PASSES = (
    "select-fp8", "sink", "order", "hoist", "recognise", "shard", "fp8", "overlap", "lifetimes",
)  # fmt: skip
# The last stage in which every module's bodies are its own: what counts per module reads that.
BY_MODULE = "fp8"
STAGES = ("elaborate", *PASSES)
# Run only when asked for by name, on ``Compiled.trained``: inference has no use for it.
ON_REQUEST = ("differentiate",)
FORMATS = frozenset({"select-fp8", "fp8"})  # passes that put codes in the place of numbers


@dataclass(frozen=True)
class Compiled:
    """A checked source and what each pass made of it."""

    source: CheckedProgram
    stages: dict[str, Program]

    @property
    def program(self) -> Program:
        """The program after the last pass."""
        return self.stages[STAGES[-1]]

    @property
    def trained(self) -> Program:
        """What ``differentiate`` takes: the program as ``recognise`` leaves it, without number
        formats. Codes have no gradients; what is trained are the numbers they are made of."""
        if self.program.deployment is None or not self.program.deployment.precision:
            return self.stages["recognise"]
        program = self.stages["elaborate"]
        for name in PASSES[: PASSES.index("recognise") + 1]:
            if name not in FORMATS:
                program = import_module(_module(name)).run(program)
        verify(program, "recognise")
        return program

    def after(self, name: str) -> Program:
        """The program as pass ``name`` left it; a pass that is not in the pipeline runs now.

        Raises:
            KeyError: there is no pass of that name.
            UserError: the pass does not support what the program does.
        """
        if name in ON_REQUEST:
            program: Program = import_module(_module(name)).run(self.trained)
            verify(program, name)
            return program
        return self.stages[name]


def compile_model(
    file: str,
    choices: Choices | None = None,
    *,
    model: str | None = None,
    deploy: str | None = None,
    check: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Compiled:
    """Check, elaborate and run every pass.

    Args:
        file: a path, or a shipped model's name.
        choices: ``--set``, the checkpoint's config.json, ``--dims``.
        model: which model, of a file with several.
        deploy: a deployment of the file: passes find it as ``program.deployment``.
        check: verify each pass as a translation (``--verify``): the program before and after it
            are run on a small random instance. Imports torch.
        progress: called with each stage's name before it runs.

    Raises:
        DiagnosticError: the user's mistakes, all of them.
        NotEquivalent: with ``check``, a pass changed what is computed.
    """
    progress("elaborate")
    source = open_program(file, choices, model)
    return run_passes(source, deploy=deploy, check=check, progress=progress)


def run_passes(
    source: CheckedProgram,
    *,
    deploy: str | None = None,
    check: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Compiled:
    """The passes on a checked source; see ``compile_model``."""
    deployment = None if deploy is None else choose(source, deploy)
    program = replace(import_module("compiler.passes.elaborate").run(source), deployment=deployment)
    if deployment is not None and deployment.mesh.axes:
        program = replace(program, placed=placed(source, deployment))
    verify(program, "elaborate")
    stages = {"elaborate": program}
    for name in PASSES:
        progress(name)
        before, program = program, import_module(_module(name)).run(program)
        verify(program, name)
        if check:
            import_module("compiler.equivalence").equivalent(before, program)
        stages[name] = program
    return Compiled(source, stages)


def _module(name: str) -> str:
    """Where a pass stands: ``select-fp8`` in ``select_fp8.py``."""
    return f"compiler.passes.{name.replace('-', '_')}"
