"""Which brackets of a text pair up, and what stands in which: for messages about broken text."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

CLOSES = {")": "(", "]": "[", "}": "{"}
_TOKEN = re.compile(r'#[^\n]*|"[^"\n]*"|[()\[\]{}]')
_CODE = re.compile(r'(?:[^"#\n]|"[^"\n]*"|")*')


@dataclass(frozen=True)
class Unpaired:
    """A bracket without its partner; ``end`` is where that shows: a bracket of another kind, or
    the end of the text."""

    offset: int
    end: int


class Layout:
    """Lines and brackets of a text. Each question is answered in time linear in the text."""

    def __init__(self, text: str):
        self.text = text
        self.lines = [0, *(m.end() for m in re.finditer("\n", text))]

    @cached_property
    def brackets(self) -> list[tuple[str, int]]:
        """The brackets outside comments and quotes, with their offsets."""
        found = ((m.group(), m.start()) for m in _TOKEN.finditer(self.text))
        return [(mark, at) for mark, at in found if mark in "()[]{}"]

    @cached_property
    def enclosing(self) -> list[int | None]:
        """For each line, the offset of the bracket that is open where it starts."""
        out: list[int | None] = []
        stack: list[int] = []
        marks = iter([*self.brackets, ("", len(self.text) + 1)])
        mark, at = next(marks)
        for start in self.lines:
            while at < start:
                if mark not in CLOSES:
                    stack.append(at)
                elif stack:
                    stack.pop()
                mark, at = next(marks)
            out.append(stack[-1] if stack else None)
        return out

    def line(self, offset: int) -> int:
        """The number, from 0, of the line that holds ``offset``."""
        return bisect_right(self.lines, offset) - 1

    def start(self, line: int) -> int:
        """Where a line starts; the end of the text for the one after the last."""
        return self.lines[line] if line < len(self.lines) else len(self.text)

    def code(self, line: int) -> str:
        """A line without its comment and trailing blanks."""
        match = _CODE.match(self.text, self.start(line))
        return match.group().rstrip() if match else ""

    def first_on_line(self, offset: int) -> bool:
        return not self.text[self.start(self.line(offset)) : offset].strip()

    def code_above(self, line: int) -> tuple[int, str]:
        """The nearest line above that holds more than a comment: its number, and its text."""
        for number in range(line - 1, -1, -1):
            code = self.code(number)
            if code.strip():
                return number, code
        return 0, ""

    def innermost(self, offset: int) -> int | None:
        """The offset of the bracket that is open at ``offset``."""
        stack: list[int] = []
        for mark, at in self.brackets:
            if at >= offset:
                break
            if mark not in CLOSES:
                stack.append(at)
            elif stack:
                stack.pop()
        return stack[-1] if stack else None

    def indent(self, offset: int) -> int:
        """How far the line that holds ``offset`` is indented."""
        code = self.code(self.line(offset))
        return len(code) - len(code.lstrip())

    def unpaired(self) -> Unpaired | None:
        """The first bracket without a partner. Of braces left open, the one that the indentation
        of what follows gives away."""
        stack: list[tuple[str, int]] = []
        suspect: int | None = None
        for mark, at in self.brackets:
            if mark not in CLOSES:
                stack.append((mark, at))
                continue
            if not stack:
                return Unpaired(at, at)
            opener, opened = stack.pop()
            if opener != CLOSES[mark]:
                # A stray ')' or ']' among statements closes nothing; else the opener is the stray.
                return Unpaired(at, at) if opener == "{" else Unpaired(opened, at)
            if mark == "}" and suspect is None and self.first_on_line(at):
                suspect = opened if self.indent(opened) > self.indent(at) else None
        if not stack:
            return None
        return Unpaired(stack[-1][1] if suspect is None else suspect, len(self.text))


def depth(text: str) -> int:
    """How many braces ``text`` leaves open; negative if it closes more than it opens."""
    return sum({"{": 1, "}": -1}.get(mark, 0) for mark, _ in Layout(text).brackets)
