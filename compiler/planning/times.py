"""How long a kernel and a collective take: a roofline from what the cluster reaches.

    kernel:      max(floor, FLOPs / rate, bytes / bandwidth) + gap
    collective:  latency + bytes over the slowest level that it crosses

The backward pass follows from the forward kernels by the known rules, behind ``backward_work``: a
product has two of its size, one for its input (dgrad) and one for its weights (wgrad); an attention
computes its scores anew and has four more products; what is bound by memory reads and writes
gradients beside what it read. A graph of adjoints, where there is one, can take its place.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from compiler.planning.formats import Precision, Role
from compiler.planning.kernels import COMMUNICATION, Kernel
from compiler.planning.rates import Rates
from compiler.planning.routing import spread
from compiler.planning.sharding import Sharding
from dsl.formats import NumberFormat


@dataclass(frozen=True)
class Work:
    """What a kernel does in one phase: at which rates, how many FLOPs and bytes."""

    kernel: str  # whose rate; "" is bound by memory alone
    format: NumberFormat | None
    flops: float
    bytes: float
    wide: bool = False


@dataclass(frozen=True)
class Phases:
    """Seconds of a kernel or collective: forward, backward for the inputs, for the weights."""

    forward: float
    inputs: float = 0.0
    weight: float = 0.0

    def __add__(self, other: Phases) -> Phases:
        return Phases(
            self.forward + other.forward,
            self.inputs + other.inputs,
            self.weight + other.weight,
        )

    def times(self, factor: float) -> Phases:
        return Phases(self.forward * factor, self.inputs * factor, self.weight * factor)


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in a collective: between nodes, and inside its node."""

    out: float
    up: float


class Times:
    """Times of one rank.

    Args:
        tokens: of one pass of one rank. ``direct``: each pick is sent by itself, without forwarding
            inside a node, as decoding does to keep latency low.
        gradient: bytes of a gradient's element.
    """

    def __init__(
        self,
        rates: Rates,
        sharding: Sharding,
        precision: Precision,
        tokens: float,
        direct: bool = False,
        gradient: float = 4.0,
    ):
        self.rates = rates
        self.sharding = sharding
        self.precision = precision
        self.tokens = tokens
        self.direct = direct
        self.gradient = gradient

    def of(self, kernel: Kernel, trains: bool, recomputed: bool = False) -> Phases:
        """All phases of a kernel; those of the backward pass only where one ``trains``."""
        if kernel.kind in COMMUNICATION:
            return Phases(
                self.collective(kernel, False), self.collective(kernel, True) if trains else 0.0
            )
        forward = self.seconds(forward_work(kernel))
        if not trains:
            return Phases(forward)
        inputs, weight = backward_work(kernel, self.gradient)
        again = forward if recomputed else 0.0
        return Phases(
            forward, again + sum(map(self.seconds, inputs)), sum(map(self.seconds, weight))
        )

    def seconds(self, work: Work) -> float:
        rates = self.rates
        time = work.bytes / rates.memory(work.kernel)
        if work.flops:
            kernel = work.kernel or "gemm"
            time = max(time, work.flops / rates.compute(kernel, work.format, work.wide))
        return max(rates.floor, time) + rates.gap

    # -- collectives -----------------------------------------------------------------------------

    def collective(self, kernel: Kernel, backward: bool) -> float:
        """Seconds of a collective, or of the one that its gradient needs: what was sent by dispatch
        comes back as a combine, and the other way round."""
        kind = kernel.kind
        if backward and kind in ("dispatch", "combine"):
            kind = "combine" if kind == "dispatch" else "dispatch"
        return self.transfer(kind, self.sent(kernel, backward))

    def transfer(self, collective: str, sent: Sent) -> float:
        """The latency of the slowest level that is crossed, and the time of the slowest link."""
        rates, time = self.rates, 0.0
        if sent.up:
            time = sent.up / rates.bandwidth(collective, "scale_up")
        if sent.out:
            time = max(time, sent.out / rates.bandwidth(collective, "scale_out"))
            return time + rates.latency(collective, "scale_out")
        return time + rates.latency(collective, "scale_up") if sent.up else 0.0

    def sent(self, kernel: Kernel, backward: bool = False) -> Sent:
        """Bytes that a rank sends, what stays with its own node or rank left out."""
        if kernel.kind == "all_reduce":
            return self.reduced(kernel.read, kernel.axes, 2.0)
        op = kernel.op
        assert op is not None and op.router is not None
        nodes = self.sharding.nodes(op.axes)
        where = spread(op.router, nodes)
        row = op.row * self._width(kernel, backward)
        tokens = self.tokens * self.sharding.imbalance
        if self.direct:
            return Sent(tokens * where.picks_out * row, tokens * where.picks_up * row)
        in_node = len(nodes) / len(set(nodes))
        inside = where.other_ranks * (in_node - 1) / in_node
        return Sent(tokens * where.other_nodes * row, tokens * inside * row)

    def _width(self, kernel: Kernel, backward: bool) -> float:
        """Bytes of an element in flight: dispatch carries what the blocks' products read, combine
        the model's own type; gradients go the other way, in the formats of their products."""
        product = kernel.product
        dispatches = (kernel.kind == "dispatch") is not backward
        if not dispatches or product is None:
            return self.precision.own
        role: Role = product.gradients if backward else product.activations
        return role.bytes

    def reduced(self, bytes: float, axes: Collection[str], passes: float = 1.0) -> Sent:
        """What a rank sends to reduce (or gather) ``bytes`` over a group: inside its node first,
        then its share of them between nodes. An all-reduce is two passes."""
        nodes = self.sharding.nodes(tuple(axes)) if axes else [0]
        count = len(set(nodes))
        inside = len(nodes) / count
        return Sent(
            passes * bytes / inside * (count - 1) / count if count > 1 else 0.0,
            passes * bytes * (inside - 1) / inside,
        )


