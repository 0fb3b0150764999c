"""Where in the source an error happened that the emitted code, or torch below it, raised.

``model.py`` has the line of the source beside each statement: the innermost of its frames in a
traceback therefore says which equation was computed, its ``self`` in which block, and its variables
of which shapes. Nothing but the compiled directory is needed: the ``.arch`` file may be elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, ModuleType, TracebackType
from typing import Any

import torch

from compiler.errors import UserError

TEXT = "__dslc_text__"  # the global of an emitted module that holds its own text
MOST_OPERANDS = 6


class RunError(UserError, RuntimeError):
    """Something failed while an equation was computed; the message says which, and where.

    Attributes:
        place: ``std/ffn.arch:15``.
        block: the path of the block in the source, ``layers[3].attn``; "" is the model itself.
        equation: what the source says there.

    The exception behind it is ``__cause__``.
    """

    def __init__(self, message: str, place: str, block: str, equation: str):
        super().__init__(message)
        self.place, self.block, self.equation = place, block, equation


@dataclass(frozen=True)
class Place:
    """A statement of an emitted module, and the equation it comes from."""

    place: str
    equation: str
    statement: str


def remember_text(module: ModuleType, text: str) -> None:
    """Let errors of an emitted module find its text, whatever becomes of the file."""
    setattr(module, TEXT, text)


def located(error: Exception) -> RunError | None:
    """The error with its place in the source; None if no emitted code was running."""
    found: tuple[FrameType, Place] | None = None
    trace = error.__traceback__
    while trace is not None:
        text = trace.tb_frame.f_globals.get(TEXT)
        place = _place(text.splitlines(), trace) if isinstance(text, str) else None
        found = (trace.tb_frame, place) if place else found
        trace = trace.tb_next
    if found is None:
        return None
    frame, place = found
    own = frame.f_locals.get("self")
    block = source_path(getattr(own, "path", ""))
    said = str(error).strip() or "no message"
    if type(error) not in (RuntimeError, ValueError):
        said = f"{type(error).__name__}: {said}"
    number = place.place.rpartition(":")[2]
    margin = " " * len(number)
    lines = [
        said,
        f"  --> {place.place}" + (f", in {block}" if block else ""),
        f"{margin} |",
        f"{number} | {place.equation}",
        f"{margin} |",
    ]
    operands = _operands(place.statement, frame.f_locals)
    if operands:
        lines.append(f"  with {', '.join(operands)}")
    return RunError("\n".join(lines), place.place, block, place.equation)


def source_path(path: str) -> str:
    """``layers.3.attn`` of the emitted model is ``layers[3].attn`` of the source."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", path)


def quoted(lines: Sequence[str], line: int, first: int = 1) -> tuple[str, str] | None:
    """The equation and its place in the comment nearest above a line, from line ``first`` on.

    Args:
        lines: of an emitted module.
        line, first: counted from 1.
    """
    at = line - 2  # counted from 0
    while at >= first and not lines[at].lstrip().startswith("#"):
        at -= 1
    parts: list[str] = []
    while at >= first and lines[at].lstrip().startswith("#"):
        text = lines[at].strip()[1:]
        parts.insert(0, text.strip())
        if not text.startswith("   "):  # continuations are indented
            break
        at -= 1
    text, _, place = "  ".join(parts).rpartition("  ")
    return (" ".join(text.split()), place) if re.search(r":\d+$", place) else None


def _place(lines: list[str], trace: TracebackType) -> Place | None:
    """The statement that was running."""
    found = quoted(lines, trace.tb_lineno, trace.tb_frame.f_code.co_firstlineno)
    if found is None:
        return None
    return Place(found[1], found[0], _statement(lines, trace))


def _statement(lines: list[str], trace: TracebackType) -> str:
    """The expression that was running, of what may be several lines."""
    positions = list(trace.tb_frame.f_code.co_positions())
    first, last, begin, end = positions[trace.tb_lasti // 2]
    if first is None or last is None or begin is None or end is None:
        return lines[trace.tb_lineno - 1]
    rows = [line.encode() for line in lines[first - 1 : last]]
    rows[-1] = rows[-1][:end]  # before the first is cut: they may be the same
    rows[0] = rows[0][begin:]
    return b"\n".join(rows).decode(errors="replace")


def _operands(statement: str, variables: Mapping[str, Any]) -> list[str]:
    """``x float32 [5, 256]`` for each tensor that a statement names."""
    out: dict[str, str] = {}
    for match in re.finditer(r"(?<![\w.\"'])(self\.)?([A-Za-z_]\w*)(?!\w|\()", statement):
        name = match[2]
        value = getattr(variables.get("self"), name, None) if match[1] else variables.get(name)
        if isinstance(value, torch.Tensor):
            kind = str(value.dtype).removeprefix("torch.")
            out.setdefault(name, f"{name} {kind} {list(value.shape)}")
    shown = list(out.values())
    more = len(shown) - MOST_OPERANDS
    return [*shown[:MOST_OPERANDS], f"{more} more"] if more > 0 else shown
