"""One function of the module: a step of all sequences, or of one token of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from backends.mlir.linalg import Linalg
from backends.mlir.values import BATCH, Axis, Code, Element, Size, Value
from compiler.ir import Program
from compiler.tensors import CachePattern, Pattern

Key = tuple[str, tuple[range, ...]]  # a pattern's path and ranges


@dataclass
class Weights:
    """The stacked weights that functions read: one tensor for each pattern, one axis for each
    array on the way to it, so that a layer or an expert is a slice."""

    patterns: dict[Key, Pattern]
    act: Element
    used: dict[str, Pattern] = field(default_factory=dict)

    def element(self, pattern: Pattern) -> Element:
        return self.act if pattern.dtype == "act" else "f32"


def key_of(pattern: Pattern | CachePattern) -> str:
    """What a stacked tensor is called: ``layers[1:4].attn.W_o`` is that of layers 1, 2 and 3."""
    return pattern.path.format(*(f"{r.start}:{r.stop}" for r in pattern.ranges))


@dataclass
class Step:
    """What is the same in all bodies of a function.

    Sizes: ``batch`` sequences, ``time`` rows of each, ``rows`` of all, ``held`` positions of the
    longest sequence before the step, ``wanted`` rows whose result is wanted.
    """

    program: Program
    code: Code
    ops: Linalg
    act: Element
    weights: Weights
    batch: Size
    time: Size
    held: Size
    wanted: Size
    past: Value  # i64 [batch], positions before the step
    count: Value | None  # i64 [batch], rows that count; None: all
    rows_wanted: Value | None  # i64 [wanted]; None: all
    caches: dict[Key, Value]  # as they were before the step: [arrays.., batch, capacity, ...]
    states: dict[Key, Value]  # [arrays.., batch, ...]
    kept: dict[Key, Value] = field(default_factory=dict)  # rows, or states, that the step adds
    rows: Size = 1
    history: Size = 1

    def __post_init__(self) -> None:
        code, ops = self.code, self.ops
        self.rows = code.times(self.batch, self.time)
        self.history = code.plus(self.held, self.time)
        # All at the head of the function: loops and branches may read them.
        time, history = Axis("@time", self.time), Axis("@history", self.history)
        batch = Axis(BATCH, self.batch)
        place = ops.map("add", [self.past, ops.iota(time)], "i64")
        self.position = ops.merge(ops.transpose(place, [BATCH, "@time"]), [BATCH, "@time"], "@time")
        at = ops.iota(history)
        new = ops.map("sub", [at, self.number(self.held)], "i64")
        old = ops.map("lt", [new, self.constant(0)], "i1")
        later = ops.map("add", [self.past, new], "i64")
        chosen = ops.map("where", [old, at, later], "i64")
        self.history_position = ops.full(chosen, [batch, history])
        self.valid: Value | None = None
        if self.count is not None:
            before = ops.map("lt", [at, self.past], "i1")
            counted = ops.map("lt", [new, self.count], "i1")
            both = ops.map("where", [old, before, counted], "i1")
            self.valid = ops.full(both, [batch, history])

    def constant(self, number: int | float | bool, element: Element = "i64") -> Value:
        return Value("", (), element, number)

    def number(self, size: Size) -> Value:
        """A size as an i64 value."""
        if isinstance(size, int):
            return self.constant(size)
        whole = self.code.define(f"arith.index_cast {size} : index to i64")
        name = self.code.define(f"tensor.from_elements {whole} : tensor<i64>")
        return Value(name, (), "i64")

    def tied(self, value: Value) -> Value:
        """The same, with its dynamic sizes said again: IREE loses them in loops and branches."""
        sizes = [axis.size for axis in value.axes if isinstance(axis.size, str)]
        if not sizes:
            return value
        name = self.code.define(
            f"flow.tensor.tie_shape {value.name} : {value.type}{{{', '.join(sizes)}}}"
        )
        return Value(name, value.axes, value.element)

    def weight(self, path: str, ranges: tuple[range, ...], index: Sequence[Size]) -> Value:
        """A parameter, of the layer and the expert that ``index`` says."""
        pattern = self.weights.patterns[path, ranges]
        key = key_of(pattern)
        self.weights.used[key] = pattern
        element = self.weights.element(pattern)
        arrays = tuple(Axis(f"@{n}", len(r)) for n, r in enumerate(ranges))
        own = tuple(Axis(n, s) for n, s in zip(pattern.dims, pattern.shape, strict=True))
        whole = Value("", (*arrays, *own), element)
        name = self.code.define(f'util.global.load immutable @"{key}" : {whole.type}')
        loaded = Value(name, whole.axes, element)
        ranges_of: dict[str, tuple[Size, Size]] = {
            axis.name: (at, 1) for axis, at in zip(arrays, index, strict=True)
        }
        return self.ops.slice(loaded, ranges_of, drop=True) if index else loaded
