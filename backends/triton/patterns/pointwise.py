"""Chains of elementwise nodes, and the views between them, as one kernel.

An element of the result is followed back through the graph: each node is asked for its value at an
index, and asks its operands at theirs. A view is another index, a stack a choice by index, so a
rotation of pairs becomes two reads and a choice. What is not elementwise is read from memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.kernels import Group
from backends.triton.families.pointwise import Leaf, Pointwise, generate
from backends.triton.patterns.context import Context, calls, packed
from backends.triton.patterns.powers import power
from compiler.ir import Dim, Node

ROOTS = frozenset({"map", "cast", "stack", "concat"})
ALONG = frozenset({"reduce", "softmax", "rms_norm"})  # computed along a whole row
VIEWS = frozenset({"part", "select", "unflatten", "flatten", "rename", "expand"})
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "bool": 1}
MOST_LEAVES = 12
MOST_COLUMNS = 16384  # of a row that a program has whole
INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "eq": "==", "ne": "!=", "and": "&", "or": "|",
}  # fmt: skip
CALLS = {fn: f"tl.{fn}({{0}})" for fn in "exp log sqrt rsqrt sigmoid abs floor ceil".split()} | {
    "sin": "sine({0}, 0)",
    "cos": "sine({0}, 1)",
    "neg": "-{0}",
    "not": "~{0}",
    "silu": "{0} * tl.sigmoid({0})",
    "tanh": "2 * tl.sigmoid(2 * {0}) - 1",
    "min": "tl.minimum({0}, {1})",
    "max": "tl.maximum({0}, {1})",
    "where": "tl.where({0}, {1}, {2})",
}


@dataclass(frozen=True)
class Index:
    """Where along a dim: an expression of index variables, and how many values it takes."""

    text: str
    extent: int


At = Mapping[str, Index]


class Unfit(Exception):
    """A value that cannot be followed."""


@dataclass
class Writer:
    """Follows one result back."""

    context: Context
    root: Node
    row: Dim | None
    covered: set[str] = field(default_factory=set)
    along: Dim | None = None  # what a program has all of
    statements: list[str] = field(default_factory=list)
    leaves: dict[str, str] = field(default_factory=dict)  # node: argument
    reads: dict[str, set[tuple[tuple[str, Index], ...]]] = field(default_factory=dict)
    flops: int = 0
    _known: dict[tuple[str, tuple[tuple[str, Index], ...]], str] = field(default_factory=dict)

    def value(self, node: Node, at: At) -> str:
        """The variable that holds a node's value at an index; act values are float32 in it."""
        key = (node.name, tuple(sorted((n, at[n]) for n in node.type.names)))
        if key not in self._known:
            self._known[key] = self._value(node, at)
        return self._known[key]

    def _value(self, node: Node, at: At) -> str:
        if node.op in VIEWS and self._followed(node):
            return self._view(node, at)
        if node.op == "constant":
            return _literal(node.attrs["value"])
        if node.op == "iota" and node.type.dims[0].kind == "plain":
            return self._named(at[node.type.names[0]].text)
        if node.name not in self.covered:
            return self._load(node, at)
        if node.op in ("stack", "concat"):
            return self._joined(node, at)
        if node.op in ALONG:
            return self._along(node, at)
        operands = [self.value(self.context.graph[name], at) for name in node.inputs]
        if node.op == "cast":
            return self._cast(node, operands[0])
        fn = str(node.attrs["fn"])
        self.flops += 1
        wide = operands
        if node.type.dtype in ("act", "f32"):  # whole numbers meet floats as float32
            kinds = [self.context.graph[name].type.dtype for name in node.inputs]
            wide = [
                f"{o}.to(tl.float32)" if k == "i64" and not _number(o) else o
                for o, k in zip(operands, kinds, strict=True)
            ]
        if fn in INFIX:
            text = f"{wide[0]} {INFIX[fn]} {wide[1]}"
        elif fn in CALLS:
            text = CALLS[fn].format(*wide)
        elif fn == "pow" and (found := power(wide[0], wide[1])):
            text = found
        else:
            raise Unfit
        return self._rounded(node, self._named(text))

    def _along(self, node: Node, at: At) -> str:
        """A sum, a mean, an extreme or a softmax along a row."""
        assert self.along is not None
        operand = self.context.operand(node, 0)
        if node.op == "rms_norm":
            return self._normed(node, at)
        name, length = self.along.name, self.context.size(self.along)
        value = self.value(operand, {**at, name: Index("column", length)})
        self.flops += 1
        fn = "softmax" if node.op == "softmax" else str(node.attrs["fn"])
        fill = {"sum": "0.0", "mean": "0.0", "min": 'float("inf")'}.get(fn, 'float("-inf")')
        there = self._named(f"tl.where(inside, {value}, {fill})")
        if fn == "softmax":
            shifted = self._named(f"tl.exp({there} - tl.max({there}, 1)[:, None])")
            return self._named(f"{shifted} / tl.sum({shifted}, 1)[:, None]")
        short = {"mean": "sum"}.get(fn, fn)
        text = f"tl.{short}({there}, 1)[:, None]"
        return self._named(f"{text} / {length}" if fn == "mean" else text)

    def _normed(self, node: Node, at: At) -> str:
        """``x * rsqrt(mean(x^2) + eps)``, times a gain."""
        assert self.along is not None
        length, a = self.context.size(self.along), node.attrs
        x = self.value(self.context.operand(node, 0), at)
        square = self._named(f"tl.where(inside, {x} * {x}, 0.0)")
        mean = f"tl.sum({square}, 1)[:, None] / {length}"
        unit = self._named(f"{x} * tl.rsqrt({mean} + {float(a['eps'])!r})")
        self.flops += 4
        if a["gain"] is None:
            return self._rounded(node, unit)
        if a["rounds_before_gain"]:
            raise Unfit
        gain = self.value(self.context.operand(node, a["gain"]), at)
        return self._rounded(node, self._named(f"{unit} * {gain}"))

    def _followed(self, view: Node) -> bool:
        """Is the view's operand laid out so that it can be read at any index?"""
        source = self.context.operand(view, 0)
        return not any(d.kind == "history" for d in source.type.dims)

    def _named(self, text: str) -> str:
        if re.fullmatch(r"\w+", text):
            return text
        name = f"v{len(self.statements)}"
        self.statements.append(f"{name} = {text}")
        return name

    def _rounded(self, node: Node, name: str) -> str:
        """A named equation of activations rounds to their dtype."""
        short = {"bfloat16": "tl.bfloat16", "float16": "tl.float16"}.get(self.context.dtype)
        if node.type.dtype == "act" and node.rounds and short and node is not self.root:
            return self._named(f"{name}.to({short}).to(tl.float32)")
        return name

    def _cast(self, node: Node, operand: str) -> str:
        before, after = self.context.operand(node, 0).type.dtype, node.type.dtype
        if _number(operand):
            return operand
        if before in ("act", "f32") and after in ("act", "f32"):
            return self._rounded(node, operand)
        kind = {"i64": "int64", "bool": "int1"}.get(after, "float32")
        return self._named(f"{operand}.to(tl.{kind})")

    def _view(self, node: Node, at: At) -> str:
        source = self.context.operand(node, 0)
        a, inner = node.attrs, {n: at[n] for n in node.type.names}
        size = self.context.size
        if node.op == "part":
            whole = source.type.dim(a["dim"])
            mine = inner.pop(a["part"])
            offset = whole.offset(a["part"]).at(self.context.program.sizes)
            inner[whole.name] = Index(_plus(mine.text, offset), mine.extent)
        elif node.op == "select":
            inner[a["dim"]] = Index(str(int(a["at"])), 1)
        elif node.op == "unflatten":
            text, extent = "", 1
            for dim in a["into"]:
                mine = inner.pop(dim.name)
                text = _plus(f"{_atom(text)} * {size(dim)}", mine.text) if text else mine.text
                extent *= mine.extent
            inner[a["dim"]] = Index(text, extent)
        elif node.op == "flatten":
            mine = inner.pop(a["into"].name)
            below = 1
            for name in reversed(a["dims"]):
                length = size(source.type.dim(name))
                text = f"{_atom(mine.text)} // {below}" if below > 1 else mine.text
                if name != a["dims"][0]:
                    text = f"{_atom(text)} % {length}"
                inner[name] = Index(text, min(mine.extent, length))
                below *= length
        elif node.op == "rename":
            inner[a["dim"]] = inner.pop(a["to"].name)
        return self.value(source, {n: i for n, i in inner.items() if n in source.type.names})

    def _joined(self, node: Node, at: At) -> str:
        dim: Dim = node.attrs["dim"]
        here = at[dim.name]
        where = self._named(here.text)
        result = ""
        begin = 0
        values = []
        for number, name in enumerate(node.inputs):
            operand = self.context.graph[name]
            if node.op == "stack":
                inner = {n: i for n, i in at.items() if n in operand.type.names}
                values.append((number + 1, self.value(operand, inner)))
                continue
            part = dim.parts[number]
            length = self.context.size(part)
            clamped = f"tl.minimum(tl.maximum({where} - {begin}, 0), {length - 1})"
            inner = {**at, part.name: Index(self._named(clamped), length)}
            begin += length
            values.append((begin, self.value(operand, inner)))
        for end, value in reversed(values):
            result = f"tl.where({where} < {end}, {value}, {result})" if result else value
        return self._rounded(node, self._named(result))

    def _load(self, node: Node, at: At) -> str:
        """Read a tensor at an index."""
        dims = node.type.dims
        if node.type.dtype not in ("act", "f32", "i64", "bool") or any(
            d.kind == "history" for d in dims
        ):
            raise Unfit
        moving = [d for d in dims if d.kind != "plain"]
        if moving and (len(moving) > 1 or dims[0] is not moving[0] or self.row is None):
            raise Unfit
        if moving and moving[0].name != self.row.name:  # type: ignore[union-attr]
            raise Unfit
        argument = self.leaves.setdefault(node.name, f"x{len(self.leaves)}")
        key = tuple(sorted((n, at[n]) for n in node.type.names))
        self.reads.setdefault(node.name, set()).add(key)
        below, terms = 1, []
        for dim in reversed(dims):
            place = at[dim.name].text
            terms.append(f"{_atom(place)} * {below}" if below > 1 else place)
            if dim.kind == "plain":
                below *= self.context.size(dim)
        address = " + ".join([argument, *(t for t in reversed(terms) if t != "0")])
        text = f"tl.load({address}, inside, other=0)" if dims else f"tl.load({argument})"
        if node.type.dtype == "act" and self.context.dtype != "float32":
            text += ".to(tl.float32)"
        if node.type.dtype == "bool":
            text += " != 0"
        return self._named(text)


