"""Values as the emitter sees them: an expression, its axes, and where sequences stand.

An axis is a dim's name. A *packed* value has an axis of kind time, along which the tokens of all
sequences stand; a value per sequence (a *padded* one, if it runs over time or history too) has the
axis ``BATCH`` in front; any other is the same for all sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_letters

from backends.pytorch.emit.text import ATOM, UNARY, Text, method
from compiler.ir import DType

BATCH = ""


class EmitError(Exception):
    """A program holds something that this backend has no code for."""


Number = int | float | bool


@dataclass(frozen=True)
class Matrix:
    """A stored matrix, or a stretch of its rows or columns: the two axes as they are stored, each
    the row-major product of the dims that the value has in their place."""

    text: Text
    rows: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """An expression. ``number`` is set where it is a Python number, which has no axes or dtype of
    its own; ``matrix`` where it is a view of a stored matrix."""

    text: Text
    axes: tuple[str, ...]
    dtype: DType
    number: Number | None = None
    matrix: Matrix | None = None

    def __str__(self) -> str:
        return self.text.text

    @property
    def batched(self) -> bool:
        return BATCH in self.axes

    @property
    def cheap(self) -> bool:
        """Whether the expression can be repeated: a name, an attribute or a number."""
        return self.number is not None or self.text.text.replace(".", "").isidentifier()

    def axis(self, name: str) -> int:
        return self.axes.index(name)

    def at(self, name: str) -> int:
        """The axis counted from the end: -1 is the last."""
        return self.axes.index(name) - len(self.axes)

    def with_(self, text: Text, axes: Sequence[str] | None = None) -> Value:
        """Another expression in its place; no longer a number, or the view of a matrix."""
        axes = self.axes if axes is None else tuple(axes)
        return Value(text, axes, self.dtype)


def literal(number: Number, dtype: DType, name: str = "") -> Value:
    """A Python number, under a constant's name if it has one."""
    if name:
        return Value(Text(name), (), dtype, number)
    negative = not isinstance(number, bool) and number < 0
    return Value(Text(repr(number), UNARY if negative else ATOM), (), dtype, number)


def indexed(value: Value, pattern: Sequence[str], axes: Sequence[str]) -> Value:
    """``value[pattern]``: one entry per axis, ``:`` for those that stay; written short."""
    entries = list(pattern)
    left = list(entries)
    while left and left[-1] == ":":
        left.pop()
    if not left:
        return replace(value, axes=tuple(axes))
    first = next(i for i, entry in enumerate(entries) if entry != ":")
    right = ["...", *entries[first:]] if first else entries
    shorter = left if len(left) <= len(right) else right
    return value.with_(Text(f"{value.text.atom}[{', '.join(shorter)}]"), axes)


def permuted(value: Value, order: Sequence[str]) -> Value:
    """The same axes in another order, without a copy."""
    order = tuple(order)
    if order == value.axes or value.number is not None:
        return value
    count = len(order)
    moved = [i for i in range(count) if order[i] != value.axes[i]]
    if len(moved) == 2:
        a, b = (i - count for i in moved)
        return value.with_(method(value.text, "transpose", str(a), str(b)), order)
    for name in value.axes:  # one axis moved past others
        rest = [n for n in value.axes if n != name]
        to = order.index(name)
        if [*rest[:to], name, *rest[to:]] == list(order):
            source = value.axes.index(name)
            return value.with_(method(value.text, "movedim", str(source), str(to)), order)
    places = ", ".join(str(value.axes.index(name)) for name in order)
    return value.with_(method(value.text, "permute", places), order)


def aligned(value: Value, axes: Sequence[str]) -> Value:
    """The value broadcastable to ``axes``: its own in that order, length 1 for those it lacks."""
    if value.number is not None:
        return value
    value = permuted(value, [name for name in axes if name in value.axes])
    pattern = [":" if name in value.axes else "None" for name in axes]
    kept = list(axes)
    while pattern and pattern[0] == "None":  # broadcasting adds leading axes by itself
        pattern.pop(0)
        kept.pop(0)
    if "None" not in pattern:
        return value
    first = pattern.index("None")
    if all(entry == "None" for entry in pattern[first:]):
        return value.with_(Text(f"{value.text.atom}[..., {', '.join(pattern[first:])}]"), kept)
    while pattern[-1] == ":":
        pattern.pop()
    return value.with_(Text(f"{value.text.atom}[{', '.join(pattern)}]"), kept)


def full(value: Value, axes: Sequence[str]) -> Value:
    """The value with exactly these axes, length 1 for those it lacks, leading ones included."""
    value = aligned(value, axes)
    lacking = len(axes) - len(value.axes)
    if not lacking:
        return value
    return value.with_(Text(f"{value.text.atom}[{', '.join(['None'] * lacking)}]"), axes)


def union(values: Sequence[Value], order: Sequence[str]) -> tuple[str, ...]:
    """All axes of some values: the batch first, then in the given order."""
    found = {name for value in values for name in value.axes}
    return tuple(name for name in (BATCH, *order) if name in found)


def letters(axes: Sequence[str], kinds: Mapping[str, str]) -> dict[str, str]:
    """A letter for each axis: its own name where that is one letter, ``t`` for time, ``s`` for
    history, ``b`` for the batch."""
    fixed = {"time": "t", "history": "s"}
    chosen = {n: fixed[kinds[n]] for n in axes if kinds.get(n) in fixed}
    if len(set(chosen.values())) < len(chosen):
        raise EmitError(f"two dims of time, or two of history: {', '.join(chosen)}")
    if BATCH in axes:
        chosen[BATCH] = "b"
    for name in sorted((n for n in axes if n not in chosen), key=len):
        first = name[0] if name[0] in ascii_letters else "a"
        for letter in (first, first.swapcase(), *ascii_letters):
            if letter not in chosen.values():
                chosen[name] = letter
                break
    return chosen
