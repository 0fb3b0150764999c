"""One module of a program as one ``nn.Module`` class: parameters, children, a method per body."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from backends.pytorch.emit import turns as emit_turns
from backends.pytorch.emit.body import Body, Method
from backends.pytorch.emit.coded import annotation
from backends.pytorch.emit.sizes import Sizes, atoms
from backends.pytorch.emit.tables import table
from backends.pytorch.emit.text import WIDTH, Text, call, comment, spoken, wrapped
from backends.pytorch.emit.values import EmitError, Number, Value
from backends.pytorch.names import TAKEN, Scope, attribute
from compiler import rules
from compiler.ir import Child, Dim, Graph, Module, Node, Parameter, Program, Type
from dsl.extents import Extent

if TYPE_CHECKING:
    from backends.pytorch.emit.module import Emitter


@dataclass(frozen=True)
class Argument:
    """One argument of a class's constructor: a size, or a number of the source."""

    name: str
    size: Extent | None = None
    number: Number = 0


@dataclass(frozen=True)
class Array:
    """The pieces of an array of children, in order. ``numbered`` if it does not begin at 0, or
    has gaps: then modules go by their numbers."""

    pieces: tuple[Child, ...]
    numbered: bool

    @property
    def dims(self) -> list[Dim]:
        return [c.array for c in self.pieces if c.array is not None]

    def place(self, dim: Dim) -> int:
        """Which piece a loop over ``dim`` runs over: of several that are empty, the one of its
        name."""
        found = [i for i, d in enumerate(self.dims) if (d.start, d.size) == (dim.start, dim.size)]
        if not found:
            raise EmitError(f"no piece of '{self.pieces[0].name}' is over {dim}")
        return next((i for i in found if self.dims[i].name == dim.name), found[0])


