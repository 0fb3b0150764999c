"""Identities that cost a line of emitted code each: a product with one, a cast to the same dtype.

Only what is exact in every dtype is left out, and never a name: where a named value is the same as
an anonymous one, the anonymous one gets the name.
"""

from __future__ import annotations

from compiler.ir import Graph, Node, Rewriter


def run_on(graph: Graph) -> Graph:
    """The body without values that are another value."""
    rewriter = Rewriter(graph)
    for node in graph:
        same = _same(rewriter, node)
        if same is None:
            rewriter.replace(node.name, rewriter.copy(node).name)
        elif not node.label and (same.rounds or not node.rounds):
            rewriter.replace(node.name, same.name)
        elif _may_take_its_name(graph, rewriter, node, same):
            made = same.with_(
                name=rewriter.new.fresh(node.name),
                label=node.label,
                rounds=node.rounds or same.rounds,
                span=node.span,
                type=node.type,
            )
            rewriter.replace(node.name, rewriter.new.add(made).name)
        else:
            rewriter.replace(node.name, rewriter.copy(node).name)
    return rewriter.done()


def _same(rewriter: Rewriter, node: Node) -> Node | None:
    """The value, in the new graph, that this node's is but for rounding."""
    new = rewriter.new
    if node.op == "cast":
        source = new[rewriter.to[node.inputs[0]]]
        return source if source.type.dtype == node.type.dtype else None
    if node.op == "map" and node.attrs["fn"] in ("mul", "div"):
        left, right = (new[rewriter.to[name]] for name in node.inputs)
        orders = [(left, right)] if node.attrs["fn"] == "div" else [(left, right), (right, left)]
        for value, one in orders:
            if _is_one(one) and value.type.dtype == node.type.dtype:
                return value
    return None


def _is_one(node: Node) -> bool:
    value = node.attrs.get("value") if node.op == "constant" else None
    return value == 1 and not isinstance(value, bool)


def _may_take_its_name(graph: Graph, rewriter: Rewriter, node: Node, same: Node) -> bool:
    """The anonymous value is read here alone, so that the new one takes its place; caches, sources
    and arguments are what they are."""
    (read,) = [i for i in node.inputs if rewriter.to[i] == same.name] or [""]
    alone = graph.nx.out_degree(read) == 1 and read != graph.output
    return alone and not same.label and bool(same.inputs) and same.op != "cache"
