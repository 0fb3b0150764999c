"""Every named value of an emitted model as it is computed, with the source line it comes from.

The emitted code is not changed for it: Python tells a trace function of each line that runs, and
the comment above a statement says which equation the statement is. So it works on a ``model.py``
that somebody edited, and costs nothing where it is not used.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from backends.pytorch.ahead.blocks import BlockedWeight
from backends.pytorch.places import quoted, source_path
from backends.pytorch.runtime.fp8 import Coded, CodedWeight

if TYPE_CHECKING:
    from backends.pytorch.model import Model

NAMED = re.compile(r"(?:cached |let )?(\w+)\[")  # what an equation defines


@dataclass(frozen=True)
class Equation:
    """A statement's source: ``c_kv``, ``cached c_kv[s,c] = ...``, ``std/ffn.arch:15``."""

    name: str
    text: str
    place: str


@dataclass(frozen=True)
class Value:
    """What an equation gave, in one call of a block.

    ``module`` is the path in the source (``layers[3].attn``; empty for the model) of a block of
    type ``block``, ``result`` whether it is what the block's ``def`` returns, ``user`` the equation
    that calls it. ``tensor`` is a copy.
    """

    module: str
    block: str
    method: str
    equation: Equation
    tensor: Tensor
    result: bool
    user: Equation | None = None

    @property
    def path(self) -> str:
        return f"{self.module}.{self.equation.name}" if self.module else self.equation.name


@contextmanager
def watching(model: Model) -> Iterator[list[Value]]:
    """Within, what the model computes is added to the list, in the order of execution.

    Of a method's variables, those whose name is the one that their equation defines: temporaries
    are left out.
    """
    found: list[Value] = []
    watcher = _Watcher(inspect.getfile(type(model.module)), _equations(model.code), found)
    # Those that lie somewhere for as long as the model does: a state dict may hold copies, whose
    # memory goes to values of the step.
    stored = [*model.module.parameters(), *model.module.buffers()]
    lasting = [t for t in stored if not isinstance(t, (BlockedWeight, CodedWeight))]
    watcher.kept = {t.untyped_storage().data_ptr() for t in lasting}
    before = sys.gettrace()
    sys.settrace(watcher.call)
    try:
        yield found
    finally:
        sys.settrace(before)


class _Watcher:
    def __init__(self, file: str, equations: dict[int, Equation], found: list[Value]):
        self.file = file
        self.equations = equations
        self.found = found
        self.kept: set[int] = set()  # where parameters are: views of them are no values

    def call(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != self.file or not isinstance(_owner(frame), nn.Module):
            return None
        return _Frame(self, frame).event

    def add(self, frame: FrameType, line: int, name: str | None, value: object) -> None:
        """``name`` is the variable that has the value; None if it is what the method returns."""
        equation = self.equations.get(line)
        value = value.wide() if isinstance(value, Coded) else value
        if equation is None or not isinstance(value, Tensor):
            return
        if name is not None and name.rstrip("_") != equation.name:
            return
        if value.untyped_storage().data_ptr() in self.kept:
            return
        method = frame.f_code.co_name
        result = name is None and not method.startswith("_")
        if name is None and not result:
            return  # a branch: its caller gives the value its name
        owner = _owner(frame)
        path, block = source_path(str(getattr(owner, "path", ""))), type(owner).__name__
        copy = value.detach().to("cpu", copy=True)
        user = self._user(frame)
        self.found.append(Value(path, block, method, equation, copy, result, user))

    def _user(self, frame: FrameType) -> Equation | None:
        """The statement of another module that is running this one."""
        outer, owner = frame.f_back, _owner(frame)
        while outer is not None:
            if outer.f_code.co_filename == self.file and _owner(outer) is not owner:
                return self.equations.get(outer.f_lineno)
            outer = outer.f_back
        return None


class _Frame:
    """One call of a method: which of its variables have changed since the line before."""

    def __init__(self, watcher: _Watcher, frame: FrameType):
        self.watcher = watcher
        self.known = dict(frame.f_locals)
        self.line = frame.f_lineno

    def event(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event in ("line", "return"):
            for name, value in frame.f_locals.items():
                if self.known.get(name) is not value:
                    self.known[name] = value
                    self.watcher.add(frame, self.line, name, value)
            self.line = frame.f_lineno
        if event == "return" and argument is not None:
            self.watcher.add(frame, self.line, None, argument)
        return self.event


def _owner(frame: FrameType) -> object:
    code: CodeType = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _equations(code: str) -> dict[int, Equation]:
    """The equation of each line of the emitted code that is part of a statement."""
    lines = code.splitlines()
    out: dict[int, Equation] = {}
    for function in ast.walk(ast.parse(code)):
        if isinstance(function, ast.FunctionDef):
            for statement in ast.walk(function):
                if isinstance(statement, (ast.Assign, ast.AugAssign, ast.Return)):
                    equation = _above(lines, statement.lineno, function.lineno)
                    if equation is not None:
                        last = statement.end_lineno or statement.lineno
                        out |= dict.fromkeys(range(statement.lineno, last + 1), equation)
    return out


def _above(lines: list[str], line: int, first: int) -> Equation | None:
    """The comment nearest above a line, within the function that begins on line ``first``."""
    found = quoted(lines, line, first)
    name = NAMED.match(found[0]) if found else None
    return Equation(name[1], *found) if found and name else None
