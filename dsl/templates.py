"""Names of tensors with expressions in braces: ``model.layers.{2*i + 1}``.

In a source, an expression is over constants and the numbers of arrays, each under the name that a
``names`` entry binds. ``filled`` puts constants in; what is left is in *slots*, the numbers of the
arrays on a path, outermost first: ``{0}`` alone, ``$0`` in an expression (``{2 * $0 + 1}``). That
form stands for all tensors of a pattern at once. Numbers of arrays are only added to each other and
multiplied by constants, so what values an expression has is known from the ranges.

A number in square brackets, ``experts[{e}].gate_proj``, is no part of a tensor's name but a place
along its first axis: a checkpoint may keep the blocks of an array in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import gcd
from typing import NoReturn

from dsl.extents import Extent, ExtentError

LONGEST = 200  # letters of an expression

_TOKEN = re.compile(r"\s*(?:(?P<number>\d+\b)|(?P<name>[A-Za-z_]\w*|\$\d+)|(?P<sign>[-+*/()]))")
_SIGNS = frozenset("+-*/")


class TemplateError(ValueError):
    """A name that is none, in one clause. ``unknown`` is the name in braces that means nothing."""

    def __init__(self, message: str, unknown: str | None = None):
        self.unknown = unknown
        super().__init__(message)


@dataclass(frozen=True)
class Placeholder:
    """An expression in braces; ``steps`` are its numbers, names and signs, operands first."""

    text: str
    steps: tuple[int | str, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names in it, each once."""
        found = (s for s in self.steps if isinstance(s, str) and s not in _SIGNS)
        return tuple(dict.fromkeys(found))

    @property
    def name(self) -> str | None:
        """The name that it is, if it is nothing else."""
        return self.names[0] if len(self.steps) == 1 and self.names else None

    def value(self, of: Callable[[str], Extent]) -> Extent:
        """What it comes to where names mean ``of(name)``.

        Raises:
            TemplateError: it has no value, or is no sum of multiples of numbers.
        """
        stack: list[Extent] = []
        for step in self.steps:
            if isinstance(step, int):
                stack.append(Extent.of(step))
            elif step not in _SIGNS:
                stack.append(of(step))
            else:
                right, left = stack.pop(), stack.pop()
                try:
                    stack.append(self._apply(step, left, right))
                except ExtentError as error:
                    raise TemplateError(f"{{{self.text}}}: {error}") from None
        return stack[0]

    def _apply(self, sign: str, left: Extent, right: Extent) -> Extent:
        if sign == "+":
            return left + right
        if sign == "-":
            return left - right
        if sign == "/" and right.names:
            raise TemplateError(f"{{{self.text}}} divides by the number of an array")
        if sign == "*" and left.names and right.names:
            raise TemplateError(f"{{{self.text}}} multiplies numbers of arrays")
        return left * right if sign == "*" else left / right


@dataclass(frozen=True)
class Numbers:
    """A sum of multiples of slots: ``start`` where all are at their first number, and what one
    more of each slot adds. Slots with one number are part of ``start``."""

    start: int
    steps: tuple[tuple[int, int], ...] = ()

    @property
    def slots(self) -> set[int]:
        return {slot for slot, _ in self.steps}

    def at(self, places: Sequence[int]) -> int:
        """The value where each slot is so many beyond its first number."""
        return self.start + sum(step * places[slot] for slot, step in self.steps)

    def spread(self, ranges: Sequence[range]) -> range:
        """A progression that has all values; if there is one slot, it has no others."""
        ends = [step * (len(ranges[slot]) - 1) for slot, step in self.steps]
        low = self.start + sum(e for e in ends if e < 0)
        high = self.start + sum(e for e in ends if e > 0)
        return range(low, high + 1, gcd(*(step for _, step in self.steps)) or 1)


def parts(template: str) -> list[str | Placeholder]:
    """The texts and expressions of a name.

    Raises:
        TemplateError: braces do not pair up, or hold no expression.
    """
    if not re.fullmatch(r"[^{}]*(\{[^{}]*\}[^{}]*)*", template):
        raise TemplateError("the braces of this name do not pair up")
    if re.search(r"[\[\]]", re.sub(r"\[(\d+|\{[^{}]*\})\]", "", template)):
        raise TemplateError("square brackets hold the place in a stacked tensor: a number, or {i}")
    pieces = re.split(r"\{([^{}]*)\}", template)
    return [_placeholder(p) if k % 2 else p for k, p in enumerate(pieces) if k % 2 or p]


