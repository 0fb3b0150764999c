"""Python text: precedence of operators, and lines that are not too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 100
OPEN, CLOSE = "([{", ")]}"

# Precedences: what binds tighter is larger.
ATOM, POWER, UNARY, PRODUCT, SUM, AND, OR, COMPARE = 20, 15, 14, 12, 11, 9, 8, 6


@dataclass(frozen=True)
class Text:
    """A Python expression and how tightly its outermost operator binds."""

    text: str
    binds: int = ATOM

    def __str__(self) -> str:
        return self.text

    def within(self, binds: int) -> str:
        """As an operand of an operator that binds so tightly."""
        return self.text if self.binds >= binds else f"({self.text})"

    @property
    def atom(self) -> str:
        """As something that is indexed, called or has attributes."""
        return self.within(ATOM)


def call(function: str, *arguments: str) -> Text:
    return Text(f"{function}({', '.join(arguments)})")


def method(value: Text, name: str, *arguments: str) -> Text:
    return Text(f"{value.atom}.{name}({', '.join(arguments)})")


def binary(left: Text, operator: str, right: Text, binds: int) -> Text:
    """Left-associative, but for ``**``; comparisons do not chain."""
    if operator == "**":
        return Text(f"{left.within(POWER + 1)} ** {right.within(UNARY)}", POWER)
    same = binds + 1 if binds == COMPARE else binds
    return Text(f"{left.within(same)} {operator} {right.within(binds + 1)}", binds)


# -- lines -----------------------------------------------------------------------------------------


def wrapped(line: str, indent: int) -> list[str]:
    """A statement on as many lines as it needs, indented by ``indent`` spaces.

    Broken as formatters do: at the last bracket that leaves a short head, its contents on lines of
    their own, between commas if they must be.
    """
    margin = " " * indent
    if len(margin + line) <= WIDTH:
        return [margin + line]
    found = _last_bracket(line)
    if found is None:
        return [margin + line]
    start, end = found
    head, body, tail = line[: start + 1], line[start + 1 : end], line[end:]
    if len(margin) + len(head) > WIDTH and (inner := _first_bracket(line)) is not None:
        start, end = inner
        head, body, tail = line[: start + 1], line[start + 1 : end], line[end:]
    pieces = split(body)
    joined = " " * (indent + 4) + body
    if len(joined) <= WIDTH and (len(pieces) == 1 or "=" not in body):
        inside = [joined]
    else:
        inside = [
            out
            for piece in pieces
            for out in wrapped(piece + ("," if len(pieces) > 1 else ""), indent + 4)
        ]
    return [margin + head, *inside, *wrapped(tail, indent)]


def split(text: str) -> list[str]:
    """The parts between commas that no bracket or quote holds."""
    parts, depth, begin, quote = [], 0, 0, ""
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in OPEN:
            depth += 1
        elif letter in CLOSE:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + 1
    last = text[begin:].strip()
    return [*parts, last] if last else parts


def _brackets(line: str) -> list[tuple[int, int]]:
    """Outermost pairs of brackets with something in them."""
    pairs, depth, begin, quote = [], 0, 0, ""
    for at, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in OPEN:
            if depth == 0:
                begin = at
            depth += 1
        elif letter in CLOSE:
            depth -= 1
            if depth == 0 and at > begin + 1:
                pairs.append((begin, at))
    return pairs


def _last_bracket(line: str) -> tuple[int, int] | None:
    pairs = [p for p in _brackets(line) if p[1] - p[0] > 12] or _brackets(line)
    return pairs[-1] if pairs else None


def _first_bracket(line: str) -> tuple[int, int] | None:
    pairs = _brackets(line)
    return pairs[0] if pairs else None


def comment(text: str, place: str, indent: int) -> list[str]:
    """A comment with a place behind it, on as many lines as it needs."""
    lines, room = [""], WIDTH - indent - 4
    for word in [*text.split(), f" {spoken(place)}" if place else ""]:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word.lstrip()
    first, *rest = lines
    marked = [f"# {first}", *(f"#   {line}" for line in rest)]
    return [f"{' ' * indent}{line}".rstrip() for line in marked]


def spoken(text: str) -> str:
    """Text from outside (a file's name, a comment) as it may stand in a docstring or a comment."""
    return " ".join(text.split()).replace("\\", "/").replace('"""', "'''")


def stretch(begin: str, end: str) -> str:
    """``begin:end`` as formatters write it: bounds that are no names or numbers stand apart."""
    simple = all(b.isalnum() or not b for b in (begin, end))
    if simple:
        return f"{begin}:{end}"
    return f"{begin} : {end}".strip()


def arguments(items: Sequence[str]) -> str:
    """A tuple's text, one element included."""
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
