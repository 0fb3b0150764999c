"""Type rules: what type each op's result must have, given its operands.

A rule returns a ``Type`` whose dtype and *set* of dims the stored type must equal; their order is
free, because the source fixes it (``agrees``). Dims that an op introduces (``top``'s ``to``, a
``cache``'s history) have names in the attributes or the stored type, and the rule says which they
may be. ``compiler/spec.py`` points here, one rule per op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce as fold

from compiler import rules_coded
from compiler.ir import Child, Dim, DType, Graph, Module, Node, Parameter, Program, Type
from dsl.extents import Extent


class RuleError(Exception):
    """A node breaks its op's type rule; the message says what was expected and found."""


@dataclass(frozen=True)
class Scope:
    """Where a body runs: the program, and the module whose parameters and children it names."""

    program: Program
    module: str

    def parameter(self, name: str) -> Parameter:
        """A parameter of the module, or of a child: ``mlp.W_gate``."""
        path, _, name = name.rpartition(".")
        if path:
            return self.inside(path).parameter(name)
        for parameter in self.program.modules[self.module].parameters:
            if parameter.name == name:
                return parameter
        raise RuleError(f"module {self.module} has no parameter '{name}'")

    def body(self, name: str) -> Graph:
        if name not in self.program.bodies:
            raise RuleError(f"there is no body '{name}'")
        return self.program.bodies[name]

    def pieces(self, child: str) -> list[Child]:
        """The children of one name; arrays in pieces (dense layers, sparse layers) have several."""
        module: Module = self.program.modules[self.module]
        found = [c for c in module.children if c.name == child]
        if not found:
            raise RuleError(f"module {self.module} has no child '{child}'")
        return found

    def child(self, name: str, over: Dim | None = None) -> Child | None:
        """The child a node runs: none for "" (the module itself), the piece of an array that
        ``over`` numbers, or the one child of that name.

        Raises:
            RuleError: there is none, or it is (not) an array against expectation.
        """
        if not name:
            return None
        path, _, name = name.rpartition(".")
        if path:  # a child's child
            return self.inside(path).child(name, over)
        found: list[Child] = []
        for piece in self.pieces(name):
            array = piece.array
            if array is None or over is None:
                if array is over:
                    return piece
            elif (array.start, array.size) == (over.start, over.size):
                found.append(piece)
        if found:  # several only if they are empty: then it is the one of that name
            named = [c for c in found if c.array and over and c.array.name == over.name]
            return (named or found)[0]
        numbered = f"an array over {over.name}: {over.size}" if over else "a single module"
        raise RuleError(f"child '{name}' of {self.module} is not {numbered}")

    def inside(self, name: str, over: Dim | None = None) -> Scope:
        """The scope in which that child's bodies run."""
        child = self.child(name, over)
        return self if child is None else replace(self, module=child.module)


Rule = Callable[[Node, list[Node], Scope], Type]

_WIDTH: dict[DType, int] = {"coded": -1, "bool": 0, "i64": 1, "act": 2, "f32": 3}
_COMPARE = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"})
_WHOLE = frozenset({"add", "sub", "mul", "pow", "neg", "abs", "floor", "ceil", "min", "max"})


def agrees(stored: Type, ruled: Type) -> bool:
    """Whether a stored type is the one the rule asks for, but for the order of dims."""
    return (
        stored.dtype == ruled.dtype
        and set(stored.dims) == set(ruled.dims)
        and stored.of == ruled.of
        and stored.bundle == ruled.bundle
        and stored.coding == ruled.coding
    )


def join(operands: Iterable[Node]) -> DType:
    """The dtype of an arithmetic result: bool < i64 < act < f32.

    An index value met by an activation is exact only in f32. Constants are weak: they never widen,
    but a float constant lifts whole numbers to f32.
    """
    operands = list(operands)
    strong = {n.type.dtype for n in operands if n.op != "constant"}
    weak = {n.type.dtype for n in operands if n.op == "constant"}
    if not strong:
        return max(weak, key=_WIDTH.__getitem__)
    widest = max(strong, key=_WIDTH.__getitem__)
    if widest == "act" and "i64" in strong:
        return "f32"
    if _WIDTH[widest] < _WIDTH["act"]:
        if "act" in weak:
            return "f32"
        return max({widest, *weak}, key=_WIDTH.__getitem__)
    return widest


def union(types: Iterable[Type]) -> tuple[Dim, ...]:
    """All dims of the operands, each once.

    Raises:
        RuleError: two operands have different dims of one name.
    """
    found: dict[str, Dim] = {}
    for type in types:
        for dim in type.dims:
            if found.setdefault(dim.name, dim) != dim:
                raise RuleError(
                    f"dim {dim.name} is {describe(found[dim.name])} and {describe(dim)}"
                )
    return tuple(found.values())


def describe(dim: Dim) -> str:
    """A dim with its size, as messages show it."""
    kind = f" of kind {dim.kind}" if dim.kind != "plain" else ""
    start = f" from {dim.start}" if dim.start.terms else ""
    return f"{dim.name}: {dim.size}{start}{kind}"


