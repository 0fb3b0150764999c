"""The text form of a program: what ``--emit graph`` shows and pass tests are written in.

    program decoder of Model
    const layers = 61

    module Norm of Norm {  // norm.arch:6
      dim d = hidden
      param gain : act[d]  // norm.arch:7
      name gain = "weight"
      method call = Norm.call
    }

    entry main = Model.main(token, after = token + 1)

    body Norm.call {
      dim t [time] = time
      dim d = hidden
      %x = input name="x" : act[t, d]  // norm.arch:9
      %1 = map(%x, %x) fn="mul" : act[t, d]  // norm.arch:10
      %ms = reduce(%1) fn="mean" over=("d") : f32[t] as ms  // norm.arch:10
      ...
      return %y
    }

A dim is declared once per body and then named. ``as`` gives a value's source name, ``rounds`` says
that it is rounded there, ``//`` where it came from. In attributes, "..." is text or a name, `...`
a dim, <...> an extent, (...) a tuple. Sums ``n|j`` and products ``(h,n)`` of declared dims need no
declaration. Sizes stay symbolic: the number of layers occurs in one line. ``h/tp`` is a rank's part
of a dim that is divided over the mesh axes that its declaration names behind ``over``. ``turn``
lists nodes of one micro-batch, which run before those of the next line (``compiler/turns.py``).

Printing and parsing (``compiler/parse.py``) are inverse, but for the columns of source spans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from compiler.coding import Coding, declared
from compiler.ir import Dim, Entry, Graph, Module, Node, Program, Type
from compiler.parse import TextError, parse, resolve
from dsl.diagnostics import Span
from dsl.extents import Extent
from dsl.formats import NumberFormat

__all__ = ["TextError", "body_text", "node_text", "parse", "program_text", "same", "show"]

_WORD = re.compile(r"[A-Za-z0-9_$@][A-Za-z0-9_.$@-]*\Z")
_DIM = re.compile(r"[A-Za-z0-9_.$@|(),/-]+\Z")


def show(value: Any) -> str:
    """An attribute's or constant's value.

    Raises:
        TypeError: it is of a kind that no attribute has.
    """
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False)
        case Extent():
            return f"<{value}>"
        case Dim():
            return f"`{value.name}`"
        case Coding():
            return _coding(value)
        case tuple():
            return f"({', '.join(show(v) for v in value)})"
    raise TypeError(f"{value!r} has no text form")


def program_text(program: Program) -> str:
    """The whole program; ends with a newline."""
    parts = [f"program {_word(program.name)} of {_word(program.root)}"]
    constants = [f"const {_word(k)} = {show(v)}" for k, v in program.constants.items()]
    ignored = [f"ignored {show(name)}" for name in program.ignored]
    formats = [_format(f) for f in _formats(program)]
    mesh = [f"mesh {show(program.mesh)} batch {show(program.batch)}"] if program.mesh else []
    parts += ["\n".join(block) for block in (mesh, constants, ignored, formats) if block]
    parts += ["\n".join(_module(m)) for m in program.modules.values()]
    if program.entries:
        parts.append("\n".join(_entry(e) for e in program.entries.values()))
    parts += [body_text(g) for g in program.bodies.values()]
    return "\n\n".join(parts) + "\n"


def body_text(graph: Graph) -> str:
    """One body, without a newline at the end."""
    lines = [f"body {_word(graph.name)} {{"]
    keys = Keys(_dims_of_body(graph))
    lines += keys.lines()
    lines += ["  " + node_text(n, keys) for n in graph]
    for turn in graph.turns:
        lines.append(f"  turn {turn.who} {' '.join('%' + _word(n) for n in turn.nodes)}".rstrip())
    if graph.output:
        lines.append(f"  return %{_word(graph.output)}")
    return "\n".join([*lines, "}"])


def node_text(node: Node, keys: Keys | None = None) -> str:
    """One node on one line; without ``keys``, dims stand by their names."""
    keys = keys or Keys(())
    out = f"%{_word(node.name)} = {_word(node.op)}"
    if node.inputs:
        out += f"({', '.join('%' + _word(i) for i in node.inputs)})"
    for name, value in node.attrs.items():
        out += f" {_word(name)}={keys.show(value)}"
    out += f" : {keys.type(node.type)}"
    if node.label is not None:
        out += f" as {_word(node.label)}"
    if node.rounds:
        out += " rounds"
    return out + _at(node.span)


class Keys:
    """The dims of a body or module, each with the key it is written by: its name, or its name and
    a number where a broken graph has two different dims of one name."""

    def __init__(self, dims: Iterable[Dim]):
        self.declared: dict[str, Dim] = {}
        self._keys: dict[Dim, str] = {}
        for dim in dims:
            self._add(dim)

    def _add(self, dim: Dim) -> None:
        if dim in self._keys:
            return
        for part in dim.parts:
            self._add(part)
        if resolve(dim.name, self.declared) == dim:  # a sum or product of what is declared
            self._keys[dim] = dim.name
            return
        key, number = dim.name, 1
        while resolve(key, self.declared):  # the key of another dim
            number += 1
            key = f"{dim.name}#{number}"
        self.declared[key] = dim
        self._keys[dim] = key

    def __getitem__(self, dim: Dim) -> str:
        return self._keys.get(dim, dim.name)

    def quoted(self, dim: Dim) -> str:
        key = self[dim]
        return key if _DIM.match(key) else f"`{key}`"

    def type(self, type: Type) -> str:
        of = f" of {self.quoted(type.of)}" if type.of else ""
        of = f" of {show(type.bundle)}" if type.bundle else of
        coding = f" {_coding(type.coding)}" if type.coding else ""
        return f"{type.dtype}[{', '.join(self.quoted(d) for d in type.dims)}]{of}{coding}"

    def show(self, value: Any) -> str:
        if isinstance(value, Dim):
            return f"`{self[value]}`"
        if isinstance(value, tuple):
            return f"({', '.join(self.show(v) for v in value)})"
        return show(value)

    def lines(self) -> Iterator[str]:
        for key, dim in self.declared.items():
            line = f"  dim {key if _DIM.match(key) else f'`{key}`'}"
            if dim.kind != "plain":
                line += f" [{dim.kind}]"
            line += f" = {dim.size}"
            if dim.start.terms:
                line += f" from {dim.start}"
            if dim.axes:
                line += f" over {show(dim.axes)}"
            if dim.form != "atom":
                line += f" {dim.form} ({', '.join(f'`{self[p]}`' for p in dim.parts)})"
            if key != dim.name:
                line += f" named {show(dim.name)}"
            yield line


def _dims_of_body(graph: Graph) -> Iterator[Dim]:
    for node in graph:
        yield from _dims_of_type(node.type)
        for value in node.attrs.values():
            yield from _dims_in(value)


def _dims_of_type(type: Type) -> Iterator[Dim]:
    yield from type.dims
    if type.of:
        yield type.of


def _dims_in(value: Any) -> Iterator[Dim]:
    if isinstance(value, Dim):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _dims_in(item)


def _module(module: Module) -> Iterator[str]:
    yield f"module {_word(module.name)} of {_word(module.block)} {{{_at(module.span)}"
    dims = [d for p in module.parameters for d in _dims_of_type(p.type)]
    keys = Keys([*dims, *(c.array for c in module.children if c.array)])
    yield from keys.lines()
    for p in module.parameters:
        stored = f" stored {_coding(p.coding)}" if p.coding else ""
        yield f"  {p.role} {_word(p.name)} : {keys.type(p.type)}{stored}{_at(p.span)}"
    for c in module.children:
        array = f"[{keys.quoted(c.array)}]" if c.array else ""
        yield f"  child {_word(c.name)}{array} = {_word(c.module)}"
    for name, part in module.names.items():
        number = f"[{_word(part.number)}]" if part.number else ""
        yield f"  name {_word(name)}{number} = {show(part.template)}{_at(part.span)}"
    for name, body in module.methods.items():
        yield f"  method {_word(name)} = {_word(body)}"
    yield "}"


def _entry(entry: Entry) -> str:
    inputs = []
    for item in entry.inputs:
        text = _word(item.name)
        if item.shift_of is not None:
            sign = "-" if item.shift < 0 else "+"
            text += f" = {_word(item.shift_of)} {sign} {abs(item.shift)}"
        inputs.append(text)
    return f"entry {_word(entry.name)} = {_word(entry.body)}({', '.join(inputs)})"


def _coding(coding: Coding) -> str:
    """``{e4m3 1 x 128 of d}``."""
    sides = ("all" if side is None else str(side) for side in (coding.rows, coding.columns))
    over = [d if _DIM.match(d) else f"`{d}`" for d in coding.over]
    words = [_word(coding.format.name), " x ".join(sides), *(["of", *over] if over else [])]
    return f"{{{' '.join(words)}}}"


def _format(format: NumberFormat) -> str:
    return f"format {_word(format.name)} {' '.join(f'{k}={v}' for k, v in declared(format))}"


def _formats(program: Program) -> Iterator[NumberFormat]:
    """Every number format that occurs, those of its scales first."""
    found: dict[str, NumberFormat] = {}

    def add(format: NumberFormat | None) -> None:
        if format is not None and format.name not in found:
            add(format.scale)
            found[format.name] = format

    nodes = [n for graph in program.bodies.values() for n in graph]
    parameters = [p for m in program.modules.values() for p in m.parameters]
    for coding in [*(p.coding for p in parameters), *(n.type.coding for n in nodes)]:
        add(coding.format if coding else None)
    for node in nodes:
        for value in node.attrs.values():
            for item in value if isinstance(value, tuple) else (value,):
                add(item.format if isinstance(item, Coding) else None)
    yield from found.values()


def _word(name: str) -> str:
    return name if _WORD.match(name) else show(name)


def _at(span: Span | None) -> str:
    return f"  // {span}" if span else ""


# -- equality --------------------------------------------------------------------------------------


def same(left: Program, right: Program) -> bool:
    """Whether two programs are equal, source spans compared by file and line."""
    return _contents(left) == _contents(right)


def _contents(program: Program) -> tuple[Any, ...]:
    def plain(item: Any) -> Any:
        """The item's fields, its span as text."""
        return {**vars(item), "span": str(item.span) if item.span else None}

    modules = {
        k: plain(m)
        | {"parameters": [plain(p) for p in m.parameters]}
        | {"names": {name: plain(part) for name, part in m.names.items()}}
        for k, m in program.modules.items()
    }
    bodies = {
        k: (g.name, g.output, [plain(n) for n in g], g.turns) for k, g in program.bodies.items()
    }
    rest: tuple[Any, ...] = (program.name, program.root, dict(program.constants))
    rest += (program.ignored, program.mesh, program.batch)
    return (*rest, modules, bodies, dict(program.entries))
