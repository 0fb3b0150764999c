"""How long a kernel and a collective take: a roofline from what the cluster reaches.

    kernel:      max(floor, FLOPs / rate, bytes / bandwidth) + gap
    collective:  latency + bytes over the slowest level that it crosses

What the backward pass of a kernel does stands in ``backward.py``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from compiler.planning.backward import Work, backward_work, forward_work
from compiler.planning.formats import Precision, Role
from compiler.planning.kernels import COMMUNICATION, Kernel
from compiler.planning.rates import Rates
from compiler.planning.routing import spread
from compiler.planning.sharding import Sharding


@dataclass(frozen=True)
class Phases:
    """Seconds of a kernel or collective: forward, backward for the inputs, for the weights, and of
    what runs forward ``again`` before those two. That reads what was kept, and no gradient."""

    forward: float
    inputs: float = 0.0
    weight: float = 0.0
    again: float = 0.0

    def __add__(self, other: Phases) -> Phases:
        return Phases(
            self.forward + other.forward,
            self.inputs + other.inputs,
            self.weight + other.weight,
            self.again + other.again,
        )

    @property
    def all(self) -> float:
        return self.forward + self.inputs + self.weight + self.again


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
        found = kernel.gradient
        is_product = found is not None and kernel.flops > 0 and kernel.kind != "memory"
        again = forward * (found.again if found is not None and is_product else recomputed)
        return Phases(
            forward, sum(map(self.seconds, inputs)), sum(map(self.seconds, weight)), again
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
        return Sent(tokens * where.other_nodes * row, tokens * where.forwarded * row)

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
