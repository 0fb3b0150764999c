"""Reads the text form of a program (``compiler/text.py`` describes and prints it)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NoReturn, cast, get_args

from compiler.ir import (
    Child,
    Dim,
    DimKind,
    DType,
    Entry,
    EntryInput,
    Graph,
    Module,
    NamePart,
    Node,
    Parameter,
    Program,
    Type,
)
from compiler.parse_coding import read_coding, read_format
from compiler.turns import read_turn
from dsl.diagnostics import Source, Span
from dsl.extents import Extent
from dsl.formats import NumberFormat

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<comment>//.*)
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<dim>`[^`]*`)
    | (?P<number>-?\d+(?:\.\d+(?:e[+-]?\d+)?|e[+-]?\d+)(?![\w$@.]) | -inf\b)
    | (?P<word>[A-Za-z0-9_$@][A-Za-z0-9_.$@-]*)
    | (?P<symbol>[-+*/^=:,%(){}\[\]<>|])
    )""",
    re.VERBOSE,
)


class TextError(ValueError):
    """The text is not that of a program; the message names the line."""


def resolve(name: str, declared: Mapping[str, Dim]) -> Dim | None:
    """The dim of this name: a declared one, or a sum or product of declared ones."""
    if name in declared:
        return declared[name]
    parts = _split(name, "|")
    form = "sum"
    if len(parts) == 1 and name.startswith("(") and name.endswith(")"):
        parts, form = _split(name[1:-1], ","), "product"
    if form == "sum" and len(parts) == 1:
        return None
    dims = [resolve(p, declared) for p in parts]
    if None in dims:
        return None
    known = cast(list[Dim], dims)
    return Dim.sum(known) if form == "sum" else Dim.product(known)


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators that stand in no parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def parse(text: str) -> Program:
    """The program that the text is.

    Raises:
        TextError: it is none.
    """
    return _Reader(text).program()


