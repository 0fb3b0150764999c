"""Kernels of a user's own: functions of files that the source names (``extern``)."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from backends.triton.targets import TARGETS
from compiler.errors import UserError
from compiler.ir import Node


@dataclass(frozen=True)
class Extern:
    """A function of a file of the user's.

    Attributes:
        path: of the file; function: of it, ``(*tensors) -> tensor``, each ``[n, ...]``.
        module: what the file is called in the compiled directory, without its ending.
    """

    path: Path
    function: str
    module: str

    @property
    def name(self) -> str:
        """What ``kernels.py`` calls it."""
        return f"{self.module}_{self.function}"

    def line(self) -> str:
        """What makes it one of ``kernels.py``: tensors come to it without gaps."""
        function = f"{self.module}.{self.function}"
        return f"import {self.module}  # beside this file\n\n{self.name} = dense({function})"

    def text(self, place: str) -> str:
        """The file's text.

        Args:
            place: in the source, where the kernel is named.

        Raises:
            UserError: it cannot be read, or has no such function.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except OSError as error:
            raise UserError(f"{place}: kernel file {self.path}: {error.strerror}") from None
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{place}: kernel file {self.path} is no Python: {error}") from None
        if not any(isinstance(n, ast.FunctionDef) and n.name == self.function for n in tree.body):
            raise UserError(f"{place}: kernel file {self.path} has no function '{self.function}'")
        return text


def serving(node: Node, target: str) -> Extern | None:
    """The kernel of an ``extern`` node for a target, if there is one.

    Raises:
        UserError: the source names a target that there is none of.
    """
    for name in node.attrs["targets"]:
        if name not in TARGETS:
            raise UserError(
                f"{node.span}: a kernel is for '{name}', and targets are {', '.join(TARGETS)}"
            )
    where = dict(zip(node.attrs["targets"], node.attrs["kernels"], strict=True)).get(target)
    if where is None:
        return None
    file, _, function = where.rpartition(":")
    return Extern(Path(file), function, f"extern_{Path(file).stem}")