@dataclass
class ClassWriter:
    """Writes a class, body by body as callers ask for them; ``text`` then puts it together."""

    emitter: Emitter
    module: Module
    methods: dict[tuple[str, frozenset[str]], Method] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.program: Program = self.emitter.program
        members = [p.name for p in self.module.parameters] + [c.name for c in self.module.children]
        self._scope = Scope(*TAKEN, "self", *(attribute(m) for m in members))
        for name in {_def(label) for label in self.module.methods} - {"call"}:
            self._scope.take(name)
        self.sizes = Sizes(self._scope)
        for parameter in self.module.parameters:
            self._size_text(parameter.type)
        span = self.module.span
        written = span.source.line(span.line) if span else ""
        declared = re.search(rf"\b{self.module.block}\s*\[([^\]]*)\]", written)
        self._declared = re.findall(r"\w+", declared[1]) if declared else []
        self._method_names: dict[str, list[Method]] = {}
        self._tables_of: dict[tuple[str, str], str] = {}
        self._turns: dict[str, emit_turns.Turns] = {}

    # -- what bodies ask -------------------------------------------------------------------------

    @property
    def reserved(self) -> Sequence[str]:
        return self.emitter.reserved

    def attribute(self, name: str) -> str:
        """A parameter, or a child, of this module or of a child: ``self.mlp.gate``."""
        return f"self.{'.'.join(attribute(part) for part in name.split('.'))}"

    def size(self, dim: Dim) -> Text:
        """A dim's size, where a method needs it."""
        return self.sizes.text(dim, stored=True)

    def extent(self, extent: Extent) -> Text:
        return self.emitter.constants.extent(extent)

    def constant(self, name: str, value: Number) -> str:
        """What a constant of the source is called here: in capitals if the program has it, else
        an argument of the class; "" if it has no name."""
        if not name or value in (float("inf"), -float("inf")):
            return ""
        constants = self.emitter.constants
        if constants.values.get(name) == value and not isinstance(value, bool):
            return constants.name(name)
        return self.number(name, value)

    def number(self, name: str, value: Number, named: bool = False) -> str:
        """A number as an argument of the class; with ``named``, a constant if it is one's value."""
        if named:
            found = self.emitter.constants.named(value)
            return found or repr(value)
        for known, other in self.numbers.items():
            if other == value and known.rstrip("_0123456789") == name:
                return f"self.{known}"
        own = self._scope.take(name)
        self.numbers[own] = value
        return f"self.{own}"

    def array(self, child: str) -> Array:
        module = rules.Scope(self.program, self.module.name)
        pieces = tuple(module.inside(child.rpartition(".")[0]).pieces(child.rpartition(".")[2]))
        sizes, at, numbered = self.program.sizes, 0, False
        for piece in pieces:
            if piece.array is None:
                raise EmitError(f"'{child}' of {self.module.name} is no array")
            numbered = numbered or piece.array.start.at(sizes) != at
            at = piece.array.start.at(sizes) + self.program.size(piece.array)
        return Array(pieces, numbered)

    def child_method(
        self, child: str, over: Dim | None, body: str, batched: Iterable[str]
    ) -> Method:
        """The method of a child (of this class itself for "") that is a body."""
        if not child:
            return self.method(body, batched)
        found = rules.Scope(self.program, self.module.name).child(child, over)
        assert found is not None  # only "" names no child
        return self.emitter.writer(found.module).method(body, batched)

    def child_turns(self, child: str, over: Dim, graph: Graph) -> emit_turns.Turns:
        found = rules.Scope(self.program, self.module.name).child(child, over)
        assert found is not None
        return self.emitter.writer(found.module).turns(graph)

    # -- methods ---------------------------------------------------------------------------------

    def method(self, body: str, batched: Iterable[str] = ()) -> Method:
        """The method that is this body; written when it is first asked for."""
        key = (body, frozenset(batched))
        if key not in self.methods:
            definition = next((d for d, b in self.module.methods.items() if b == body), "")
            entry = self.emitter.entry_of(self.module, body)
            name = entry or _def(definition) or self._definition(body)
            self.methods[key] = self._written(
                self.program.bodies[body],
                "forward" if name == "call" else name,
                key[1],
                entry=entry is not None,
            )
        return self.methods[key]

    def _definition(self, body: str) -> str:
        """The def that a body comes from, by the body's name."""
        return body.removeprefix(f"{self.module.name}.").split(".")[0]

    def private(self, graph: Graph, batched: Iterable[str], few: bool) -> Method:
        """One side of a branch."""
        key = (graph.name, frozenset(batched))
        if key not in self.methods:
            definition = self._definition(graph.name)
            stem = "" if definition == "call" else f"_{definition}"
            name = f"{stem}_{'few' if few else 'many'}"
            note = f"; {'few' if few else 'many'} positions at once"
            self.methods[key] = self._written(graph, name, key[1], note=note)
        return self.methods[key]

    def of_one_token(self, graph: Graph, batched: Iterable[str]) -> Method:
        """What a scan does at one token."""
        key = (graph.name, frozenset(batched))
        if key not in self.methods:
            definition, *rest = graph.name.removeprefix(f"{self.module.name}.").split(".")
            name = "_".join(["", *([] if definition == "call" else [definition]), *rest])
            note = "; one token of every sequence"
            self.methods[key] = self._written(graph, name, key[1], note=note)
        return self.methods[key]

    def _written(
        self,
        graph: Graph,
        name: str,
        batched: frozenset[str],
        entry: bool = False,
        note: str = "",
    ) -> Method:
        body = Body(self, graph, batched)
        result = body.run()
        needs_step = body.needs_step or entry
        parameters = [f"{n}: {annotation(p.type.dtype)}" for n, p in body.parameters]
        step = [f"{body.step}: Step"] if needs_step else []
        gives = annotation(graph.result.type.dtype)
        head = f"def {{name}}({', '.join(['self', *step, *parameters])}) -> {gives}:"
        history = any(d.kind == "history" for d in graph.result.type.dims)
        per_sequence = result.batched and not history
        signature = _signature(body) + note
        for known in self._method_names.get(name, []):
            if code([head, *body.lines]) == code(known.lines):
                return replace(known, batched=per_sequence)
        public = not name.startswith("_") and not self._method_names.get(name)
        own = name if public else self._scope.take(name)
        lines = (head, f'        """{signature}"""', *body.lines)
        written = Method(own, lines, needs_step, per_sequence, graph.result.type.dtype)
        self._method_names.setdefault(name, []).append(written)
        return written

    def turns(self, graph: Graph) -> emit_turns.Turns:
        """The method in which two micro-batches take turns in a body."""
        if graph.name not in self._turns:
            self._turns[graph.name] = emit_turns.written(self, graph, self._scope.take)
        return self._turns[graph.name]

    settle = staticmethod(emit_turns.settle)

    def table(self, body: Body, node: Node) -> Value:
        """A value that is computed once, as a method of its own; returns its call."""
        key = (body.graph.name, node.name)
        if key not in self._tables_of:
            graph = table(body.graph, node.name)
            others = body.tables - {node.name}
            alone = Body(self, graph, like="like", tables=others)
            alone.run()
            same = [n for n, lines in self.tables.items() if code(lines) == code(alone.lines)]
            name = same[0] if same else self._scope.take(body.stem(node))
            self.tables[name] = alone.lines
            self._tables_of[key] = name
        text = call(f"self.{self._tables_of[key]}", body.like())
        return Value(text, node.type.names, node.type.dtype)

    # -- the text --------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write every body that no caller asked for, so that a class has all its methods."""
        for body in self.module.methods.values():
            if body in self.program.bodies:
                self.method(body)

    def arguments(self) -> list[Argument]:
        """The constructor's: the block's own dims first, as the source lists them. Known when
        children have theirs."""
        own = self._declared
        named = sorted(
            self.sizes.names.items(),
            key=lambda item: own.index(item[0][0]) if item[0][0] in own else len(own),
        )
        sizes = [Argument(name, size=size) for (_, size), name in named]
        return sizes + [Argument(name, number=n) for name, n in self.numbers.items()]

    def text(self, name: str, defaults: bool = False) -> list[str]:
        """The class's lines under a name; with ``defaults``, it can be made without arguments."""
        children = self._children()
        given = []
        for a in self.arguments():
            kind = "int" if a.size is not None else type(a.number).__name__
            value = repr(a.number) if a.size is None else str(self.extent(a.size))
            given.append(f"{a.name}: {kind}" + (f" = {value}" if defaults else ""))
        doc = self._doc()
        out = [f"class {name}(nn.Module):", *doc, *([""] if doc else [])]
        out += wrapped(f"def __init__({', '.join(['self', *given])}):", 4)
        out.append("        super().__init__()")
        kept = [a.name for a in self.arguments() if a.size is None or a.name in self.sizes.stored]
        if kept:
            line = f"{', '.join(f'self.{k}' for k in kept)} = {', '.join(kept)}"
            lines = [line] if len(line) + 8 <= WIDTH else [f"self.{k} = {k}" for k in kept]
            out += [f"        {line}" for line in lines]
        for parameter in self.module.parameters:
            out += self._parameter(parameter)
        out += children
        for table_name, lines in self.tables.items():
            out += ["", "    @table", f"    def {table_name}(self, like: Tensor) -> Tensor:"]
            out += lines
        seen = set()
        for method in sorted(self.methods.values(), key=lambda m: m.name.startswith("_")):
            if method.name not in seen:
                seen.add(method.name)
                head, *lines = method.lines
                out += ["", *wrapped(head.format(name=method.name), 4), *lines]
        for turns in self._turns.values():
            out += ["", *turns.lines]
        return out

    def _doc(self) -> list[str]:
        """The comment above the block in the source."""
        span = self.module.span
        if span is None:
            return []
        said: list[str] = []
        number = span.line - 1
        while (line := span.source.line(number).strip()).startswith("# ") and "---" not in line:
            said.insert(0, line[2:].strip())
            number -= 1
        text, place = spoken(" ".join(said)), spoken(str(span))
        if len(text) + len(place) < 86:
            return [f'    """{text}  {place}"""' if text else f'    """{place}"""']
        lines = [line.strip()[2:].strip() for line in comment(text, str(span), 4)]
        return [f'    """{lines[0]}', *(f"    {line}" for line in lines[1:]), '    """']

    def _size_text(self, type: Type) -> list[Text]:
        return [self.sizes.text(d, stored=False) for d in type.dims]

    def _parameter(self, parameter: Parameter) -> list[str]:
        shape = [str(t) for t in self._size_text(parameter.type)] or ["()"]
        dtype = {"f32": ["dtype=torch.float32"], "i64": ["dtype=torch.int64"],
                 "bool": ["dtype=torch.bool"]}.get(parameter.type.dtype, [])  # fmt: skip
        empty = call("torch.empty", *shape, *dtype)
        own = attribute(parameter.name)
        composite = any(d.parts for d in parameter.type.dims)
        if parameter.role == "state" or parameter.type.dtype in ("i64", "bool"):
            made = wrapped(f'self.register_buffer("{own}", {empty})', 8)
        else:
            made = wrapped(f"self.{own} = nn.Parameter({empty})", 8)
        if not composite:
            return made
        note = ", ".join(parameter.type.names)
        if len(made) == 1 and len(made[0]) + len(note) + 4 <= WIDTH:
            return [f"{made[0]}  # {note}"]
        return [*comment(note, "", 8), *made]

    def _children(self) -> list[str]:
        out: list[str] = []
        done: set[str] = set()
        for child in self.module.children:
            if child.name in done:
                continue
            done.add(child.name)
            own = self.attribute(child.name)
            if child.array is None:
                out += wrapped(f"{own} = {self._made(child)}", 8)
                continue
            array = self.array(child.name)
            if array.numbered:
                pieces = [self._numbered(piece) for piece in array.pieces]
                out += wrapped(f"{own} = Numbered([{', '.join(pieces)}])", 8)
                continue
            lists = [
                f"{self._made(piece)} for _ in range({self.sizes.text(dim, stored=False)})"
                for piece, dim in zip(array.pieces, array.dims, strict=True)
            ]
            if len(lists) == 1:
                out += wrapped(f"{own} = nn.ModuleList({lists[0]})", 8)
            else:
                out += wrapped(f"{own} = nn.ModuleList([{lists[0]}])", 8)
                for more in lists[1:]:
                    out += wrapped(f"{own}.extend([{more}])", 8)
        return out

    def _numbered(self, piece: Child) -> str:
        assert piece.array is not None
        begin, end = piece.array.start, piece.array.start + piece.array.size
        numbers = f"range({self.extent(begin)}, {self.extent(end)})"
        return f"*((i, {self._made(piece)}) for i in {numbers})"

    def _made(self, child: Child) -> str:
        """A child's construction, in terms of this class's own dims where they are the same."""
        name, given = self.emitter.made(child.module)
        own = [d for p in self.module.parameters for d in atoms(p.type.dims)]
        own += [d for c in self.module.children if c.array is not None for d in atoms((c.array,))]
        values = []
        for argument in given:
            if argument.size is None:
                values.append(f"{argument.name}={argument.number!r}")
                continue
            number = argument.size.constant
            same = None if number is not None else self._same(argument, own)
            values.append(f"{argument.name}={same or self.extent(argument.size)}")
        return f"{name}({', '.join(values)})"

    def _same(self, argument: Argument, own: list[Dim]) -> str | None:
        assert argument.size is not None
        named = {key: name for key, name in self.sizes.names.items() if key[1] == argument.size}
        for (dim, _), name in named.items():
            if dim == argument.name:
                return name
        bodies = [self.program.bodies[b] for b, _ in self.methods if b in self.program.bodies]
        met = [d for g in bodies for n in g for d in atoms(n.type.dims) if d.name in self._declared]
        found = self.sizes.equal(argument.name, argument.size, [*own, *met])
        return found or next(iter(named.values()), None)


def _def(label: str) -> str:
    """The def that a module's method is of: ``call``, of ``call@rows`` and of ``call'``."""
    return label.split("@")[0].rstrip("'")


def _signature(body: Body) -> str:
    """``x[t,d] -> y[t,d]``: what a method takes and gives, as the source would say it."""

    def shown(name: str, type: Type) -> str:
        return f"{name}[{','.join(type.names)}]" if type.dims else name

    given = ", ".join(shown(name, node.type) for name, node in body.parameters)
    result = body.graph.result
    return f"{given} -> {shown(body.stem(result), result.type)}"


def code(lines: Sequence[str]) -> list[str]:
    """Lines without comments and the docstrings of methods, which name dims."""
    return [line for line in lines if not re.match(r"\s*#| {8}\"\"\"", line)]