class _Line:
    """The tokens of one line, read from left to right."""

    def __init__(
        self,
        number: int,
        text: str,
        sources: dict[str, Source],
        formats: dict[str, NumberFormat] | None = None,
    ):
        self.number, self.text = number, text
        self.formats = {} if formats is None else formats
        self.tokens: list[tuple[str, str]] = []
        self.span: Span | None = None
        self.at = 0
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if not match:
                self.fail(f"cannot read {text[position:].strip()!r}")
            kind = cast(str, match.lastgroup)
            if kind == "comment":
                self.span = self._span(match["comment"][2:].strip(), sources)
            else:
                self.tokens.append((kind, match[kind]))
            position = match.end()

    def _span(self, text: str, sources: dict[str, Source]) -> Span | None:
        file, _, line = text.rpartition(":")
        if not file or not line.isdigit():
            return None
        source = sources.setdefault(file, Source(file, ""))
        return Span(source, int(line), 1, int(line), 1)

    def fail(self, message: str) -> NoReturn:
        raise TextError(f"line {self.number}: {message}: {self.text.strip()}")

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else "end"

    def next(self) -> str:
        token = self.peek() or self.fail("the line ends too early")
        self.at += 1
        return token

    def take(self, symbol: str) -> bool:
        """Whether this symbol or keyword is next; it is skipped if so."""
        if self.peek() == symbol and self.kind() in ("symbol", "word"):
            self.at += 1
            return True
        return False

    def need(self, symbol: str) -> None:
        if not self.take(symbol):
            self.fail(f"expected '{symbol}' and found '{self.peek() or 'the end'}'")

    def end(self) -> None:
        if self.kind() != "end":
            self.fail(f"'{self.peek()}' is too much")

    def word(self) -> str:
        kind, token = self.kind(), self.next()
        if kind == "string":
            return cast(str, json.loads(token))
        if kind != "word" and not (kind == "number" and token[0].isdigit()):  # %1.1 is a name
            self.fail(f"expected a name and found '{token}'")
        return token

    def words(self) -> list[str]:
        """Names in parentheses, or nothing."""
        found: list[str] = []
        if self.take("("):
            while not self.take(")"):
                if found:
                    self.need(",")
                self.need("%")
                found.append(self.word())
        return found

    # -- extents: sums of products, as Extent prints them --

    def extent(self) -> Extent:
        total = -self._term() if self.take("-") else self._term()
        while self.peek() in ("+", "-") and self.kind() == "symbol":
            total = total + self._term() if self.next() == "+" else total - self._term()
        return total

    def _term(self) -> Extent:
        value = self._factor()
        while self.peek() in ("*", "/") and self.kind() == "symbol":
            value = value * self._factor() if self.next() == "*" else value / self._factor()
        return value

    def _factor(self) -> Extent:
        word = self.word()
        base = Extent.of(int(word)) if word.isdigit() else Extent.name(word)
        value = base
        if self.take("^"):
            for _ in range(int(self.word()) - 1):
                value = value * base
        return value

    # -- dims and types --

    def dim_name(self) -> str:
        """A dim as it stands in a type: ``n|(h,v)``, or anything in backticks."""
        if self.kind() == "dim":
            return self.next()[1:-1]
        text = self._dim_item()
        while self.take("|"):
            text += "|" + self._dim_item()
        return text

    def _dim_item(self) -> str:
        if not self.take("("):
            name = self.next()
            return f"{name}/{self.next()}" if self.take("/") else name
        parts = [self.dim_name()]
        while self.take(","):
            parts.append(self.dim_name())
        self.need(")")
        return f"({','.join(parts)})"

    def dim(self, dims: Mapping[str, Dim]) -> Dim:
        return self.known(self.dim_name(), dims)

    def known(self, name: str, dims: Mapping[str, Dim]) -> Dim:
        return resolve(name, dims) or self.fail(f"dim '{name}' is not declared")

    def type(self, dims: Mapping[str, Dim]) -> Type:
        dtype = self.word()
        if dtype not in get_args(DType):
            self.fail(f"'{dtype}' is not a dtype")
        self.need("[")
        found: list[Dim] = []
        while not self.take("]"):
            if found:
                self.need(",")
            found.append(self.dim(dims))
        if dtype == "bundle":
            self.need("of")
            return Type("bundle", tuple(found), bundle=self.word())
        of = self.dim(dims) if self.take("of") else None
        coding = read_coding(self, self.formats) if self.take("{") else None
        return Type(cast(DType, dtype), tuple(found), of, coding=coding)

    def value(self, dims: Mapping[str, Dim]) -> Any:
        kind, token = self.kind(), self.next()
        if kind == "string":
            return json.loads(token)
        if kind == "dim":
            return self.known(token[1:-1], dims)
        if kind == "number":
            return float(token)
        if token == "-":
            return -self.value(dims)
        if token == "<":
            extent = self.extent()
            self.need(">")
            return extent
        if token == "{":
            return read_coding(self, self.formats)
        if token == "(":
            items: list[Any] = []
            while not self.take(")"):
                if items:
                    self.need(",")
                items.append(self.value(dims))
            return tuple(items)
        if token.isdigit():
            return int(token)
        words = {"null": None, "true": True, "false": False}
        if token in words:
            return words[token]
        if token in ("inf", "nan"):
            return float(token)
        return self.fail(f"'{token}' is not a value")


