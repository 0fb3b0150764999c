"""Linear recurrences in one form, so that a backend may compute many tokens at once.

    S = scale * S + write (x) (value - read . S)        and what is read of it: query . S

A state of which each token scales all, adds a product of two vectors, and reads along one of its
dims, is linear attention (arXiv:2006.16236), with a decay RetNet or GLA, with a read the delta rule
(arXiv:2102.11174, gated: arXiv:2412.06464). Nothing here knows their names: the equation is taken
apart into factors, and if it is of this form, the scan is written anew in it. Its bodies then hold
nothing but these equations, in order (scale, write, value, read; query), and attribute ``linear``
names the dims: along the first it is read, along the second it holds values.

Everything that a token brings is computed for all tokens at once. It is part of `recognise`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from compiler.ir import Dim, Graph, Node, Program, Rewriter, Type
from compiler.passes.composites import rounds

SOURCES = frozenset({"constant", "iota"})


class NotLinear(Exception):
    """The scan is not of the form."""


@dataclass
class Product:
    """``sign * factors * core``; ``core`` alone may depend on the state (None: nothing does)."""

    factors: list[str] = field(default_factory=list)
    core: str | None = None
    sign: int = 1


@dataclass(frozen=True)
class Form:
    """The factors of each vector, as nodes of the scan's bodies, and the two dims."""

    scale: list[str]
    write: list[str]
    value: list[str]
    read: list[str] | None
    query: list[str]
    along: Dim
    holds: Dim
    summed: str  # what ``along`` is called where the state is read
    negative: bool  # what is written is taken away
    dot: str  # the node of ``read`` that is the product of query and state


def run(program: Program) -> Program:
    bodies = dict(program.bodies)
    # Bodies that became one (passes/cse.py) are written anew only if all who run them agree.
    scans = [n for graph in program.bodies.values() for n in graph if n.op == "scan"]
    reads = {(n.attrs["body"], n.attrs.get("read")) for n in scans}
    counts = Counter(name for pair in reads for name in pair)
    for name, graph in program.bodies.items():
        for scan in [n for n in graph if n.op == "scan" and n.attrs.get("read")]:
            body, read = program.bodies[scan.attrs["body"]], program.bodies[scan.attrs["read"]]
            if counts[body.name] > 1 or counts[read.name] > 1:
                continue
            try:
                form = _form(body, read)
            except NotLinear:
                continue
            made = _Writer(bodies[name], bodies[name][scan.name], body, read, form)
            bodies[name] = made.run()
            bodies[body.name], bodies[read.name] = made.body(), made.reader()
    return program.with_bodies(bodies)


# -- taking apart ----------------------------------------------------------------------------------


def _depending(graph: Graph) -> set[str]:
    """What depends on the state, a body's first input."""
    found = {graph.inputs[0].name}
    for node in graph:
        if found.intersection(node.inputs):
            found.add(node.name)
    return found


def _need(condition: bool) -> None:
    if not condition:
        raise NotLinear


def _product(graph: Graph, name: str, depends: set[str]) -> Product:
    """A node as a product."""
    node = graph[name]
    fn = node.attrs.get("fn") if node.op == "map" else None
    if rounds(node):
        return Product([], name) if name in depends else Product([name])
    if fn == "neg":
        inner = _product(graph, node.inputs[0], depends)
        return replace(inner, sign=-inner.sign)
    if fn == "mul" or (node.op == "contract" and not node.attrs["over"]):
        parts = [_product(graph, i, depends) for i in node.inputs]
        cores = [p.core for p in parts if p.core is not None]
        _need(len(cores) <= 1)
        sign = -1 if sum(p.sign < 0 for p in parts) % 2 else 1
        return Product([f for p in parts for f in p.factors], cores[0] if cores else None, sign)
    return Product([], name) if name in depends else Product([name])


def _sum(graph: Graph, name: str, depends: set[str]) -> list[Product]:
    """A node as a sum of products."""
    node = graph[name]
    if node.op == "map" and node.attrs["fn"] in ("add", "sub") and not rounds(node):
        left, right = (_sum(graph, i, depends) for i in node.inputs)
        if node.attrs["fn"] == "sub":
            right = [replace(p, sign=-p.sign) for p in right]
        return [*left, *right]
    return [_product(graph, name, depends)]


