"""Text to syntax tree. Every syntax mistake of a file is found in one run.

A file that does not parse as a whole is cut where a declaration starts at the left margin, and each
piece is parsed alone. In a piece that does not parse, the statement at fault is left out and the
rest is parsed again: one mistake hides neither the next nor what the checker would find elsewhere.
"""

from __future__ import annotations

import re

from lark.exceptions import UnexpectedInput

from dsl import syntax
from dsl.brackets import Layout, depth
from dsl.diagnostics import Diagnostics, Refused, Source, Span
from dsl.grammar import grammar
from dsl.syntax_errors import DECLARATIONS, UNFINISHED, Missing, Place, report, starts_like_one
from dsl.tree import TreeBuilder

MOST_MISTAKES = 10  # of one declaration; more than that is not an .arch file
INSIDE_TOO = ("const", "index")  # declarations that also stand in blocks

_DECLARATION = re.compile(rf"({'|'.join(DECLARATIONS)})\b")
_DECLARED = re.compile(
    r"\b(?:block|model|fn|const|param|state|def|dims|deploy|device|cluster|format)\s+(?:fn\s+)?([A-Za-z_]\w*)"
    r"|([A-Za-z_]\w*)\s*(?:\[[^\]\n]*\])?\s*(?::[^=\n]*)?=(?!=)"
    r"|([A-Za-z_]\w*)\s*:"
)


def parse(source: Source, found: Diagnostics) -> syntax.File:
    """Parse ``source``; mistakes go to ``found``, and what could be read is returned."""
    try:
        return _build(source, source.text, 0)
    except (UnexpectedInput, Refused) as error:
        first = error
    before = len(found.found)
    pieces = [_Piece(source, text, line, found) for line, text in _pieces(source.text)]
    if len(found.found) == before:  # each piece parses, but not one after the other
        assert isinstance(first, UnexpectedInput)
        report(Place(source, source.text, 0), first, found)
    return syntax.File(
        next((p.edition for p in pieces if p.edition is not None), None),
        tuple(d for p in pieces for d in p.declarations),
        frozenset(name for p in pieces for name in p.broken),
        Span(source, 1, 1, 1, 1),
    )


def _build(source: Source, text: str, lines_before: int) -> syntax.File:
    return TreeBuilder(source, lines_before).transform(grammar().parse(text))


def _pieces(text: str) -> list[tuple[int, str]]:
    """(lines before, text) of each stretch that starts with a declaration at the left margin."""
    pieces: list[tuple[int, list[str]]] = [(0, [])]
    open_ = 0
    for number, line in enumerate(text.split("\n")):
        start = _DECLARATION.match(line)
        if start and pieces[-1][1] and (open_ == 0 or start.group(1) not in INSIDE_TOO):
            pieces.append((number, []))
            open_ = 0
        pieces[-1][1].append(line)
        open_ = max(0, open_ + depth(line))
    return [(number, "\n".join(lines)) for number, lines in pieces]


class _Piece:
    """One declaration, read as far as it can be. ``broken`` are the names of what was left out."""

    def __init__(self, source: Source, text: str, line: int, found: Diagnostics):
        self.declarations: tuple[syntax.Declaration, ...] = ()
        self.edition: syntax.Name | None = None
        self.broken: set[str] = set()
        reached = -1
        for _ in range(MOST_MISTAKES):
            place = Place(source, text, line)
            try:
                file = _build(source, text, line)
            except Refused as refused:
                found.add(refused.diagnostic)
                at: int | Missing | None = place.offset(refused.diagnostic.span)
            except UnexpectedInput as error:
                if (error.pos_in_stream or len(text)) <= reached:
                    break  # a consequence of what was left out
                at = report(place, error, found)
            else:
                self.declarations, self.edition = file.declarations, file.edition
                return
            if isinstance(at, Missing):
                mended = text[: at.offset - 1] + at.mark + text[at.offset :]
                if Layout(mended).unpaired() is None:
                    text, reached = mended, at.offset - 1
                    continue
                at = at.last
            stretch = None if at is None else _statement(place, at)
            if stretch is None:
                break
            start, reached = stretch
            self.broken |= _declared(text[start:reached])
            blank = re.sub(r"[^\n]", " ", text[start:reached])
            text = text[:start] + blank + text[reached:]
        self.broken |= _declared(text)


def _statement(text: Layout, offset: int) -> tuple[int, int] | None:
    """The stretch of whole lines that hold the statement at ``offset``, with all that it encloses;
    None if it is the head of the declaration."""
    first = text.line(offset)
    while first > 0 and not _starts(text, first):
        first -= 1
    last = text.line(offset) + 1
    while last < len(text.lines) and not starts_like_one(text, last):
        last += 1
    stretch = text.text[text.start(first) : text.start(last)]
    open_ = depth(stretch)
    while open_ > 0 and last < len(text.lines):
        open_ += depth(text.text[text.start(last) : text.start(last + 1)])
        last += 1
    if not text.text[: text.start(first)].strip() or open_ != 0:
        return None
    return text.start(first), text.start(last)


def _starts(text: Layout, line: int) -> bool:
    """Does a statement start in this line, and none go on in it?"""
    if not starts_like_one(text, line) or UNFINISHED.search(text.code_above(line)[1]):
        return False
    bracket = text.enclosing[line]
    return bracket is None or text.text[bracket] == "{"


def _declared(text: str) -> set[str]:
    """Names that a broken piece seems to declare."""
    return {name for found in _DECLARED.findall(text) for name in found if name}
