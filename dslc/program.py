"""A compiled model, before and as it is written to a directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import dslc
from compiler import directory, manifest, tensors
from compiler.casts import Cast, casts, comments
from compiler.deployed import refuse_what_is_not_acted_on
from compiler.errors import UserError
from compiler.ir import Program as Graphs
from compiler.pairs import most_pairs
from compiler.pipeline import BY_MODULE, ON_REQUEST, STAGES, Compiled, compile_model
from compiler.report import Report, report
from compiler.staged import is_staged, staged_text
from compiler.stateful import refuse_states
from compiler.text import program_text
from dsl.constants import Choices
from dsl.deploy.check import choose
from dsl.deploy.typed import Deployment
from dsl.diagnostics import near
from dsl.requirements import limit_of
from dslc.config import read_config
from dslc.gpu import CPU, resolve

if TYPE_CHECKING:
    from backends.triton.ahead import Binary
    from backends.triton.generate import Generated

BACKENDS = ("pytorch", "mlir")
DTYPES = ("float32", "bfloat16", "float16")
QUANTISING = ("select-fp8", "fp8")
SOURCE = "select-fp8"  # the stage that is nearest to the source and says how it is run

Constant = int | float | bool | str | None


@dataclass(frozen=True)
class Program:
    """What ``dslc.compile`` returns: every stage of the compilation, ready to be written."""

    compiled: Compiled
    backend: str = "pytorch"
    target: str = "cpu"
    checkpoint: Path | None = None  # that the dims came from
    dtype: str = "bfloat16"  # of activations, where a GPU's kernels are compiled for one

    @property
    def name(self) -> str:
        return self.compiled.program.name

    @property
    def constants(self) -> dict[str, Constant]:
        """Every constant that has a value."""
        return dict(self.compiled.program.constants)

    def after(self, stage: str | None = None) -> Graphs:
        """The program as a pass left it; the last one unless named.

        Raises:
            UserError: there is no such pass.
        """
        if stage is None:
            return self.compiled.program
        known = (*STAGES, *ON_REQUEST)
        if stage not in known:
            hint = near(stage, known) or f"passes: {', '.join(known)}"
            raise UserError(f"there is no pass '{stage}'; {hint}")
        return self.compiled.after(stage)

    def graph(self, after: str | None = None) -> str:
        """The text of the program after a pass; it can be parsed back.

        Where that pass quantises, comments behind it tell what was cast, what was left, and why.
        """
        text = program_text(self.after(after))
        return (
            text + "\n" + comments(self.casts()) if after in QUANTISING and self.casts() else text
        )

    def casts(self) -> list[Cast]:
        """What the deployment's precision rules made of each contraction; none without such."""
        return casts(self.compiled.after(STAGES[0]))

    def code(self) -> str:
        """The text of ``model.py``.

        Raises:
            UserError: the deployment asks for what no pass acts on yet.
        """
        from backends.pytorch.emit.module import emit

        refuse_what_is_not_acted_on(self.compiled.program.deployment)
        return self.generated.model if self.generated else emit(self.compiled.program)

    @cached_property
    def generated(self) -> Generated | None:
        """The code for a GPU, its kernels included; None where the target is the CPU."""
        target = resolve(self.target)
        if target is None:
            return None
        from backends.triton.generate import generate

        return generate(self.compiled.program, target, self.dtype)

    def binaries(self, progress: Callable[[str], None] = lambda _: None) -> list[Binary]:
        """The GPU's kernels, compiled; what was compiled before is taken from the cache.

        Raises:
            UserError: Triton is missing, or cannot compile one; the message names it.
        """
        from backends.triton.generate import binaries

        return binaries(self.generated, progress) if self.generated else []

    def held_kernels(self) -> list[str]:
        """The kernels of the source's own that serve the target, held against their equations.

        Raises:
            UserError: one is off, or fails; the message names its place.
        """
        target = resolve(self.target)
        if target is None:
            return []
        from backends.triton.try_externs import verify

        return verify(self.compiled.program, target, self.dtype)

    def report(self, sequence: int = 4096) -> Report:
        """Parameters, cache and FLOPs; ``sequence`` is the length that FLOPs are counted at."""
        return report(self.compiled.after(STAGES[0]), sequence)

    @property
    def deployed_name(self) -> str:
        return self.deployed.name if self.deployed else ""

    @property
    def deployed(self) -> Deployment | None:
        """The deployment that the program was compiled for."""
        return self.compiled.program.deployment

    def deployment(self, name: str) -> Deployment:
        """One of the file's deployments, which holds at these sizes.

        Raises:
            DiagnosticError: there is none of that name, or what in it does not hold.
        """
        return choose(self.compiled.source, name)

    @property
    def context(self) -> manifest.ContextRow | None:
        """How many positions a sequence may have; None if the source sets no limit."""
        limit = limit_of(self.compiled.source.library, self.compiled.source.constants)
        if limit is None:
            return None
        return manifest.ContextRow(
            positions=limit.positions,
            place=str(limit.span),
            text=" ".join(limit.span.text.split()),
        )

    def save(
        self,
        path: str | Path,
        optimize: str | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Write the compiled directory, whole or not at all.

        Args:
            optimize: a dtype, for which the step of one token is compiled to machine code of this
                CPU: float32 or bfloat16. With the backend mlir, the dtype of the whole module.
            progress: called with what is being compiled.

        Raises:
            DirectoryError: there is something else, or it cannot be written.
            UserError: the step of one token cannot be compiled, or the deployment asks for what no
                pass acts on yet.
        """
        files = {
            "graph.txt": self.graph().encode(),
            "source.txt": self.graph(SOURCE).encode(),
        }
        if self.backend == "mlir":
            from backends.mlir.artifact import build

            self._for_mlir()
            elaborated = self.compiled.after(SOURCE)
            files |= build(self.compiled.program, elaborated, optimize or "float32", progress)
        elif is_staged(self.deployed):  # no code: nothing runs it
            if optimize is not None or self.generated is not None:
                raise UserError(f"deployment '{self.deployed_name}' is compiled as text alone")
            files["stages.txt"] = staged_text(self.compiled.program).encode()
        else:
            files["model.py"] = self.code().encode()
        if optimize is not None and self.backend == "pytorch":
            files |= self._ahead(optimize, progress)
        if self.generated is not None:
            from backends.triton.generate import files as of_gpu

            files |= of_gpu(self.generated, self.binaries(progress))
        source = self.compiled.source
        config = {
            name: declared.keys
            for name, declared in source.constants.declared.items()
            if declared.keys
        }
        about = manifest.build(
            self.compiled.after(SOURCE),
            version=dslc.__version__,
            sources={unit.source.name: unit.source.text for unit in source.library.units},
            passes=STAGES,
            files=files,
            config=config,
            context=self.context,
            pairs=most_pairs(self.compiled.program),
            deployment=self.deployed.name if self.deployed else None,
            local=self.compiled.after(BY_MODULE),
            backend=self.backend,
            target=self.target,
        )
        directory.write(Path(path), about, files)

    def mlir(self, dialect: str = "linalg", dtype: str = "float32") -> str:
        """The text of the MLIR module, verified.

        Args:
            dialect: linalg is what is compiled; torch, stablehlo or tosa what torch-mlir makes.
            dtype: float32 or bfloat16.

        Raises:
            UserError: an extra is not installed, or the program has something without a lowering.
        """
        from backends.mlir.emit import emit

        self._for_mlir()
        return emit(self.compiled.program, self.compiled.after(SOURCE), dialect, dtype)

    def _for_mlir(self) -> None:
        if self.target != "cpu":
            raise UserError(
                f"the MLIR backend compiles for the CPU, not for --target {self.target}"
            )
        refuse_what_is_not_acted_on(self.compiled.program.deployment)
        if self.compiled.program.mesh:
            raise UserError(
                f"the MLIR backend compiles for one process, not for the mesh of deployment "
                f"'{self.deployed_name}'"
            )

    def _ahead(self, dtype: str, progress: Callable[[str], None]) -> dict[str, bytes]:
        """The files of a compiled decode step."""
        if self.after().mesh:
            raise UserError(
                f"decoding is not compiled ahead for several processes yet: leave out --optimize "
                f"or --deploy {self.deployed_name}"
            )
        if any(p.coding for m in self.after().modules.values() for p in m.parameters):
            name = self.deployed.name if self.deployed else ""
            raise UserError(
                f"decoding is not compiled ahead for quantised products yet: leave out --optimize "
                f"or --deploy {name}"
            )
        refuse_states(self.compiled.after(SOURCE))
        from backends.pytorch.ahead.build import build, stored_blocks  # torch, and Inductor

        blocked = {}
        if self.checkpoint is not None:
            elaborated = self.compiled.after(STAGES[0])
            patterns, ignored = tensors.patterns(elaborated), tensors.ignored(elaborated)
            blocked = stored_blocks(self.checkpoint, patterns, ignored)
        return build(self.code(), dtype, progress=progress, blocked=blocked)


def compile_file(
    file: str,
    dims: str | None = None,
    set: Mapping[str, Constant] | None = None,
    checkpoint: Path | None = None,
    deploy: str | None = None,
    backend: str = "pytorch",
    target: str = "cpu",
    model: str | None = None,
    verify: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    dtype: str | None = None,
) -> Program:
    """See ``dslc.compile``.

    Args:
        dtype: of activations, that a GPU's kernels are compiled for; as config.json says, or
            bfloat16.
        verify: run the program before and after each pass, and compare.
        progress: called with each pass's name before it runs.
        note: called with each sentence that the user should know.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend '{backend}' is not built yet; there is {', '.join(BACKENDS)}")
    gpu = resolve(target)
    config = read_config(checkpoint) if checkpoint is not None else None
    choices = Choices(set=dict(set or {}), config=config, preset=dims)
    compiled = compile_model(
        file, choices, model=model, deploy=deploy, check=verify, progress=progress
    )
    overruled = compiled.source.constants.overruled()
    if overruled:
        shown = ", ".join(overruled[:6]) + (" and more" if len(overruled) > 6 else "")
        note(f"config.json says otherwise than --dims {dims}, and is followed: {shown}")
    if dtype is None:
        stored = (config or {}).get("dtype", (config or {}).get("torch_dtype"))
        dtype = stored if stored in DTYPES else "bfloat16"
    return Program(compiled, backend, gpu.name if gpu else CPU, checkpoint, dtype)
