"""One body of a program as one method: which values get a variable, in which layout they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from backends.pytorch.emit.kernels import Group, unread
from backends.pytorch.emit.ops import emit
from backends.pytorch.emit.tables import roots
from backends.pytorch.emit.text import Text, arguments, call, comment, method, wrapped
from backends.pytorch.emit.values import BATCH, EmitError, Value, permuted
from backends.pytorch.names import Scope
from compiler.ir import KEPT, Dim, DType, Graph, Node
from dsl.diagnostics import Span

if TYPE_CHECKING:
    from backends.pytorch.emit.classes import ClassWriter

# An equation and its name; a value with its last index.
EQUATION = re.compile(
    r"(?:let\s+|cached\s+|scan\s+)?([A-Za-z_]\w*)\s*(?:\[[^=]*\])?\s*(?::\s*\w+\s*)?=(?!=)"
)
INDEXED = re.compile(r"([A-Za-z_]\w*)\[(?:[^\[\]]*\W)?(\w+)\]$")
MOST_LINES = 6  # of an equation that is quoted
LONGEST = 64  # of the operands of an expression together; the longest get a name of their own
STEMS = {
    "reduce": {"sum": "total", "mean": "mean", "max": "peak", "min": "least"},
    "map": {"mul": "product", "add": "sum", "sub": "difference", "div": "quotient"},
}
PLAIN_STEMS = {
    "softmax": "p", "top": "best", "argtop": "picks", "in_top": "chosen", "contract": "product",
    "apply": "routed", "experts": "routed", "attention": "attended", "concat": "joined",
    "stack": "stacked", "rms_norm": "normed", "position": "position",
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A method that has been written: what a caller must know."""

    name: str
    lines: tuple[str, ...]
    needs_step: bool
    batched: bool  # the result is per sequence, though its type has neither time nor history
    dtype: DType


