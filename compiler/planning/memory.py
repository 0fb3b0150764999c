"""Bytes that a rank holds: parameters, what belongs to them, what the backward pass keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from compiler.ir import Program
from compiler.planning.formats import Precision
from compiler.planning.kernels import rule_of
from compiler.planning.ops import Op, Operand, Param, Piece
from compiler.planning.sharding import Sharding
from compiler.tensors import Pattern, patterns, places
from dsl.deploy.typed import Target

# Their gradient is that of the result, whatever the operands were.
LINEAR = frozenset({"add", "sub", "neg"})


@dataclass(frozen=True)
class Held:
    """A parameter on one rank: ``elements`` of it, whole on ``copies`` ranks that could share what
    the optimizer keeps; ``bytes`` is the width its weights are stored in."""

    path: str
    layer: int | None
    elements: float
    bytes: float
    axes: tuple[str, ...]  # mesh axes that it is whole on
    copies: int
    kept_as: str  # its format's name


class Parameters:
    """The parameters of a program under a deployment."""

    def __init__(self, source: Program, sharding: Sharding, precision: Precision):
        self.source = source
        self.sharding = sharding
        self.precision = precision
        self.places = {p.key: p for p in places(source)}
        self.patterns = {(p.path, p.ranges): p for p in patterns(source) if p.role == "param"}

    def held(self, params: Iterable[Param], layers: range) -> list[Held]:
        """What a rank holds of the parameters that a piece reads, once for each of its layers."""
        out: list[Held] = []
        for param in dict.fromkeys(params):
            pattern = self.patterns.get(param[:2])
            if pattern is None:
                continue
            path = param.path
            one = self._one(param, pattern, bool(layers))
            numbers: Sequence[int | None] = list(layers) if layers else [None]
            own = [n for n in numbers if n is None or n in pattern.ranges[0]]
            out += [Held(path, number, *one) for number in own]
        return out

    def _one(
        self, param: Param, pattern: Pattern, in_layer: bool
    ) -> tuple[float, float, tuple[str, ...], int, str]:
        sharding, precision = self.sharding, self.precision
        place = self.places[param.path.rpartition(".")[0], param.ranges]
        (parameter,) = [p for p in place.module.parameters if p.name == param.name]
        divided = sharding.axes(place, parameter.type.dims, self.source)
        elements = prod(pattern.shape) / sharding.deployment.mesh.ways(divided)
        axes: set[str] = set(divided)
        path, ranges = place.path, list(place.ranges)
        while path:
            path, _, child = path.rpartition(".")
            if not child.endswith("]"):
                continue
            numbers = ranges.pop()
            if ranges or not in_layer:  # an array of blocks; the outermost loop has its own count
                outer = self.places[path, tuple(ranges)]
                placed = sharding.array(outer, child.partition("[")[0], len(numbers))
                elements *= placed.each
                axes |= set(placed.axes)
        whole = sharding.whole_over(axes)
        copies = sharding.deployment.mesh.ways(whole)
        role = precision.of(param.path, param.ranges).weights
        kept_as = role.format.name if role.format is not None else "own"
        return elements, role.bytes, whole, copies, kept_as


def read(piece: Piece) -> list[Param]:
    """The parameters that a piece reads."""
    return [o.param for op in piece.ops for o in op.inputs if o.param is not None]


# -- what the backward pass keeps ------------------------------------------------------------------


def is_recomputed(op: Op, targets: Sequence[Target]) -> bool:
    """Do these targets of ``recompute`` name what an op computes?"""
    for target in targets:
        if target.kind == "block" and op.block == target.name:
            return True
        if target.kind == "value" and (op.block, op.label) == (target.block, target.name):
            return True
        if target.kind in ("use", "array") and op.path:
            parts = [part.partition("[")[0] for part in op.path.split(".")]
            if target.name in parts:
                return True
    return False


@dataclass
class _Need:
    """How a value is wanted again: as it is, by quantised products, or to compute others anew."""

    elements: float = 0.0
    own: float = 0.0
    plain: bool = False
    anew: bool = False
    quantised: set[float] = field(default_factory=set)


@dataclass(frozen=True)
class Kept:
    """What one layer keeps of a micro-batch: ``bytes``, the ops that run again backward, and the
    values that are kept in another form than they are read in."""

    bytes: float
    again: frozenset[int]
    quantised: Mapping[int, tuple[float, float]]  # by op: elements and bytes of each


def kept(piece: Piece, targets: Sequence[Target], precision: Precision) -> Kept:
    """What one layer keeps of a micro-batch for its backward pass.

    Kept are: of a product its operand, in the product's format; of an attention what it read and
    its result; of pointwise ops their operands, of sums nothing. Values that the source gives no
    name to are never kept, but what they are computed from: they are fused. What is computed again
    is not kept but what it is computed from; where that was made by a quantised product, in that
    product's format (arXiv:2412.19437, section 3.3.3). Gates multiply before the last product of an
    expert, so that no expert's result is kept.
    """
    ops = {op.id: op for op in piece.ops}
    again = {op.id for op in piece.ops if is_recomputed(op, targets)}
    needs: dict[int, _Need] = {}

    def want(operand: Operand, how: str, width: float = 0.0) -> None:
        if operand.value is None or operand.param is not None or not operand.elements:
            return
        maker = ops.get(operand.value)
        if maker is not None and maker.kind == "light" and not _is_kept(maker):
            if maker.id not in again:
                again.add(maker.id)
                for inner in maker.inputs:
                    want(inner, "anew")
            return
        found = needs.setdefault(operand.value, _Need())
        found.elements = max(found.elements, operand.elements)
        found.own = max(found.own, precision.value(operand.dtype))
        found.plain |= how == "plain"
        found.anew |= how == "anew"
        found.quantised |= {width} if how == "quantised" else set()

    for op in piece.ops:
        for operand in op.inputs:
            if op.id in again and op.kind != "product":
                want(operand, "anew")
            elif op.kind == "product":
                role = _role(op, precision)
                want(operand, "plain" if role is None else "quantised", role or 0.0)
            elif op.kind in ("attention", "mixing", "scan") or _keeps_operands(op):
                want(operand, "plain")
        if op.kind == "attention":
            want(Operand(op.elements, "act", op.id), "plain")
    total, forms = 0.0, dict[int, tuple[float, float]]()
    for value, wanted in needs.items():
        if value in again:
            continue
        maker = ops.get(value)
        made = _role(maker, precision) if maker is not None else None
        each = wanted.own
        if not wanted.plain and wanted.anew and maker is not None and made is not None:
            each = made
            forms[value] = (maker.elements, each)
        elif not wanted.plain and not wanted.anew:
            each = max(wanted.quantised)
        total += (wanted.elements if maker is None else maker.elements) * each
    return Kept(total, frozenset(again), forms)


def _is_kept(op: Op) -> bool:
    """Is it written to memory under a name, or moved between ranks? What has no name is fused."""
    return bool(op.label) or op.node.op in ("experts", "apply", "cache", "gather")


def _keeps_operands(op: Op) -> bool:
    if not _is_kept(op) or op.node.op in ("experts", "apply", "cache", "concat", "stack"):
        return False
    return op.node.op != "map" or op.node.attrs["fn"] not in LINEAR


def _role(op: Op, precision: Precision) -> float | None:
    """Bytes of a quantised product's operand."""
    if op.kind != "product":
        return None
    role = rule_of(op, precision).activations
    return role.bytes if role.format is not None else None


def by_format(held: Iterable[Held]) -> Mapping[str, float]:
    """Bytes of weights by the format they are stored in."""
    out: dict[str, float] = {}
    for one in held:
        out[one.kept_as] = out.get(one.kept_as, 0.0) + one.elements * one.bytes
    return out
