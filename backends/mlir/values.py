"""What the lowering knows of a value, and the text of the function that it writes.

A ``Value`` is an SSA name with *named* axes, as in the graph: alignment, broadcasting and the order
of axes follow from the names. A size is a number, or the name of an ``index`` that holds it.

Time comes in two forms. A value over time alone is *packed*: its time axis runs over all rows of
the step, the sequences one behind the other. Where it meets a history it is *batched*: an axis
``BATCH`` in front, and the time axis is that of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from compiler.errors import UserError

BATCH = "@batch"

Size = int | str  # a number, or the name of an index value
Element = Literal["f32", "bf16", "f8E4M3FN", "f8E5M2", "i8", "i64", "i1"]
Number = int | float | bool


class Unsupported(UserError):
    """The backend has no lowering for something in the program."""


@dataclass(frozen=True)
class Axis:
    name: str
    size: Size

    @property
    def text(self) -> str:
        """The size as a tensor type writes it."""
        return str(self.size) if isinstance(self.size, int) else "?"


@dataclass(frozen=True)
class Value:
    """A tensor, or with ``number`` a constant that is written where it is used.

    A packed weight of codes has ``scales``: [rows / LANES, tiles of columns].
    """

    name: str
    axes: tuple[Axis, ...]
    element: Element
    number: Number | None = None
    scales: Value | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.axes)

    @property
    def type(self) -> str:
        return tensor_type(self.axes, self.element)

    def axis(self, name: str) -> Axis:
        return self.axes[self.names.index(name)]

    def renamed(self, names: dict[str, str]) -> Value:
        axes = tuple(Axis(names.get(a.name, a.name), a.size) for a in self.axes)
        scales = self.scales.renamed(names) if self.scales else None
        return replace(self, axes=axes, scales=scales)


def tensor_type(axes: Sequence[Axis], element: str) -> str:
    return f"tensor<{''.join(axis.text + 'x' for axis in axes)}{element}>"


def union(values: Sequence[Value]) -> tuple[Axis, ...]:
    """All axes of the values, each once. An axis that one value knows the number of has that."""
    found: dict[str, Axis] = {}
    for value in values:
        for axis in value.axes:
            if axis.name not in found or isinstance(axis.size, int):
                found[axis.name] = axis
    return tuple(found.values())


class Code:
    """The lines of one function. Index constants are written once, at its head."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.indices: dict[int, str] = {}
        self.depth = 2
        self.count = 0

    def fresh(self) -> str:
        self.count += 1
        return f"%{self.count}"

    def add(self, line: str) -> None:
        self.lines.append("  " * self.depth + line)

    def define(self, expression: str) -> str:
        """A new SSA name for what an operation gives."""
        name = self.fresh()
        self.add(f"{name} = {expression}")
        return name

    @contextmanager
    def nested(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1

    # -- index arithmetic, folded where it is known -----------------------------------------------

    def index(self, size: Size) -> str:
        """The name of an index value that holds a size."""
        if isinstance(size, str):
            return size
        return self.indices.setdefault(size, f"%c{size}" if size >= 0 else f"%cm{-size}")

    def binary(self, op: str, a: Size, b: Size) -> Size:
        return self.define(f"arith.{op} {self.index(a)}, {self.index(b)} : index")

    def plus(self, a: Size, b: Size) -> Size:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if 0 in (a, b):
            return b if a == 0 else a
        return self.binary("addi", a, b)

    def minus(self, a: Size, b: Size) -> Size:
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        return a if b == 0 else self.binary("subi", a, b)

    def times(self, a: Size, b: Size) -> Size:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if 1 in (a, b):
            return b if a == 1 else a
        return self.binary("muli", a, b)

    def product(self, sizes: Sequence[Size]) -> Size:
        result: Size = 1
        for size in sizes:
            result = self.times(result, size)
        return result

    def text(self) -> list[str]:
        head = [f"    {name} = arith.constant {n} : index" for n, name in self.indices.items()]
        return head + self.lines
