"""Products of tokens with a stored matrix, or with a part of it for each head."""

from __future__ import annotations

from dataclasses import dataclass

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.kernels import Group
from backends.pytorch.emit.text import call, method
from backends.pytorch.emit.values import Value
from backends.triton.families import gemm, grouped_gemm
from backends.triton.kernel import Operator
from backends.triton.patterns.coded import format_of, stacked
from backends.triton.patterns.context import Context, packed
from backends.triton.patterns.stored import Place, place
from compiler.ir import Dim, Node


@dataclass(frozen=True)
class Found:
    """A product that a kernel computes: ``[rows, columns of a]`` times the stored matrix."""

    x: Node
    matrix: Place
    parts: int
    own: bool
    n: int
    k: int
    step: int
    transposed: bool
    covered: tuple[str, ...]

    def stored(self, body: Body) -> list[str]:
        """The matrix as arguments: codes and scales where it is quantised."""
        parameter = self.matrix.parameter
        text = body.owner.attribute(str(parameter.attrs["param"]))
        return [f"{text}.codes", f"{text}.scale"] if parameter.type.coding else [text]

    def spec(self, dtype: str, out: str) -> gemm.Gemm:
        """What the kernel is generated for.

        Raises:
            ValueError: no kernel reads the matrix as it is stored.
        """
        m = self.matrix
        coding = m.parameter.type.coding
        taken = (self.parts * self.step if self.parts > 1 else self.n, self.k)
        whole = not (self.transposed or m.row or m.column) and (m.rows, m.columns) == taken
        between = self.k if self.transposed else self.n
        return gemm.Gemm(
            n=self.n,
            k=self.k,
            parts=self.parts,
            own=self.own,
            stored=None if whole else (m.rows, m.columns),
            row=m.row,
            column=m.column,
            step=self.step if self.parts > 1 and self.step != between else 0,
            transposed=self.transposed,
            weights=format_of(coding) if coding is not None else None,
            dtype=dtype,
            out=out,
        )


def product(context: Context, node: Node) -> Group | None:
    """A contraction of tokens with a stored matrix."""
    if node.op != "contract" or len(node.inputs) != 2:
        return None
    found = find(context, node)
    if found is None:
        return None
    out = context.dtype_of(node)
    if context.experts is not None:
        return grouped(context, node, found, out)
    try:
        operator = gemm.generate(found.spec(context.dtype, out), context.target)
    except ValueError:
        return None
    return _group(context, node, found, operator)


def grouped(context: Context, node: Node, found: Found, out: str) -> Group | None:
    """A product of rows that are sorted by expert, each with its expert's matrix."""
    assert context.experts is not None
    experts = context.experts
    try:
        one = found.spec(context.dtype, out)
        if one.parts > 1 or one.transposed or one.stored is not None:
            return None
        spec = grouped_gemm.GroupedGemm(
            experts.count, one.n, one.k, weights=one.weights, dtype=context.dtype, out=out
        )
        operator = grouped_gemm.generate(spec, context.target)
    except (ValueError, KeyError):
        return None

    def write(body: Body, root: Node, prefix: str) -> Value | None:
        if packed(body, prefix, found.x.name) is None:
            return None
        rows = str(body.values[prefix + found.x.name])
        given = stacked(body, experts, found.matrix.parameter)
        text = call(context.use(operator), rows, *given, body.shared["offsets"])
        return Value(text, node.type.names, node.type.dtype)

    return Group(node.name, frozenset({node.name}), write, frozenset({found.x.name}))


def find(context: Context, node: Node, rows: str = "") -> Found | None:
    """How the contraction is a product of rows and a stored matrix.

    Args:
        rows: the kind of dim that rows are; tokens, or rows that were chosen, unless given.
    """
    if context.dtype == "float32":
        return None  # tensor cores would round its operands
    over = set(node.attrs["over"])
    for x_at, w_at in ((0, 1), (1, 0)):
        matrix = place(context, node.inputs[w_at])
        w = context.operand(node, w_at)
        if matrix is None or matrix.parameter.type.dtype not in ("act", "coded"):
            continue
        x, widened = _narrow(context, context.operand(node, x_at))
        if x.type.dtype != "act" or not x.type.dims or x.type.dims[0].kind == "plain":
            continue
        row, *rest = x.type.dims
        if (row.kind == "history") != (rows == "history") or any(d.kind != "plain" for d in rest):
            continue
        heads = [d for d in rest if d.name not in over]
        summed = [d for d in rest if d.name in over]
        kept = [d for d in w.type.dims if d.name not in over and d.name not in x.type.names]
        if {d.name for d in summed} != over or rest != [*heads, *summed]:
            continue
        if {d.name for d in (*heads, *summed, *kept)} != set(w.type.names):
            continue
        kept = [d for name in node.type.names for d in kept if d.name == name]
        if node.type.names != (row.name, *(d.name for d in (*heads, *kept))):
            continue
        shape = _shape(context, matrix, heads, summed, kept)
        if shape is not None:
            views = _views(context, node.inputs[w_at], node)
            covered = (*widened, *views)
            return Found(x, matrix, *shape, covered=covered)
    return None


def _narrow(context: Context, x: Node) -> tuple[Node, tuple[str, ...]]:
    """The activations behind a cast to float32: their products are exact in it."""
    if x.op == "cast" and x.type.dtype == "f32":
        return context.operand(x, 0), (x.name,)
    return x, ()


def _views(context: Context, name: str, root: Node) -> tuple[str, ...]:
    """The casts between a parameter and the product: they are not computed. Views are free."""
    found = []
    node = context.graph[name]
    while node.inputs:
        if node.op in ("cast", "dequantize"):
            found.append(node.name)
        node = context.operand(node, 0)
    return tuple(found)


def _shape(
    context: Context, matrix: Place, heads: list[Dim], summed: list[Dim], kept: list[Dim]
) -> tuple[int, bool, int, int, int, bool] | None:
    """parts, own, n, k, step, transposed."""
    over = matrix.together(summed, context)
    if over is None:
        return None
    k, step_k = over
    for transposed in (False, True):
        if step_k != ((1, 0) if transposed else (0, 1)):
            continue
        unit = (0, 1) if transposed else (1, 0)
        own = matrix.together(heads, context)
        whole = matrix.together(kept, context)
        if heads:
            if own and whole and whole[1] == unit and own[1][1] == 0:
                return own[0], True, whole[0], k, own[1][0], transposed
            continue
        if whole and whole[1] == unit:
            return 1, False, whole[0], k, 0, transposed
        rest = matrix.together(kept[1:], context)
        first = matrix.together(kept[:1], context)
        if rest and first and rest[1] == unit and first[1][1] == 0:
            return first[0], False, rest[0], k, first[1][0], transposed
    return None


def _group(context: Context, node: Node, found: Found, operator: Operator) -> Group:
    def write(body: Body, root: Node, prefix: str) -> Value | None:
        if packed(body, prefix, found.x.name) is None:
            return None
        rows = body.values[prefix + found.x.name].text
        if len(found.x.type.dims) > 2:
            rows = method(rows, "flatten", "1")
        text = call(context.use(operator), str(rows), *found.stored(body))
        kept = node.type.dims[1:]
        if len(kept) > 1:
            text = method(text, "unflatten", "-1", body.shape(kept))
        return Value(text, node.type.names, node.type.dtype)

    own = {n for n in found.covered if context.users(n) == {node.name}}
    return Group(node.name, frozenset({node.name, *own}), write, frozenset({found.x.name}))
