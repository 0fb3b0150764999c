"""recognise: sub-graphs that a backend may have one kernel for become composite nodes.

Nothing here knows a model. A pattern is an algebraic shape: "a softmax over history of a sum of
contractions, contracted with a value", not a name. A composite keeps its meaning: attribute
``body`` names a graph of the program that holds the very nodes it replaced, and whose inputs, in
order, are the composite's operands. Whoever has no kernel runs that graph *in the module of the
body that holds the composite* (parameters are operands, but an ``apply`` in it names a child).

All positions below (``terms``, ``value``, ``gain``, ...) count the composite's operands from 0.
Operands are taken before casts to f32: the cast is in ``body``, so that a kernel reads ``act``.
The result's dims, and their order, are the node's type.

``attention``: softmax over history of a sum of score contractions, contracted with a value. The
expanded and the absorbed form of a latent attention differ only in their operands (in the absorbed
one the value is a key too).

| attribute | type | meaning |
| --- | --- | --- |
| ``body`` | str | the graph of the nodes replaced |
| ``terms`` | ((query, key, over), ...) | score = sum of contract(query, key) over these dims |
| ``value`` | int | operand with dims history and what the result keeps; may be a key as well |
| ``scale`` | float | what the sum is multiplied by (constants folded, wherever they stood) |
| ``mask`` | None, (least, beyond) or str | visible: all; where least <= position[time] - |
| | | position[history] < beyond (None: no bound; causal is (0, None), a window of w |
| | | (0, w)); else a graph bool[time, history] whose inputs are operands ``mask_operands`` |
| ``mask_operands`` | (int, ...) | what the mask reads; an interval: (time's, history's positions) |
| ``time``, ``history`` | str | the dims |
| ``heads`` | (str, ...) | the scores' other dims; a key or value that lacks one is shared by them |
| ``values`` | (str, ...) | dims of ``value`` that are neither history nor heads |
| ``softmax_dtype`` | str | dtype of scores and probabilities (f32) |
| ``score`` | str, optional | a graph f32[] -> f32[]: what is made of each scaled sum before the |
| | | mask (a soft cap); dims are lifted over |
| ``sink`` | int, optional | operand over heads: one more logit in the softmax's denominator, of |
| | | no position and no value |

``rms_norm``: x / sqrt(mean(x^2) + eps), times a gain if there is one; computed in f32.

| attribute | type | meaning |
| --- | --- | --- |
| ``body`` | str | the graph of the nodes replaced |
| ``over`` | (str, ...) | dims of operand 0 that the mean runs over |
| ``eps`` | float | added to the mean |
| ``gain`` | int or None | operand over ``over``; its product is taken after x is normalised |
| ``rounds_before_gain`` | bool | x is rounded to act before the gain (``unit`` is no |
| | | f32 value in the source); False: one rounding, at the result |

``experts``: an array of blocks indexed by picks, and the gate-weighted sum of what they give:
result = sum over ``picks`` of gate * block[pick](args). Operands: pick, gate, args...

| attribute | type | meaning |
| --- | --- | --- |
| ``body`` | str | the graph of the nodes replaced: an ``apply`` and a ``contract`` |
| ``block`` | str | the apply's ``body``: what one block computes |
| ``child``, ``over``, ``rows``, ``dims`` | | the apply's |
| ``picks`` | str | the dim of pick that is summed (k of ``pick[k]``) |

``silu`` is no composite: x * sigmoid(x) becomes ``map`` with fn ``silu``; a gated unit is then the
product of two maps, which emitters fuse as any maps.
"""

from __future__ import annotations

from collections.abc import Iterator

from compiler.ir import Graph, Node, Program, Rewriter
from compiler.passes import attention, linear, norms
from compiler.passes.composites import Match, narrow, replace, rounds, wide, with_cast


def run(program: Program) -> Program:
    """Replace what is recognised in every body; the bodies replaced are added to the program."""
    program = linear.run(program)
    bodies: dict[str, Graph] = {}
    taken = set(program.bodies)
    for name, graph in program.bodies.items():
        matches = [*attention.find(graph), *norms.find(graph), *_experts(graph)]
        made, graphs = replace(graph, matches, taken) if matches else (graph, [])
        bodies[name] = _silu(made)
        bodies |= {graph.name: _silu(graph) for graph in graphs}
    return program.with_bodies(bodies)


# -- routed experts ------------------------------------------------------------------------------


def _experts(graph: Graph) -> Iterator[Match]:
    """sum over k of gate[k] * apply(pick[k], ...): a contraction, or a product that is summed."""
    for node in graph:
        if node.op == "contract":
            product = node
        elif node.op == "reduce" and node.attrs["fn"] == "sum":
            product = wide(graph, node.inputs[0])
            if product.op != "map" or product.attrs["fn"] != "mul" or rounds(product):
                continue
        else:
            continue
        if len(product.inputs) != 2 or len(node.attrs["over"]) != 1:
            continue
        for applied, gate in (product.inputs, product.inputs[::-1]):
            apply, weight = wide(graph, applied), narrow(graph, gate)
            if apply.op == "apply" and _gates(apply, weight, node.attrs["over"][0]):
                yield _routed(graph, node, apply, weight)


def _gates(apply: Node, gate: Node, picks: str) -> bool:
    rows = apply.attrs["rows"]
    return picks in rows and picks in gate.type.names and set(gate.type.names) <= set(rows)


def _routed(graph: Graph, node: Node, apply: Node, gate: Node) -> Match:
    pick, *args = apply.inputs
    operands = tuple(dict.fromkeys((pick, gate.name, *args)))
    attrs = {key: apply.attrs[key] for key in ("child", "over", "rows", "dims")}
    attrs |= {"block": apply.attrs["body"], "picks": node.attrs["over"][0]}
    return Match("experts", with_cast(graph, node).name, operands, attrs)


# -- activations ---------------------------------------------------------------------------------


def _silu(graph: Graph) -> Graph:
    """x * sigmoid(x) as one map."""
    rewriter = Rewriter(graph)
    for node in graph:
        source = _silu_of(graph, node)
        if source is None:
            rewriter.replace(node.name, rewriter.copy(node).name)
        else:
            made = node.with_(inputs=(rewriter.to[source],), attrs={"fn": "silu"})
            rewriter.replace(node.name, rewriter.new.add(made).name)
    return rewriter.done()


def _silu_of(graph: Graph, node: Node) -> str | None:
    if node.op != "map" or node.attrs["fn"] != "mul":
        return None
    for x, gate in (node.inputs, node.inputs[::-1]):
        inner = graph[gate]
        if inner.op == "map" and inner.attrs["fn"] == "sigmoid" and inner.inputs == (x,):
            return x if not rounds(inner) else None
    return None
