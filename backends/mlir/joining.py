"""Products of matrices out of products over many axes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from backends.mlir.values import Axis, Value, union

if TYPE_CHECKING:
    from backends.mlir.linalg import Linalg

Undo = list[tuple[str, list[Axis]]]


def joined(
    to: Linalg, a: Value, b: Value, out: Sequence[Axis], over: Sequence[Axis]
) -> tuple[Value, Value, list[Axis], list[Axis], Undo]:
    """A product with axes joined that stand side by side wherever they occur.

    ``q[t,h,n] = W[h,n,r] * x[t,r]`` is a product of matrices over (h,n): the compiler recognises
    those, and tiles them for the caches and registers.
    """
    undo: Undo = []
    orders = [list(a.names), list(b.names), [axis.name for axis in out]]
    found = True
    while found:
        found = False
        for order in orders:
            for x, y in pairwise(order):
                if all(_together(other, x, y) for other in orders):
                    into = f"{x},{y}"
                    sizes = {axis.name: axis for axis in (*union([a, b]), *out)}
                    both = [sizes[x], sizes[y]]
                    a = to.merge(a, [x, y], into) if x in a.names else a
                    b = to.merge(b, [x, y], into) if x in b.names else b
                    size = to.code.product([axis.size for axis in both])
                    if any(axis.name == x for axis in out):
                        undo.insert(0, (into, both))
                    out, over = (_join(axes, x, y, Axis(into, size)) for axes in (out, over))
                    orders = [list(a.names), list(b.names), [axis.name for axis in out]]
                    found = True
                    break
            if found:
                break
    return a, b, list(out), list(over), undo


def _together(order: list[str], x: str, y: str) -> bool:
    if x not in order and y not in order:
        return True
    return x in order and y in order and order.index(y) == order.index(x) + 1


def _join(axes: Sequence[Axis], x: str, y: str, into: Axis) -> list[Axis]:
    return [into if axis.name == x else axis for axis in axes if axis.name != y]
