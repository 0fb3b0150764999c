"""Tensor operations over named axes, as linalg, tensor and arith operations.

Nearly everything is one ``linalg.generic`` whose indexing maps follow from the names of axes;
IREE fuses them. Values of the activation dtype are widened to f32 before anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from backends.mlir.joining import joined
from backends.mlir.values import Axis, Code, Element, Number, Size, Value, tensor_type, union

FLOATS = frozenset({"f32", "bf16", "f8E4M3FN", "f8E5M2"})

_FLOAT = {
    "add": "arith.addf", "sub": "arith.subf", "mul": "arith.mulf", "div": "arith.divf",
    "pow": "math.powf", "min": "arith.minimumf", "max": "arith.maximumf", "neg": "arith.negf",
    "exp": "math.exp", "log": "math.log", "sqrt": "math.sqrt", "rsqrt": "math.rsqrt",
    "sin": "math.sin", "cos": "math.cos", "tanh": "math.tanh", "abs": "math.absf",
    "floor": "math.floor", "ceil": "math.ceil", "round": "math.roundeven",
}  # fmt: skip
_WHOLE = {
    "add": "arith.addi", "sub": "arith.subi", "mul": "arith.muli", "min": "arith.minsi",
    "max": "arith.maxsi", "abs": "math.absi", "pow": "math.ipowi", "rem": "arith.remsi",
    "floordiv": "arith.divsi",
}  # fmt: skip
_COMPARE = {
    "lt": ("olt", "slt"), "le": ("ole", "sle"), "gt": ("ogt", "sgt"), "ge": ("oge", "sge"),
    "eq": ("oeq", "eq"), "ne": ("une", "ne"),
}  # fmt: skip

_NAN = {"f32": "0x7FC00000", "bf16": "0x7FC0"}
_NEUTRAL: dict[str, Number] = {"sum": 0, "max": -math.inf, "min": math.inf}
_STEP = {"sum": "add", "max": "max", "min": "min"}


def literal(number: Number, element: str) -> str:
    """A number as an attribute of that type."""
    if element in FLOATS:
        value = float(number)
        if math.isinf(value):
            bits = {"f32": ("0x7F800000", "0xFF800000"), "bf16": ("0x7F80", "0xFF80")}[element]
            return f"{bits[value < 0]} : {element}"
        if math.isnan(value):
            return f"{_NAN[element]} : {element}"
        return f"{value:.17e} : {element}"
    if element == "i1":
        return "true" if number else "false"
    if isinstance(number, float) and math.isinf(number):
        number = (1 << 63) - 1 if number > 0 else -(1 << 63)
    return f"{int(number)} : {element}"


class Linalg:
    """Writes operations into ``code``."""

    loops = True  # whether layers and blocks of arrays may be loops

    def __init__(self, code: Code):
        self.code = code

    def stored(self, key: str, value: Value) -> Value:
        """A stacked weight; ``value`` has its axes and element."""
        name = self.code.define(f'util.global.load immutable @"{key}" : {value.type}')
        return Value(name, value.axes, value.element)

    # -- scalars, inside a region ------------------------------------------------------------------

    def scalar(self, name: str, element: str, to: str) -> str:
        """A scalar in another type."""
        if element == to:
            return name
        code = self.code
        if element == "i1":
            if to == "i64":
                return code.define(f"arith.extui {name} : i1 to i64")
            return code.define(f"arith.uitofp {name} : i1 to {to}")
        if element == "i8":
            return code.define(f"arith.sitofp {name} : i8 to {to}")
        if element == "i64":
            if to == "i1":
                zero = code.define("arith.constant 0 : i64")
                return code.define(f"arith.cmpi ne, {name}, {zero} : i64")
            return code.define(f"arith.sitofp {name} : i64 to {to}")
        if to in FLOATS:
            op = "extf" if to == "f32" else "truncf"
            return code.define(f"arith.{op} {name} : {element} to {to}")
        return code.define(f"arith.fptosi {name} : {element} to {to}")

    def compute(self, fn: str, args: Sequence[str], element: str) -> str:
        """One scalar function of arguments of one type."""
        code = self.code
        if fn in _COMPARE:
            ordered, signed = _COMPARE[fn]
            op = f"arith.cmpf {ordered}" if element in FLOATS else f"arith.cmpi {signed}"
            return code.define(f"{op}, {args[0]}, {args[1]} : {element}")
        if fn in ("and", "or"):
            return code.define(f"arith.{fn}i {args[0]}, {args[1]} : i1")
        if fn == "not":
            true = code.define("arith.constant true")
            return code.define(f"arith.xori {args[0]}, {true} : i1")
        if fn == "copy":
            return args[0]
        if fn == "neg" and element not in FLOATS:
            zero = code.define(f"arith.constant 0 : {element}")
            return code.define(f"arith.subi {zero}, {args[0]} : {element}")
        if fn in ("sigmoid", "silu"):
            one = code.define(f"arith.constant {literal(1, element)}")
            minus = code.define(f"arith.negf {args[0]} : {element}")
            grown = code.define(f"math.exp {minus} : {element}")
            below = code.define(f"arith.addf {grown}, {one} : {element}")
            over = one if fn == "sigmoid" else args[0]
            return code.define(f"arith.divf {over}, {below} : {element}")
        if fn == "power":  # the power of two that is no greater than a magnitude
            bits = code.define(f"arith.bitcast {args[0]} : f32 to i32")
            exponent = code.define("arith.constant 0x7F800000 : i32")
            kept = code.define(f"arith.andi {bits}, {exponent} : i32")
            return code.define(f"arith.bitcast {kept} : i32 to f32")
        table = _FLOAT if element in FLOATS else _WHOLE
        return code.define(f"{table[fn]} {', '.join(args)} : {element}")

    # -- elementwise, reductions, products ---------------------------------------------------------

    def generic(
        self,
        inputs: Sequence[Value],
        out: Sequence[Axis],
        element: Element,
        body: Callable[[list[str]], str],
        over: Sequence[Axis] = (),
        start: Number | None = None,
        attributes: str = "",
    ) -> Value:
        """One ``linalg.generic``.

        Args:
            out: the axes of the result; inputs may have any of them, and those of ``over``.
            body: from the inputs' scalars (and, with ``over``, what was summed so far) to the
                result's scalar.
            start: what a sum begins with.
            attributes: of the operation.
        """
        code = self.code
        loops = [*out, *over]
        letters = {axis.name: f"d{n}" for n, axis in enumerate(loops)}
        space = ", ".join(letters.values())
        tensors = [v for v in inputs if v.number is None]

        def indexing(names: Sequence[str]) -> str:
            return f"affine_map<({space}) -> ({', '.join(letters[n] for n in names)})>"

        maps = ", ".join([*(indexing(v.names) for v in tensors), indexing([a.name for a in out])])
        kinds = ", ".join(['"parallel"'] * len(out) + ['"reduction"'] * len(over))
        into = self.empty(out, element)
        if over:
            assert start is not None
            into = self.fill(into, start)
        result = Value(code.fresh(), tuple(out), element)
        given = ""
        if tensors:
            given = f"ins({', '.join(v.name for v in tensors)} : "
            given += f"{', '.join(v.type for v in tensors)}) "
        code.add(
            f"{result.name} = linalg.generic {{indexing_maps = [{maps}], "
            f"iterator_types = [{kinds}]}} {given}outs({into.name} : {into.type}) "
            f"{f'attrs = {{{attributes}}} ' if attributes else ''}{{"
        )
        blocks = {id(v): code.fresh() for v in tensors}
        carried = code.fresh()
        arguments = [f"{blocks[id(v)]}: {v.element}" for v in tensors]
        code.add(f"^bb0({', '.join([*arguments, f'{carried}: {element}'])}):")
        with code.nested():
            scalars = []
            for value in inputs:
                if value.number is None:
                    scalars.append(blocks[id(value)])
                else:
                    text = literal(value.number, value.element)
                    scalars.append(code.define(f"arith.constant {text}"))
            if over:
                scalars.append(carried)
            code.add(f"linalg.yield {body(scalars)} : {element}")
        code.add(f"}} -> {result.type}")
        return result

    def map(self, fn: str, inputs: Sequence[Value], element: Element) -> Value:
        """A function of each element. Operands meet in f32 if one of them is no whole number."""
        kinds = {v.element for v in inputs}
        meet: Element = "f32" if element == "bf16" and fn not in ("where", "copy") else element
        if element == "i1":
            meet = "f32" if kinds & FLOATS else "i64" if "i64" in kinds else "i1"
        # In the order of the widest operand: a mask in front must not turn scores around.
        widest = max(inputs, key=lambda value: len(value.axes))
        out = union([widest, *inputs])

        def body(scalars: list[str]) -> str:
            if fn == "where":
                test, *sides = scalars
                wide = [
                    self.scalar(s, v.element, meet) for s, v in zip(sides, inputs[1:], strict=True)
                ]
                chosen = self.code.define(f"arith.select {test}, {wide[0]}, {wide[1]} : {meet}")
                return self.scalar(chosen, meet, element)
            wide = [self.scalar(s, v.element, meet) for s, v in zip(scalars, inputs, strict=True)]
            found = self.compute(fn, wide, meet)
            return found if element == "i1" else self.scalar(found, meet, element)

        # One tensor twice: two inputs of the operation.
        return self.generic(_apart(inputs), out, element, body)

    def cast(self, value: Value, element: Element) -> Value:
        if value.element == element:
            return value
        if value.number is not None:
            return Value("", (), element, value.number)
        return self.map("copy", [value], element)

    def contract(self, a: Value, b: Value, out: Sequence[Axis], element: Element) -> Value:
        """A product summed over the axes that ``out`` lacks, in f32."""
        over = [axis for axis in union([a, b]) if axis.name not in {o.name for o in out}]
        a, b, out, over, undo = joined(self, a, b, out, over)

        def body(scalars: list[str]) -> str:
            left = self.scalar(scalars[0], a.element, "f32")
            right = self.scalar(scalars[1], b.element, "f32")
            product = self.compute("mul", [left, right], "f32")
            return self.compute("add", [scalars[2], product], "f32") if over else product

        result = self.generic(_apart([a, b]), out, "f32", body, over, 0.0 if over else None)
        for name, axes in undo:
            result = self.split(result, name, axes)
        return self.cast(result, element)

    def reduce(self, fn: str, value: Value, over: Sequence[str], element: Element) -> Value:
        gone = [value.axis(name) for name in over]
        out = [axis for axis in value.axes if axis.name not in over]
        wide: Element = "f32" if value.element in FLOATS else "i64"
        step = _STEP[fn]

        def body(scalars: list[str]) -> str:
            return self.compute(
                step, [scalars[1], self.scalar(scalars[0], value.element, wide)], wide
            )

        return self.cast(self.generic([value], out, wide, body, gone, _NEUTRAL[fn]), element)

    def iota(self, axis: Axis) -> Value:
        def body(scalars: list[str]) -> str:
            at = self.code.define("linalg.index 0 : index")
            return self.code.define(f"arith.index_cast {at} : index to i64")

        return self.generic([], [axis], "i64", body)

    def rank(self, value: Value, over: str) -> Value:
        """How many elements along an axis come before each: the larger, and of equal ones those in
        front of it."""
        other = value.renamed({over: f"{over}'"})
        out = list(value.axes)
        mine, theirs = value.names.index(over), len(out)

        def body(scalars: list[str]) -> str:
            code = self.code
            own, them, count = scalars
            own, them = (self.scalar(s, value.element, "f32") for s in (own, them))
            more = self.compute("gt", [them, own], "f32")
            same = self.compute("eq", [them, own], "f32")
            at = [code.define(f"linalg.index {n} : index") for n in (theirs, mine)]
            front = code.define(f"arith.cmpi ult, {at[0]}, {at[1]} : index")
            first = code.define(f"arith.andi {same}, {front} : i1")
            before = code.define(f"arith.ori {more}, {first} : i1")
            return self.compute("add", [count, self.scalar(before, "i1", "i64")], "i64")

        axis = Axis(f"{over}'", value.axis(over).size)
        return self.generic(_apart([value, other]), out, "i64", body, [axis], 0)

    def gather(self, table: Value, name: str, index: Value) -> Value:
        """Rows of a table by an index; an axis that both have is aligned."""
        rest = [a for a in table.axes if a.name != name and a.name not in index.names]
        out = [*index.axes, *rest]
        places = {axis.name: n for n, axis in enumerate(out)}

        def body(scalars: list[str]) -> str:
            code = self.code
            at = []
            for axis in table.axes:
                if axis.name == name:
                    at.append(code.define(f"arith.index_cast {scalars[0]} : i64 to index"))
                else:
                    at.append(code.define(f"linalg.index {places[axis.name]} : index"))
            return code.define(f"tensor.extract {table.name}[{', '.join(at)}] : {table.type}")

        return self.generic([index], out, table.element, body)

    # -- tensors -----------------------------------------------------------------------------------

    def empty(self, axes: Sequence[Axis], element: str) -> Value:
        sizes = ", ".join(axis.size for axis in axes if isinstance(axis.size, str))
        type = tensor_type(axes, element)
        name = self.code.define(f"tensor.empty({sizes}) : {type}")
        return Value(name, tuple(axes), element)  # type: ignore[arg-type]

    def fill(self, into: Value, number: Number) -> Value:
        value = self.code.define(f"arith.constant {literal(number, into.element)}")
        name = self.code.define(
            f"linalg.fill ins({value} : {into.element}) "
            f"outs({into.name} : {into.type}) -> {into.type}"
        )
        return Value(name, into.axes, into.element)

    def full(self, value: Value, axes: Sequence[Axis]) -> Value:
        """The value repeated along axes that it lacks, in this order."""
        if value.number is None and value.axes == tuple(axes):
            return value
        return self.generic([value], axes, value.element, lambda scalars: scalars[0])

    def transpose(self, value: Value, names: Sequence[str]) -> Value:
        return self.full(value, [value.axis(name) for name in names])

    def merge(self, value: Value, names: Sequence[str], into: str) -> Value:
        """Axes joined row-major into one, which stands where the first of them stood."""
        if len(names) == 1:
            return value.renamed({names[0]: into})
        first = value.names.index(names[0])
        if value.names[first : first + len(names)] != tuple(names):
            before = [n for n in value.names[:first] if n not in names]
            after = [n for n in value.names[first:] if n not in names]
            value = self.transpose(value, [*before, *names, *after])
            first = len(before)
        joined = value.axes[first : first + len(names)]
        size = self.code.product([axis.size for axis in joined])
        axes = (*value.axes[:first], Axis(into, size), *value.axes[first + len(names) :])
        groups = _groups([1] * first + [len(names)] + [1] * (len(axes) - first - 1))
        type = tensor_type(axes, value.element)
        name = self.code.define(
            f"tensor.collapse_shape {value.name} {groups} : {value.type} into {type}"
        )
        return Value(name, axes, value.element)

    def split(self, value: Value, name: str, into: Sequence[Axis]) -> Value:
        """An axis as several, row-major."""
        if len(into) == 1:
            return value.renamed({name: into[0].name})
        at = value.names.index(name)
        axes = (*value.axes[:at], *into, *value.axes[at + 1 :])
        groups = _groups([1] * at + [len(into)] + [1] * (len(value.axes) - at - 1))
        shape = ", ".join(str(axis.size) for axis in axes)
        type = tensor_type(axes, value.element)
        made = self.code.define(
            f"tensor.expand_shape {value.name} {groups} output_shape [{shape}] : "
            f"{value.type} into {type}"
        )
        return Value(made, axes, value.element)

    def slice(
        self, value: Value, ranges: dict[str, tuple[Size, Size]], drop: bool = False
    ) -> Value:
        """A stretch (start, size) of some axes; with ``drop`` these have size 1 and go."""
        starts, sizes, axes = [], [], []
        for axis in value.axes:
            start, size = ranges.get(axis.name, (0, axis.size))
            starts.append(str(start))
            sizes.append(str(size))
            if not (drop and axis.name in ranges):
                axes.append(Axis(axis.name, size))
        ones = ", ".join("1" for _ in value.axes)
        type = tensor_type(axes, value.element)
        name = self.code.define(
            f"tensor.extract_slice {value.name}[{', '.join(starts)}] [{', '.join(sizes)}] [{ones}] "
            f": {value.type} to {type}"
        )
        return Value(name, tuple(axes), value.element)

    def tied(self, value: Value) -> Value:
        """The same, with its dynamic sizes said again: IREE loses them in loops and branches."""
        sizes = [axis.size for axis in value.axes if isinstance(axis.size, str)]
        if not sizes:
            return value
        name = self.code.define(
            f"flow.tensor.tie_shape {value.name} : {value.type}{{{', '.join(sizes)}}}"
        )
        return Value(name, value.axes, value.element)

    def sized(self, value: Value, axes: Sequence[Axis]) -> Value:
        """The same, with sizes that are known to be these."""
        if value.axes == tuple(axes):
            return value
        type = tensor_type(axes, value.element)
        name = self.code.define(f"tensor.cast {value.name} : {value.type} to {type}")
        return Value(name, tuple(axes), value.element)

    def insert(self, value: Value, into: Value, starts: dict[str, Size]) -> Value:
        """A tensor put into a larger one; axes that it lacks have size 1 there."""
        at = [str(starts.get(axis.name, 0)) for axis in into.axes]
        own = {axis.name: axis.size for axis in value.axes}
        sizes = [str(own.get(axis.name, 1)) for axis in into.axes]
        ones = ", ".join("1" for _ in into.axes)
        name = self.code.define(
            f"tensor.insert_slice {value.name} into {into.name}[{', '.join(at)}] "
            f"[{', '.join(sizes)}] [{ones}] : {value.type} into {into.type}"
        )
        return Value(name, into.axes, into.element)

    def concat(self, values: Sequence[Value], along: str) -> Value:
        """Values one behind the other along an axis; the others are in the same order."""
        first = values[0]
        size: Size = 0
        for value in values:
            size = self.code.plus(size, value.axis(along).size)
        axes = tuple(Axis(along, size) if a.name == along else a for a in first.axes)
        into, at = self.empty(axes, first.element), 0  # type: Value, Size
        for value in values:
            into = self.insert(value, into, {along: at})
            at = self.code.plus(at, value.axis(along).size)
        return into


def _apart(inputs: Sequence[Value]) -> list[Value]:
    """Distinct objects, so that one tensor may be two inputs."""
    return [Value(v.name, v.axes, v.element, v.number) for v in inputs]


def _groups(lengths: Sequence[int]) -> str:
    groups, at = [], 0
    for length in lengths:
        groups.append(f"[{', '.join(str(at + n) for n in range(length))}]")
        at += length
    return f"[{', '.join(groups)}]"
