"""Bodies of the graph as the operations of one function: calls are written in their place, a chain
is one loop whose body is written once, however many layers there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from backends.mlir.coding import NoCodes, element_of
from backends.mlir.linalg import Linalg
from backends.mlir.step import Step
from backends.mlir.values import BATCH, Axis, Code, Element, Size, Unsupported, Value
from compiler import spec
from compiler.coding import Coding
from compiler.ir import Dim, Graph, Node
from compiler.tensors import Place, called

Lower = Callable[["Frame", Node, list[Value]], Value]
LOWERINGS: dict[str, Lower] = {}


def lowers(*ops: str) -> Callable[[Lower], Lower]:
    """Registers how ops of these names are lowered."""

    def register(lower: Lower) -> Lower:
        LOWERINGS.update(dict.fromkeys(ops, lower))
        return lower

    return register


def lacking(graphs: Mapping[str, Graph]) -> Node | None:
    """A node that there is no lowering for, if there is one; composites have their bodies."""
    for graph in graphs.values():
        for node in graph:
            known = node.op in LOWERINGS or spec.op(node).composite
            if not known:
                return node
    return None


@dataclass(frozen=True)
class Frame:
    """One run of one body.

    Args:
        index: which of the module's arrays it is in, counted from 0 along each of ``place.ranges``.
        rows: how many rows the block of an array has here.
    """

    step: Step
    graph: Graph
    place: Place
    index: tuple[Size | None, ...]
    arguments: Mapping[str, Value]
    rows: Size = 1

    @staticmethod
    def entry(step: Step, body: Graph, tokens: Value) -> Frame:
        """The frame of an entry's body, whose one input is ``tokens`` [batch, time]."""
        (point,) = body.inputs
        packed = step.ops.merge(tokens, [BATCH, "@time"], "@time")
        given = {point.attrs["name"]: packed.renamed({"@time": point.type.names[0]})}
        return Frame(step, body, Place(step.program.modules[step.program.root]), (), given)

    @property
    def ops(self) -> Linalg:
        return self.step.ops

    @property
    def code(self) -> Code:
        return self.step.code

    @cached_property
    def kinds(self) -> dict[str, str]:
        return {dim.name: dim.kind for node in self.graph for dim in node.type.dims}

    def time_of(self, value: Value) -> str | None:
        return next((n for n in value.names if self.kinds.get(n) == "time"), None)

    def history_of(self, value: Value) -> str | None:
        return next((n for n in value.names if self.kinds.get(n) == "history"), None)

    def axis(self, dim: Dim) -> Axis:
        """A dim as an axis of a packed value."""
        return Axis(dim.name, self.size(dim))

    def size(self, dim: Dim) -> Size:
        if dim.kind == "time":
            return self.step.rows
        if dim.kind == "history":
            return self.step.history
        if dim.kind == "rows":
            return self.step.wanted if "wanted" in str(dim.size) else self.rows
        return self.step.program.size(dim)

    # -- the two forms of time ---------------------------------------------------------------------

    def batched(self, value: Value) -> Value:
        """With an axis of sequences, if it runs over time."""
        time = self.time_of(value)
        if BATCH in value.names or time is None:
            return value
        into = [Axis(BATCH, self.step.batch), Axis(time, self.step.time)]
        return self.ops.split(value, time, into)

    def settled(self, value: Value) -> Value:
        """Packed, if it runs over time and over no history."""
        time = self.time_of(value)
        if BATCH not in value.names or time is None or self.history_of(value):
            return value
        return self.ops.merge(value, [BATCH, time], time)

    def together(self, values: Sequence[Value]) -> list[Value]:
        """All batched if one of them is."""
        if not any(BATCH in value.names for value in values):
            return list(values)
        return [self.batched(value) for value in values]

    # -- running -----------------------------------------------------------------------------------

    def evaluate(self) -> Value:
        values: dict[str, Value] = {}
        for node in self.graph:
            lower = LOWERINGS.get(node.op, composite)
            args = [values[i] for i in node.inputs]
            try:
                found = self.settled(lower(self, node, args))
            except Unsupported:
                raise
            if node.rounds and node.type.dtype == "act":
                found = self.ops.cast(found, self.step.act)
            values[node.name] = found
        return values[self.graph.output]

    def run(
        self,
        body: str,
        args: Sequence[Value],
        child: str = "",
        index: Size | None = None,
        dims: Sequence[tuple[str, str]] = (),
        over: Node | None = None,
        rows: Size = 1,
    ) -> Value:
        """Another body in this one's place.

        Args:
            args: under the caller's names of dims, in the order of the body's inputs.
            index: which one of an array of children, from 0; None runs all of them side by side.
            dims: (the body's name, the caller's name) of dims that are called differently.
            over: the node that runs it, unless it is in this frame's module.
        """
        graph = self.step.program.bodies[body]
        outside = dict(dims)
        inner = {caller: own for own, caller in outside.items()}
        arguments = {
            node.attrs["name"]: value.renamed(inner)
            for node, value in zip(graph.inputs, args, strict=True)
        }
        place, numbers = self.place, self.index
        if over is not None and child:
            place = next(p for p, b in called(self.step.program, self.place, over) if b == body)
            if len(place.ranges) > len(numbers):
                numbers = (*numbers, index)
        frame = Frame(self.step, graph, place, numbers, arguments, rows)
        return frame.evaluate().renamed(outside)

    def element(self, node: Node) -> Element:
        """What a computed value is held in; only names round to the activation dtype."""
        if node.type.dtype in ("act", "f32", "coded"):  # what codes stand for
            return "f32"
        return "i64" if node.type.dtype == "i64" else "i1"

    def stored(self, dtype: str) -> Element:
        kinds: dict[str, Element] = {"f32": "f32", "coded": "f32", "i64": "i64", "bool": "i1"}
        return self.step.act if dtype == "act" else kinds[dtype]

    def check_codes(self, node: Node, coding: Coding) -> None:
        """
        Raises:
            Unsupported: values of the format cannot be computed with here.
        """
        if not self.ops.loops:
            raise self.unsupported(node, f"'{coding.format}' is written in linalg alone")
        try:
            element_of(coding)
        except NoCodes as why:
            raise self.unsupported(node, str(why)) from None

    def unsupported(self, node: Node, why: str) -> Unsupported:
        place = f"{node.span}: " if node.span else ""
        return Unsupported(f"{place}the MLIR backend cannot compile '{node.op}' here: {why}")