def _form(body: Graph, read: Graph) -> Form:
    state = body.inputs[0]
    _need(state.type.dtype == "f32" and len(state.type.dims) >= 2)
    depends = _depending(body)
    scaled: list[Product] = []
    update: list[Product] = []
    for term in _sum(body, body.output, depends):
        (scaled if term.core == state.name else update).append(term)
    _need(len(scaled) == len(update) == 1 and scaled[0].sign == 1)
    dot, query, along = _query(read)
    write, value, reads, summed = list(update[0].factors), list[str](), None, along
    sign = update[0].sign
    if update[0].core is not None:
        value, reads, summed, flipped = _correction(body, update[0].core, depends, along)
        sign *= flipped
    else:
        value = [f for f in write if along not in body[f].type.names]
        write = [f for f in write if along in body[f].type.names]
    names = {d.name for d in state.type.dims}

    def dims(factors: Iterable[str]) -> set[str]:
        return {n for f in factors for n in body[f].type.names}

    held = names - dims(write) - dims(scaled[0].factors) - {along}
    held -= {d for f in query for d in read[f].type.names}
    if reads is not None:
        held -= dims(reads)
    _need(len(held) == 1 and along in dims(write) and along not in dims(value))
    _need(reads is None or summed == along or along not in dims(reads))
    (holds,) = held
    _need(holds in dims(value))
    used = dims([*scaled[0].factors, *write, *value, *(reads or ())]) - {summed}
    _need(used <= names and {d for f in query for d in read[f].type.names} <= names)
    return Form(
        scaled[0].factors,
        write,
        value,
        reads,
        query,
        state.type.dim(along),
        state.type.dim(holds),
        summed,
        sign < 0,
        dot.name,
    )


def _correction(
    body: Graph, core: str, depends: set[str], along: str
) -> tuple[list[str], list[str], str, int]:
    """``value - read . S``: the factors of both, what the sum runs over, and the value's sign."""
    values: list[Product] = []
    reads: list[Product] = []
    for term in _sum(body, core, depends):
        (values if term.core is None else reads).append(term)
    _need(len(values) == len(reads) == 1 and values[0].sign == -reads[0].sign)
    assert reads[0].core is not None
    dot = body[reads[0].core]
    _need(dot.op == "contract" and len(dot.attrs["over"]) == 1 and dot.type.dtype == "f32")
    (summed,) = dot.attrs["over"]
    inside = [i for i in dot.inputs if i in depends]
    _need(len(inside) == 1)
    state, source = body.inputs[0].name, body[inside[0]]
    if source.name != state:  # read under another name
        _need(source.op == "rename" and source.inputs == (state,))
        _need((source.attrs["dim"], source.attrs["to"].name) == (along, summed))
    else:
        _need(summed == along)
    factors = [f for i in dot.inputs if i not in depends for f in _factors(body, i, depends)]
    return values[0].factors, [*factors, *reads[0].factors], summed, values[0].sign


def _factors(graph: Graph, name: str, depends: set[str]) -> list[str]:
    found = _product(graph, name, depends)
    _need(found.core is None and found.sign == 1)
    return found.factors


def _query(read: Graph) -> tuple[Node, list[str], str]:
    """The product that alone reads a state, the factors of the vector it is read with, and the dim
    that is summed. What is made of that product needs no state."""
    state = read.inputs[0].name
    readers = read.users(state)
    _need(len(readers) == 1)
    (dot,) = readers
    _need(dot.op == "contract" and len(dot.attrs["over"]) == 1 and dot.type.dtype == "f32")
    _need(dot.inputs.count(state) == 1)
    none: set[str] = set()
    factors = [f for i in dot.inputs if i != state for f in _factors(read, i, none)]
    return dot, factors, dot.attrs["over"][0]


# -- putting together ------------------------------------------------------------------------------


