"""Bodies by hand, as the elaborator lowers them: a few lines per equation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from compiler import rules
from compiler.equivalence import equivalent
from compiler.ir import (
    HISTORY,
    ROWS,
    TIME,
    Child,
    Dim,
    DType,
    Entry,
    EntryInput,
    Graph,
    Module,
    Node,
    Parameter,
    Program,
    Type,
)
from compiler.verify import verify
from dsl.extents import Extent


def dim(name: str, size: str | int | None = None) -> Dim:
    """``dim("h", "heads")``; ``dim("t")``, ``dim("s")`` and ``dim("R")`` are the step's."""
    kinds = {"t": ("time", TIME), "s": ("history", HISTORY), "R": ("rows", ROWS)}
    if size is None:
        kind, extent = kinds[name]
        return Dim(name, extent, kind)  # type: ignore[arg-type]
    return Dim(name, Extent.name(size) if isinstance(size, str) else Extent.of(size))


t, s = dim("t"), dim("s")


NOWHERE = cast(rules.Scope, None)  # arithmetic's type does not depend on where it runs


class Body:
    """Writes a graph line by line; every method returns the new value's name."""

    def __init__(self, name: str):
        self.graph = Graph(name)

    def __call__(
        self, op: str, *inputs: str, type: Type, name: str = "v", rounds: bool = False, **attrs: Any
    ) -> str:
        labels = {n.label for n in self.graph}
        label = name if name != "v" and op != "param" and name not in labels else None
        node = Node(self.graph.fresh(name), op, inputs, type, attrs, label=label, rounds=rounds)
        return self.graph.add(node).name

    def type(self, name: str) -> Type:
        return self.graph[name].type

    def input(self, name: str, *dims: Dim, dtype: DType = "act", of: Dim | None = None) -> str:
        attrs = {"name": name}
        return self.graph.add(Node(name, "input", (), Type(dtype, dims, of), attrs)).name

    def param(self, name: str, *dims: Dim, dtype: DType = "act", op: str = "param") -> str:
        return self(op, type=Type(dtype, dims), name=name, param=name)

    def constant(self, value: float) -> str:
        return self(
            "constant", type=Type("i64" if isinstance(value, int) else "act", ()), value=value
        )

    def position(self, of: Dim) -> str:
        return self("position", type=Type("i64", (of,)))

    def iota(self, of: Dim) -> str:
        return self("iota", type=Type("i64", (of,), of=of))

    def cast(self, a: str, dtype: DType = "f32", **rest: Any) -> str:
        return self("cast", a, type=Type(dtype, self.type(a).dims), **rest)

    def contract(self, *inputs: str, over: str, **rest: Any) -> str:
        """``over="n j"``; f32 if an operand is, as the rule has it."""
        dims = {d.name: d for i in inputs for d in self.type(i).dims}
        kept = [d for name, d in dims.items() if name not in over.split()]
        kept.sort(key=lambda d: d.kind not in ("time", "rows"))
        wide = any(self.type(i).dtype == "f32" for i in inputs)
        made = Type("f32" if wide else "act", tuple(kept))
        return self("contract", *inputs, type=made, over=tuple(over.split()), **rest)

    def map(self, fn: str, *inputs: str, **rest: Any) -> str:
        widest = sorted(inputs, key=lambda i: -len(self.type(i).dims))
        dims = {d.name: d for i in widest for d in self.type(i).dims}
        node = Node("", "map", inputs, Type("act", ()), {"fn": fn})
        ruled = rules.map(node, [self.graph[i] for i in inputs], NOWHERE)
        return self("map", *inputs, type=Type(ruled.dtype, tuple(dims.values())), fn=fn, **rest)

    def reduce(self, fn: str, a: str, over: str, **rest: Any) -> str:
        kept = tuple(d for d in self.type(a).dims if d.name != over)
        return self("reduce", a, type=Type(self.type(a).dtype, kept), fn=fn, over=(over,), **rest)

    def softmax(self, a: str, over: str = "s", **rest: Any) -> str:
        return self("softmax", a, type=self.type(a), over=over, **rest)

    def cache(self, a: str, name: str) -> str:
        dims = tuple(s if d.kind == "time" else d for d in self.type(a).dims)
        made = Node(
            self.graph.fresh(name),
            "cache",
            (a,),
            Type(self.type(a).dtype, dims),
            {"name": name},
            label=name,
        )
        return self.graph.add(made).name

    def part(self, a: str, of: Dim, part: str) -> str:
        (chosen,) = (p for p in of.parts if p.name == part)
        dims = tuple(chosen if d == of else d for d in self.type(a).dims)
        made = Type(self.type(a).dtype, dims)
        return self("part", a, type=made, dim=of.name, part=part)

    def unflatten(self, a: str, of: Dim, *into: Dim) -> str:
        dims = tuple(n for d in self.type(a).dims for n in (into if d == of else (d,)))
        made = Type(self.type(a).dtype, dims)
        return self("unflatten", a, type=made, dim=of.name, into=into)

    def call(
        self,
        body: Graph,
        child: str,
        *inputs: str,
        dims: Mapping[str, str] | None = None,
        **rest: Any,
    ) -> str:
        names = dims or {}
        made = tuple(Dim(names.get(d.name, d.name), d.size, d.kind) for d in body.result.type.dims)
        attrs = {"body": body.name, "child": child, "dims": tuple(names.items())}
        return self("call", *inputs, type=Type(body.result.type.dtype, made), **attrs, **rest)

    def done(self, output: str) -> Graph:
        self.graph.output = output
        return self.graph