def filled(template: str, slots: Mapping[str, int], constants: Mapping[str, object]) -> str:
    """The name with constants put in, and with slots for the numbers of arrays.

    Raises:
        TemplateError: it is none, or a name in it is neither a constant with a value nor in
            ``slots``.
    """

    def of(name: str) -> Extent:
        if name in slots:
            return Extent.name(f"${slots[name]}")
        if name not in constants:
            raise TemplateError(
                f"'{name}' is neither a constant nor the number of an array around it", name
            )
        value = constants[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TemplateError(f"'{name}' is {value}, not a whole number")
        return Extent.of(value)

    out = ""
    for part in parts(template):
        if isinstance(part, str):
            out += part
        elif part.name is not None and part.name in constants and part.name not in slots:
            out += str(constants[part.name])
        else:
            out += _written(part.value(of))
    return out


def numbered(name: str, ranges: Sequence[range]) -> list[str | Numbers]:
    """The texts of a filled name and the numbers between them; the ranges are not empty.

    Raises:
        TemplateError: it is none, or has a number that is not whole or below zero.
    """
    out: list[str | Numbers] = []
    for part in parts(name):
        if isinstance(part, str):
            out.append(part)
            continue
        if part.text.isdecimal():
            value = Extent.name(f"${part.text}")
        else:
            value = part.value(Extent.name)
        out.append(_over(value, ranges))
    return out


def _over(value: Extent, ranges: Sequence[range]) -> Numbers:
    start, steps = Fraction(0), []
    for monomial, factor in value.terms:
        if not monomial:
            start += factor
            continue
        name = monomial[0][0]
        slot = int(name[1:]) if re.fullmatch(r"\$\d+", name) else len(ranges)
        if slot >= len(ranges):
            raise TemplateError(f"'{name}' is the number of no array")
        start += factor * ranges[slot].start
        if len(ranges[slot]) > 1:
            steps.append((slot, factor))
    for number in (start, *(start + step for _, step in steps)):
        if number.denominator != 1:
            raise TemplateError(f"this name has the number {number}, which is not whole")
    made = Numbers(int(start), tuple((slot, int(step)) for slot, step in steps))
    lowest = made.spread(ranges).start
    if lowest < 0:
        raise TemplateError(f"this name has the number {lowest}, which is below zero")
    return made


def _written(value: Extent) -> str:
    """A number, ``{0}``, or an expression; what is no whole number is found by ``numbered``."""
    if value.constant is not None and value.constant >= 0:
        return str(value.constant)
    slot = next((n for n in value.names if value == Extent.name(n)), None)
    return f"{{{slot[1:] if slot else value}}}"


def _placeholder(text: str) -> Placeholder:
    return Placeholder(text, _Reader(text).steps)


class _Reader:
    """Reads an expression; ``steps`` are in the order in which they are done."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.steps: tuple[int | str, ...] = ()
        if not text.strip() or len(text) > LONGEST:
            self._fail()
        self._sum()
        if text[self.at :].strip():
            self._fail()

    def _fail(self) -> NoReturn:
        shown = self.text if len(self.text) <= LONGEST else f"{self.text[:20]}..."
        raise TemplateError(f"'{{{shown}}}' is no expression of whole numbers")

    def _next(self, *signs: str) -> str:
        """The sign that is next, if it is one of these; it is skipped then."""
        match = _TOKEN.match(self.text, self.at)
        if match is None or match["sign"] not in signs:
            return ""
        self.at = match.end()
        return match["sign"]

    def _sum(self) -> None:
        self._product()
        while sign := self._next("+", "-"):
            self._product()
            self.steps += (sign,)

    def _product(self) -> None:
        self._operand()
        while sign := self._next("*", "/"):
            self._operand()
            self.steps += (sign,)

    def _operand(self) -> None:
        if self._next("-"):
            self.steps += (0,)
            self._operand()
            self.steps += ("-",)
        elif self._next("("):
            self._sum()
            if not self._next(")"):
                self._fail()
        else:
            match = _TOKEN.match(self.text, self.at)
            if match is None or match["sign"]:
                self._fail()
            self.at = match.end()
            self.steps += (int(match["number"]) if match["number"] else match["name"],)