def _atom(text: str) -> str:
    return text if re.fullmatch(r"\w+", text) else f"({text})"


def _plus(text: str, offset: int | str) -> str:
    return text if str(offset) == "0" else f"{text} + {offset}"


def _literal(value: float) -> str:
    if value in (math.inf, -math.inf):
        return f'float("{value}")'
    return repr(value)


def _number(text: str) -> bool:
    return bool(re.match(r"-?\d|float\(", text)) or text in ("True", "False")


def pointwise(context: Context, node: Node) -> Group | None:
    """An elementwise node, with all that only it reads."""
    if node.op not in ROOTS | ALONG or not node.type.dims or node.name in context.taken:
        return None
    dims = node.type.dims
    rows = [d for d in dims if d.kind != "plain"]
    if any(d.kind == "history" for d in dims) or rows != list(dims[: len(rows)]) or len(rows) > 1:
        return None
    row = rows[0] if rows else None
    covered = _covered(context, node)
    if not covered:
        return None
    inner = dims[len(rows) :]
    along = inner[-1] if any(context.graph[n].op in ALONG for n in covered) else None
    writer = Writer(context, node, row, covered, along)
    variables = _variables(inner)
    at = {d.name: Index(variables[d.name], context.size(d)) for d in inner}
    if along is not None:
        at |= _rows_of(context, inner[:-1])
        at[along.name] = Index("column", context.size(along))
    if row is not None:
        lead = context.sizes(inner[:-1]) if along is not None else 1
        at[row.name] = Index(f"row // {lead}" if lead > 1 else "row", 1)
    try:
        result = writer.value(node, at)
    except Unfit:
        return None
    if not writer.leaves or len(writer.leaves) > MOST_LEAVES:
        return None
    spec = _spec(context, node, writer, row, variables, result)
    if spec is None:
        return None
    names = list(writer.leaves)
    operator = generate(spec, context.target)

    def arguments(body: Body, prefix: str) -> list[str] | None:
        return packed(body, prefix, *names)

    return calls(context, node, covered, arguments, operator, names)