def composite(frame: Frame, node: Node, args: list[Value]) -> Value:
    return frame.run(node.attrs["body"], args)


@lowers("call")
def call(frame: Frame, node: Node, args: list[Value]) -> Value:
    a = node.attrs
    return frame.run(a["body"], args, a["child"], dims=a["dims"], over=node)


@lowers("branch")
def branch(frame: Frame, node: Node, args: list[Value]) -> Value:
    """By the positions asked for of each sequence."""
    a, step, code = node.attrs, frame.step, frame.code
    _, relation, number = a["when"]
    if isinstance(step.time, int):
        side = "then" if spec.holds(a["when"], {"time": step.time}) else "otherwise"
        return frame.run(a[side], args)
    test = {"<=": "ule", "<": "ult", ">": "ugt", ">=": "uge"}[relation]
    holds = code.define(f"arith.cmpi {test}, {step.time}, {code.index(number)} : index")
    name = code.fresh()
    order = [frame.axis(d) for d in node.type.dims]
    element = frame.element(node) if not node.rounds else frame.stored(node.type.dtype)
    outer, sides = step.pending, []
    for side in ("then", "otherwise"):
        step.pending = {}
        lines, code.lines = code.lines, []
        with code.nested():
            found = frame.settled(frame.run(a[side], args))
            if BATCH in found.names:
                raise frame.unsupported(node, "its sides run over a history")
            found = frame.ops.cast(frame.ops.full(found, order), element)
        sides.append((code.lines, found, step.pending))
        code.lines = lines
    # What the sides cache leaves the branch as rows: IREE loses them in a whole cache, which a loop
    # carries and a branch changes.
    step.pending, pending = outer, sides[0][2]
    if pending.keys() != sides[1][2].keys():
        raise frame.unsupported(node, "only one of its sides caches")
    types = ", ".join(v.type for v in (sides[0][1], *(rows for rows, _ in pending.values())))
    code.add(f"{name}:{1 + len(pending)} = scf.if {holds} -> ({types}) {{")
    for number, (lines, found, cached) in enumerate(sides):
        if number:
            code.add("} else {")
        code.lines += lines
        with code.nested():
            values = ", ".join(v.name for v in (found, *(cached[key][0] for key in pending)))
            code.add(f"scf.yield {values} : {types}")
    code.add("}")
    for number, (key, (rows, starts)) in enumerate(pending.items(), start=1):
        step.cached(key, frame.ops.tied(replace(rows, name=f"{name}#{number}")), starts)
    return frame.ops.tied(Value(f"{name}#0", tuple(order), element))