def forward_work(kernel: Kernel) -> Work:
    kind = "" if kernel.kind in ("memory", "quantise") else kernel.kind
    return Work(kind, kernel.format, kernel.flops, kernel.bytes, kernel.wide)


def backward_work(kernel: Kernel, gradient: float) -> tuple[list[Work], list[Work]]:
    """The backward pass of one forward kernel: for its inputs, and for its weights.

    Args:
        gradient: bytes of a weight gradient's element, which is read and written.
    """
    moved = kernel.read + kernel.written
    if kernel.kind == "quantise":  # the gradient passes as it is
        return ([Work("", None, 0.0, moved)] if kernel.kept else []), []
    if kernel.kind in ("attention", "decode_attention"):
        flops = 3 * kernel.scores + 2 * kernel.values
        return [Work("attention_backward", kernel.format, flops, 2 * moved)], []
    if kernel.kind == "memory":
        return [Work("", None, 2 * kernel.flops, kernel.read + moved)], []
    if kernel.product is None:  # both factors are values
        return [Work(kernel.kind, None, kernel.flops, moved, kernel.wide)] * 2, []
    product = kernel.product
    same = product.weights.format == product.gradients.format
    format = product.weights.format if same else None
    weights = 2 * kernel.parameters * gradient
    wgrad = [Work(f"{kernel.kind}_wgrad", format, kernel.flops, moved + weights, kernel.wide)]
    if product.activations.turns:  # the kept operand, quantised anew with its tiles turned
        wgrad.append(Work("", None, 0.0, 2 * kernel.read))
    dgrad = [
        Work(f"{kernel.kind}_dgrad", format, kernel.flops, moved + kernel.weights, kernel.wide)
    ]
    if kernel.separate and product.gradients.format is not None:
        forms = 2 if product.gradients.turns else 1
        comes = kernel.own
        if kernel.sent_back:  # quantised already, in one of the forms
            comes, forms = product.gradients.bytes, forms - 1
        moved = kernel.results * (comes + forms * product.gradients.bytes)
        dgrad.append(Work("", None, 0.0, moved))
    return dgrad, wgrad
