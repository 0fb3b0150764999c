"""What is kept of earlier positions, the rows of tables, and attention over histories."""

from __future__ import annotations

from dataclasses import dataclass

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.kernels import Group
from backends.pytorch.emit.text import Text, arguments, call, wrapped
from backends.pytorch.emit.values import BATCH, Value
from backends.pytorch.runtime.sizes import PAGE
from backends.triton.families import attention_decode, attention_prefill, gemm, rows
from backends.triton.families.attention import AttentionSpec, Rows, Term
from backends.triton.kernel import Operator
from backends.triton.patterns import scores
from backends.triton.patterns.context import Context, calls, packed
from backends.triton.patterns.products import Found, find
from compiler.ir import Dim, Graph, Node

DECODED = 64  # rows of a tile: queries of a sequence, times the heads that share a key


def cache(context: Context, node: Node) -> Group | None:
    """A value of each token, kept in pages."""
    if not kept(context, node):
        return None
    value = context.operand(node, 0)
    width = context.sizes(value.type.dims[1:])
    operator = rows.generate(rows.Rows(width, context.dtype, store=True), context.target)

    def write(body: Body, root: Node, prefix: str) -> Value | None:
        given = packed(body, prefix, value.name)
        if given is None:
            return None
        name = f'"{node.attrs["name"]}"'
        store = context.use(operator)
        text = call("paged.extend", body.runtime_step, "self", name, given[0], store)
        return Value(text, (BATCH, *node.type.names), node.type.dtype)

    return Group(node.name, frozenset({node.name}), write)


def kept(context: Context, node: Node) -> bool:
    """A cache of activations whose first axis is time, and which keeps all of them."""
    if node.op != "cache" or node.attrs.get("last") is not None:
        return False
    value = context.operand(node, 0)
    first, *rest = value.type.dims or (None,)
    return (
        first is not None
        and first.kind == "time"
        and node.type.dtype == value.type.dtype == "act"
        and node.type.names[1:] == tuple(d.name for d in rest)
        and all(d.kind == "plain" for d in rest)
    )


def in_pages(context: Context, graph: Graph, name: str) -> bool:
    """Is it what ``cache`` gives, here or where this body is called from?"""
    node = graph[name]
    if node.op == "cache":
        return kept(context.within(graph), node)
    if node.op != "input":
        return False
    at = [n.name for n in graph.inputs].index(name)
    callers = [
        (caller, n.inputs[at])
        for caller in context.program.bodies.values()
        for n in caller
        if n.op == "branch" and graph.name in (n.attrs["then"], n.attrs["otherwise"])
    ]
    return bool(callers) and all(in_pages(context, g, operand) for g, operand in callers)


def gather(context: Context, node: Node) -> Group | None:
    """Rows of a matrix by a number of each token."""
    if node.op != "gather":
        return None
    table, index = (context.operand(node, i) for i in range(2))
    if table.op != "param" or len(table.type.dims) != 2 or table.type.dtype != "act":
        return None
    if node.attrs["dim"] != table.type.names[0] or len(index.type.dims) != 1:
        return None
    if index.type.dims[0].kind == "plain" or node.type.names != (
        index.type.names[0],
        table.type.names[1],
    ):
        return None
    spec = rows.Rows(context.size(table.type.dims[1]), context.dtype)
    operator = rows.generate(spec, context.target)

    def given(body: Body, prefix: str) -> list[str] | None:
        return packed(body, prefix, table.name, index.name)

    return calls(context, node, (), given, operator)


def select_rows(context: Context, node: Node) -> Group | None:
    """The rows whose result is wanted."""
    if node.op != "select_rows":
        return None
    x = context.operand(node, 0)
    first, *rest = x.type.dims
    if first.kind != "time" or len(rest) != 1 or x.type.dtype != "act":
        return None
    operator = rows.generate(rows.Rows(context.size(rest[0]), context.dtype), context.target)

    def given(body: Body, prefix: str) -> list[str] | None:
        value = packed(body, prefix, x.name)
        return [*value, f"{body.runtime_step}.rows"] if value else None

    return calls(context, node, (), given, operator)