@lowers("chain")
def chain(frame: Frame, node: Node, args: list[Value]) -> Value:
    """A loop over layers: their weights are slices of stacked ones, what they cache is put into
    stacked rows."""
    a, step, code = node.attrs, frame.step, frame.code
    x, *extras = args
    layers = frame.size(a["index"])
    assert isinstance(layers, int)
    if not layers:
        return x
    place = next(p for p, _ in called(step.program, frame.place, node))
    first = a["index"].start.at(step.program.sizes) - place.ranges[-1].start
    order = [frame.axis(d) for d in node.type.dims]
    element = frame.stored(node.type.dtype)
    x = frame.ops.cast(frame.ops.full(x, order), element)

    def layer(x: Value, at: Size) -> Value:
        dims = a.get("dims", ())
        out = frame.run(a["body"], [x, *extras], a["child"], at, dims, over=node)
        return frame.ops.cast(frame.ops.full(frame.settled(out), order), element)

    if layers <= 1 or not frame.ops.loops:
        for at in range(first, first + layers):
            x = layer(x, at)
        return x
    depth = len(place.ranges)
    keys = [
        key
        for key in step.kept
        if key[0].startswith(f"{place.path}.") and key[1][:depth] == place.ranges
    ]
    carried = [x, *(step.kept[key] for key in keys)]
    names = [code.fresh() for _ in carried]
    number, results = code.fresh(), code.fresh()
    given = ", ".join(f"{n} = {v.name}" for n, v in zip(names, carried, strict=True))
    types = ", ".join(v.type for v in carried)
    code.add(
        f"{results}:{len(carried)} = scf.for {number} = {code.index(first)} to "
        f"{code.index(first + layers)} step {code.index(1)} iter_args({given}) -> ({types}) {{"
    )
    outer, step.pending = step.pending, None
    with code.nested():
        inside = [frame.ops.tied(replace(v, name=n)) for v, n in zip(carried, names, strict=True)]
        step.kept.update(zip(keys, inside[1:], strict=True))
        new = [layer(inside[0], number), *(step.kept[key] for key in keys)]
        code.add(f"scf.yield {', '.join(v.name for v in new)} : {types}")
    code.add("}")
    if outer is not None and any(a != b for a, b in zip(new[1:], inside[1:], strict=True)):
        raise frame.unsupported(node, "layers that cache, within one side of a branch")
    step.pending = outer
    out = [frame.ops.tied(replace(v, name=f"{results}#{n}")) for n, v in enumerate(carried)]
    step.kept.update(zip(keys, out[1:], strict=True))
    return out[0]
