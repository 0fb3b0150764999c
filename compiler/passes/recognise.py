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
| ``mask`` | None, (least, beyond) or str | visible: everything; where least <= position[time] - |
| | | position[history] < beyond (beyond None: no bound; causal is (0, None), a window of w |
| | | (0, w)); else a graph bool[time, history] whose inputs are operands ``mask_operands`` |
| ``mask_operands`` | (int, ...) | what the mask reads; an interval: (time's, history's positions) |
| ``time``, ``history`` | str | the dims |
| ``heads`` | (str, ...) | the scores' other dims; a key or value that lacks one is shared by them |
| ``values`` | (str, ...) | dims of ``value`` that are neither history nor heads |
| ``softmax_dtype`` | str | dtype of scores and probabilities (f32) |

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

from compiler.ir import Program


def run(program: Program) -> Program:
    """Replace what is recognised in every body; the bodies replaced are added to the program."""
    return program