# -- attention -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A key or value.

    Attributes:
        product: what computes it from a history, None where it is in pages itself; by: the kernel.
    """

    node: Node
    rows: Rows
    product: Found | None = None
    by: Operator | None = None


def attention(context: Context, node: Node) -> Group | None:
    """Attention of packed queries over histories in pages, or over what is computed from these."""
    if node.op != "attention" or not isinstance(node.attrs["mask"], tuple | None):
        return None
    a = node.attrs
    heads = [node.type.dim(name) for name in a["heads"]]
    time = str(a["time"])
    if node.type.names != (time, *a["heads"], *a["values"]) or node.type.dtype != "act":
        return None
    if any(context.operand(node, i).op != "position" for i in a.get("mask_operands", ())):
        return None
    held: dict[int, Held] = {}
    terms = []
    for number, (q, k, over) in enumerate(a["terms"]):
        query, key = context.operand(node, q), context.operand(node, k)
        if query.type.names != (time, *a["heads"], *over) or query.type.dtype != "act":
            return None
        found = _held(context, key, heads, over)
        if found is None:
            return None
        held[k] = found
        dim = context.sizes(query.type.dim(name) for name in over)
        terms.append(Term("abcdefgh"[number], Rows(context.sizes(heads), dim), found.rows))
    function = a.get("score")
    score = () if function is None else scores.statements(context.program.bodies[function])
    sink = None if a.get("sink") is None else context.operand(node, a["sink"])
    if score is None or (sink and sink.type.names != tuple(a["heads"])):
        return None
    keys = [k for _, k, _ in a["terms"]]
    shared = keys.index(a["value"]) if a["value"] in keys else None
    if shared is None:
        found = _held(context, context.operand(node, a["value"]), heads, a["values"])
        if found is None:
            return None
        held[a["value"]] = found
    value = held[a["value"]].rows if shared is None else shared
    try:
        spec = AttentionSpec(
            heads=context.sizes(heads),
            terms=tuple(terms),
            value=value,
            scale=float(a["scale"]),
            visible=a["mask"],
            dtype=context.dtype,
            page=PAGE,
            score=score,
            sink="" if sink is None else context.dtype if sink.type.dtype == "act" else "float32",
        )
        few, many = _operators(context, spec)
    except ValueError:
        return None
    covered = {h.node.name for h in held.values() if h.product is not None}
    if not context.inner(covered, node.name):
        return None
    order = [*dict.fromkeys([*keys, a["value"]])]
    return _written(context, node, spec, [held[i] for i in order], sink, few, many, covered)


def _operators(context: Context, spec: AttentionSpec) -> tuple[Operator | None, Operator | None]:
    """For few queries of a sequence, and for many. A value that is a key as well is what decoding
    makes of keys and values that are computed, and these are what many queries are worth."""
    few = many = None
    if not spec.packed:
        few = attention_decode.generate(spec, context.target)
    if not isinstance(spec.value, int):
        many = attention_prefill.generate(spec, context.target)
    if few is None and many is None:
        raise ValueError("neither for few nor for many queries")
    return few, many


def _held(context: Context, node: Node, heads: list[Dim], over: tuple[str, ...]) -> Held | None:
    """A key or value: of the first heads, and with its own dims last."""
    names = node.type.names
    own = names[1 : len(names) - len(over)]
    if node.type.dtype != "act" or names[len(names) - len(over) :] != tuple(over):
        return None
    if own != tuple(d.name for d in heads[: len(own)]) or node.type.dims[0].kind != "history":
        return None
    count = context.sizes(heads[: len(own)])
    dim = context.sizes(node.type.dim(name) for name in over)
    if in_pages(context, context.graph, node.name):
        return Held(node, Rows(count, dim, paged=True))
    found = find(context, node, "history") if node.op == "contract" else None
    if found is None or not in_pages(context, context.graph, found.x.name):
        return None
    try:
        operator = gemm.generate(found.spec(context.dtype, context.dtype), context.target)
    except ValueError:  # no kernel reads the matrix as it is stored
        return None
    return Held(node, Rows(count, dim), found, operator)


def _written(
    context: Context,
    node: Node,
    spec: AttentionSpec,
    held: list[Held],
    sink: Node | None,
    few: Operator | None,
    many: Operator | None,
    covered: set[str],
) -> Group:
    a = node.attrs
    queries = [node.inputs[q] for q, _, _ in a["terms"]]

    def write(body: Body, root: Node, prefix: str) -> Value | None:
        given = packed(body, prefix, *queries)
        if given is None:
            return None
        at = places(body)
        packs: dict[str, str] = {}
        for one in held:
            if one.product is None:
                given.append(f"{body.values[prefix + one.node.name].text.atom}.pages")
                continue
            given.append(_computed(context, body, prefix, one, packs))
        given += [str(body.values[prefix + sink.name])] if sink else []
        given.append(f"{at}.q_offsets")
        given.append(f"{at}.k_offsets" if spec.packed else f"{at}.lengths")
        given += [f"{at}.page_table"] if spec.paged else []
        given.append(f"{at}.most_queries")
        extra = [] if spec.paged else [f"{at}.most_positions"]
        shape = node.type.dims[1:]
        unflattened = len(shape) != 2

        def text(operator: Operator, more: list[str]) -> Text:
            found = call(context.use(operator), *given, *more)
            if unflattened:
                sizes = arguments([str(context.size(d)) for d in shape])
                found = Text(f"{found}.view({', '.join(['-1', sizes[1:-1]])})")
            return found

        if few is None or many is None:
            operator = few or many
            assert operator is not None
            result = text(operator, extra if operator is few else [])
            return Value(result, node.type.names, node.type.dtype)
        name = body.variable(root)
        most = max(1, DECODED // spec.group)
        body.line(f"if {body.runtime_step}.time <= {most}:", root.span)
        body.lines += wrapped(f"{name} = {text(few, extra)}", body.indent + 4)
        body.line("else:", root.span)
        body.lines += wrapped(f"{name} = {text(many, [])}", body.indent + 4)
        return Value(Text(name), node.type.names, node.type.dtype)

    sources = [h.product.x.name if h.product else h.node.name for h in held]
    sources += [sink.name] if sink else []
    return Group(
        node.name, frozenset({node.name, *covered}), write, frozenset([*queries, *sources])
    )


def _computed(context: Context, body: Body, prefix: str, one: Held, packs: dict[str, str]) -> str:
    """A key or value of all positions, packed, under a name."""
    assert one.product is not None and one.by is not None
    x = one.product.x
    if x.name not in packs:
        width = context.sizes(x.type.dims[1:])
        take = context.use(rows.generate(rows.Rows(width, context.dtype), context.target))
        history = body.values[prefix + x.name].text.atom
        packs[x.name] = body.names.take(f"{body.stem(x)}_packed")
        body.line(f"{packs[x.name]} = {history}.packed({take})", one.node.span)
    name = body.names.take(body.stem(one.node))
    text = call(context.use(one.by), packs[x.name], *one.product.stored(body))
    body.line(f"{name} = {text}", one.node.span)
    return name


def places(body: Body) -> str:
    """The variable that tells where queries and histories lie; made where it is first needed."""
    if "places" not in body.shared:
        body.shared["places"] = body.names.take("at")
        body.line(f"{body.shared['places']} = paged.places({body.runtime_step})", None)
    return body.shared["places"]
