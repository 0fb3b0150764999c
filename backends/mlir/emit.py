"""The module as text, in one of several dialects, verified and able to be parsed back."""

from __future__ import annotations

from backends.mlir.artifact import ELEMENTS, INSTALL
from backends.mlir.module import lower
from compiler.errors import UserError
from compiler.ir import Program
from compiler.tensors import caches


def emit(program: Program, elaborated: Program, dialect: str, dtype: str) -> str:
    """
    Args:
        elaborated: the same program before any pass, which says what is cached.
        dialect: linalg, which is what is compiled.

    Raises:
        UserError: the extra is not installed.
        Unsupported: the program has something without a lowering.
    """
    if dialect != "linalg":
        raise UserError(f"--dialect {dialect} is not built yet")
    text = lower(program, caches(elaborated), ELEMENTS[dtype]).text
    try:
        from iree.compiler import ir
    except ImportError:
        raise UserError(f"--emit mlir needs IREE's compiler: {INSTALL}") from None
    with ir.Context():
        module = ir.Module.parse(text)
        module.operation.verify()
        return f"{module}\n"
