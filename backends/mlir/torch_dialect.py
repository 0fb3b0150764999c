"""The same operations over named axes in torch-mlir's torch dialect, all sizes known.

What is compiled is written by ``linalg.py``; this is for other compilers: torch-mlir lowers it to
StableHLO, TOSA and linalg. There are no loops here: layers follow one another, and all blocks of an
array run side by side along an axis of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from backends.mlir.linalg import FLOATS, Linalg
from backends.mlir.values import Axis, Code, Element, Number, Size, Value, union

_TYPES = {"f32": "f32", "bf16": "bf16", "i64": "si64", "i1": "i1"}
_CODES = {"f32": 6, "bf16": 15, "i64": 4, "i1": 11}
_BINARY = {
    "mul": "mul.Tensor", "div": "div.Tensor", "pow": "pow.Tensor_Tensor", "min": "minimum",
    "max": "maximum", "lt": "lt.Tensor", "le": "le.Tensor", "gt": "gt.Tensor", "ge": "ge.Tensor",
    "eq": "eq.Tensor", "ne": "ne.Tensor", "and": "logical_and", "or": "logical_or",
}  # fmt: skip
_UNARY = frozenset("neg exp log sqrt rsqrt sin cos tanh sigmoid abs floor ceil".split())


def torch_type(axes: Sequence[Axis], element: str) -> str:
    return f"!torch.vtensor<[{','.join(str(a.size) for a in axes)}],{_TYPES[element]}>"


def _type(value: Value) -> str:
    return torch_type(value.axes, value.element)


class Torch(Linalg):
    """Writes operations of the torch dialect; sizes are numbers."""

    loops = False

    def __init__(self, code: Code):
        super().__init__(code)
        self.head: dict[str, str] = {}  # constants, at the head of the function

    # -- what operations are given beside tensors --------------------------------------------------

    def whole(self, number: int) -> str:
        name = f"%int{number}" if number >= 0 else f"%intm{-number}"
        self.head.setdefault(name, f"torch.constant.int {number}")
        return name

    def word(self, text: str) -> str:
        kind = "none" if text == "none" else f"bool {text}"
        self.head.setdefault(f"%{text}", f"torch.constant.{kind}")
        return f"%{text}"

    def numbers(self, values: Sequence[Size]) -> str:
        names = [self.whole(int(n)) for n in values]
        types = ", ".join("!torch.int" for _ in names)
        return self.code.define(
            f"torch.prim.ListConstruct {', '.join(names)} : ({types}) -> !torch.list<int>"
        )

    def op(
        self,
        name: str,
        operands: Sequence[Value | tuple[str, str]],
        axes: Sequence[Axis],
        element: Element,
    ) -> Value:
        """``torch.aten.<name>`` of tensors and of (name, type) pairs."""
        pairs = [(v.name, _type(v)) if isinstance(v, Value) else v for v in operands]
        names, types = (", ".join(part) for part in zip(*pairs, strict=True))
        type = torch_type(axes, element)
        made = self.code.define(f"torch.aten.{name} {names} : {types} -> {type}")
        return Value(made, tuple(axes), element)

    def literal(self, numbers: Number | Sequence[int], axes: Sequence[Axis], to: Element) -> Value:
        shape = "".join(f"{a.size}x" for a in axes)
        if isinstance(numbers, Sequence):
            text = f"[{', '.join(map(str, numbers))}]"
        elif to == "i1":
            text = "true" if numbers else "false"
        elif to == "i64":
            text = str(int(numbers))
        elif math.isinf(numbers):
            bits = {"f32": ("0x7F800000", "0xFF800000"), "bf16": ("0x7F80", "0xFF80")}[to]
            text = bits[numbers < 0]
        else:
            text = f"{float(numbers):.17e}"
        type = torch_type(axes, to)
        made = self.code.define(
            f"torch.vtensor.literal(dense<{text}> : tensor<{shape}{_TYPES[to]}>) : {type}"
        )
        return Value(made, tuple(axes), to)

    # -- shapes ------------------------------------------------------------------------------------

    def view(self, value: Value, axes: Sequence[Axis]) -> Value:
        shape = (self.numbers([a.size for a in axes]), "!torch.list<int>")
        return self.op("view", [value, shape], axes, value.element)

    def permuted(self, value: Value, names: Sequence[str]) -> Value:
        if value.names == tuple(names):
            return value
        order = (self.numbers([value.names.index(n) for n in names]), "!torch.list<int>")
        return self.op("permute", [value, order], [value.axis(n) for n in names], value.element)

    def aligned(self, value: Value, axes: Sequence[Axis]) -> Value:
        """With an axis of size 1 for each that it lacks, in this order."""
        if value.number is not None:
            value = self.literal(value.number, (), value.element)
        value = self.permuted(value, [a.name for a in axes if a.name in value.names])
        wanted = [a if a.name in value.names else Axis(a.name, 1) for a in axes]
        return value if len(wanted) == len(value.axes) else self.view(value, wanted)

    def full(self, value: Value, axes: Sequence[Axis]) -> Value:
        if value.number is not None:
            return self.literal(value.number, axes, value.element)
        found = self.aligned(value, axes)
        if found.axes == tuple(axes):
            return found
        shape = (self.numbers([a.size for a in axes]), "!torch.list<int>")
        return self.op("broadcast_to", [found, shape], axes, value.element)

    def transpose(self, value: Value, names: Sequence[str]) -> Value:
        return self.permuted(value, names)

    def merge(self, value: Value, names: Sequence[str], into: str) -> Value:
        if len(names) == 1:
            return value.renamed({names[0]: into})
        first = value.names.index(names[0])
        before = [n for n in value.names[:first] if n not in names]
        after = [n for n in value.names[first:] if n not in names]
        value = self.permuted(value, [*before, *names, *after])
        size = math.prod(int(value.axis(n).size) for n in names)
        axes = [*(value.axis(n) for n in before), Axis(into, size)]
        return self.view(value, [*axes, *(value.axis(n) for n in after)])

    def split(self, value: Value, name: str, into: Sequence[Axis]) -> Value:
        at = value.names.index(name)
        return self.view(value, [*value.axes[:at], *into, *value.axes[at + 1 :]])

    def slice(
        self, value: Value, ranges: dict[str, tuple[Size, Size]], drop: bool = False
    ) -> Value:
        for name, (start, size) in ranges.items():
            at = value.names.index(name)
            axes = [Axis(name, size) if a.name == name else a for a in value.axes]
            ends = (at, int(start), int(start) + int(size), 1)
            bounds = [(self.whole(n), "!torch.int") for n in ends]
            value = self.op("slice.Tensor", [value, *bounds], axes, value.element)
        left = [a for a in value.axes if not (drop and a.name in ranges)]
        return value if len(left) == len(value.axes) else self.view(value, left)

    def concat(self, values: Sequence[Value], along: str) -> Value:
        first = values[0]
        size = sum(int(v.axis(along).size) for v in values)
        axes = [Axis(along, size) if a.name == along else a for a in first.axes]
        names, types = ", ".join(v.name for v in values), ", ".join(map(_type, values))
        made = self.code.define(
            f"torch.prim.ListConstruct {names} : ({types}) -> !torch.list<vtensor>"
        )
        at = (self.whole(first.names.index(along)), "!torch.int")
        return self.op("cat", [(made, "!torch.list<vtensor>"), at], axes, first.element)

    # -- arithmetic --------------------------------------------------------------------------------

    def cast(self, value: Value, element: Element) -> Value:
        if value.element == element:
            return value
        if value.number is not None:
            return Value("", (), element, value.number)
        false, none = (self.word("false"), "!torch.bool"), (self.word("none"), "!torch.none")
        code = (self.whole(_CODES[element]), "!torch.int")
        return self.op("to.dtype", [value, code, false, false, none], value.axes, element)

    def map(self, fn: str, inputs: Sequence[Value], element: Element) -> Value:
        kinds = {v.element for v in inputs}
        meet: Element = "f32" if element == "bf16" and fn not in ("where", "copy") else element
        if element == "i1":
            meet = "f32" if kinds & FLOATS else "i64" if "i64" in kinds else "i1"
        out = union(inputs)
        if fn == "where":
            sides = [self.aligned(self.cast(v, meet), out) for v in inputs[1:]]
            test = self.aligned(inputs[0], out)
            return self.op("where.self", [test, *sides], out, element)
        values = [self.aligned(self.cast(v, meet), out) for v in inputs]
        given: list[Value | tuple[str, str]] = list(values)
        if fn == "silu":
            gate = self.op("sigmoid", given, out, meet)
            found = self.op("mul.Tensor", [*given, gate], out, meet)
        elif fn in ("add", "sub"):
            one = (self.whole(1), "!torch.int")
            found = self.op(f"{fn}.Tensor", [*given, one], out, meet)
        elif fn == "not":
            found = self.op("logical_not", given, out, "i1")
        elif fn in _UNARY:
            found = self.op(fn, given, out, meet)
        else:
            found = self.op(_BINARY[fn], given, out, "i1" if element == "i1" else meet)
        return found if element == "i1" else self.cast(found, element)

    def contract(self, a: Value, b: Value, out: Sequence[Axis], element: Element) -> Value:
        kept = {axis.name for axis in out}
        for name in [n for n in a.names if n not in kept and n not in b.names]:
            a = self.reduce("sum", a, [name], "f32")
        for name in [n for n in b.names if n not in kept and n not in a.names]:
            b = self.reduce("sum", b, [name], "f32")
        both = [n for n in a.names if n in b.names and n in kept]
        over = [n for n in a.names if n in b.names and n not in kept]
        rows = [n for n in a.names if n not in b.names]
        columns = [n for n in b.names if n not in a.names]
        left = self._matrices(a, [both, rows, over])
        right = self._matrices(b, [both, over, columns])
        axes = [left.axes[0], left.axes[1], right.axes[2]]
        found = self.op("bmm", [left, right], axes, "f32")
        sizes = {axis.name: axis for axis in union([a, b])}
        found = self.view(found, [sizes[n] for n in (*both, *rows, *columns)])
        return self.cast(self.permuted(found, [axis.name for axis in out]), element)

    def _matrices(self, value: Value, groups: Sequence[Sequence[str]]) -> Value:
        value = self.permuted(self.cast(value, "f32"), [n for group in groups for n in group])
        axes = [
            Axis(f"@{n}", math.prod(int(value.axis(name).size) for name in group))
            for n, group in enumerate(groups)
        ]
        return self.view(value, axes)

    def reduce(self, fn: str, value: Value, over: Sequence[str], element: Element) -> Value:
        wide: Element = "f32" if value.element in FLOATS else "i64"
        value = self.cast(value, wide)
        left = [a for a in value.axes if a.name not in over]
        dims = (self.numbers([value.names.index(n) for n in over]), "!torch.list<int>")
        false, none = (self.word("false"), "!torch.bool"), (self.word("none"), "!torch.none")
        if fn == "sum":
            found = self.op("sum.dim_IntList", [value, dims, false, none], left, wide)
        else:
            found = self.op(f"a{fn}", [value, dims, false], left, wide)
        return self.cast(found, element)

    def iota(self, axis: Axis) -> Value:
        return self.literal(range(int(axis.size)), [axis], "i64")

    def rank(self, value: Value, over: str) -> Value:
        other = value.renamed({over: f"{over}'"})
        axis = value.axis(over)
        more = self.map("gt", [other, value], "i1")
        same = self.map("eq", [other, value], "i1")
        front = self.map("lt", [self.iota(Axis(f"{over}'", axis.size)), self.iota(axis)], "i1")
        before = self.map("or", [more, self.map("and", [same, front], "i1")], "i1")
        return self.reduce("sum", self.cast(before, "i64"), [f"{over}'"], "i64")

    def gather(self, table: Value, name: str, index: Value) -> Value:
        shared = [a for a in index.axes if a.name in table.names]
        own = [a for a in index.axes if a.name not in table.names]
        rest = [a for a in table.axes if a.name != name and a not in shared]
        count = Axis("@picked", math.prod(int(a.size) for a in own))
        # Shared axes in front, then the chosen ones, then the rest.
        order = [*(a.name for a in shared), name, *(a.name for a in rest)]
        table = self.permuted(table, order)
        index = self.permuted(index, [a.name for a in (*shared, *own)])
        index = self.view(index, [*shared, count])
        at = (self.whole(len(shared)), "!torch.int")
        axes = [*shared, count, *rest]
        if shared:
            spread, false = self.full(index, axes), (self.word("false"), "!torch.bool")
            found = self.op("gather", [table, at, spread, false], axes, table.element)
        else:
            found = self.op("index_select", [table, at, index], axes, table.element)
        return self.view(found, [*shared, *own, *rest])
