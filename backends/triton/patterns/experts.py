"""Routed experts: rows sorted by expert, a product with all experts' matrices at once, the sum."""

from __future__ import annotations

from dataclasses import dataclass, replace

from backends.pytorch.emit.body import Body
from backends.pytorch.emit.kernels import Group, unread
from backends.pytorch.emit.text import Text, call
from backends.pytorch.emit.values import Value
from backends.triton.families import combine, dispatch
from backends.triton.families.formats import Quantised
from backends.triton.kernel import Operator
from backends.triton.patterns.coded import format_of, named
from backends.triton.patterns.context import Context, packed
from compiler.ir import Graph, Node

ELSEWHERE = frozenset({"input", "param", "state", "constant"})


@dataclass(frozen=True)
class Routed:
    """One sum over a token's experts.

    Attributes:
        root: the node whose value the kernel gives: the sum, or that with ``added`` in it, rounded.
        block: what an expert computes, for rows that stand one after another.
    """

    node: Node
    root: Node
    covered: frozenset[str]
    block: Graph
    added: Node | None


def routed(context: Context, node: Node) -> Group | None:
    """Experts that each token picks, with what is added to their sum."""
    found = _found(context, node)
    if found is None or found.covered & context.taken:
        return None
    a = found.node.attrs
    pick, gate, x = (context.operand(found.node, i) for i in range(3))
    over = pick.type.of
    if over is None or over.start.at(context.program.sizes) != 0:
        return None
    experts, picks = context.size(over), context.size(pick.type.dims[-1])
    if context.blocks.get(found.block.name) is None:
        return None
    inner = replace(
        context.within(found.block),
        experts=context.blocks[found.block.name],
        taken=frozenset(),
    )
    if not _computed(inner):
        return None
    width = context.size(found.block.result.type.dims[-1])
    try:
        coding = format_of(x.type.coding) if x.type.dtype == "coded" else None
        sending = _dispatch(context, x, coding, experts, picks)
        summing = combine.generate(
            combine.CombineSpec(picks, width, int(found.added is not None), context.dtype),
            context.target,
        )
    except (ValueError, KeyError):
        return None
    reads = [pick.name, gate.name, x.name, *([found.added.name] if found.added else [])]

    def write(body: Body, root: Node, prefix: str) -> Value | None:
        given = packed(body, prefix, *reads)
        if given is None or body.owner.array(str(a["child"])).numbered:
            return None
        rows, row_of = _sent(context, body, prefix, found, sending, x)
        result = _block(context, body, found, rows)
        added = [given[3]] if found.added else []
        text = call(context.use(summing), str(result), row_of, given[1], *added)
        return Value(text, found.root.type.names, "act")

    return Group(found.root.name, found.covered, write, frozenset(reads))


def _found(context: Context, node: Node) -> Routed | None:
    """The node is the sum, or what rounds it after something is added."""
    root, added = node, None
    covered = {node.name}
    if node.op == "cast" and node.type.dtype == "act":
        total = context.operand(node, 0)
        if total.op != "map" or total.attrs["fn"] != "add" or len(context.users(total.name)) > 1:
            return None
        a, b = (context.operand(total, i) for i in range(2))
        node, added = (a, b) if a.op == "experts" else (b, a)
        covered |= {total.name, node.name}
        if added.type.dtype != "act" or added.type.names != root.type.names:
            return None
        if len(context.users(node.name)) > 1:
            return None
    if node.op != "experts" or len(node.inputs) != 3:
        return None
    pick, gate, x = (context.operand(node, i) for i in range(3))
    row, *rest = pick.type.dims
    if row.kind == "plain" or len(rest) != 1 or gate.type.names != pick.type.names:
        return None
    if gate.type.dtype != "f32" or len(x.type.dims) != 2 or x.type.dims[0].name != row.name:
        return None
    if tuple(node.attrs["rows"]) != pick.type.names or len(root.type.dims) != 2:
        return None
    block = context.program.bodies[node.attrs["block"]]
    if len(block.inputs) != 1 or len(block.result.type.dims) != 2:
        return None
    if block.result.type.dtype != "act":
        return None
    return Routed(node, root, frozenset(covered), block, added)


def _computed(inner: Context) -> bool:
    """Do kernels compute all of a block?"""
    groups = list(inner.groups(inner))
    covered = {name for group in groups for name in group.covered}
    reads = {name for group in groups for name in group.reads or ()}
    idle = unread(inner.graph, groups)
    for node in inner.graph:
        if node.op == "param" and node.name in reads:
            return False
        if node.name not in covered | idle and node.op not in ELSEWHERE:
            return False
    return inner.graph.output in covered


def _dispatch(
    context: Context, x: Node, coding: Quantised | None, experts: int, picks: int
) -> Operator:
    width = context.size(x.type.dims[1])
    spec = dispatch.DispatchSpec(experts, picks, width, context.dtype)
    if coding is not None:
        tiles = coding.scales(1, width)[1]
        spec = replace(spec, dtype=coding.element, scales=tiles, scale=coding.scale)
    return dispatch.generate(spec, context.target)


def _sent(
    context: Context,
    body: Body,
    prefix: str,
    found: Routed,
    sending: Operator,
    x: Node,
) -> tuple[str, str]:
    """Names of the sorted rows, and of where each choice's row is."""
    span = found.node.span
    pick = str(body.values[prefix + found.node.inputs[0]])
    rows, row_of, offsets = (body.names.take(n) for n in ("rows", "row_of", "offsets"))
    function = context.use(sending)
    body.shared["offsets"] = offsets
    if x.type.dtype != "coded":
        given = str(body.values[prefix + x.name])
        body.line(f"{rows}, {row_of}, {offsets} = {call(function, pick, given)}", span)
        return rows, row_of
    codes = named(body, prefix + x.name)
    scales = body.names.take("row_scales")
    text = call(function, pick, f"{codes}.codes", f"{codes}.scales")
    body.line(f"{rows}, {scales}, {row_of}, {offsets} = {text}", span)
    assert x.type.coding is not None
    coding = body.owner.emitter.codings.name(x.type.coding)
    sorted_rows = body.names.take("sorted_rows")
    body.line(f"{sorted_rows} = {call('Coded', rows, scales, coding)}", span)
    return sorted_rows, row_of


def _block(context: Context, body: Body, found: Routed, rows: str) -> Value:
    """What the experts give for the sorted rows, written in place."""
    (given,) = found.block.inputs
    value = Value(Text(rows), given.type.names, given.type.dtype)
    return body.inline(found.block, found.node, [value])