class Body:
    """Writes the statements of one body.

    Args:
        batched: inputs that are per sequence, though their types have neither time nor history.
        like: an expression for a tensor of the activation dtype on the right device, if the
            caller knows one better than the body's own inputs and parameters.
    """

    def __init__(
        self,
        owner: ClassWriter,
        graph: Graph,
        batched: Iterable[str] = (),
        like: str = "",
        tables: frozenset[str] | None = None,
    ):
        self.owner = owner
        self.graph = graph
        self.names = Scope("self", "like", *owner.reserved)
        self.step = self.names.take("step")
        self.needs_step = False
        self.shared: dict[str, str] = {}  # variables that several kernels' calls read, by purpose
        self.lines: list[str] = []
        self.indent = 8
        self.nodes: dict[str, Node] = {}
        self.values: dict[str, Value] = {}
        self.uses: Counter[str] = Counter()
        self.dims: dict[str, Dim] = {}
        self.parameters: list[tuple[str, Node]] = []
        self._like = like
        self._batched = frozenset(batched)
        self._place: tuple[str, int] | None = None
        self._loops: dict[str, str] = {}
        self.routings: dict[str, str] = {}  # by the node that routes, its variable
        self._variables: set[str] = set()  # nodes whose value is a variable of theirs already
        self.tables = roots(graph) if tables is None else tables
        self.kernels = None if like else owner.emitter.kernels
        self.groups: dict[str, tuple[Group, str]] = {}  # by root; and its prefix
        self._grouped: set[str] = set()  # what a group's root stands for
        self._unread: set[str] = set()  # what only groups use, and none reads
        for node in graph.inputs:
            name = self.names.take(self.stem(node))
            self.parameters.append((name, node))
            per_sequence = node.attrs["name"] in self._batched or self.has(node, "history")
            axes = (BATCH, *node.type.names) if per_sequence else node.type.names
            self.values[node.name] = Value(Text(name), axes, node.type.dtype)
        self._order = self.add(graph)

    def add(self, graph: Graph, prefix: str = "") -> list[Node]:
        """Take in the nodes of a graph that its result needs: this body's, or those a composite
        stands for. Returns them, but for inputs, in their order."""
        needed = {*self.results(graph)} | {n.name for n in graph if n.op in KEPT}
        for node in reversed(list(graph)):
            if node.name in needed and (prefix or node.name not in self.tables):
                needed.update(node.inputs)
        order = []
        for node in graph:
            for dim in node.type.dims:
                self.dims.setdefault(dim.name, dim)
            if node.name not in needed:
                continue
            inputs = tuple(prefix + i for i in node.inputs)
            taken = node.with_(name=prefix + node.name, inputs=inputs)
            self.nodes[taken.name] = taken
            if prefix or node.name not in self.tables:
                self.uses.update(inputs)
            if node.op != "input":
                order.append(taken)
        self.uses.update(prefix + name for name in self.results(graph))
        if self.kernels is not None:
            idle = {n.name for n in graph} - needed | (set() if prefix else self.tables)
            program = self.owner.program
            groups = list(self.kernels.groups(program, graph, frozenset(idle), bool(prefix)))
            for group in groups:
                self.groups[prefix + group.root] = group, prefix
                self._grouped |= {prefix + name for name in group.covered - {group.root}}
            self._unread |= {prefix + name for name in unread(graph, groups)}
        return order

    # -- the method ------------------------------------------------------------------------------

    def run(self) -> Value:
        """Write every node, then the result, which is returned."""
        for node in self._order:
            self.write(node)
        result = self.tensor(self.values[self.graph.output])
        self.line(f"return {result}", self.graph.result.span)
        return result

    def write(self, node: Node) -> None:
        """Give a node its value, and a variable if it should have one."""
        if node.name in self._grouped or node.name in self._unread:
            return
        if node.name in self.groups:
            group, prefix = self.groups.pop(node.name)
            if (computed := group.write(self, node, prefix)) is not None:
                self._named(node, self.canonical(computed, node))
                return
            others = {prefix + name for name in group.covered - {group.root}} | self._unread
            self._grouped -= others
            self._unread.clear()
            for name in [n for n in self.nodes if n in others]:
                self.write(self.nodes[name])
        if node.op == "expand" and self._broadcast(node):
            self.values[node.name] = self.values[node.inputs[0]]
            self.uses[node.inputs[0]] += self.uses[node.name] - 1
            return
        if node.name in self.tables:
            value = self.owner.table(self, node)
        else:
            if node.op == "wait" or node.attrs.get("starts"):
                self.owner.settle(self)
            self._shorten(node)
            value = emit(self, node)
            if not node.attrs.get("starts") or node.op == "routing":  # nothing is there yet else
                value = self.canonical(value, node)
            if self.kernels is not None and value.number is None:
                self.kernels.missed(self, node)
        self._named(node, value)

    def _named(self, node: Node, value: Value) -> None:
        """This is a node's value: under a name of its own, if it should have one."""
        self.values[node.name] = value
        final = node.name == self.graph.output
        if value.number is not None or node.name in self._variables:
            return
        if final and self.uses[node.name] == 1:
            return
        if node.op in KEPT and not self.uses[node.name]:
            self.line(str(value), node.span)  # kept, though nobody reads it in this body
        elif node.label and str(value) != node.label and node.op not in ("param", "state"):
            self.bind(node, node.label.rpartition(".")[2])
        elif node.op == "wait":
            self.bind(node, re.sub(r"_sent(_\d+)?$", "", str(self.values[node.inputs[0]])))
        elif self.uses[node.name] > 1 and not value.cheap and value.matrix is None:
            self.bind(node)

    def has_variable(self, node: str) -> bool:
        return node in self._variables

    def results(self, graph: Graph) -> list[str]:
        """The values of a graph that are read outside of it."""
        return [graph.output]

    def _broadcast(self, node: Node) -> bool:
        """Whether all who read an expanded value broadcast it themselves."""
        new = {d.name for d in node.attrs["dims"]}
        users = [n for n in self.nodes.values() if node.name in n.inputs]
        return node.name not in (self.graph.output, *self.tables) and all(
            user.op == "map"
            and any(
                new <= set(self.nodes[other].type.names) and self.nodes[other].op != "expand"
                for other in user.inputs
            )
            for user in users
        )

    def bind(self, node: Node, stem: str = "") -> Value:
        """Give a value a variable."""
        value = self.values[node.name]
        name = self.variable(node, stem)
        self.line(f"{name} = {value}", node.span)
        self.values[node.name] = replace(value, text=Text(name))
        return self.values[node.name]

    def loop_variable(self, stem: str) -> str:
        """A variable of a loop; loops that follow one another share it."""
        if stem not in self._loops:
            self._loops[stem] = self.names.take(stem)
        return self._loops[stem]

    def variable(self, node: Node, stem: str = "") -> str:
        """A variable for a node's value, which the caller assigns."""
        self._variables.add(node.name)
        return self.names.take(stem or self.stem(node))

    def operand(self, node: Node, at: int) -> Value:
        """An operand's value. A view of a matrix that is read more than once gets a name now."""
        name = node.inputs[at]
        value = self.values[name]
        if value.matrix is not None and self.uses[name] > 1 and not value.cheap:
            return self.bind(self.nodes[name])
        return value

    def operands(self, node: Node) -> list[Value]:
        return [self.operand(node, i) for i in range(len(node.inputs))]

    def _shorten(self, node: Node) -> None:
        """Bind the longest operands until an expression over them is short enough to read."""
        names = [n for n in dict.fromkeys(node.inputs) if self.values[n].matrix is None]
        while sum(len(str(self.values[n])) for n in names) > LONGEST:
            longest = max(names, key=lambda n: len(str(self.values[n])))
            if self.values[longest].cheap:
                return
            self.bind(self.nodes[longest])

    def stem(self, node: Node) -> str:
        """What to call a value: as the source does, or by what it is."""
        if node.op in ("input", "cache"):
            named = str(node.attrs["name"])
        else:
            named = node.label or str(node.attrs.get("param") or node.name.rpartition("/")[2])
            if node.label or "param" in node.attrs:
                named = named.rpartition(".")[2]
        if word := re.fullmatch(r"([A-Za-z_]\w*?)(\.\d+)?", named):
            return word[1]
        written = node.span.text if node.span else ""
        if node.op in ("part", "select"):
            where = node.attrs["part" if node.op == "part" else "at"]
            return f"{self.stem(self._first(node))}_{where}"
        if node.op in ("flatten", "unflatten", "rename", "cast", "expand", "select_rows"):
            return self.stem(self._first(node))
        if equation := EQUATION.match(written):
            return equation[1]
        if (value := INDEXED.match(written)) and node.op == "input":
            return f"{value[1]}_{value[2]}"
        if node.op in ("call", "chain"):
            return f"{node.attrs['child'] or node.attrs['body'].rpartition('.')[2]}_out"
        if node.op == "gather":
            return f"{self.stem(self._first(node))}_at"
        if node.op == "iota":
            return node.type.names[0]
        fn = str(node.attrs.get("fn", ""))
        return STEMS.get(node.op, {}).get(fn) or PLAIN_STEMS.get(node.op) or fn or "value"

    def _first(self, node: Node) -> Node:
        """The first operand, which this body does not compute if it is a part of a table."""
        name = node.inputs[0]
        return self.nodes[name] if name in self.nodes else self.graph[name]

    def line(self, text: str, span: Span | None) -> None:
        """A statement, under its equation if that is another one than the last statement's."""
        if span is not None and (span.source.name, span.line) != self._place:
            self._place = (span.source.name, span.line)
            self.lines += comment(_equation(span), str(span), self.indent)
        self.lines += wrapped(text, self.indent)

    # -- types and layouts -----------------------------------------------------------------------

    def kind(self, axis: str) -> str:
        return "batch" if axis == BATCH else self.dims[axis].kind

    def kinds(self) -> dict[str, str]:
        return {name: dim.kind for name, dim in self.dims.items()}

    @staticmethod
    def has(node: Node, kind: str) -> bool:
        return any(d.kind == kind for d in node.type.dims)

    def axis_of(self, value: Value, kind: str) -> str | None:
        """The value's axis of that kind, if there is one."""
        return next((a for a in value.axes if a != BATCH and self.dims[a].kind == kind), None)

    @property
    def runtime_step(self) -> str:
        self.needs_step = True
        return self.step

    def on_step(self, name: str, value: Value, axes: Sequence[str], axis: int, *more: str) -> Value:
        """``step.name(value, axis, ...)``."""
        at = [str(axis)] if axis or more else []
        text = call(f"{self.runtime_step}.{name}", str(value), *at, *more)
        return value.with_(text, axes)

    def padded(self, value: Value) -> Value:
        """Packed to padded; any other value as it is."""
        time = self.axis_of(value, "time")
        if value.batched or time is None:
            return value
        return self.on_step("pad", value, (BATCH, *value.axes), value.axis(time))

    def together(self, values: Sequence[Value], padded: bool = False) -> list[Value]:
        """The values in one layout: padded if one runs over history (or ``padded`` says so)."""
        if padded or any(v.batched and self.axis_of(v, "history") for v in values):
            return [self.padded(v) for v in values]
        varying = [a for v in values if not v.batched for a in [self._row_axis(v)] if a]
        if not varying:
            return list(values)
        return [self._spread(v, varying[0]) if v.batched else v for v in values]

    def _row_axis(self, value: Value) -> str | None:
        return self.axis_of(value, "time") or self.axis_of(value, "rows")

    def _spread(self, value: Value, axis: str) -> Value:
        """A value per sequence as one per token, or per wanted row."""
        if self.axis_of(value, "time"):
            return value
        spread = self.on_step("spread", value, (axis, *value.axes[1:]), 0)
        if self.dims[axis].kind == "rows":
            return self.on_step("select", spread, spread.axes, 0)
        return spread

    def canonical(self, value: Value, node: Node) -> Value:
        """A node's result as everyone may rely on it: packed where its type allows, with the
        type's order of dims and its dtype."""
        if value.number is not None:
            return replace(value, dtype=node.type.dtype)
        time = self.axis_of(value, "time")
        if value.batched and time and not self.axis_of(value, "history"):
            axes = tuple(a for a in value.axes if a != BATCH)
            value = self.on_step("pack", value, axes, value.axis(time) - 1)
        order = tuple(a for a in (BATCH, *node.type.names) if a in value.axes)
        missing = set(node.type.names) - set(value.axes)
        if missing or len(order) != len(value.axes):
            raise EmitError(f"%{node.name} ({node.op}) has axes {value.axes}, not {node.type}")
        return self.cast(permuted(value, order), node.type.dtype)

    def cast(self, value: Value, dtype: DType) -> Value:
        """The value in another dtype; numbers take whatever dtype they meet."""
        if value.number is not None or value.dtype == dtype:
            return value
        if dtype == "act":
            name, arguments = "to", [f"{self.like()}.dtype"]
        else:
            name, arguments = {"f32": "float", "i64": "long", "bool": "bool"}[dtype], []
        text = method(value.text, name, *arguments)
        matrix = value.matrix
        if matrix is not None:
            matrix = replace(matrix, text=method(matrix.text, name, *arguments))
        return Value(text, value.axes, dtype, matrix=matrix)

    def like(self) -> str:
        """A tensor of the activation dtype, on the device of the run."""
        if self._like:
            return self._like
        for name, node in self.parameters:
            if node.type.dtype == "act" and not node.attrs.get("starts"):
                return name
        for parameter in self.owner.module.parameters:
            if parameter.type.dtype == "act":
                return self.owner.attribute(parameter.name)
        for node in self.nodes.values():
            value = self.values.get(node.name)
            if value is not None and value.dtype == "act" and value.cheap and value.number is None:
                return str(value)
        return "next(self.parameters())"

    def tensor(self, value: Value) -> Value:
        """The value as a tensor, where a number would not do."""
        if value.number is None:
            return value
        like = self.like()
        dtype = {"act": f"{like}.dtype", "f32": "torch.float32"}.get(value.dtype)
        given = [f"dtype={dtype}"] if dtype else []
        return Value(
            call("torch.tensor", str(value), *given, f"device={like}.device"), (), value.dtype
        )

    # -- invalid places --------------------------------------------------------------------------

    def within(self, value: Value, over: Sequence[str], fill: str = "0") -> Value:
        """The value with ``fill`` at places of the summed dims that a sequence does not have."""
        for name in over:
            kind = self.kind(name) if name in value.axes else ""
            if value.batched and kind in ("time", "history"):
                more = [fill] if fill != "0" else []
                text = call(
                    f"{self.runtime_step}.within_{kind}", str(value), str(value.at(name)), *more
                )
                value = value.with_(text)
        return value

    def pads(self, over: Sequence[str]) -> bool:
        """Whether reducing over these dims needs the padded layout."""
        return any(self.dims[name].kind in ("time", "history") for name in over)

    # -- what a composite stands for -------------------------------------------------------------

    def inline(self, graph: Graph, node: Node, arguments: Sequence[Value]) -> Value:
        """Write the nodes of another graph in place; returns its result."""
        prefix = f"{node.name}/"
        for given, value in zip(graph.inputs, arguments, strict=True):
            self.values[prefix + given.name] = value
        for inner in self.add(graph, prefix):
            self.write(inner)
        return self.values[prefix + graph.output]

    def shape(self, dims: Sequence[Dim], inferred: bool = True) -> str:
        """A tuple of sizes; with ``inferred``, one that is a sum or product is -1."""
        sizes = [str(self.owner.size(d)) for d in dims]
        long = [i for i, size in enumerate(sizes) if " " in size]
        if inferred and long and len(dims) > 1:
            sizes[long[-1]] = "-1"
        return arguments(sizes)


def _equation(span: Span) -> str:
    """The source's line, and those after it until its brackets are closed."""
    text = ""
    for number in range(span.line, span.line + MOST_LINES):
        text = f"{text} {span.source.line(number).split('#')[0]}"
        if number >= span.end_line and all(
            text.count(a) <= text.count(b) for a, b in ("()", "[]", "{}")
        ):
            break
    return " ".join(text.split()).removesuffix("{").rstrip()
