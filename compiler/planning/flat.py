"""A program as the flat list of what one rank computes, calls inlined, layers kept as loops.

``flatten`` follows the entries' bodies at given lengths. Views, casts and what only renames cost
nothing and disappear; every other node becomes an ``Op`` that knows its operands, how many elements
they have on this rank, and where it stands in the module tree. A loop over layers becomes one
``Piece`` for each kind of layer, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from compiler import spec
from compiler.cost import flops_of, volume
from compiler.ir import Dim, Graph, Node, Program
from compiler.passes import masks
from compiler.passes.activity import taken
from compiler.planning.ops import Load, Op, Operand, Param, Piece
from compiler.planning.reading import attention_flops, router_of
from compiler.planning.routing import spread
from compiler.planning.sharding import Sharding
from compiler.tensors import Place, called, child_place

FREE = frozenset({"constant", "iota", "position"})


def flatten(
    source: Program, program: Program, entries: Sequence[str], load: Load, sharding: Sharding
) -> Flat:
    """What one rank computes for these entries; what they share is computed once."""
    flat = Flat(source, program, load, sharding)
    for name in entries:
        flat.entry = name
        entry = program.entries[name]
        graph = program.bodies[entry.body]
        args = [flat.given(n, Place(program.modules[program.root])) for n in graph.inputs]
        result = flat.body(entry.body, Place(program.modules[program.root]), args)
        if result.value is not None:
            flat.results.add(result.value)
    return flat


@dataclass
class Flat:
    """All ops of one pass. ``results`` are the ops that compute what the entries give."""

    source: Program  # as elaborated
    program: Program
    load: Load
    sharding: Sharding
    ops: list[Op] = field(default_factory=list)
    loops: list[Piece] = field(default_factory=list)
    results: set[int] = field(default_factory=set)
    entry: str = "main"
    inside: bool = False
    grouped: bool = False  # within an array that picks choose from
    done: dict[tuple[str, str], Operand] = field(default_factory=dict)
    after: dict[int, int] = field(default_factory=dict)

    @property
    def at(self) -> Mapping[str, int]:
        load = self.load
        lengths = {"time": load.time, "history": load.history, "wanted": load.wanted}
        return {**self.program.sizes, **lengths, "rows": load.time}

    def pieces(self) -> list[Piece]:
        """Ops between the loops, and the loops, in order; entries beside the first come last."""
        out: list[Piece] = []
        for number in range(len(self.loops) + 1):
            own = [op for op in self.ops if op.after == number]
            names = dict.fromkeys(op.entry for op in own)
            out += [Piece([op for op in own if op.entry == name], entry=name) for name in names]
            if number < len(self.loops):
                out.append(self.loops[number])
        return out

    # -- sizes -----------------------------------------------------------------------------------

    def count(self, place: Place, dims: Sequence[Dim], at: Mapping[str, int]) -> float:
        """Elements on this rank: those of the sequence, times sequences, less what is divided."""
        number = volume(dims, at) / self.sharding.ways(place, dims, self.program)
        lifted = any(d.kind != "plain" for d in dims)
        return number * self.load.sequences if lifted else number

    def given(self, node: Node, place: Place) -> Operand:
        """An argument of an entry: token numbers, small."""
        return Operand(self.count(place, node.type.dims, self.at), node.type.dtype)

    # -- bodies ----------------------------------------------------------------------------------

    def body(
        self,
        name: str,
        place: Place,
        args: Sequence[Operand],
        at: Mapping[str, int] | None = None,
        blocks: float = 1,
    ) -> Operand:
        graph = self.program.bodies[name]
        at = at or self.at
        values: dict[str, Operand] = {
            node.name: arg for node, arg in zip(graph.inputs, args, strict=True)
        }
        for node in graph:
            if node.op != "input":
                values[node.name] = self.node(graph, node, place, values, at, blocks)
        return values[graph.output]

    def node(
        self,
        graph: Graph,
        node: Node,
        place: Place,
        values: Mapping[str, Operand],
        at: Mapping[str, int],
        blocks: float,
    ) -> Operand:
        inputs = [values[name] for name in node.inputs]
        elements = self.count(place, node.type.dims, at)
        if node.op in ("param", "state"):
            path = f"{place.path}.{node.attrs['param']}".lstrip(".")
            param = Param(path, place.ranges, str(node.attrs["param"]))
            return Operand(elements * blocks, "act", None, param, node.op == "state")
        if node.op in FREE:
            return Operand(0.0, node.type.dtype)
        if spec.op(node).view or node.op == "cast":
            first = inputs[0]
            if first.elements == 0:
                return first
            held = elements * (blocks if first.param is not None else 1)
            narrow = node.op == "cast" and (first.dtype, node.type.dtype) == ("f32", "act")
            dtype = "act" if narrow else first.dtype  # cast as it is written; widened as it is read
            return Operand(held, dtype, first.value, first.param, first.state)
        if node.op == "branch":
            side = node.attrs["then" if spec.holds(node.attrs["when"], at) else "otherwise"]
            if self.sharding.deployment.train is not None:
                side = taken(node)  # training takes no contraction apart, however short a sequence
            return self.body(side, place, inputs, at, blocks)
        if node.op == "call":
            return self.call(node, place, inputs, at, blocks)
        if node.op == "chain":
            return self.loop(node, place, inputs, elements)
        if node.op in ("experts", "apply"):
            return self.experts(graph, node, place, inputs, at, elements)
        return self.plain(graph, node, place, inputs, at, blocks, elements)

    def call(
        self,
        node: Node,
        place: Place,
        inputs: Sequence[Operand],
        at: Mapping[str, int],
        blocks: float,
    ) -> Operand:
        (inner, body), *_ = called(self.program, place, node)
        key = (place.path, body)
        if not node.attrs["child"] and key in self.done:  # entries share what they begin with
            return self.done[key]
        result = self.body(body, inner, inputs, at, blocks)
        if not node.attrs["child"]:
            self.done[key] = result
        return result

    def loop(self, node: Node, place: Place, inputs: Sequence[Operand], elements: float) -> Operand:
        index, child = node.attrs["index"], str(node.attrs["child"])
        start = index.start.at(self.program.sizes)
        asked = range(start, start + self.program.size(index))
        ran = [
            (inner, body, [n for n in inner.ranges[-1] if n in asked])
            for inner, body in called(self.program, place, node)
        ]
        if self.inside:  # a period of a few layers: they stand one after the other
            value, *rest = inputs
            for inner, body, layers in ran:
                for _ in layers:
                    value = self.body(body, inner, [value, *rest])
            return value
        op = self.add("layers", node, place, inputs, elements)
        for inner, body, layers in ran:
            ops, self.ops, self.inside = self.ops, [], True
            boundary = [Operand(o.elements, o.dtype, -1 - i) for i, o in enumerate(inputs)]
            self.body(body, inner, boundary)
            numbers = range(layers[0], layers[-1] + 1) if layers else range(0)
            self.loops.append(Piece(self.ops, child, numbers))
            self.ops, self.inside = ops, False
        self.ops.remove(op)
        self.after[op.id] = len(self.loops)
        return Operand(elements, node.type.dtype, op.id)

    def add(
        self,
        kind: str,
        node: Node,
        place: Place,
        inputs: Sequence[Operand],
        elements: float,
        **rest: object,
    ) -> Op:
        number = len(self.after)
        behind = [o.value for o in inputs if o.value is not None and o.value >= 0]
        after = max((self.after[value] for value in behind), default=0)
        op = Op(
            number,
            kind,
            node,
            place.module.block,
            place.path,
            tuple(inputs),
            elements,
            node.type.dtype,
            entry=self.entry,
            after=after,
            grouped=self.grouped,
            **rest,  # type: ignore[arg-type]
        )
        self.after[number] = after
        self.ops.append(op)
        return op

    # -- arrays of blocks ------------------------------------------------------------------------

    def experts(
        self,
        graph: Graph,
        node: Node,
        place: Place,
        inputs: Sequence[Operand],
        at: Mapping[str, int],
        elements: float,
    ) -> Operand:
        """Rows are sent to the ranks that hold the blocks they picked, and back. On average a rank
        gets as many as it sends."""
        gated = node.op == "experts"
        pick, *rest = inputs
        gate = rest.pop(0) if gated else None
        body = str(node.attrs["block" if gated else "body"])
        pick_type = graph[node.inputs[0]].type
        rows = volume(pick_type.dims, at)
        children = {c.name: c for c in place.module.children}
        inner = child_place(self.program, place, children[str(node.attrs["child"])])
        placed = self.sharding.array(place, str(node.attrs["child"]), len(inner.ranges[-1]))
        sent = rest[0]
        row = sent.elements / self.load.tokens
        router = router_of(graph, node, self.program, placed)
        where = {"router": router, "axes": placed.axes, "row": row}
        copies = 1.0
        if placed.ranks > 1:
            copies = spread(router, self.sharding.nodes(placed.axes)).ranks
            op = self.add("dispatch", node, place, [sent, pick], sent.elements * copies, **where)
            sent = Operand(op.elements, sent.dtype, op.id)
        load, imbalance = self.load, self.sharding.imbalance
        routed = rows * load.sequences * imbalance
        permuted = self.add("light", node, place, [sent, pick], routed * row, body=graph.name)
        args = [Operand(permuted.elements, sent.dtype, permuted.id), *rest[1:]]
        count = placed.each * (1 - (1 - 1 / placed.each) ** routed)  # that any row picked
        self.load, self.grouped = _scaled(load, imbalance), True
        result = self.body(body, inner, args, {**at, "rows": rows}, count)
        self.load, self.grouped = load, False
        many = [result, *([gate] if gate is not None else [])]
        last = self.add("light", node, place, many, elements * copies, body=graph.name)
        if placed.ranks > 1:
            back = Operand(elements * copies, "act", last.id)
            last = self.add("combine", node, place, [back, pick], elements, **where)
        return Operand(elements, "act", last.id)

    def seen(self, node: Node, place: Place) -> Callable[[int], float]:
        """The share of pairs that an attention's mask lets see, by the number of positions. What is
        no interval of distances is read off the source, where its expression still stands."""
        mask = node.attrs["mask"]
        if not isinstance(mask, str):
            return lambda length: 1.0 if mask is None else masks.visible(mask, length)
        module = self.source.modules[place.module.name]
        bodies = [self.source.bodies[name] for name in module.methods.values()]
        sizes = self.program.sizes

        def share(length: int) -> float:
            at = {**sizes, "time": length, "history": length, "wanted": 1, "rows": length}
            found = [s for body in bodies for s in masks.shares(body, at).values()]
            return min(found, default=1.0)

        return share

    # -- single ops ------------------------------------------------------------------------------

    def plain(
        self,
        graph: Graph,
        node: Node,
        place: Place,
        inputs: Sequence[Operand],
        at: Mapping[str, int],
        blocks: float,
        elements: float,
    ) -> Operand:
        load, sharding = self.load, self.sharding
        rest: dict[str, object] = {}
        kind = "light"
        if node.op == "contract" and node.attrs["over"]:
            dims = {d.name: d for operand in graph.operands(node) for d in operand.type.dims}
            ways = sharding.ways(place, list(dims.values()), self.program)
            lifted = any(d.kind != "plain" for d in dims.values())
            flops = flops_of(graph, node, at) / ways * (load.sequences if lifted else 1)
            with_parameter = any(o.param is not None and not o.state for o in inputs)
            kind = "product" if with_parameter else "mixing"
            over = [dims[n] for n in node.attrs["over"]]
            rest = {
                "flops": flops,
                "over": tuple(node.attrs["over"]),
                "summed": sharding.axes(place, over, self.program) if with_parameter else (),
                "blocks": blocks,
                "wide": all(graph[i].type.dtype == "f32" for i in node.inputs),
            }
        elif node.op == "attention":
            kind = "attention"
            ways = sharding.ways(place, node.type.dims, self.program)
            body = self.program.bodies[node.attrs["body"]]
            scores, values = attention_flops(body, at, self.seen(node, place))
            scale = load.sequences / ways
            terms = node.attrs["terms"]
            keys = 0.0
            if len(terms) > 1:
                heads = [d for d in node.type.dims if d.name in node.attrs["heads"]]
                for _, key, _ in terms:
                    dims = {d.name: d for d in graph[node.inputs[key]].type.dims}
                    keys += volume({**dims, **{d.name: d for d in heads}}.values(), at) * scale
            rest = {
                "keys": keys,
                "scores": scores * scale,
                "values": values * scale,
                "flops": (scores + values) * scale,
            }
        elif node.op == "scan":
            kind = "scan"
            flops = sum(
                spec.total_flops(self.program, run.body, {**at, "time": 1}) * run.times.at(at)
                for run in spec.runs(node, graph)
            )
            rest = {"flops": flops * load.sequences}
        elif node.op == "gather" and inputs[0].param is not None:
            inputs = [Operand(elements, inputs[0].dtype, None, inputs[0].param), *inputs[1:]]
        op = self.add(kind, node, place, inputs, elements, body=graph.name, **rest)
        return Operand(elements, node.type.dtype, op.id)


def _scaled(load: Load, factor: float) -> Load:
    return Load(load.sequences * factor, load.time, load.history, load.wanted, load.decode)