def _rows_of(context: Context, dims: tuple[Dim, ...]) -> dict[str, Index]:
    """Where dims before the last are, by the number of a row that runs over them too."""
    found, below = {}, 1
    for dim in reversed(dims):
        length = context.size(dim)
        found[dim.name] = Index(f"{_atom(_over('row', below))} % {length}", length)
        below *= length
    return found


def _over(text: str, number: int) -> str:
    return f"{text} // {number}" if number > 1 else text


def _covered(context: Context, root: Node) -> set[str]:
    """The root, and the elementwise nodes and views that nothing else reads; and what is computed
    along the root's last dim."""
    covered = {root.name}
    last = root.type.dims[-1]
    if root.op in ALONG and not _is_along(context, root, last):
        return set()
    for node in reversed(list(context.graph)):
        users = context.users(node.name)
        if not users or node.name in context.taken or not users <= covered:
            continue
        if node.op in ROOTS or node.op in VIEWS or _is_along(context, node, last):
            covered.add(node.name)
    return covered


def _is_along(context: Context, node: Node, last: Dim) -> bool:
    if node.op not in ALONG or last.kind != "plain" or context.size(last) > MOST_COLUMNS:
        return False
    over = node.attrs["over"]
    return over in (last.name, (last.name,), [last.name]) and last.name in (
        context.operand(node, 0).type.names
    )


