"""Text to syntax tree. Every syntax mistake of a file is found in one run.

A file that does not parse as a whole is cut where a declaration starts at the left margin, and each
piece is parsed alone: one mistake does not hide the next.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from lark import Lark, Token, UnexpectedCharacters, UnexpectedEOF, UnexpectedToken
from lark.exceptions import UnexpectedInput, VisitError

from dsl import syntax
from dsl.diagnostics import Diagnostics, Source, Span, near
from dsl.tree import TooDeep, TreeBuilder

EDITION = 2026
DECLARATIONS = (
    "import const index require fn block model names dims cluster deploy format edition".split()
)
KEYWORDS = (
    DECLARATIONS + "config else ignore param state use def if then let cached and or not".split()
)

# What a token is called in a message.
READABLE = {
    "NAME": "a name",
    "NUMBER": "a number",
    "STRING": "a quoted text",
    "COMPARE": "a comparison",
    "EQUAL": "'='",
    "LPAR": "'('",
    "RPAR": "')'",
    "LSQB": "'['",
    "RSQB": "']'",
    "LBRACE": "'{'",
    "RBRACE": "'}'",
    "COMMA": "','",
    "COLON": "':'",
    "DOT": "'.'",
    "VBAR": "'|'",
    "PLUS": "'+'",
    "MINUS": "'-'",
    "STAR": "'*'",
    "SLASH": "'/'",
    "CIRCUMFLEX": "'^'",
    "$END": "the end of the file",
}


@cache
def grammar() -> Lark:
    """The LALR parser, kept between processes: building its tables takes longer than any model."""
    path = Path(__file__).with_name("grammar.lark")
    options: dict[str, Any] = dict(
        parser="lalr", lexer="contextual", propagate_positions=True, maybe_placeholders=True
    )
    text = path.read_text(encoding="utf-8")
    try:
        return Lark(text, cache=True, **options)
    except (OSError, EOFError, ValueError):  # no writable temporary folder, or a damaged cache
        return Lark(text, **options)


def parse(source: Source, found: Diagnostics) -> syntax.File:
    """Parse ``source``; mistakes go to ``found``, and what could be read is returned."""
    whole = Span(source, 1, 1, 1, 1)
    try:
        return _build(source, source.text, 0)
    except UnexpectedInput as error:
        first = error
        pieces = _pieces(source.text)
        if len(pieces) < 2:
            _report(source, first, 0, found)
            return syntax.File(None, (), _declared(source.text), whole)
    except TooDeep as deep:
        found.error(
            "E0103", "nested too deeply", deep.span, f"deeper than {syntax.MAX_DEPTH} levels"
        )
        return syntax.File(None, (), _declared(source.text), whole)

    declarations: list[syntax.Declaration] = []
    broken: set[str] = set()
    edition: int | None = None
    before = len(found.found)
    for line, text in pieces:
        try:
            piece = _build(source, text, line)
        except UnexpectedInput as error:
            _report(source, error, line, found)
            broken |= _declared(text)
        except TooDeep as deep:
            found.error(
                "E0103", "nested too deeply", deep.span, f"deeper than {syntax.MAX_DEPTH} levels"
            )
            broken |= _declared(text)
        else:
            declarations += piece.declarations
            edition = edition if piece.edition is None else piece.edition
    if len(found.found) == before:  # the pieces parse, the whole does not: a brace is unbalanced
        _report(source, first, 0, found)
    return syntax.File(edition, tuple(declarations), frozenset(broken), whole)


def _build(source: Source, text: str, lines_before: int) -> syntax.File:
    tree = grammar().parse(text)
    try:
        return TreeBuilder(source, lines_before).transform(tree)
    except VisitError as error:
        raise error.orig_exc from None


def _pieces(text: str) -> list[tuple[int, str]]:
    """(lines before, text) of each stretch that starts with a declaration at the left margin."""
    start = re.compile(rf"(?:{'|'.join(DECLARATIONS)})\b")
    pieces: list[tuple[int, list[str]]] = [(0, [])]
    for number, line in enumerate(text.split("\n")):
        if start.match(line) and pieces[-1][1]:
            pieces.append((number, []))
        pieces[-1][1].append(line)
    return [(number, "\n".join(lines)) for number, lines in pieces]


def _declared(text: str) -> frozenset[str]:
    """Names that a broken piece seems to declare."""
    pattern = r"\b(?:block|model|fn|const|index|use|dims|deploy|cluster|format)\s+([A-Za-z_]\w*)"
    return frozenset(re.findall(pattern, text))


def _report(source: Source, error: UnexpectedInput, before: int, found: Diagnostics) -> None:
    if isinstance(error, UnexpectedCharacters):
        _report_character(source, error, before, found)
    elif isinstance(error, UnexpectedEOF):  # pragma: no cover - LALR reports $END as a token
        end = _end_of(source)
        found.error("E0101", "the file ends in the middle of a declaration", end)
    elif isinstance(error, UnexpectedToken):
        _report_token(source, error, before, found)


def _report_character(
    source: Source, error: UnexpectedCharacters, before: int, found: Diagnostics
) -> None:
    line, column = error.line + before, error.column
    span = Span(source, line, column, line, column + 1)
    text = source.line(line)[column - 1 : column]
    if text == '"':
        message, hint = "a quoted text has no end", 'close it with " on the same line'
    else:
        shown = repr(text) if text.isprintable() else f"U+{ord(text):04X}" if text else "this"
        message, hint = f"{shown} means nothing here", ""
        ascii_twin = {
            "×": "*",
            "·": "*",
            "−": "-",
            "÷": "/",
            "≤": "<=",
            "≥": ">=",
            "→": "->",
            "∞": "inf",
        }
        if text in ascii_twin:
            hint = f"write {ascii_twin[text]}"
        elif text == ";":
            hint = "equations need no ';': a new name starts a new equation"
    found.error("E0102", message, span, hint=hint)


def _report_token(source: Source, error: UnexpectedToken, before: int, found: Diagnostics) -> None:
    token: Token = error.token
    expected = {t for t in (error.accepts or error.expected or ())}
    if token.type == "$END":
        span = _end_of(source)
        found.error(
            "E0101",
            "the file ends in the middle of a declaration",
            span,
            _expectation(expected),
            hint="is a '}' or ')' missing?" if expected & {"RBRACE", "RPAR"} else "",
        )
        return
    line = (token.line or 1) + before
    end_line = (token.end_line or token.line or 1) + before
    span = Span(
        source, line, token.column or 1, end_line, token.end_column or (token.column or 1) + 1
    )
    shown = str(token)
    hint = ""
    if token.type == "NAME":
        words = {w.lower() for w in expected if w.isupper()} & set(KEYWORDS)
        hint = near(shown, words)
    elif shown in KEYWORDS and "NAME" in expected:
        hint = f"'{shown}' is a word of the language and cannot be a name"
    elif token.type == "EQUAL" and "COMPARE" in expected:
        hint = "equality is written =="
    found.error("E0101", f"'{shown}' cannot stand here", span, _expectation(expected), hint=hint)


def _expectation(expected: set[str]) -> str:
    """``expected a name or '='``, if the list is short enough to help."""
    words = sorted(READABLE.get(t, f"'{t.lower()}'") for t in expected if not t.startswith("__"))
    if not words or len(words) > 6:
        return "expected an expression" if {"NUMBER", "LPAR"} <= expected else ""
    return "expected " + (
        words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
    )


def _end_of(source: Source) -> Span:
    lines = source.text.rstrip().split("\n")
    return Span(source, len(lines), len(lines[-1]) + 1, len(lines), len(lines[-1]) + 2)


__all__ = ["EDITION", "KEYWORDS", "parse"]
