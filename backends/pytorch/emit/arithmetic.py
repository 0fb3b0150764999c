"""Elementwise maps, contractions and reductions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from backends.pytorch.emit.text import (
    AND,
    COMPARE,
    OR,
    PRODUCT,
    SUM,
    UNARY,
    Text,
    binary,
    call,
    method,
)
from backends.pytorch.emit.values import (
    BATCH,
    EmitError,
    Matrix,
    Number,
    Value,
    aligned,
    letters,
    literal,
    union,
)
from compiler.ir import DType, Node

if TYPE_CHECKING:
    from backends.pytorch.emit.body import Body

BINARY = {
    "add": ("+", SUM), "sub": ("-", SUM), "mul": ("*", PRODUCT), "div": ("/", PRODUCT),
    "pow": ("**", 15), "lt": ("<", COMPARE), "le": ("<=", COMPARE), "gt": (">", COMPARE),
    "ge": (">=", COMPARE), "eq": ("==", COMPARE), "ne": ("!=", COMPARE), "and": ("&", AND),
    "or": ("|", OR),
}  # fmt: skip
UNARY_PREFIX = {"neg": "-", "not": "~"}
CALLS = {
    fn: f"torch.{fn}" for fn in "exp log sqrt rsqrt sin cos tanh sigmoid abs floor ceil".split()
} | {"silu": "F.silu"}
COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"})

# On numbers, so that what is constant is computed while compiling.
FOLDS: Mapping[str, Callable[..., Number]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "pow": operator.pow, "neg": operator.neg, "exp": math.exp, "log": math.log, "sqrt": math.sqrt,
    "rsqrt": lambda x: 1 / math.sqrt(x), "sin": math.sin, "cos": math.cos, "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)), "silu": lambda x: x / (1 + math.exp(-x)),
    "abs": abs, "floor": math.floor, "ceil": math.ceil, "min": min, "max": max,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq,
    "ne": operator.ne, "and": operator.and_, "or": operator.or_, "not": operator.not_,
    "where": lambda c, a, b: a if c else b,
}  # fmt: skip


# -- elementwise -----------------------------------------------------------------------------------


def map(body: Body, node: Node) -> Value:
    fn = str(node.attrs["fn"])
    values = body.operands(node)
    if all(v.number is not None for v in values):
        if folded := _folded(fn, values, node):
            return folded
        values = [body.tensor(values[0]), *values[1:]]
    if fn == "where":  # torch takes numbers for the two values, but none for the condition
        values = [body.tensor(values[0]), *values[1:]]
    values = body.together(values)
    axes = union(values, node.type.names)
    dtype = node.type.dtype
    if dtype in ("act", "f32", "i64") and fn not in COMPARISONS:
        given = values[1:] if fn == "where" else values
        widened = _widened(body, given, dtype)
        values = [*values[:1], *widened] if fn == "where" else widened
    lined = [aligned(v, axes) for v in values]
    text, got = _mapped(fn, lined)
    if fn not in COMPARISONS and all(v.number is not None for v in values[fn == "where" :]):
        got = "f32" if dtype in ("act", "f32") else dtype  # torch's default for Python floats
    elif fn in COMPARISONS:
        got = "bool"
    else:
        got = dtype
    return Value(text, axes, got)


def _folded(fn: str, values: Sequence[Value], node: Node) -> Value | None:
    numbers = [v.number for v in values]
    try:
        result = FOLDS[fn](*numbers)
    except (ArithmeticError, ValueError):
        return None
    if node.type.dtype in ("act", "f32"):
        result = float(result)
    return literal(result, node.type.dtype)


def _widened(body: Body, values: Sequence[Value], dtype: DType) -> list[Value]:
    """Operands such that torch's promotion gives ``dtype``: whole numbers meet floats as f32, and
    an f32 scalar alone does not make f32 of an activation."""
    out = [
        body.cast(v, "i64" if dtype == "i64" else "f32") if v.dtype in ("i64", "bool") else v
        for v in values
    ]
    if dtype != "f32":
        return out
    tensors = [v for v in out if v.number is None]
    if any(v.dtype == "f32" and v.axes for v in tensors):
        return out
    return [body.cast(v, "f32") if v.number is None else v for v in out]


def _mapped(fn: str, values: Sequence[Value]) -> tuple[Text, DType | None]:
    texts = [v.text for v in values]
    if fn in BINARY:
        sign, binds = BINARY[fn]
        return binary(texts[0], sign, texts[1], binds), None
    if fn in UNARY_PREFIX:
        return Text(f"{UNARY_PREFIX[fn]}{texts[0].within(UNARY)}", UNARY), None
    if fn in CALLS:
        tensor = texts[0]
        return call(CALLS[fn], str(tensor)), None
    if fn in ("min", "max"):
        bound = "max" if fn == "min" else "min"
        for this, other in ((0, 1), (1, 0)):
            if values[this].number is not None:
                return method(texts[other], "clamp", f"{bound}={texts[this]}"), None
        return call(f"torch.{fn}imum", *(str(t) for t in texts)), None
    if fn == "where":
        return call("torch.where", *(str(t) for t in texts)), None
    raise EmitError(f"no code for the function '{fn}'")


# -- sums ------------------------------------------------------------------------------------------


def reduce(body: Body, node: Node) -> Value:
    fn, over = str(node.attrs["fn"]), list(node.attrs["over"])
    (value,) = body.together([body.tensor(body.operand(node, 0))], body.pads(over))
    if value.dtype in ("bool", "i64"):
        value = body.cast(value, node.type.dtype)
    ragged = [n for n in over if value.batched and body.dims[n].kind in ("time", "history")]
    plain = [n for n in over if n not in ragged]
    if plain:
        value = _reduced(value, fn, plain)
    for name in ragged:
        if fn == "mean":
            kind = body.dims[name].kind
            text = call(f"{body.runtime_step}.{kind}_mean", str(value), str(value.at(name)))
            value = value.with_(text, [a for a in value.axes if a != name])
        else:
            fill = {"sum": "0", "max": "-inf", "min": "inf"}[fn]
            value = body.within(value, [name], fill)
            if fn == "sum":
                value = _reduced(value, fn, [name])
            else:
                text = call(
                    {"max": "largest", "min": "smallest"}[fn], str(value), str(value.at(name))
                )
                value = value.with_(text, [a for a in value.axes if a != name])
    return value


def _reduced(value: Value, fn: str, over: Sequence[str]) -> Value:
    places = sorted(value.at(name) for name in over)
    axes = str(places[0]) if len(places) == 1 else f"({', '.join(str(p) for p in places)})"
    name = {"sum": "sum", "mean": "mean", "max": "amax", "min": "amin"}[fn]
    left = [a for a in value.axes if a not in over]
    return value.with_(method(value.text, name, axes), left)


def contract(body: Body, node: Node) -> Value:
    """A product with a stored matrix, elementwise products, or an einsum."""
    over = tuple(node.attrs["over"])
    names = list(node.inputs)
    numbers = [n for n in names if body.values[n].number is not None]
    tensors = [n for n in names if n not in numbers]
    if not tensors:
        values = [body.tensor(body.values[numbers.pop(0)])]
    else:
        values = [body.cast(body.values[n], node.type.dtype) for n in tensors]
    values = body.together(values, body.pads(over))
    if tensors:
        values = [_masked(body, n, v, over) for n, v in zip(tensors, values, strict=True)]
    result = _linear_product(body, node, values, over)
    if result is None:
        # Views of matrices that are read as they are, and more than once, get their names now.
        for at, name in enumerate(tensors):
            before = body.values[name]
            if before.matrix is not None and not before.cheap and body.uses[name] > 1:
                values[at] = body.cast(body.bind(body.nodes[name]), node.type.dtype)
        result = product(body, node, values, over)
    for name in numbers:
        result = result.with_(binary(result.text, "*", body.values[name].text, PRODUCT))
    return result


def _masked(body: Body, name: str, value: Value, over: tuple[str, ...]) -> Value:
    """An operand with zeros where a sequence has no such place; probabilities have them already."""
    node = body.nodes[name]
    zero = node.attrs["over"] if node.op == "softmax" else ""
    return body.within(value, [n for n in over if n != zero and n in value.axes])


def product(body: Body, node: Node, values: list[Value], over: tuple[str, ...]) -> Value:
    """Elementwise products, a sum, or an einsum."""
    dtype = node.type.dtype
    axes = union(values, [*node.type.names, *over])
    if not over:
        text = aligned(values[0], axes).text
        for other in values[1:]:
            text = binary(text, "*", aligned(other, axes).text, PRODUCT)
        return Value(text, axes, dtype)
    if len(values) == 1:
        return _reduced(values[0], "sum", over)
    left = tuple(a for a in axes if a not in over)
    names = letters(axes, body.kinds())
    subscripts = ",".join("".join(names[a] for a in v.axes) for v in values)
    equation = f'"{subscripts}->{"".join(names[a] for a in left)}"'
    return Value(call("torch.einsum", equation, *(str(v) for v in values)), left, dtype)


def _linear_product(
    body: Body, node: Node, values: list[Value], over: tuple[str, ...]
) -> Value | None:
    """The product of a value and a stored matrix, if that is what it is."""
    if len(values) != 2 or not over:
        return None
    for x, w in (values, reversed(values)):
        if w.matrix is not None and (found := _linear(body, node, x, w.matrix, over)):
            return found
    return None


def _linear(
    body: Body, node: Node, x: Value, matrix: Matrix, over: tuple[str, ...]
) -> Value | None:
    """``F.linear(x, W)`` or ``x @ W`` where the sum runs over all columns, or all rows, of a
    stored matrix, and these are the last axes of x."""
    for summed, kept in ((matrix.columns, matrix.rows), (matrix.rows, matrix.columns)):
        lead = x.axes[: len(x.axes) - len(summed)]
        if set(summed) != set(over) or x.axes[len(lead) :] != summed or set(kept) & set(lead):
            continue
        axes = (*lead, *kept)
        if tuple(a for a in axes if a != BATCH) != node.type.names:
            return None
        rows = x.text if len(summed) == 1 else method(x.text, "flatten", str(-len(summed)))
        if summed == matrix.columns:
            text = call("F.linear", str(rows), str(matrix.text))
        else:
            text = binary(rows, "@", matrix.text, PRODUCT)
        if len(kept) > 1:
            dims = [node.type.dim(name) for name in kept]
            text = method(text, "unflatten", "-1", body.shape(dims))
        return Value(text, axes, node.type.dtype)
    return None
