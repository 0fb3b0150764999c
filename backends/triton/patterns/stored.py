"""Where a view of a stored matrix lies in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from backends.triton.patterns.context import Context
from compiler.ir import Dim, Node

Step = tuple[int, int]  # rows and columns from one number of a dim to the next


@dataclass(frozen=True)
class Place:
    """A view of a parameter that is a matrix.

    Attributes:
        parameter: its node.
        rows, columns: of the whole matrix.
        row, column: where the view starts.
        steps: of each of the view's dims.
    """

    parameter: Node
    rows: int
    columns: int
    steps: Mapping[str, Step]
    row: int = 0
    column: int = 0

    def together(self, dims: Sequence[Dim], context: Context) -> tuple[int, Step] | None:
        """Dims as one: its length and step; None if they do not adjoin. Of none: 1 and 0."""
        length, step = 1, (0, 0)
        for dim in reversed(dims):
            mine = self.steps[dim.name]
            if length > 1 and mine != (step[0] * length, step[1] * length):
                return None
            if length == 1:
                step = mine
            length *= context.size(dim)
        return length, step


def place(context: Context, name: str) -> Place | None:
    """The matrix that a node is a view of, if it is one; casts to float32 are looked through."""
    node = context.graph[name]
    if node.op == "param":
        if len(node.type.dims) != 2:
            return None
        rows, columns = (context.size(d) for d in node.type.dims)
        first, second = node.type.names
        return Place(node, rows, columns, {first: (1, 0), second: (0, 1)})
    if node.op not in ("unflatten", "part", "rename", "flatten", "cast", "dequantize"):
        return None
    before = place(context, node.inputs[0])
    if before is None or node.op in ("cast", "dequantize"):
        return before
    a, steps = node.attrs, dict(before.steps)
    if node.op == "unflatten":
        below = steps.pop(a["dim"])
        for dim in reversed(a["into"]):
            steps[dim.name] = below
            below = below[0] * context.size(dim), below[1] * context.size(dim)
        return replace(before, steps=steps)
    if node.op == "rename":
        steps[a["to"].name] = steps.pop(a["dim"])
        return replace(before, steps=steps)
    source = context.graph[node.inputs[0]].type
    if node.op == "flatten":
        found = before.together([source.dim(n) for n in a["dims"]], context)
        if found is None:
            return None
        for dim in a["dims"]:
            steps.pop(dim)
        steps[a["into"].name] = found[1]
        return replace(before, steps=steps)
    step = steps.pop(a["dim"])
    offset = source.dim(a["dim"]).offset(a["part"]).at(context.program.sizes)
    steps[a["part"]] = step
    row, column = before.row + offset * step[0], before.column + offset * step[1]
    return replace(before, steps=steps, row=row, column=column)
