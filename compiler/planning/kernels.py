"""The kernels that a piece of a program runs, and what each reads, writes and multiplies.

Ops become kernels as good implementations run them, and no better:

- contractions of one value with parameters of one format are one matrix product (gate and up; the
  two down-projections of a latent attention);
- connected ops that are bound by memory, without a matrix product between them, are one kernel,
  which reads what comes from outside and writes what others read (a residual sum and the norm after
  it; a gated unit's product; a router);
- a value that a quantised product reads is written quantised by the kernel that makes it, or by a
  kernel of its own where a deployment says ``casts = separate``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import networkx as nx

from compiler.planning.formats import Precision, Product
from compiler.planning.ops import Op, Operand, Piece
from dsl.formats import NumberFormat

Kind = Literal[
    "gemm",
    "grouped_gemm",
    "attention",
    "decode_attention",
    "memory",
    "dispatch",
    "combine",
    "all_reduce",
    "quantise",
]
COMMUNICATION = frozenset({"dispatch", "combine", "all_reduce"})


@dataclass(frozen=True)
class Gradient:
    """What the backward graph computes for a kernel, on one rank.

    Attributes:
        inputs, weight: FLOPs of the part for its operands and of that for its parameters.
        inside: FLOPs that the part for its operands computes once more, on the chip: scores.
        again: how often it runs forward once more, a share if some of its products do.
        reached: whether anything that it computes has an adjoint.
    """

    inputs: float = 0.0
    weight: float = 0.0
    inside: float = 0.0
    again: float = 0.0
    reached: bool = True


@dataclass
class Kernel:
    """One kernel, or one collective, of one rank.

    Attributes:
        needs: positions of kernels of the same piece that come before.
        flops: of products; attention's in ``scores`` and ``values`` apart.
        read, weights, written: bytes of values, of parameters, of results.
        parameters: numbers in the parameters that are multiplied, on this rank; ``results`` in what
            a product gives, ``own`` bytes each unless quantised.
        separate: its operands are quantised by kernels of their own. ``kept``: it only copies what
            the backward pass reads.
        makes: (block, value, path) that the source calls what it computes.
        reads: of each value read, its id, elements, and the bytes of one; negative ids come from
            outside of the piece.
        made: ids of values that it writes. ``with_values``: what it only arranges anew, and is
            computed again with.
        ops: what it computes, the first of them as ``op``; ``gradient``: what its backward graph
            computes, where one trains.
        sent_back: its result goes to combine, so that its gradient arrives as dispatch sends it.
        axes: mesh axes that a collective runs over. ``row`` numbers are sent for each token.
    """

    name: str
    kind: Kind
    needs: set[int] = field(default_factory=set)
    product: Product | None = None
    format: NumberFormat | None = None
    wide: bool = False
    flops: float = 0.0
    scores: float = 0.0
    values: float = 0.0
    read: float = 0.0
    weights: float = 0.0
    written: float = 0.0
    parameters: float = 0.0
    results: float = 0.0
    own: float = 2.0
    separate: bool = False
    kept: bool = False
    makes: list[tuple[str, str, str]] = field(default_factory=list)
    reads: dict[int, tuple[float, float]] = field(default_factory=dict)
    made: list[int] = field(default_factory=list)
    with_values: set[int] = field(default_factory=set)
    sent_back: bool = False
    axes: tuple[str, ...] = ()
    row: float = 0.0
    op: Op | None = None
    ops: tuple[Op, ...] = ()
    gradient: Gradient | None = None

    @property
    def bytes(self) -> float:
        return self.read + self.weights + self.written


def kernels(piece: Piece, precision: Precision, decode: bool, casts: str) -> list[Kernel]:
    """The kernels of a piece, each after those that it needs."""
    return _Grouping(piece, precision, decode, casts).kernels()


def losses(own: Sequence[Kernel], results: Collection[int], precision: Precision) -> list[Kernel]:
    """A cross-entropy over each result of a training entry: it reads the logits once; backward it
    reads them again and writes their gradient."""
    out = []
    for number, kernel in enumerate(own):
        for made in set(kernel.made) & set(results):
            elements = kernel.written / precision.own
            loss = Kernel("loss", "memory", {number}, op=kernel.op)
            loss.read = elements * precision.own
            loss.reads = {made: (elements, precision.own)}
            out.append(loss)
    return out


def kept_forms(
    own: Sequence[Kernel],
    values: Mapping[int, tuple[float, float]],
    width: float,
    casts: str,
) -> list[Kernel]:
    """What is kept for the backward pass in another form than it is read in is written so by the
    kernel that makes it, or by one of its own.

    Args:
        values: by op, its elements and the bytes of each as kept; ``width``: as they are read.
    """
    out = []
    for number, kernel in enumerate(own):
        for made in kernel.made:
            if made not in values:
                continue
            elements, bytes = values[made]
            if casts == "separate":
                copy = Kernel(f"keep {kernel.name}", "quantise", {number})
                copy.read, copy.written = elements * width, elements * bytes
                copy.kept = True
                out.append(copy)
            else:
                kernel.written += elements * bytes
    return out


class _Grouping:
    def __init__(self, piece: Piece, precision: Precision, decode: bool, casts: str):
        self.ops = {op.id: op for op in piece.ops}
        self.precision = precision
        self.decode = decode
        self.casts = casts
        self.sent = {op.id for op in piece.ops if op.kind == "dispatch"}
        self.carried = self.sent | {
            op.id for op in piece.ops if op.kind == "light" and self._behind(op) & self.sent
        }  # these arrive quantised
        self.forms = self._forms()
        self.out: list[Kernel] = []
        self.maker: dict[int, int] = {}  # op -> position of its kernel
        self.quantised: dict[tuple[int, float], int] = {}  # by kernels of their own

    def kernels(self) -> list[Kernel]:
        for group in self._groups():
            if group[0].kind == "light":
                self._memory(group)
            elif group[0].kind == "product":
                self._product(group)
            else:
                self._single(group[0])
        return self.out

    # -- grouping --------------------------------------------------------------------------------

    def _groups(self) -> list[list[Op]]:
        """Ops that are one kernel, in an order in which each comes after what it reads."""
        depth: dict[int, int] = {}
        for op in self.ops.values():
            behind = [depth[i] for i in self._behind(op)]
            depth[op.id] = max(behind, default=0) + (op.kind != "light")
        together: nx.Graph[int] = nx.Graph()
        products: dict[object, int] = {}
        for op in self.ops.values():
            together.add_node(op.id)
            if op.kind == "light":
                for other in self._behind(op):
                    if self.ops[other].kind == "light" and depth[other] == depth[op.id]:
                        together.add_edge(other, op.id)
            elif op.kind == "product" and not op.summed:
                value = next((o.value for o in op.inputs if o.param is None), None)
                key = (value, depth[op.id], self._rule(op), op.grouped, op.over)
                if value is not None:
                    together.add_edge(products.setdefault(key, op.id), op.id)
        groups = [[self.ops[i] for i in sorted(g)] for g in nx.connected_components(together)]
        return sorted(groups, key=lambda g: (depth[g[0].id], g[0].kind == "light", g[0].id))

    def _behind(self, op: Op) -> set[int]:
        return {o.value for o in op.inputs if o.value is not None and o.value in self.ops}

    def _rule(self, op: Op) -> Product:
        return rule_of(op, self.precision)

    def _forms(self) -> dict[int, set[float]]:
        """Of each value, the bytes of an element in each form that its readers want."""
        forms: dict[int, set[float]] = {}
        for op in self.ops.values():
            for operand in op.inputs:
                if operand.value is not None:
                    forms.setdefault(operand.value, set()).add(self._each(op, operand))
        return forms

    def _each(self, op: Op, operand: Operand) -> float:
        apart = self.casts == "separate" and operand.value not in self.carried
        wanted = 0.0 if apart else self._wanted(op, operand)
        return wanted or self.precision.value(operand.dtype)

    def _wanted(self, op: Op, operand: Operand) -> float:
        """Bytes of an element as ``op`` wants it; 0 for as it is."""
        if op.kind == "product" and operand.param is None:
            role = self._rule(op).activations
            return role.bytes if role.format is not None else 0.0
        if op.kind == "dispatch" and operand is op.inputs[0]:
            role = self._block_rule(op).activations
            return role.bytes if role.format is not None else 0.0
        if operand.value in self.sent:
            role = self._block_rule(self.ops[operand.value]).activations
            return role.bytes if role.format is not None else 0.0
        return 0.0

    # -- what they cost --------------------------------------------------------------------------

    def _start(self, name: str, kind: Kind, group: Sequence[Op]) -> Kernel:
        kernel = Kernel(name, kind, op=group[0], ops=tuple(group))
        inside = {op.id for op in group}
        widest: dict[int, tuple[float, float]] = {}
        for op in group:
            kernel.makes.append((op.block, op.label, op.path))
            for operand in op.inputs:
                if operand.value is None or operand.value in inside or operand.elements == 0:
                    continue
                each = self._wanted(op, operand) or self.precision.value(operand.dtype)
                if operand.value in self.maker:
                    kernel.needs.add(self._source(operand, self._wanted(op, operand)))
                elements, width = widest.get(operand.value, (0.0, 0.0))
                widest[operand.value] = (max(elements, operand.elements), max(width, each))
        kernel.reads = widest
        kernel.read = sum(elements * each for elements, each in widest.values())
        return kernel

    def _source(self, operand: Operand, wanted: float) -> int:
        """The kernel to wait for; makes a kernel that quantises where casts are separate."""
        assert operand.value is not None
        maker = self.maker[operand.value]
        if self.casts != "separate" or not wanted or operand.value in self.carried:
            return maker
        key = (operand.value, wanted)
        if key not in self.quantised:
            own = self.precision.value(operand.dtype)
            elements = operand.elements
            kernel = Kernel(f"quantise {self.out[maker].name}", "quantise", {maker})
            kernel.read, kernel.written = elements * own, elements * wanted
            self.quantised[key] = self._add(kernel, [])
        return self.quantised[key]

    def _add(self, kernel: Kernel, group: Iterable[Op]) -> int:
        self.out.append(kernel)
        for op in group:
            self.maker[op.id] = len(self.out) - 1
            kernel.made.append(op.id)
        return len(self.out) - 1

    def _written(self, op: Op) -> float:
        """Bytes that a value is written as, in each form that its readers want."""
        if op.node.op == "cache":
            return op.inputs[0].elements * self.precision.cached
        own = min(self.precision.value(op.dtype), self.precision.own)  # what leaves the piece
        return op.elements * sum(self.forms.get(op.id, {own}))

    def _memory(self, group: Sequence[Op]) -> None:
        inside = {op.id for op in group}
        kernel = self._start(_named(group), "memory", group)
        last = [op for op in group if not self._read_only_in(op, inside)]
        kernel.written = sum(self._written(op) for op in last)
        kernel.weights = sum(
            {
                o.param: o.elements * self.precision.own
                for op in group
                for o in op.inputs
                if o.param
            }.values()
        )
        kernel.flops = sum(op.flops for op in group)
        self._add(kernel, group)

    def _read_only_in(self, op: Op, inside: set[int]) -> bool:
        readers = [o.id for o in self.ops.values() if op.id in [i.value for i in o.inputs]]
        return bool(readers) and set(readers) <= inside and op.node.op != "cache"

    def _product(self, group: Sequence[Op]) -> None:
        rule = self._rule(group[0])
        kind: Kind = "grouped_gemm" if group[0].grouped else "gemm"
        kernel = self._start(_named(group), kind, group)
        kernel.product, kernel.format = rule, rule.format
        kernel.own = self.precision.own
        kernel.separate = self.casts == "separate"
        kernel.wide = all(op.wide for op in group) and rule.format is None
        for op in group:
            kernel.flops += op.flops
            kernel.results += op.elements
            kernel.written += self._written(op)
            for operand in op.inputs:
                if operand.param is not None and not operand.state:
                    kernel.parameters += operand.elements
                    kernel.weights += operand.elements * rule.weights.bytes
        kernel.sent_back = any(self._is_sent_back(op) for op in group)
        position = self._add(kernel, group)
        for op in group:
            if op.summed:
                elements = op.elements
                reduce = Kernel(
                    f"all-reduce {op.label or op.path}", "all_reduce", {position}, op=op
                )
                reduce.axes, reduce.read = op.summed, elements * self.precision.value(op.dtype)
                self.maker[op.id] = self._add(reduce, [])

    def _is_sent_back(self, op: Op) -> bool:
        """Does nothing but a gate and a sum stand between it and a combine?"""
        if not op.grouped:
            return False
        sums = {o.id for o in self.ops.values() if o.kind == "light" and op.id in self._behind(o)}
        return any(o.kind == "combine" and self._behind(o) & sums for o in self.ops.values())

    def _single(self, op: Op) -> None:
        match op.kind:
            case "attention":
                kernel = self._start(
                    _named([op]), "decode_attention" if self.decode else "attention", [op]
                )
                kernel.flops, kernel.scores, kernel.values = op.flops, op.scores, op.values
                kernel.written = self._written(op)
                if op.keys and not self.decode:
                    kernel.needs.add(self._side_by_side(op))
            case "dispatch" | "combine":
                kernel = self._start(f"{op.kind} {op.path}", op.kind, [op])
                kernel.product = self._block_rule(op)
            case "mixing":
                kernel = self._start(_named([op]), "gemm", [op])
                kernel.flops, kernel.wide = op.flops, op.wide
                kernel.written = self._written(op)
            case _:  # a scan: bound by memory, or by its products
                kernel = self._start(_named([op]), "memory", [op])
                kernel.flops, kernel.written = op.flops, self._written(op)
        self._add(kernel, [op])

    def _side_by_side(self, op: Op) -> int:
        """The keys of all products that an attention's scores are summed of, in one matrix: kernels
        take one product. (Decoding kernels take the cached rows as they are.)"""
        keys = [op.inputs[term[1]] for term in op.node.attrs["terms"]]
        kernel = Kernel(f"{_named([op])} keys", "memory", op=op)
        for operand in keys:
            if operand.value is not None:
                kernel.read += operand.elements * self.precision.value(operand.dtype)
                kernel.with_values.add(operand.value)
                if operand.value in self.maker:
                    kernel.needs.add(self.maker[operand.value])
        kernel.written = op.keys * self.precision.own
        return self._add(kernel, [])

    def _block_rule(self, op: Op) -> Product:
        """The formats of the first products in the blocks that tokens are sent to."""
        for other in self.ops.values():
            if other.kind == "product" and other.grouped and other.path.startswith(op.path):
                return self._rule(other)
        return self.precision.plain


def rule_of(op: Op, precision: Precision) -> Product:
    """The formats of a product."""
    for operand in op.inputs:
        if operand.param is not None and not operand.state:
            return precision.of(operand.param.path, operand.param.ranges)
    return precision.plain


def _named(group: Sequence[Op]) -> str:
    place = group[0].path.rpartition(".")[2] or group[0].block
    labels = [op.label for op in group if op.label]
    if group[0].kind == "product":
        labels = [o.param.name for op in group for o in op.inputs if o.param is not None]
    return f"{place}: {' + '.join(dict.fromkeys(labels))}" if labels else place