def parameters(graph: Graph) -> tuple[Parameter, ...]:
    """What a module that runs this body must store."""
    found = {
        node.attrs["param"]: Parameter(node.attrs["param"], node.type, node.op)  # type: ignore[arg-type]
        for node in graph
        if node.op in ("param", "state")
    }
    return tuple(found.values())


def program(
    graph: Graph,
    sizes: Mapping[str, int],
    children: Mapping[str, Graph] | None = None,
) -> Program:
    """A model that is one block with this body, and children with theirs."""
    children = children or {}
    modules = {
        "M": Module(
            "M",
            "M",
            parameters(graph),
            tuple(Child(name, name) for name in children),
            methods={"call": graph.name},
        )
    }
    for name, body in children.items():
        modules[name] = Module(name, name, parameters(body), methods={"call": body.name})
    inputs = tuple(EntryInput(node.attrs["name"]) for node in graph.inputs)
    return Program(
        "hand",
        dict(sizes),
        "M",
        modules,
        {body.name: body for body in (graph, *children.values())},
        {"main": Entry("main", graph.name, inputs)},
    )


# -- attention with low-rank keys and values -----------------------------------------------------

PUBLISHED = {"hidden": 7168, "heads": 128, "rank": 512, "width": 128, "turned": 64, "out": 128}


def low_rank_attention(
    sizes: Mapping[str, int] = PUBLISHED, rounds: bool = False, joint: bool = False
) -> Program:
    """Keys and values expanded from one cached latent, written with other names than anyone's.

    Args:
        rounds: the keys have a plain name, which marks a rounding.
        joint: one ``let`` holds keys and values, and parts of it are read.
    """
    b = Body("Attend.call")
    d, g, z = dim("d", "hidden"), dim("g", "heads"), dim("z", "rank")
    a, e, o = dim("a", "width"), dim("e", "turned"), dim("o", "out")
    x = b.input("x", t, d)
    ae, ao = Dim.sum([a, e]), Dim.sum([a, o])
    q = b.contract(x, b.param("Q", g, ae, d), over="d", name="q", rounds=True)
    q_a, q_e = b.part(q, ae, "a"), b.part(q, ae, "e")
    latent = b.cache(b.contract(x, b.param("Down", z, d), over="d"), "latent")
    turned = b.cache(b.contract(x, b.param("Turn", e, d), over="d"), "turned")
    gao = Dim.product([g, ao])
    up = b.unflatten(b.param("Up", gao, z), gao, g, ao)
    if joint:
        both = b.contract(latent, up, over="z", name="both")
        keys, values = b.part(both, ao, "a"), b.part(both, ao, "o")
    else:
        keys = b.contract(b.part(up, ao, "a"), latent, over="z", name="keys", rounds=rounds)
        values = b.contract(b.part(up, ao, "o"), latent, over="z", name="values")
    near = b.contract(b.cast(q_a), b.cast(keys), over="a")
    far = b.contract(b.cast(q_e), b.cast(turned), over="e")
    score = b.map("mul", b.map("add", near, far), b.constant(0.072), name="score")
    seen = b.map("le", b.position(s), b.position(t))
    masked = b.map("where", seen, score, b.constant(float("-inf")))
    p = b.softmax(masked, name="p")
    out = b.cast(b.contract(p, b.cast(values), over="s"), "act", name="out", rounds=True)
    y = b.contract(out, b.param("Out", d, g, o), over="g o", name="y", rounds=True)
    return program(b.done(y), sizes)


def shared_key_attention(sizes: Mapping[str, int], window: int | None = None) -> Program:
    """Grouped queries on fewer key-value heads, causal or within a window; the scale on q."""
    b = Body("Attend.call")
    d, k, m, n = dim("d", "hidden"), dim("k", "kv_heads"), dim("m", "per_group"), dim("n", "width")
    x = b.input("x", t, d)
    q = b.contract(x, b.param("Q", k, m, n, d), over="d", name="q", rounds=True)
    keys = b.cache(b.contract(x, b.param("K", k, n, d), over="d"), "keys")
    values = b.cache(b.contract(x, b.param("V", k, n, d), over="d"), "values")
    scaled = b.map("mul", q, b.constant(0.25))
    at, past = b.position(t), b.position(s)
    seen = b.map("ge", at, past)
    if window is not None:
        near = b.map("lt", b.map("sub", at, past), b.constant(window))
        seen = b.map("and", near, seen)
    score = b.contract(scaled, keys, over="n")
    p = b.softmax(b.map("where", seen, score, b.constant(float("-inf"))))
    out = b.contract(p, values, over="s", name="out", rounds=True)
    y = b.contract(out, b.param("Out", d, k, m, n), over="k m n", name="y", rounds=True)
    return program(b.done(y), sizes)


# -- what a pass must keep -----------------------------------------------------------------------


def agree(before: Program, after: Program) -> None:
    """The program after a pass is well-formed and computes the same, on every side of a branch."""
    verify(after)
    equivalent(before, after)