def dim_of(type: Type, name: str) -> Dim:
    try:
        return type.dim(name)
    except KeyError:
        raise RuleError(f"the operand {type} has no dim '{name}'") from None


def need(condition: bool, message: str) -> None:
    if not condition:
        raise RuleError(message)


def without(type: Type, *names: str) -> tuple[Dim, ...]:
    for name in names:
        dim_of(type, name)
    return tuple(d for d in type.dims if d.name not in names)


def product(dims: Iterable[Dim]) -> Extent:
    return fold(lambda size, dim: size * dim.size, dims, Extent.of(1))


def total(dims: Iterable[Dim]) -> Extent:
    return fold(lambda size, dim: size + dim.size, dims, Extent.of(0))


# -- sources ---------------------------------------------------------------------------------------


def input(node: Node, operands: list[Node], scope: Scope) -> Type:
    need(node.type.of is None or node.type.dtype == "i64", "only i64 values index a dim")
    return node.type


def position(node: Node, operands: list[Node], scope: Scope) -> Type:
    kinds = [d.kind for d in node.type.dims]
    need(
        kinds in (["time"], ["history"]), f"positions run over one time or history dim, not {kinds}"
    )
    return Type("i64", node.type.dims)


def param(node: Node, operands: list[Node], scope: Scope) -> Type:
    parameter = scope.parameter(node.attrs["param"])
    need(parameter.role == node.op, f"'{parameter.name}' is a {parameter.role}, not a {node.op}")
    if node.type.dtype == "coded":
        return rules_coded.stored(parameter)
    return parameter.type


def constant(node: Node, operands: list[Node], scope: Scope) -> Type:
    value = node.attrs["value"]
    if isinstance(value, bool):
        return Type("bool", ())
    # A whole number may also stand for an activation's value: 0 and 0.0 are one constant there.
    whole = isinstance(value, int) and node.type.dtype != "act"
    return Type("i64" if whole else "act", ())


def iota(node: Node, operands: list[Node], scope: Scope) -> Type:
    (dim,) = node.type.dims if len(node.type.dims) == 1 else (None,)
    if dim is None:
        raise RuleError("an iota has one dim")
    return Type("i64", (dim,), of=dim)


# -- arithmetic ------------------------------------------------------------------------------------


def map(node: Node, operands: list[Node], scope: Scope) -> Type:
    fn = node.attrs["fn"]
    arity = 3 if fn == "where" else 1 if fn in UNARY else 2
    need(len(operands) == arity, f"{fn} takes {arity} operands, not {len(operands)}")
    dims = union(n.type for n in operands)
    if fn in _COMPARE:
        if fn in ("and", "or", "not"):
            need(all(n.type.dtype == "bool" for n in operands), f"{fn} is of bool values")
        return Type("bool", dims)
    if fn == "where":
        need(operands[0].type.dtype == "bool", "where chooses by a bool value")
        return Type(join(operands[1:]), dims)
    dtype = join(operands)
    if _WIDTH[dtype] < _WIDTH["act"]:
        dtype = "i64" if fn in _WHOLE else "f32"
    return Type(dtype, dims)


UNARY = frozenset("neg exp log sqrt rsqrt sin cos tanh sigmoid abs floor ceil not silu".split())
BINARY = frozenset("add sub mul div pow min max lt le gt ge eq ne and or".split())
FUNCTIONS = UNARY | BINARY | {"where"}


def contract(node: Node, operands: list[Node], scope: Scope) -> Type:
    dims = union(n.type for n in operands)
    names = {d.name for d in dims}
    missing = [name for name in node.attrs["over"] if name not in names]
    need(not missing, f"no operand has the summed dims {', '.join(missing)}")
    left = tuple(d for d in dims if d.name not in node.attrs["over"])
    return Type(join(operands), left)


