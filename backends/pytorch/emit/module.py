"""A program as the text of ``model.py``: one ``nn.Module`` class per block, as written by hand.

    text = emit(program)

The text needs torch and ``backends.pytorch.runtime``, nothing else. ``build()`` makes the model,
empty; each entry of the program is a method of it, ``main(step, token)``. Emission writes text
only: it does not import torch, and takes no longer for more layers or experts.
"""

from __future__ import annotations

import re

from backends.pytorch.emit.classes import Argument, ClassWriter, code
from backends.pytorch.emit.coded import Codings
from backends.pytorch.emit.collectives import MESH, mesh
from backends.pytorch.emit.kernels import Kernels
from backends.pytorch.emit.sizes import Constants
from backends.pytorch.emit.text import WIDTH, spoken
from backends.pytorch.emit.values import EmitError
from backends.pytorch.names import Scope
from compiler.ir import Module, Program

# What model.py may import from the runtime, where it is used.
RUNTIME = [
    "Coded", "Coding", "Mesh", "Numbered", "Pending", "Step", "apply", "arrived", "attention",
    "experts", "gather", "in_top", "inf", "largest", "making", "named", "number_format", "paged",
    "quantize", "scaled_linear", "smallest", "softmax", "stacked", "table", "top", "wide",
]  # fmt: skip
IMPORTED = ["torch", "Callable", "partial", "F", "nn", "Tensor", "kernels", *RUNTIME, "build", MESH]

__all__ = ["EmitError", "emit"]


def emit(program: Program, kernels: Kernels | None = None) -> str:
    """The text of a program's ``model.py``.

    Args:
        kernels: of a target that has some: what they compute is called as ``kernels.NAME(...)``.

    Raises:
        EmitError: the program holds something that this backend has no code for.
    """
    return Emitter(program, kernels).text()


class Emitter:
    """Collects the classes of one program. Modules of one block whose texts are equal share one."""

    def __init__(self, program: Program, kernels: Kernels | None = None):
        self.program = program
        self.kernels = kernels
        self.scope = Scope(*IMPORTED)
        # Classes have the blocks' own names, whatever constants are called.
        self._names = {
            b: self.scope.take(b) for b in {m.block: 0 for m in program.modules.values()}
        }
        self.constants = Constants(dict(program.constants), self.scope)
        self.codings = Codings(self.scope)
        self.reserved = [*IMPORTED, "next", "range", *self.constants.reserved]
        self._writers: dict[str, ClassWriter] = {}
        self._made: dict[str, tuple[str, list[Argument]]] = {}  # by module: class, arguments
        self._texts: dict[tuple[str, str], str] = {}  # (block, text): class
        self._classes: list[list[str]] = []

    def writer(self, module: str) -> ClassWriter:
        if module not in self._writers:
            self._writers[module] = ClassWriter(self, self.program.modules[module])
        return self._writers[module]

    def entry_of(self, module: Module, body: str) -> str | None:
        """The entry point that a body of the root module is."""
        if module.name != self.program.root:
            return None
        return next((e.name for e in self.program.entries.values() if e.body == body), None)

    def made(self, module: str) -> tuple[str, list[Argument]]:
        """A module's class and the arguments of its constructor; its children's come first."""
        if module not in self._made:
            writer = self.writer(module)
            writer.finish()
            for child in writer.module.children:
                self.made(child.module)
            block = writer.module.block
            writer.text("_")  # children's arguments may name further dims of this class
            text = "\n".join(code(writer.text("_")))
            if (block, text) not in self._texts:
                first = all(block != other for other, _ in self._texts)
                name = self._names[block] if first else self.scope.take(block)
                self._texts[block, text] = name
                root = module == self.program.root
                self._classes.append(writer.text(name, defaults=root))
            self._made[module] = (self._texts[block, text], writer.arguments())
        return self._made[module]

    def text(self) -> str:
        root = self.writer(self.program.root)
        for entry in self.program.entries.values():
            root.method(entry.body)
        build = _build(self.made(self.program.root)[0])
        body = "\n\n\n".join("\n".join(lines) for lines in [*self._classes, build])
        ranks = mesh(self.program, self.constants)
        constants = "\n".join([*self.constants.lines, *self.codings.lines, *ranks])
        span = root.module.span
        source = f" from {spoken(span.source.name)}" if span else ""
        head = [
            f'"""{self.program.name}, written by dslc{source}."""',
            "",
            *_imports(body, constants),
        ]
        parts = ["\n".join(head), constants] if constants else ["\n".join(head)]
        return "\n\n".join(parts) + "\n\n\n" + body + "\n"


def _build(name: str) -> list[str]:
    return [
        f'def build(device: str = "meta", dtype: torch.dtype = torch.float32) -> {name}:',
        '    """The model, its weights not filled in; ``dtype`` is that of its activations too."""',
        "    with making(device, dtype):",
        f"        return named({name}())",
    ]


def _imports(body: str, constants: str) -> list[str]:
    text = "\n".join([*code(body.splitlines()), constants])  # comments speak of softmax too
    used = [name for name in RUNTIME if re.search(rf"(?<![.\w]){name}\b", text)]
    lines = ["import torch"]
    if re.search(r"\bF\.", body):
        lines.append("import torch.nn.functional as F")
    lines += ["from torch import Tensor, nn", ""]
    if re.search(r"\bpartial\(", text):
        lines[:0] = ["from collections.abc import Callable", "from functools import partial", ""]
    if re.search(r"\bkernels\.", text):
        lines += ["import kernels  # beside this file", ""]
    line = f"from backends.pytorch.runtime import {', '.join(used)}"
    if len(line) <= WIDTH:
        return [*lines, line]
    names = [f"    {name}," for name in used]
    return [*lines, "from backends.pytorch.runtime import (", *names, ")"]
