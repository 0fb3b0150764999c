"""Mistakes and where they are: spans, diagnostics, and how both are shown.

A diagnostic has a stable code (``docs/errors.md`` lists them), one sentence, the offending text
underlined, any second place that disagrees with it, and a hint. All mistakes of a file are reported
in one run, in the order of the text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

MOST_NAMES = 500  # among which a misspelt one is looked for


@dataclass(frozen=True)
class Source:
    """A file's text and the name it is shown under."""

    name: str
    text: str = field(repr=False)

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    def line(self, number: int) -> str:
        """A line, counted from 1."""
        return self.lines[number - 1] if 0 < number <= len(self.lines) else ""


@dataclass(frozen=True)
class Span:
    """A stretch of a source: lines and columns count from 1, the end column is exclusive."""

    source: Source = field(repr=False)
    line: int
    column: int
    end_line: int
    end_column: int

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}"

    @property
    def text(self) -> str:
        """The spanned text, of the first line if there are several."""
        line = self.source.line(self.line)
        end = self.end_column - 1 if self.end_line == self.line else len(line)
        return line[self.column - 1 : end]

    def to(self, other: Span) -> Span:
        return Span(self.source, self.line, self.column, other.end_line, other.end_column)


@dataclass(frozen=True)
class Note:
    """A second place that the message speaks of."""

    span: Span
    text: str


@dataclass(frozen=True)
class Diagnostic:
    """One mistake, or, with a code that starts with W, what is likely one and does no harm.
    ``label`` stands under the underlined text."""

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    notes: tuple[Note, ...] = ()
    hint: str = ""

    @property
    def is_warning(self) -> bool:
        return self.code.startswith("W")

    def render(self) -> str:
        """The message as shown to the user, without colours."""
        out = [f"{'warning' if self.is_warning else 'error'}[{self.code}]: {self.message}"]
        if self.span:
            out += _place(self.span, self.label, "^", "-->")
        for note in self.notes:
            out += _place(note.span, note.text, "-", ":::")
        if self.hint:
            out += [
                f"  hint: {line}" if i == 0 else f"        {line}"
                for i, line in enumerate(self.hint.split("\n"))
            ]
        return "\n".join(out)


class DiagnosticError(Exception):
    """Mistakes that the user can mend; the command prints them and exits with status 1."""

    def __init__(self, diagnostics: Iterable[Diagnostic]):
        self.diagnostics = in_order(diagnostics)
        super().__init__("\n\n".join(d.render() for d in self.diagnostics))


class Refused(Exception):
    """Text that follows the grammar and is refused all the same; reading goes on after it."""

    def __init__(self, code: str, message: str, span: Span, label: str = ""):
        super().__init__(message)
        self.diagnostic = Diagnostic(code, message, span, label)


class Diagnostics:
    """Collects mistakes while a file is read, each once."""

    def __init__(self) -> None:
        self.found: list[Diagnostic] = []
        self.warnings: list[Diagnostic] = []
        self._told: set[Diagnostic] = set()

    def error(
        self,
        code: str,
        message: str,
        span: Span | None,
        label: str = "",
        *,
        notes: Sequence[tuple[Span | None, str]] = (),
        hint: str = "",
    ) -> None:
        kept = tuple(Note(s, text) for s, text in notes if s is not None)
        self.add(Diagnostic(code, message, span, label, kept, hint))

    def add(self, diagnostic: Diagnostic) -> None:
        if diagnostic not in self._told:
            self._told.add(diagnostic)
            (self.warnings if diagnostic.is_warning else self.found).append(diagnostic)

    def raise_if_any(self) -> None:
        if self.found:
            raise DiagnosticError(self.found)


def in_order(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    def place(d: Diagnostic) -> tuple[str, int, int]:
        return (d.span.source.name, d.span.line, d.span.column) if d.span else ("", 0, 0)

    return sorted(diagnostics, key=place)


def near(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the closest known name, or nothing."""
    names = set(known)
    if len(names) > MOST_NAMES:  # nobody wrote these
        return ""
    matches = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.6)
    return f"did you mean '{matches[0]}'?" if matches else ""


def counted(number: int, one: str, many: str) -> str:
    """``no index``, ``1 index``, ``2 indices``."""
    return f"{number or 'no'} {one if number == 1 else many}"


def _place(span: Span, label: str, mark: str, arrow: str) -> list[str]:
    line = span.source.line(span.line)
    shown = "".join(c if c.isprintable() else " " if c == "\t" else "\ufffd" for c in line)
    if len(shown) > 160:  # a mutated or generated file may be one endless line
        start = max(0, span.column - 60)
        shown, offset = shown[start : start + 120], start
    else:
        offset = 0
    end = span.end_column if span.end_line == span.line else len(line.rstrip()) + 1
    width = max(1, min(end - span.column, len(shown) - (span.column - 1 - offset)))
    gutter = " " * len(str(span.line))
    under = " " * (span.column - 1 - offset) + mark * width
    return [
        f"{gutter} {arrow} {span.source.name}:{span.line}:{span.column}",
        f"{gutter} |",
        f"{span.line} | {shown}".rstrip(),
        f"{gutter} | {under}{' ' + label if label else ''}",
    ]
