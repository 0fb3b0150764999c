"""What an op costs: floating-point operations and bytes, at given lengths.

FLOPs are those of contractions, two per multiply-add, as the field counts a model's compute; maps
and reductions count nothing beside them. Bytes are what a value holds, with two bytes for the
activation dtype (BF16).

A time is the roofline's: max(FLOPs / peak, bytes / bandwidth). Only the ratio of the two matters
for a choice between programs, so time is measured in FLOPs and a byte is worth ``BALANCE`` of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from compiler.ir import Dim, Graph, Node

# FLOPs that a GPU does in the time of one byte from memory: 989 TFLOPS in BF16 at 3.35 TB/s, an
# H100's or H800's (an A100's is 153, a B200's 281). Orders are chosen with it on every target, so
# that the same source gives the same program.
BALANCE = 295

# The history at which an order is judged: a common training length, and close to the mean context
# that a large deployment has reported (4,989).
REPRESENTATIVE = 4096

WIDTH = {"act": 2, "f32": 4, "i64": 8, "bool": 1}


def lengths(
    sizes: Mapping[str, int], time: int, history: int | None = None, rows: int | None = None
) -> dict[str, int]:
    """The constants together with the lengths of one step; without a history, s is t."""
    history = time if history is None else history
    rows = time if rows is None else rows
    return {**sizes, "time": time, "history": history, "wanted": 1, "rows": rows}


def volume(dims: Iterable[Dim], at: Mapping[str, int]) -> int:
    """How many elements these dims span."""
    return prod(dim.size.at(at) for dim in dims)


def is_square(dims: Iterable[Dim]) -> bool:
    """Does a value pair the positions asked for with all positions so far? Scores, masks and
    probabilities do. They are as many as time x history and are never written to memory: an
    attention kernel keeps them on the chip (FlashAttention, arXiv:2205.14135)."""
    kinds = {dim.kind for dim in dims}
    return {"time", "history"} <= kinds


def flops_of(graph: Graph, node: Node, at: Mapping[str, int]) -> int:
    """A contraction's multiply-adds, twice; n operands at once take n - 1 multiplications."""
    if node.op != "contract":
        return 0
    dims = {dim.name: dim for operand in graph.operands(node) for dim in operand.type.dims}
    return max(2, len(node.inputs)) * volume(dims.values(), at)
