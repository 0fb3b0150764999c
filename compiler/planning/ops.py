"""What one rank computes, as a flat list: ops, what they read, and the pieces they stand in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from compiler.ir import Node
from compiler.planning.routing import Router


class Param(NamedTuple):
    """A parameter: the path and ranges of its pattern (``layers[{0}].attn.W_o``), and its name."""

    path: str
    ranges: tuple[range, ...]
    name: str


@dataclass(frozen=True)
class Operand:
    """What an op reads.

    Attributes:
        value: the op that computes it; None for parameters and for what costs nothing to read.
        param: the parameter that it is, or part of it.
        elements: numbers of it that this rank reads.
        dtype: how it is stored, not what a cast makes of it.
    """

    elements: float
    dtype: str
    value: int | None = None
    param: Param | None = None
    state: bool = False


@dataclass
class Op:
    """One node, on one rank.

    Attributes:
        kind: product (a contraction with a parameter), mixing (one without), attention, light (all
            that is bound by memory), scan, dispatch, combine, layers (a loop over layers).
        label: what the source calls the value; ``block`` and ``path`` say where, ``body`` in
            which of the block's bodies.
        flops: of products, two per multiply-add; of attention, scores and values apart in
            ``scores`` and ``values``.
        blocks: blocks of an array that this rank holds and runs this op for; 1 elsewhere.
        summed: mesh axes over which the result is a partial sum.
        wide: whether a product reads numbers that are wider than the model's own type.
        grouped: in a block of an array that picks choose from.
        router, axes, row: of dispatch and combine: how they pick, the mesh axes that the blocks are
            spread over, and how many numbers a token's row has.
        keys: of an attention whose scores are several products, the numbers of all their keys side
            by side, those that heads share repeated: what a kernel for one product reads.
    """

    id: int
    kind: str
    node: Node
    block: str
    path: str
    inputs: tuple[Operand, ...]
    elements: float
    dtype: str
    flops: float = 0.0
    scores: float = 0.0
    values: float = 0.0
    blocks: float = 1
    over: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    wide: bool = False
    grouped: bool = False
    router: Router | None = None
    axes: tuple[str, ...] = ()
    row: float = 0.0
    keys: float = 0.0
    entry: str = "main"
    body: str = ""
    after: int = 0  # loops over layers that it depends on

    @property
    def label(self) -> str:
        return self.node.label or ""


@dataclass
class Piece:
    """Ops that run one after the other: a layer of a loop, or what stands between loops.

    ``layers`` are the numbers of the array ``child`` that are alike; empty between loops.
    """

    ops: list[Op]
    child: str = ""
    layers: range = range(0)
    entry: str = "main"


@dataclass(frozen=True)
class Load:
    """What one rank computes in one pass: ``sequences`` (may be a fraction, of a prompt that two
    micro-batches share), ``time`` positions of each, of ``history`` with those."""

    sequences: float
    time: int
    history: int
    wanted: int  # rows of each whose result is wanted
    decode: bool = False

    @property
    def tokens(self) -> float:
        return self.sequences * self.time
