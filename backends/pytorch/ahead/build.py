"""Compiling a decode step ahead of time, with Inductor."""

from __future__ import annotations

import platform
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch._inductor import aoti_compile_and_package
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from backends.pytorch.ahead.pieces import cut
from backends.pytorch.ahead.plan import FILE_NAME, Call, Plan
from backends.pytorch.ahead.processor import features
from compiler.errors import UserError

RUNTIME = "from backends.pytorch.runtime import"
TRACED_WITH = "from backends.pytorch.ahead.onetoken import"
OPTIONS: dict[str, Any] = {
    "cpp.dynamic_threads": True,  # as many as the process that runs it has
    "aot_inductor.package_constants_in_so": True,  # tables: weights are arguments
}


def build(
    code: str, dtype: str, entry: str = "main", progress: Callable[[str], None] = lambda _: None
) -> dict[str, bytes]:
    """The files of a compiled decode step, for this machine's CPU.

    No weights are needed, nor memory for them.

    Args:
        code: the text of ``model.py``.
        dtype: of weights and activations.
        progress: told what is being compiled.

    Raises:
        UserError: the step cannot be traced or compiled; the message says why.
    """
    plan, programs = traced(code, dtype, entry)
    files = {}
    for number, (name, program) in enumerate(programs.items()):
        progress(f"machine code, {number + 1} of {len(programs)}")
        files[name] = _packaged(program)
    return {**files, FILE_NAME: (plan.model_dump_json(indent=1) + "\n").encode()}


def traced(code: str, dtype: str, entry: str = "main") -> tuple[Plan, dict[str, ExportedProgram]]:
    """A decode step as programs that can be compiled, or run as they are, by their files' names.

    Raises:
        UserError: the step cannot be traced.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it deprecates
        try:
            with FakeTensorMode():
                pieces = cut(_model(code, getattr(torch, dtype)), entry)
        except Exception as error:  # torch raises many kinds
            raise UserError(
                f"--optimize: a step of one token cannot be traced: {_first_line(error)}"
            ) from error
    plan = Plan(
        dtype=dtype,
        torch=torch.__version__,
        machine=platform.machine(),
        features=features(),
        calls=tuple(
            Call(
                piece=_file(use.piece),
                values=tuple(use.values),
                caches=tuple(use.caches),
                weights=tuple(use.weights),
                results=tuple(use.results),
            )
            for use in pieces.uses
        ),
        logits=pieces.logits,
    )
    return plan, {_file(number): program for number, program in enumerate(pieces.programs)}


def _model(code: str, dtype: torch.dtype) -> nn.Module:
    """The emitted model, of operations that can be traced."""
    assert RUNTIME in code
    module = ModuleType("dslc_traced")
    exec(compile(code.replace(RUNTIME, TRACED_WITH), "model.py", "exec"), module.__dict__)
    made: nn.Module = module.build("cpu", dtype)
    return made.requires_grad_(False)


def _packaged(program: ExportedProgram) -> bytes:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "piece.pt2"
        try:
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=OPTIONS)
        except Exception as error:  # no compiler, or one that fails
            raise UserError(f"--optimize: Inductor failed: {_first_line(error)}") from error
        return path.read_bytes()


def _file(number: int) -> str:
    return f"decode/{number}.pt2"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
