"""Reads number formats and codings in the text form of a program."""

from __future__ import annotations

from typing import NoReturn, Protocol

from compiler.coding import Coding, rebuilt, side
from dsl.diagnostics import Span
from dsl.formats import NumberFormat


class Line(Protocol):
    """What is asked of a line (``compiler/parse.py``)."""

    def peek(self) -> str: ...
    def kind(self) -> str: ...
    def next(self) -> str: ...
    def take(self, symbol: str) -> bool: ...
    def need(self, symbol: str) -> None: ...
    def word(self) -> str: ...
    def dim_name(self) -> str: ...
    def fail(self, message: str) -> NoReturn: ...


def read_coding(line: Line, formats: dict[str, NumberFormat]) -> Coding:
    """``e4m3 1 x 128 of d}``, its brace taken."""
    name = line.word()
    if name not in formats:
        line.fail(f"the format '{name}' is not declared")
    rows = side(line.word())
    line.need("x")
    columns = side(line.word())
    over: list[str] = []
    if line.take("of"):
        while line.peek() != "}":
            over.append(line.dim_name())
    line.need("}")
    return Coding(formats[name], rows, columns, tuple(over))


def read_format(line: Line, formats: dict[str, NumberFormat], span: Span | None) -> None:
    """``e4m3 exponent=4 ...``: known from here on."""
    name, fields = line.word(), dict[str, str]()
    while line.kind() != "end":
        key = line.word()
        line.need("=")
        fields[key] = ("-" if line.take("-") else "") + line.next()
    try:
        formats[name] = rebuilt(name, fields, formats, span)
    except (KeyError, ValueError) as error:
        line.fail(f"the format '{name}' is not whole: {error}")
