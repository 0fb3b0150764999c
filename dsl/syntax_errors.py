"""What is said about text that does not parse."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lark import Token, UnexpectedCharacters, UnexpectedToken
from lark.exceptions import UnexpectedInput

from dsl.brackets import Layout
from dsl.diagnostics import Diagnostics, Source, Span, near

DECLARATIONS = (
    "import const index require fn extern block model names dims".split()
    + "device cluster deploy format edition".split()
)
KEYWORDS = (
    DECLARATIONS
    + "config else ignore param state use def if then let cached and or not".split()
    + "inf true false null".split()
)
CLAUSES = "mesh stages shard precision overlap recompute train serve".split()  # of a deployment
# A line that starts a member, a statement, a clause or an entry.
START = re.compile(
    r"\s*(?:(?:param|state|use|def|if|let|cached|index|const|ignore)\b|scan\s+[A-Za-z_]"
    rf"|(?:{'|'.join(CLAUSES)})\b"
    r"|[A-Za-z_]\w*\s*(?:\[[^\]\n]*\])?\s*(?::\s*\w+\s*)?=(?!=)|\})"
)
_DEFINED = re.compile(r"\s*(?:\[[^\]\n]*\]\s*)?(?::\s*\w+\s*)?=(?!=)")  # what follows a left side
UNFINISHED = re.compile(r"(?:[-+*/^=<>|,]|\b(?:and|or|not|then|else))$")

# What a token is called in a message.
_READABLE = {
    "NAME": "a name",
    "WORDS": "a name",
    "NUMBER": "a number",
    "STRING": "a quoted text",
    "QUANTITY": "a number with a unit",
    "TILE": "a tile such as 1 x 128",
    "SCHEDULE": "a schedule",
    "ARROW": "'->'",
    "DOTS": "'..'",
    "EQUAL": "'='",
    "FIRST": "'from'",
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
    "MINUS": "'-'",
    "$END": "the end of the file",
}
# Tokens that mean one thing together, the larger groups first.
_GROUPS = [
    ({"PLUS", "MINUS", "STAR", "SLASH", "CIRCUMFLEX", "COMPARE", "AND", "OR"}, "an operator"),
    ({name.upper() for name in DECLARATIONS if name != "edition"}, "a declaration"),
    ({"NAME", "SIZE"}, "a name, or a size such as 8B"),
    ({"PARAM", "STATE", "USE", "DEF", "INDEX", "CONST", "IF"}, "a member"),
    ({"LET", "CACHED", "SCAN", "INDEX", "CONST", "IF"}, "an equation"),
    ({name.upper() for name in CLAUSES}, "a clause"),
]

_TWINS = {
    "×": "*", "·": "*", "⋅": "*", "∗": "*", "−": "-", "–": "-", "—": "-", "÷": "/", "∕": "/",
    "≤": "<=", "≥": ">=", "≠": "!=", "→": "->", "∞": "inf", "∧": "and", "∨": "or", "¬": "not",
    "²": "^ 2", "³": "^ 3", "√": "sqrt(...)", "∑": "sum[i](...)", "Σ": "sum[i](...)", "π": "pi",
    "“": '"', "”": '"', "‘": '"', "’": '"', "`": '"', "&": "and", "!": "not", "…": "..",
    "（": "(", "）": ")", "［": "[", "］": "]", "，": ",", "＝": "=",
}  # fmt: skip
_FOREIGN = {
    "'": 'a text is quoted with "',
    ";": "nothing ends with ';': a new name starts a new equation",
    "@": "a matrix product is written with its indices: y[f] = W[f,d] * x[d]",
    "%": "there is no remainder; const functions have floor: n - floor(n / k) * k",
    "\\": "an equation may go on in the next line without a mark",
    "?": "a choice is written: if condition then a else b, or where(condition, a, b)",
}
_WORDS = {
    "elif": "write: else if",
    "return": "a function gives the value that its head names after ->",
    "for": "an equation holds for every value of its indices; there are no loops",
}
BEGINS = "a scan says what its state is before the first token: from 0"
NO_NAME = "is a word of the language and cannot be a name"


class Place(Layout):
    """A text of a source that starts some lines into it."""

    def __init__(self, source: Source, text: str, lines_before: int):
        super().__init__(text)
        self.source = source
        self.before = lines_before

    def span(self, offset: int, length: int = 1) -> Span:
        number = self.line(offset)
        line, column = number + 1 + self.before, offset - self.lines[number] + 1
        return Span(self.source, line, column, line, column + length)

    def offset(self, span: Span | None) -> int:
        """Where a span of this text starts."""
        return self.start(span.line - 1 - self.before) + span.column - 1 if span else 0

    def end(self) -> Span:
        return self.span(len(self.text.rstrip()))


def starts_like_one(layout: Layout, line: int) -> bool:
    """Does a line look as if a member, a statement or an entry started in it?"""
    return START.match(layout.text, layout.start(line)) is not None


@dataclass(frozen=True)
class Missing:
    """A mark that is missing before ``offset``: the statement that ends at ``last`` goes on."""

    mark: str
    offset: int
    last: int


def report(place: Place, error: UnexpectedInput, found: Diagnostics) -> int | Missing | None:
    """Say what is wrong, once. Gives the offset of what is wrong, or what is missing there; None
    if nothing follows it."""
    if isinstance(error, UnexpectedToken):
        return _token(place, error, found)
    assert isinstance(error, UnexpectedCharacters)
    offset = error.pos_in_stream or 0
    _character(place, offset, found)
    return offset


def _character(place: Place, offset: int, found: Diagnostics) -> None:
    mark = place.text[offset]
    if mark == '"':
        found.error(
            "E0102",
            "a quoted text has no end",
            place.span(offset),
            hint='close it with " on the same line',
        )
        return
    two = place.text[offset : offset + 2]
    seen = mark.isprintable() and not mark.isspace()
    shown = f'"{mark}"' if mark == "'" else f"'{mark}'" if seen else f"U+{ord(mark):04X}"
    message, hint = f"{shown} means nothing here", _FOREIGN.get(mark, "")
    if two in ("&&", "||"):
        message, hint = f"'{two}' means nothing here", f"write {'and' if two == '&&' else 'or'}"
    elif mark in _TWINS:
        hint = f"write {_TWINS[mark]}"
    elif not seen:
        message = f"the invisible character {shown} cannot stand here"
        hint = "delete it, or put a space in its place"
    elif mark.isalpha():
        hint = "names are made of the letters a to z and A to Z, digits and _"
    found.error(
        "E0102", message, place.span(offset, len(two) if two in ("&&", "||") else 1), hint=hint
    )


def _token(place: Place, error: UnexpectedToken, found: Diagnostics) -> int | Missing | None:
    token: Token = error.token
    expected = set(error.accepts or error.expected or ())
    at_end = token.type == "$END"
    offset = len(place.text) if at_end else (token.start_pos or 0)
    unfinished = at_end and "RBRACE" not in expected  # in the middle of a statement
    bracket = None if unfinished else _bracket(place, offset, at_end, found)
    if bracket is not None:
        return None if place.text[bracket] == "{" or at_end else bracket
    dangling = _dangling(place, token, offset, expected, found)
    if dangling is not None:
        return None if at_end else dangling
    factor = _missing_times(place, offset) if "EQUAL" in expected else None
    if factor is not None:
        start, name = factor
        found.error(
            "E0101",
            f"'{name}' cannot stand here",
            place.span(start, len(name)),
            "expected an operator",
            hint="a product is written with *",
        )
        return start
    label = _expectation(expected)
    if at_end:
        found.error("E0101", "this ends in the middle of a declaration", place.end(), label)
        return None
    if place.first_on_line(offset) and not expected & {"RBRACE", "$END", "NUMBER"}:
        line, code = place.code_above(place.line(offset))  # which is not finished
        what = label.removeprefix("expected ") or "something"
        found.error(
            "E0101",
            f"{what} is missing here",
            place.span(place.start(line) + len(code)),
            notes=[(place.span(offset, len(token)), "before this")],
            hint=BEGINS if "FIRST" in expected else "",
        )
        last = place.start(line) + max(0, len(code) - 1)
        if label == "expected '{'" and place.text[offset - 1] == " ":
            return Missing("{", offset, last)
        return last
    hint = _hint(place, error, expected)
    if not (hint.endswith(NO_NAME) and any(d.hint == hint for d in found.found)):
        shown = f"'{token}'" if len(token) < 60 else "this"
        span = place.span(offset, len(token))
        found.error("E0101", f"{shown} cannot stand here", span, label, hint=hint)
    return offset


def _bracket(place: Place, offset: int, at_end: bool, found: Diagnostics) -> int | None:
    """Report a bracket without a partner, if that is why the parser stopped at ``offset``."""
    lone = place.unpaired()
    if lone is None:
        return None
    mark = place.text[lone.offset]
    if mark in ")]}":
        if lone.offset != offset:
            return None
        found.error("E0107", f"this '{mark}' closes nothing", place.span(offset))
        return offset
    opened = place.innermost(offset)
    if not (at_end or offset == lone.end or (opened == lone.offset and mark != "{")):
        return None
    notes = [] if at_end else [(place.span(offset), "it should be closed before this")]
    found.error("E0107", f"this '{mark}' is never closed", place.span(lone.offset), notes=notes)
    return lone.offset


def _dangling(
    place: Place, token: Token, offset: int, expected: set[str], found: Diagnostics
) -> int | None:
    """Report an operator at the end of a line with nothing after it: the parser went on to read
    the next statement as its operand."""
    line = place.line(offset)
    operand = {"NUMBER", "LPAR"} <= expected and place.first_on_line(offset)
    if not operand and not (token.type in ("EQUAL", "COLON") and starts_like_one(place, line)):
        return None
    above, code = place.code_above(line)
    unfinished = UNFINISHED.search(code)
    if unfinished is None or place.innermost(offset) != place.enclosing[line]:
        return None
    operator = unfinished.group()
    start = place.start(above) + unfinished.start()
    span = place.span(start, len(operator))
    here = place.code(line)
    notes = []
    if here.strip():
        at = place.start(line) + len(here) - len(here.lstrip())
        notes.append((place.span(at, len(here.strip())), "this is something new"))
    found.error("E0101", f"nothing follows '{operator}'", span, notes=notes)
    return start


def _hint(place: Place, error: UnexpectedToken, expected: set[str]) -> str:
    token: Token = error.token
    shown = str(token)
    stands_before = re.search(r"(\w+|\S)\s*$", place.text[: token.start_pos][-200:])
    before = stands_before.group(1) if stands_before else ""
    adjacent = stands_before is not None and stands_before.group() == before
    if shown == "edition":
        return "the edition stands in the first line of a file"
    defined = _DEFINED.match(place.text, token.end_pos or 0) is not None
    if shown in ("param", "state", "use", "def") and "LET" in expected and not defined:
        return f"'{shown}' stands in a block, outside of its defs"
    if shown in DECLARATIONS and "DEF" in expected:
        return f"'{shown}' stands outside of blocks, at the left margin"
    if shown in KEYWORDS and "NAME" in expected:
        return f"'{shown}' {NO_NAME}"
    if token.type == "NAME" and before.isdigit() and adjacent:
        return f"a product is written {before} * {shown}"
    if token.type == "EQUAL" and "COMPARE" in expected:
        return "equality is written =="
    if token.type == "EQUAL" and before == ":":
        return "an equation is written with ="
    if shown == "==" and "EQUAL" in expected:
        return "an equation is written with ="
    if shown == before == "*" and adjacent:
        return "a power is written ^"
    if place.text[token.start_pos :].startswith("//") or (shown == before == "/" and adjacent):
        return "a comment starts with #"
    if before == "model" or (shown == "[" and expected == {"LBRACE"}):
        return "a model declares its own indices and takes none"
    if "FIRST" in expected:
        return BEGINS
    if shown in _WORDS:
        return _WORDS[shown]
    words = [w.lower() for w in expected if w.lower() in {*KEYWORDS, *CLAUSES}]
    if token.type == "NAME" and len(shown) > 2 and near(shown, words):
        return near(shown, words)
    if token.type == "NAME" and "DEF" in expected:
        return "equations stand in a def: def (x[d]) -> y[d] { ... }"
    if token.type in ("NAME", "LBRACE") and len(before) > 2 and before not in KEYWORDS:
        return near(
            before, [*DECLARATIONS, "let", "cached", "scan", "param", "state", "use", "def"]
        )
    return ""


def _missing_times(place: Place, offset: int) -> tuple[int, str] | None:
    """In ``y = W[f,d] x[d]`` and in ``2x`` the parser takes ``x`` for the next equation; this finds
    it, in what stands before the place where that equation's ``=`` is missed."""
    line = place.line(offset)
    if not place.text[place.start(line) : offset].strip():
        line, _ = place.code_above(line)
        before = place.code(line)
    else:
        before = place.text[place.start(line) : offset].rstrip()
    match = re.search(r"(\d|[\w\])][ \t]+)([A-Za-z_]\w*)(?:\[[^\]\n]*\])?$", before)
    if match is None or before[: match.end(1)].split()[-1] in KEYWORDS:
        return None
    if "=" not in before[: match.start()]:
        return None
    return place.start(line) + match.start(2), match.group(2)


def _expectation(expected: set[str]) -> str:
    """``expected a name or '='``, if the list is short enough to help."""
    if {"NUMBER", "LPAR", "MINUS"} <= expected:
        closing = [_READABLE[t] for t in ("RPAR", "RSQB") if t in expected]
        return " or ".join(["expected an expression", *closing])
    rest, words = set(expected), []
    if _GROUPS[0][0] <= rest:
        rest -= {"LPAR", "LSQB", "DOT"}
    for group, word in _GROUPS:
        if group <= rest:
            rest -= group | ({"NAME"} if "LET" in group else set())
            words.append(word)
    words += sorted(_READABLE.get(t, f"'{t.lower()}'") for t in rest if not t.startswith("__"))
    if not words or len(words) > 6:
        return ""
    return "expected " + (
        words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    )
