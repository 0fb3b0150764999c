"""One function of the module: a step of all sequences, or of one token of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from backends.mlir.coding import SCALES, codes_shape, element_of, matrix_of, scales_shape
from backends.mlir.linalg import Linalg
from backends.mlir.values import BATCH, Axis, Code, Element, Size, Value
from compiler.ir import Program
from compiler.tensors import CachePattern, Pattern

ENTRY = "main"
BLOCKS = "@blocks"  # all of an array of blocks
LANES: Final = 16  # rows of a packed weight that lie side by side
OUTER, INNER = "{}@outer", "{}@inner"  # what a packed axis is called as two
ROWS, COLUMNS = "@rows", "@columns"  # of a matrix of codes
TILE, WITHIN = "@tile", "@within"  # its columns as two: scales have TILE alone
Key = tuple[str, tuple[range, ...]]  # a pattern's path and ranges


@dataclass
class Weights:
    """The stacked weights that functions read: one tensor for each pattern, one axis for each
    array on the way to it, so that a layer or an expert is a slice.

    A matrix that is nothing but a factor of products over its columns may be *packed*: LANES rows
    lie side by side, [rows / LANES, columns, LANES], so that a product of many rows or of one reads
    it from front to back, a vector at a time.

    Attributes:
        packed: which are.
        loose: which cannot be, as something reads them in another way; found while lowering.
    """

    patterns: dict[Key, Pattern]
    act: Element
    packed: frozenset[str] = frozenset()
    used: dict[str, Pattern] = field(default_factory=dict)
    loose: set[str] = field(default_factory=set)

    def element(self, pattern: Pattern) -> Element:
        if pattern.coding is not None:
            return element_of(pattern.coding)
        return self.act if pattern.dtype == "act" else "f32"

    def stacked(self, pattern: Pattern) -> list[Value]:
        """What is stored of a weight: numbers, or codes and their scales."""
        key = key_of(pattern)
        arrays = tuple(Axis(f"@{n}", len(r)) for n, r in enumerate(pattern.ranges))
        is_packed = key in self.packed
        element = self.element(pattern)
        if pattern.coding is None:
            own = tuple(Axis(n, s) for n, s in zip(pattern.dims, pattern.shape, strict=True))
            return [Value(key, (*arrays, *(packed(own) if is_packed else own)), element)]
        lanes = LANES if is_packed else None
        codes = codes_shape(pattern.coding, pattern.shape, lanes)
        scales = scales_shape(pattern.coding, pattern.shape, lanes)
        rows = pattern.dims[0] if len(pattern.dims) > 1 else ROWS
        named: tuple[str, ...] = (rows, COLUMNS)
        if is_packed:
            named = (OUTER.format(rows), pattern.dims[1], INNER.format(rows))
        return [
            Value(key, (*arrays, *map(Axis, named, codes)), element),
            Value(key + SCALES, (*arrays, *map(Axis, (named[0], TILE), scales)), "f32"),
        ]


def key_of(pattern: Pattern | CachePattern) -> str:
    """What a stacked tensor is called: ``layers[1:4].attn.W_o`` is that of layers 1, 2 and 3."""
    return pattern.path.format(*(f"{r.start}:{r.stop}" for r in pattern.ranges))


def widened(ops: Linalg, codes: Value, scales: Value, columns: str) -> Value:
    """Codes times their scales, f32.

    Args:
        codes: has the axis ``columns``, whole tiles.
        scales: has ``TILE`` instead.
    """
    tiles, size = scales.axis(TILE), codes.axis(columns).size
    assert isinstance(size, int) and isinstance(tiles.size, int)
    split = ops.split(codes, columns, [tiles, Axis(WITHIN, size // tiles.size)])
    return ops.merge(ops.map("mul", [split, scales], "f32"), [TILE, WITHIN], columns)


def packed(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes of a matrix as they lie when it is packed."""
    rows, columns = axes
    assert isinstance(rows.size, int)
    outer = Axis(OUTER.format(rows.name), rows.size // LANES)
    return outer, columns, Axis(INNER.format(rows.name), LANES)


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
    # Within the sides of a branch: what they cache, which is put into ``kept`` behind it.
    pending: dict[Key, tuple[Value, dict[str, Size]]] | None = None
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

    def cached(self, key: Key, rows: Value, starts: dict[str, Size]) -> None:
        """Keep what the step adds to a cache, of the layer that ``starts`` says."""
        if self.pending is None:
            self.kept[key] = self.ops.insert(rows, self.kept[key], starts)
        else:
            self.pending[key] = (rows, starts)

    def constant(self, number: int | float | bool, element: Element = "i64") -> Value:
        return Value("", (), element, number)

    def number(self, size: Size) -> Value:
        """A size as an i64 value."""
        if isinstance(size, int):
            return self.constant(size)
        whole = self.code.define(f"arith.index_cast {size} : index to i64")
        name = self.code.define(f"tensor.from_elements {whole} : tensor<i64>")
        return Value(name, (), "i64")

    def weight(
        self,
        path: str,
        ranges: tuple[range, ...],
        index: Sequence[Size | None],
        factor: bool = False,
    ) -> Value:
        """A parameter, of the layer and the expert that ``index`` says; codes are widened, unless
        they are packed.

        Args:
            factor: whether it is read as a factor of products over its columns alone.
        """
        pattern = self.weights.patterns[path, ranges]
        key = key_of(pattern)
        self.weights.used[key] = pattern
        if not factor:
            self.weights.loose.add(key)
        found = [self._chosen(value, index) for value in self.weights.stacked(pattern)]
        if pattern.coding is None:
            return found[0]
        codes, scales = found
        if key in self.weights.packed:
            return replace(codes, scales=scales)
        wide = widened(self.ops, codes, scales, COLUMNS)
        _, columns = matrix_of(pattern.shape)
        if wide.axis(COLUMNS).size != columns:  # the last tile is a partial one
            wide = self.ops.slice(wide, {COLUMNS: (0, columns)})
        own = [Axis(n, s) for n, s in zip(pattern.dims, pattern.shape, strict=True)]
        if len(own) == 1:  # a matrix of one row
            return self.ops.slice(wide, {ROWS: (0, 1)}, drop=True).renamed({COLUMNS: own[0].name})
        return self.ops.split(wide, COLUMNS, own[1:])

    def _chosen(self, stacked: Value, index: Sequence[Size | None]) -> Value:
        """The slice of a stacked tensor; None stands for all of an array, along an axis."""
        loaded = self.ops.stored(stacked.name, replace(stacked, name=""))
        arrays = [axis.name for axis in loaded.axes[: len(index)]]
        ranges_of: dict[str, tuple[Size, Size]] = {
            name: (at, 1) for name, at in zip(arrays, index, strict=True) if at is not None
        }
        all_of = {name: BLOCKS for name, at in zip(arrays, index, strict=True) if at is None}
        found = self.ops.slice(loaded, ranges_of, drop=True) if ranges_of else loaded
        return found.renamed(all_of)