class _Writer:
    """Writes a scan in the form: its vectors for all tokens, and bodies of nothing else."""

    def __init__(self, graph: Graph, scan: Node, body: Graph, read: Graph, form: Form):
        self.graph, self.scan, self.old, self.old_read, self.form = graph, scan, body, read, form
        (self.time,) = (d for d in scan.type.dims if d.kind == "time")
        state = body.inputs[0].type
        kept = tuple(d for d in state.dims if d not in (form.along, form.holds))
        self.state = Type("f32", (*kept, form.along, form.holds))
        self.key = Type("f32", (*kept, form.along))
        self.values = Type("f32", (*kept, form.holds))
        self.per_key = any(form.along.name in body[f].type.names for f in form.scale)
        self.scale = self.key if self.per_key else Type("f32", kept)
        self.made = Rewriter(graph)

    def run(self) -> Graph:
        for node in self.graph:
            if node.name != self.scan.name:
                self.made.replace(node.name, self.made.copy(node).name)
                continue
            a, form = self.scan.attrs, self.form
            given = self._operands(self.old, a["given"])
            asked = self._operands(self.old_read, a["asked"])
            stems = ("scale", "write", "value", "read")
            vectors = (form.scale, form.write, form.value, form.read)
            types = (self.scale, self.key, self.values, self.key)
            inputs = [
                self._vector(stem, self.old, factors, given, type)
                for stem, factors, type in zip(stems, vectors, types, strict=True)
                if factors is not None
            ]
            query = self._vector("query", self.old_read, form.query, asked, self.key)
            places = tuple(range(1, len(inputs) + 1))
            attrs = {**a, "given": places, "asked": (len(inputs) + 1,)}
            attrs["linear"] = (form.along.name, form.holds.name)
            start = self.made.to[self.scan.inputs[0]]
            name = self.made.new.fresh(f"{node.name}_read")
            type = Type("f32", (self.time, *self.values.dims))
            new = Node(name, "scan", (start, *inputs, query), type, attrs, node.span)
            asked[form.dot] = self.made.new.add(new).name
            # What is made of the product is made of all tokens' at once.
            last = self.made.new[self._lifted(self.old_read, self.old_read.output, asked)]
            final = last.with_(
                name=self.made.new.fresh(node.name),
                op="cast",
                inputs=(last.name,),
                type=node.type,
                attrs={},
                label=node.label,
                rounds=node.rounds,
                span=node.span,
            )
            self.made.replace(node.name, self.made.new.add(final).name)
        return self.made.done()

    def _operands(self, body: Graph, positions: tuple[int, ...]) -> dict[str, str]:
        """The new graph's value for each input of a body but the state."""
        inputs = (self.made.to[self.scan.inputs[p]] for p in positions)
        return dict(zip((n.name for n in body.inputs[1:]), inputs, strict=True))

    def _lifted(self, body: Graph, name: str, known: dict[str, str]) -> str:
        """A node of a body that no state decides, for all tokens."""
        if name not in known:
            node = body[name]
            inputs = [self._lifted(body, i, known) for i in node.inputs]
            moves = any(self.time in self.made.new[i].type.dims for i in inputs)
            dims = (self.time, *node.type.dims) if moves else node.type.dims
            type = Type(node.type.dtype, dims, node.type.of)
            known[name] = self.made.emit(
                node.name, node.op, inputs, type, attrs=node.attrs, span=node.span
            ).name
        return known[name]

    def _vector(
        self, stem: str, body: Graph, factors: list[str], known: dict[str, str], wanted: Type
    ) -> str:
        """The product of some factors, along time and all dims that are wanted, in float32."""
        span = self.scan.span
        at = [self._lifted(body, f, known) for f in factors]
        form = self.form
        if stem == "write" and form.negative:
            at.append(self._number(-1.0))
        at = [self._wide(name) for name in at or [self._number(1.0)]]
        made = self.made
        total = at[0]
        for other in at[1:]:
            types = [made.new[total].type, made.new[other].type]
            dims = tuple(dict.fromkeys(d for t in types for d in t.dims))
            type = Type("f32", tuple(sorted(dims, key=lambda d: d.kind != "time")))
            total = made.emit(
                stem, "map", (total, other), type, attrs={"fn": "mul"}, span=span
            ).name
        names = made.new[total].type.names
        if stem == "read" and form.summed in names and form.summed != form.along.name:
            dims = tuple(
                form.along if d.name == form.summed else d for d in made.new[total].type.dims
            )
            attrs = {"dim": form.summed, "to": form.along}
            total = made.emit(
                stem, "rename", (total,), Type("f32", dims), attrs=attrs, span=span
            ).name
        have = made.new[total].type
        missing = tuple(d for d in (self.time, *wanted.dims) if d not in have.dims)
        if missing:
            type, attrs = Type("f32", (*missing, *have.dims)), {"dims": missing}
            total = made.emit(stem, "expand", (total,), type, attrs=attrs, span=span).name
        return total

    def _wide(self, name: str) -> str:
        node = self.made.new[name]
        if node.type.dtype == "f32":
            return name
        type = Type("f32", node.type.dims)
        return self.made.emit(f"{name}_wide", "cast", (name,), type, span=node.span).name

    def _number(self, value: float) -> str:
        return self.made.emit("one", "constant", (), Type("act", ()), attrs={"value": value}).name

    def body(self) -> Graph:
        """S = scale * S + write * (value - read . S)"""
        graph, form = Graph(self.old.name), self.form

        def given(name: str, type: Type) -> str:
            return graph.add(Node(name, "input", (), type, {"name": name}, self.scan.span)).name

        state = self.old.inputs[0].attrs["name"]
        graph.add(Node("state", "input", (), self.state, {"name": state}, self.scan.span))
        scale, write = given("scale", self.scale), given("write", self.key)
        value = given("value", self.values)
        kept = self._node(graph, "kept", (scale, "state"), self.state, "mul")
        if form.read is not None:
            read, over = given("read", self.key), {"over": (form.along.name,)}
            dot = Node("said", "contract", (read, "state"), self.values, over, self.scan.span)
            value = self._node(graph, "new", (value, graph.add(dot).name), self.values, "sub")
        update = self._node(graph, "update", (write, value), self.state, "mul")
        graph.output = self._node(graph, "after", (kept, update), self.state, "add")
        return graph

    def reader(self) -> Graph:
        """query . S"""
        graph, form = Graph(self.old_read.name), self.form
        state = self.old_read.inputs[0].attrs["name"]
        graph.add(Node("state", "input", (), self.state, {"name": state}, self.scan.span))
        graph.add(Node("query", "input", (), self.key, {"name": "query"}, self.scan.span))
        over = {"over": (form.along.name,)}
        graph.add(Node("found", "contract", ("query", "state"), self.values, over, self.scan.span))
        graph.output = "found"
        return graph

    def _node(self, graph: Graph, name: str, inputs: tuple[str, ...], type: Type, fn: str) -> str:
        node = Node(name, "map", inputs, type, {"fn": fn}, self.scan.span)
        return graph.add(node).name