def reduce(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    dtype, fn = operand.type.dtype, node.attrs["fn"]
    if _WIDTH[dtype] < _WIDTH["act"]:
        dtype = "f32" if fn == "mean" else "i64" if fn == "sum" else dtype
    return Type(dtype, without(operand.type, *node.attrs["over"]))


def softmax(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    dim_of(operand.type, node.attrs["over"])
    need(operand.type.dtype in ("act", "f32"), f"a softmax of {operand.type.dtype} values")
    return Type(operand.type.dtype, operand.type.dims)


# -- choosing --------------------------------------------------------------------------------------


def _chosen(node: Node, operand: Node) -> tuple[Dim, ...]:
    left = without(operand.type, node.attrs["over"])
    to = dim_of(node.type, node.attrs["to"])
    need(to.name not in operand.type.names, f"dim {to.name} is there already")
    return (*left, to)


def top(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    return Type(operand.type.dtype, _chosen(node, operand))


def argtop(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    return Type("i64", _chosen(node, operand), of=dim_of(operand.type, node.attrs["over"]))


def in_top(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    dim_of(operand.type, node.attrs["over"])
    return Type("bool", operand.type.dims)


def gather(node: Node, operands: list[Node], scope: Scope) -> Type:
    table, index = operands
    dim = dim_of(table.type, node.attrs["dim"])
    need(index.type.dtype == "i64", f"an index is i64, not {index.type.dtype}")
    of = index.type.of
    need(of is not None, f"the index is not typed: it may not index {dim.name}")
    assert of is not None
    need(of.size == dim.size, f"an index of {describe(of)} may not index {describe(dim)}")
    left = Type(table.type.dtype, without(table.type, dim.name))
    need(dim.name not in index.type.names, f"the index has the dim {dim.name} itself")
    return Type(table.type.dtype, union([left, index.type]), of=table.type.of)


# -- views -----------------------------------------------------------------------------------------


def _viewed(operand: Node, *dims: Dim) -> Type:
    """The operand's element type with other dims: an index stays one of what it was."""
    names = [d.name for d in dims]
    twice = sorted({n for n in names if names.count(n) > 1})
    need(not twice, f"dims {', '.join(twice)} occur twice in the result")
    return Type(operand.type.dtype, dims, of=operand.type.of)


def flatten(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    joined = [dim_of(operand.type, name) for name in node.attrs["dims"]]
    into: Dim = node.attrs["into"]
    size = product(joined)
    need(size == into.size, f"{size} elements do not make {describe(into)}")
    return _viewed(operand, *without(operand.type, *node.attrs["dims"]), into)


def unflatten(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    dim, into = dim_of(operand.type, node.attrs["dim"]), node.attrs["into"]
    size = product(into)
    need(size == dim.size, f"{describe(dim)} does not fall into {size} elements")
    return _viewed(operand, *without(operand.type, dim.name), *into)


def part(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    dim = dim_of(operand.type, node.attrs["dim"])
    chosen = [p for p in dim.parts if p.name == node.attrs["part"]]
    need(
        dim.form == "sum" and len(chosen) == 1,
        f"{describe(dim)} is not a sum with one part '{node.attrs['part']}'",
    )
    return _viewed(operand, *without(operand.type, dim.name), *chosen)


def select(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    dim, at = dim_of(operand.type, node.attrs["dim"]), node.attrs["at"]
    size = dim.size.constant
    need(at >= 0 and (size is None or at < size), f"{describe(dim)} has no position {at}")
    return _viewed(operand, *without(operand.type, dim.name))


def rename(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    dim, to = dim_of(operand.type, node.attrs["dim"]), node.attrs["to"]
    need(dim.size == to.size, f"{describe(dim)} cannot be called {describe(to)}")
    return _viewed(operand, *without(operand.type, dim.name), to)


def expand(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    return _viewed(operand, *operand.type.dims, *node.attrs["dims"])


def concat(node: Node, operands: list[Node], scope: Scope) -> Type:
    dim: Dim = node.attrs["dim"]
    need(
        dim.form == "sum" and len(dim.parts) == len(operands),
        f"{describe(dim)} is not a sum of {len(operands)} parts",
    )
    rests = []
    for operand, part in zip(operands, dim.parts, strict=True):
        own = dim_of(operand.type, part.name)
        need(own == part, f"{describe(own)} is not the part {describe(part)}")
        rests.append(without(operand.type, part.name))
    return Type(join(operands), (*_same(rests), dim))


def stack(node: Node, operands: list[Node], scope: Scope) -> Type:
    dim: Dim = node.attrs["dim"]
    need(
        dim.size.constant == len(operands),
        f"{len(operands)} values do not make {describe(dim)}",
    )
    return Type(join(operands), (*_same([n.type.dims for n in operands]), dim))


def _same(rests: list[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    for rest in rests[1:]:
        need(
            set(rest) == set(rests[0]),
            f"operands have different dims: ({', '.join(d.name for d in rests[0])}) and "
            f"({', '.join(d.name for d in rest)})",
        )
    return rests[0]


def cast(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    of = operand.type.of if node.type.dtype == "i64" else None
    return Type(node.type.dtype, operand.type.dims, of=of)


def select_rows(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    time = _one_of_kind(operand.type, "time")
    rows = _one_of_kind(node.type, "rows")
    return _viewed(operand, *without(operand.type, time.name), rows)


def _one_of_kind(type: Type, kind: str) -> Dim:
    found = [d for d in type.dims if d.kind == kind]
    need(len(found) == 1, f"{type} has {len(found)} dims of kind {kind}, not one")
    return found[0]


def shift(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    history = dim_of(operand.type, node.attrs["history"])
    need(history.kind == "history", f"{describe(history)} is no history")
    need(node.attrs["sign"] in (1, -1), f"an index counts forth or back, not {node.attrs['sign']}")
    new = [_one_of_kind(node.type, "time")]
    need(not any(d.kind == "time" for d in operand.type.dims), "the operand has time itself")
    if node.attrs.get("index"):
        new.append(dim_of(node.type, node.attrs["index"]))
    return _viewed(operand, *without(operand.type, history.name), *new)


def cache(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    time = _one_of_kind(operand.type, "time")
    history = _one_of_kind(node.type, "history")
    return _viewed(operand, *without(operand.type, time.name), history)