class _Reader:
    def __init__(self, text: str):
        sources: dict[str, Source] = {}
        formats: dict[str, NumberFormat] = {}
        lines = [_Line(i, line, sources, formats) for i, line in enumerate(text.split("\n"), 1)]
        self.lines = iter([line for line in lines if line.tokens])

    def program(self) -> Program:
        first = next(self.lines, None)
        if first is None:
            raise TextError("the text is empty")
        first.need("program")
        name = first.word()
        first.need("of")
        root = first.word()
        first.end()
        constants: dict[str, Any] = {}
        ignored: list[str] = []
        mesh: tuple[str, ...] = ()
        batch: tuple[str, ...] = ()
        modules: dict[str, Module] = {}
        entries: dict[str, Entry] = {}
        bodies: dict[str, Graph] = {}
        for line in self.lines:
            what = line.next()
            if what == "const":
                key = line.word()
                line.need("=")
                constants[key] = line.value({})
            elif what == "mesh":
                mesh = line.value({})
                line.need("batch")
                batch = line.value({})
            elif what == "ignored":
                ignored.append(line.word())
            elif what == "format":
                read_format(line, line.formats, line.span)
            elif what == "entry":
                entry = self.entry(line)
                entries[entry.name] = entry
            elif what == "module":
                module = self.module(line)
                modules[module.name] = module
            elif what == "body":
                graph = self.body(line)
                bodies[graph.name] = graph
            else:
                line.fail(f"'{what}' begins nothing")
            line.end()
        made = Program(name, constants, root, modules, bodies, entries, tuple(ignored))
        return replace(made, mesh=mesh, batch=batch)

    def block(self, line: _Line) -> list[_Line]:
        """The lines between the braces."""
        line.need("{")
        found: list[_Line] = []
        for inner in self.lines:
            if inner.take("}"):
                inner.end()
                return found
            found.append(inner)
        return line.fail("the closing brace is missing")

    def entry(self, line: _Line) -> Entry:
        name = line.word()
        line.need("=")
        body = line.word()
        line.need("(")
        inputs: list[EntryInput] = []
        while not line.take(")"):
            if inputs:
                line.need(",")
            item = EntryInput(line.word())
            if line.take("="):
                source = line.word()
                sign = -1 if line.next() == "-" else 1
                item = EntryInput(item.name, source, sign * int(line.word()))
            inputs.append(item)
        return Entry(name, body, tuple(inputs))

    def module(self, line: _Line) -> Module:
        name = line.word()
        line.need("of")
        block = line.word()
        dims: dict[str, Dim] = {}
        parameters: list[Parameter] = []
        children: list[Child] = []
        names: dict[str, NamePart] = {}
        methods: dict[str, str] = {}
        for inner in self.block(line):
            what = inner.next()
            if what == "dim":
                self.dim(inner, dims)
            elif what in ("param", "state"):
                own = inner.word()
                inner.need(":")
                type = inner.type(dims)
                role: Literal["param", "state"] = "param" if what == "param" else "state"
                coding = None
                if inner.take("stored"):
                    inner.need("{")
                    coding = read_coding(inner, inner.formats)
                parameters.append(Parameter(own, type, role, inner.span, coding))
            elif what == "child":
                own, array = inner.word(), None
                if inner.take("["):
                    array = inner.dim(dims)
                    inner.need("]")
                inner.need("=")
                children.append(Child(own, inner.word(), array))
            elif what == "name":
                own, number = inner.word(), None
                if inner.take("["):
                    number = inner.word()
                    inner.need("]")
                inner.need("=")
                names[own] = NamePart(inner.word(), number, inner.span)
            elif what == "method":
                own = inner.word()
                inner.need("=")
                methods[own] = inner.word()
            else:
                inner.fail(f"'{what}' is not a part of a module")
            inner.end()
        rest = (tuple(parameters), tuple(children), names, methods)
        return Module(name, block, *rest, span=line.span)

    def dim(self, line: _Line, dims: dict[str, Dim]) -> None:
        key, kind = line.dim_name(), "plain"
        if line.take("["):
            kind = line.word()
            line.need("]")
        if kind not in get_args(DimKind):
            line.fail(f"'{kind}' is not a kind of dim")
        line.need("=")
        size = line.extent()
        start = line.extent() if line.take("from") else Extent.of(0)
        axes = line.value({}) if line.take("over") else ()
        form, parts = "atom", ()
        if line.peek() in ("sum", "product"):
            form, parts = line.next(), line.value(dims)
        name = line.word() if line.take("named") else key
        dims[key] = Dim(name, size, kind, form, parts, start, axes)  # type: ignore[arg-type]

    def body(self, line: _Line) -> Graph:
        graph = Graph(line.word())
        dims: dict[str, Dim] = {}
        for inner in self.block(line):
            if inner.take("dim"):
                self.dim(inner, dims)
            elif inner.take("turn"):
                graph.turns += (read_turn(inner),)
            elif inner.take("return"):
                inner.need("%")
                graph.output = inner.word()
                if graph.output not in graph:
                    inner.fail(f"%{graph.output} is not defined")
            else:
                node = self.node(inner, dims)
                try:
                    graph.add(node)
                except ValueError as error:
                    raise TextError(f"line {inner.number}: {error}") from None
            inner.end()
        return graph

    def node(self, line: _Line, dims: Mapping[str, Dim]) -> Node:
        line.need("%")
        name = line.word()
        line.need("=")
        op = line.word()
        inputs = line.words()
        attrs: dict[str, Any] = {}
        while not line.take(":"):
            key = line.word()
            line.need("=")
            attrs[key] = line.value(dims)
        type = line.type(dims)
        label = line.word() if line.take("as") else None
        rounds = line.take("rounds")
        return Node(name, op, tuple(inputs), type, attrs, line.span, label, rounds)
