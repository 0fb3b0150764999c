"""Compiling a decode step ahead of time, with Inductor."""

from __future__ import annotations

import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import nn
from torch._inductor import aoti_compile_and_package
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram

from backends.pytorch.ahead import blocks, rows
from backends.pytorch.ahead.blocks import NeedsWide, widened
from backends.pytorch.ahead.pieces import cut
from backends.pytorch.ahead.plan import FILE_NAME, Call, Plan
from backends.pytorch.ahead.processor import features
from backends.pytorch.names import attribute_path
from backends.pytorch.weights.checkpoint import match, open_checkpoint
from compiler.errors import UserError
from compiler.tensors import Pattern

RUNTIME = "from backends.pytorch.runtime import"
TRACED_WITH = "from backends.pytorch.ahead.onetoken import"
DTYPES = ("float32", "bfloat16")
WIDEN = "decode/widen.pt2"
FEW_ROWS = "decode/rows.pt2"
FEW_ROWS_OF_BLOCKS = "decode/rows_of_blocks.pt2"
SHIMS = "aot_inductor.custom_ops_to_c_shims"
OPTIONS: dict[str, Any] = {
    "cpp.dynamic_threads": True,  # as many as the process that runs it has
    "aot_inductor.package_constants_in_so": True,  # tables: weights are arguments
}


def build(
    code: str,
    dtype: str,
    entry: str = "main",
    progress: Callable[[str], None] = lambda _: None,
    blocked: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> dict[str, bytes]:
    """The files of a compiled decode step, for this machine's CPU.

    No weights are needed, nor memory for them.

    Args:
        code: the text of ``model.py``.
        dtype: of weights and activations.
        progress: told what is being compiled.
        blocked: attribute paths of weights that are stored as E4M3 bytes with a scale for each
            block, and the rows and columns of a block. Those that are only ever multiplied with
            rows are read as they are stored.

    Raises:
        UserError: the step cannot be traced or compiled; the message says why.
    """
    progress("tracing a step of one token")
    plan, programs = traced(code, dtype, entry, blocked)
    files = {}
    for number, (name, program) in enumerate(programs.items()):
        progress(f"machine code, {number + 1} of {len(programs)}: some ten seconds of a core each")
        files[name] = packaged(program)
    return {**files, FILE_NAME: (plan.model_dump_json(indent=1) + "\n").encode()}


def traced(
    code: str,
    dtype: str,
    entry: str = "main",
    blocked: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> tuple[Plan, dict[str, ExportedProgram]]:
    """A decode step as programs that can be compiled, or run as they are, by their files' names.

    Raises:
        UserError: the step cannot be traced.
    """
    if dtype not in DTYPES:
        raise UserError(f"--optimize compiles for {' or '.join(DTYPES)}, not for {dtype}")
    left = dict(blocked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it deprecates
        while True:
            try:
                with FakeTensorMode():
                    pieces = cut(_model(code, getattr(torch, dtype)), entry, left)
                break
            except NeedsWide as needs:  # here, and in all layers like this one
                left = {p: b for p, b in left.items() if _any_number(p) != _any_number(needs.path)}
            except Exception as error:  # torch raises many kinds
                raise UserError(
                    f"--optimize: a step of one token cannot be traced: {_first_line(error)}"
                ) from error
    block = next(iter(left.values()), None)
    programs = {_file(number): program for number, program in enumerate(pieces.programs)}
    if block:
        programs[WIDEN] = _widening(block, getattr(torch, dtype))
    fast = dtype == "bfloat16" and set(rows.NEEDS) <= set(features())
    if fast:
        programs[FEW_ROWS] = _few_rows()
    if fast and block:
        programs[FEW_ROWS_OF_BLOCKS] = _few_rows_of_blocks(block)
    plan = Plan(
        dtype=dtype,
        torch=torch.__version__,
        machine=platform.machine(),
        features=features(),
        block=block,
        widen=WIDEN if block else None,
        few_rows=FEW_ROWS if fast else None,
        few_rows_of_blocks=FEW_ROWS_OF_BLOCKS if fast and block else None,
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
    return plan, programs


def stored_blocks(
    checkpoint: Path, patterns: Sequence[Pattern], ignored: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Which weights a checkpoint holds in E4M3, and its blocks: ``blocked`` of ``build``.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """
    opened = open_checkpoint(checkpoint)
    if opened.block is None:
        return {}
    sources = match(opened, list(patterns), tuple(ignored)).sources
    return {attribute_path(s.tensor.path): opened.block for s in sources if s.scale is not None}


def _widening(block: tuple[int, int], dtype: torch.dtype) -> ExportedProgram:
    """``blocks.widened`` for matrices of any size."""

    class Widen(nn.Module):
        def forward(self, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return widened(data, scale, *block, dtype)

    return _of_any_size(Widen(), torch.zeros(7, 5, dtype=torch.uint8), torch.zeros(3, 2))


def _few_rows() -> ExportedProgram:
    """``rows.few_rows`` for matrices of any size."""

    class Product(nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return rows.few_rows(x, weight)

    return _of_any_size(Product(), torch.zeros(5, 6).bfloat16(), torch.zeros(7, 6).bfloat16())


def _few_rows_of_blocks(block: tuple[int, int]) -> ExportedProgram:
    """``rows.few_rows_of_blocks`` for matrices of any size."""

    class Product(nn.Module):
        def forward(self, x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return rows.few_rows_of_blocks(x, data, scale, *block)

    data = torch.zeros(7, 6, dtype=torch.uint8)
    return _of_any_size(Product(), torch.zeros(5, 6).bfloat16(), data, torch.zeros(3, 2))


def _of_any_size(module: nn.Module, *matrices: torch.Tensor) -> ExportedProgram:
    sizes = [{0: Dim.AUTO, 1: Dim.AUTO} for _ in matrices]
    return torch.export.export(module, matrices, dynamic_shapes=sizes, strict=False)


def _any_number(path: str) -> str:
    return re.sub(r"\.(\d+|\*)(?=\.)", ".*", path)


def _model(code: str, dtype: torch.dtype) -> nn.Module:
    """The emitted model, of operations that can be traced."""
    assert RUNTIME in code
    module = ModuleType("dslc_traced")
    exec(compile(code.replace(RUNTIME, TRACED_WITH), "model.py", "exec"), module.__dict__)
    made: nn.Module = module.build("cpu", dtype)
    return made.requires_grad_(False)


def packaged(program: ExportedProgram) -> bytes:
    """A program as machine code, with what ``blocks.h`` and ``rows.h`` hold where it calls that.

    Raises:
        UserError: Inductor failed.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "piece.pt2"
        try:
            options = {**OPTIONS, SHIMS: _shims(program)}
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        except Exception as error:  # no compiler, or one that fails
            raise UserError(f"--optimize: Inductor failed: {_first_line(error)}") from error
        return path.read_bytes()


def _shims(program: ExportedProgram) -> dict[Any, list[str]]:
    """The code behind the operators of ours that a program uses."""
    used = {node.target for node in program.graph.nodes}
    if used & rows.SHIMS.keys():
        return {**blocks.SHIMS, **rows.SHIMS}
    return blocks.SHIMS if used & blocks.SHIMS.keys() else {}


def _file(number: int) -> str:
    return f"decode/{number}.pt2"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