def _variables(dims: tuple[Dim, ...]) -> dict[str, str]:
    """An index variable for each dim, by its name where that is one."""
    taken = {"row", "rows", "column", "out", "inside", "result"}
    found: dict[str, str] = {}
    for number, dim in enumerate(dims):
        plain = dim.name if re.fullmatch(r"[a-z]\w*", dim.name) else f"i{number}"
        if plain in taken or re.fullmatch(r"[xv]\d+", plain):
            plain = f"i{number}"
        found[dim.name] = plain
    return found


def _spec(
    context: Context,
    node: Node,
    writer: Writer,
    row: Dim | None,
    variables: Mapping[str, str],
    result: str,
) -> Pointwise | None:
    inner = [d for d in node.type.dims if d.kind == "plain"]
    sizes = tuple((variables[d.name], context.size(d)) for d in inner)
    whole = writer.along is not None
    lead = context.sizes(inner[:-1]) if whole else 1
    if any(length == 0 for _, length in sizes):
        return None
    leaves = []
    rows = "1" if row is None else ""
    for name, argument in writer.leaves.items():
        leaf = context.graph[name]
        dtype = context.dtype_of(leaf)
        stored = context.sizes(d for d in leaf.type.dims if d.kind == "plain")
        read = 0
        for places in writer.reads[name]:
            once = 1
            for dim, index in places:
                once *= 1 if row is not None and dim == row.name else index.extent
            read += once
        read = min(read, stored)
        moving = row is not None and row.name in leaf.type.names
        if moving and not rows:
            rows = f"{argument}.shape[0]"
        per_row, total = (read, 0) if moving else (0, read)
        leaves.append(Leaf(argument, dtype, WIDTHS[dtype], per_row, total, stored, moving))
    if not rows:
        return None  # no operand tells how many rows there are
    shape = ", ".join([*(["rows"] if row is not None else []), *(str(n) for _, n in sizes)])
    if whole and lead > 1:
        shape = shape.replace("rows", f"rows // {lead}")
        rows = f"{rows} * {lead}"
    shape = f"({shape},)" if shape.isalnum() else f"({shape})"
    dtype = context.dtype_of(node)
    ops = dict.fromkeys(
        str(n.attrs.get("fn", n.op)) for n in context.graph if n.name in writer.covered
        and n.op not in VIEWS
    )  # fmt: skip
    stem = "_".join(ops)
    if len(ops) > 3:
        stem = node.label if node.label and node.label.isidentifier() else "_".join([*ops][:4])
    place = f"  {node.span}" if node.span else ""
    about = (" ".join(node.span.text.split()) if node.span else stem).replace('"', "'")
    key = (sizes, tuple(leaves), tuple(writer.statements), result, dtype, shape)
    width = "_".join(str(n) for _, n in sizes) or "1"
    return Pointwise(
        name=context.name(f"{stem}_{width}", key),
        dims=sizes[-1:] if whole else sizes,
        leaves=tuple(leaves),
        statements=(*writer.statements, f"result = {result}"),
        dtype=dtype,
        width=WIDTHS[dtype],
        rows=rows,
        shape=shape,
        about=f"{about[:70]}{place}",
        flops=max(1, writer.flops),
        whole=whole,
        lead=lead,
    )
