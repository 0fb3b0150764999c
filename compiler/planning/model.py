"""A program under a deployment, as layers with their times: what all plans share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from compiler.errors import UserError
from compiler.ir import Program
from compiler.passes import recompute
from compiler.planning.backward import gradient_of
from compiler.planning.costs import Measured
from compiler.planning.flat import flatten
from compiler.planning.formats import HALF, Precision
from compiler.planning.kernels import COMMUNICATION, Kernel, kept_forms, kernels, losses
from compiler.planning.memory import Held, Parameters, kept, read
from compiler.planning.ops import Load, Piece
from compiler.planning.rates import Rates
from compiler.planning.segments import Layer, measured_layer, segments
from compiler.planning.sharding import Sharding
from compiler.planning.times import Times
from compiler.tensors import places
from compiler.training_costs import Backward, backward
from dsl.deploy.typed import Deployment


@dataclass(frozen=True)
class Subject:
    """What a plan is about: a program as elaborated and after the last pass, and a deployment."""

    source: Program
    final: Program
    deployment: Deployment

    def gradients(self, entries: Sequence[str], sequence: int) -> Backward:
        """What the backward graphs of these entries compute, with the deployment's recomputation.

        Raises:
            UserError: an op has no adjoint.
        """
        again = recompute.of(self.final, self.deployment)
        return backward(self.final, sequence, entries, again)

    @cached_property
    def sharding(self) -> Sharding:
        return Sharding(self.deployment, {p.key: p.module.block for p in places(self.source)})

    @cached_property
    def precision(self) -> Precision:
        return Precision(self.source, self.final, self.deployment)

    @cached_property
    def parameters(self) -> Parameters:
        return Parameters(self.source, self.sharding, self.precision)

    def rates(self, scale: Mapping[tuple[str, ...], float] | None = None) -> Rates:
        """The cluster's rates.

        Raises:
            UserError: the deployment names no cluster.
        """
        cluster = self.deployment.cluster
        if cluster is None:
            name = self.deployment.name
            raise UserError(
                f"deployment '{name}' runs on no cluster, so that there is nothing to plan with:"
                f" deploy mine from {name} on h800 {{}}"
            )
        return Rates(cluster, self.precision.own_format, scale or {})


@dataclass(frozen=True)
class Block:
    """A piece with its kernels: one kind of layer, or what stands between loops over layers."""

    piece: Piece
    kernels: tuple[Kernel, ...]
    recomputed: tuple[bool, ...]
    saved: float  # bytes that it keeps of a micro-batch, in each of its layers

    @property
    def name(self) -> str:
        piece = self.piece
        if not piece.child:
            return piece.entry
        return f"{piece.child}[{piece.layers.start}..{piece.layers.stop}]"

    @property
    def flops(self) -> float:
        return sum(k.flops for k in self.kernels)


@dataclass(frozen=True)
class Point:
    """A kernel on a roofline: FLOPs, bytes and seconds of one rank."""

    name: str
    kind: str
    format: str
    flops: float
    bytes: float
    seconds: float


class Model:
    """What one rank computes at one load, layer by layer.

    Args:
        entries: entry points; what they share is computed once.
    """

    def __init__(self, subject: Subject, entries: Sequence[str], load: Load):
        self.subject = subject
        self.load = load
        deployment = subject.deployment
        setting = deployment.train or deployment.serve
        casts = setting.casts if setting is not None else "fused"
        targets = deployment.recompute
        self.blocks: list[Block] = []
        if deployment.train is not None:
            gradients = subject.gradients(entries, load.time)
        flat = flatten(subject.source, subject.final, entries, load, subject.sharding)
        for piece in flat.pieces():
            own = kernels(piece, subject.precision, load.decode, casts)
            if deployment.train is not None:
                own += losses(own, flat.results, subject.precision)
            keeps = kept(piece, targets, subject.precision)
            if deployment.train is not None:
                own += kept_forms(own, keeps.quantised, subject.precision.own, casts)
                for kernel in own:
                    kernel.gradient = gradient_of(kernel, gradients)
            again = tuple(bool(keeps.again & {*k.made, *k.with_values}) for k in own)
            self.blocks.append(Block(piece, tuple(own), again, keeps.bytes))

    def layers(self, times: Times, trains: bool, measured: Measured | None) -> dict[int, Layer]:
        """The segments of each block, by its number; measured durations replace modelled ones."""
        out: dict[int, Layer] = {}
        for number, block in enumerate(self.blocks):
            phases = [
                times.of(kernel, trains, trains and again)
                for kernel, again in zip(block.kernels, block.recomputed, strict=True)
            ]
            out[number] = segments(block.kernels, phases, block.name)
        if measured is not None:
            routed = [n for n, layer in out.items() if any(s.group == "dispatch" for s in layer)]
            if not routed:
                raise UserError("--costs are those of a layer that dispatches tokens; none does")
            per_layer = {n: b.flops for n, b in enumerate(self.blocks)}
            loops = [n for n in routed if self.blocks[n].piece.child] or routed
            for number, block in enumerate(self.blocks):
                if block.piece.child or number in routed:
                    out[number] = measured_layer(
                        out[number],
                        out[loops[0]],
                        measured,
                        per_layer[number] / per_layer[loops[0]],
                    )
        return out

    def held(self, number: int, layers: range) -> list[Held]:
        """The parameters of some layers of a block (all that it reads, if it is none of a loop)."""
        block = self.blocks[number]
        return self.subject.parameters.held(read(block.piece), layers)

    def points(self, times: Times) -> list[Point]:
        """The forward kernels of the layer that there are most of, for a roofline."""
        most = max(self.blocks, key=lambda b: (len(b.piece.layers), b.flops))
        return [
            Point(
                k.name,
                k.kind,
                k.format.name if k.format is not None else self.subject.precision.own_format[0],
                k.flops,
                k.bytes,
                times.of(k, False).forward,
            )
            for k in most.kernels
            if k.kind not in COMMUNICATION
        ]

    @property
    def boundary(self) -> float:
        """Bytes of what a layer hands to the next."""
        for block in self.blocks:
            for op in block.piece.ops:
                for operand in op.inputs:
                    if block.piece.child and operand.value == -1:
                        return operand.elements * HALF
        return 0.0
