"""What a cluster reaches: its figures, what stands in for one that is missing, and which were used.

A rate that nobody wrote down is taken from the nearest that is: a grouped product runs as fast as
a product, a backward product as its forward one, and where a class of kernels has no rate at all,
at its peak. Every stand-in is noted, and a plan prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compiler.errors import UserError
from dsl.clusters import Cluster, Figure
from dsl.formats import NumberFormat

Key = tuple[str, ...]

# What a class of kernels is as fast as, where its own rate is not given.
LIKE: Mapping[str, str] = {
    "grouped_gemm_dgrad": "grouped_gemm",
    "grouped_gemm_wgrad": "gemm_wgrad",
    "grouped_gemm": "gemm",
    "gemm_dgrad": "gemm",
    "gemm_wgrad": "gemm",
    "decode_attention": "attention",
    "attention_backward": "attention",
}
COLLECTIVES_LIKE: Mapping[str, str] = {"combine": "dispatch", "dispatch": "all_to_all"}
WIDE = 0.5  # products of float32 operands, beside bfloat16's: TF32 on tensor cores


def gigabytes(bytes: float) -> str:
    """As messages say it: 75.9 GB, 0.001 GB."""
    return f"{bytes / 1e9:,.1f} GB" if bytes >= 1e8 else f"{bytes / 1e9:.3g} GB"


@dataclass
class Rates:
    """A cluster's figures in base units.

    Attributes:
        scale: factors on figures, by key: how a plan asks what an assumption matters.
        used: figures that were read. ``notes``: what stood in for figures that are missing.
    """

    cluster: Cluster
    own: tuple[str, ...]  # the model's own type: its format's name, and those it was declared from
    scale: Mapping[Key, float] = field(default_factory=dict)
    used: dict[Key, Figure] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    _known: dict[tuple[object, ...], float] = field(default_factory=dict)

    def figure(self, *key: str) -> float | None:
        figure = self.cluster.figures.get(key)
        if figure is None:
            return None
        self.used[key] = figure
        return figure.value * self.scale.get(key, 1.0)

    # -- computing -------------------------------------------------------------------------------

    def compute(self, kernel: str, format: NumberFormat | None, wide: bool = False) -> float:
        """FLOP/s of a class of kernels in a number format; None is the model's own type.

        Raises:
            UserError: the cluster says nothing about any format that could stand in.
        """
        key = ("compute", kernel, None if format is None else format.name, wide)
        if key not in self._known:
            self._known[key] = self._compute(kernel, format) * (WIDE if wide else 1.0)
        return self._known[key]

    def _compute(self, kernel: str, format: NumberFormat | None) -> float:
        names = self.own if format is None else (format.name, *format.bases)
        for name in names:
            asked: str | None = kernel
            while asked is not None:
                value = self.figure("rate", asked, name)
                if value is not None:
                    if asked != kernel:
                        self.note(f"rate[{kernel}, {name}] is not given: as rate[{asked}, {name}]")
                    return value
                asked = LIKE.get(asked)
        for name in names:
            value = self.figure("peak", name)
            if value is not None:
                self.note(f"rate[{kernel}, {name}] is not given: its peak")
                return value
        if format is not None:
            self.note(f"{format.name} has no rate and no peak: products in it run as {self.own[0]}")
            return self._compute(kernel, None)
        raise UserError(
            f"cluster '{self.cluster.name}' does not say how fast it multiplies:"
            f' peak[{self.own[0]}] = 989 TFLOPS "where, when"'
        )

    def memory(self, kernel: str = "") -> float:
        """Bytes per second of a class of kernels that is bound by memory.

        Raises:
            UserError: the cluster does not say how fast its memory is.
        """
        key = ("memory", kernel)
        if key not in self._known:
            self._known[key] = self._memory(kernel)
        return self._known[key]

    def _memory(self, kernel: str) -> float:
        asked: str | None = kernel or None
        while asked is not None:
            value = self.figure("rate", asked, "memory")
            if value is not None:
                return value
            asked = LIKE.get(asked)
        value = self.figure("rate", "memory")
        if value is None:
            value = self.figure("peak", "memory")
            if value is not None:
                self.note("rate[memory] is not given: its peak")
        if value is None:
            raise UserError(
                f"cluster '{self.cluster.name}' does not say how fast its memory is:"
                ' peak[memory] = 3.35 TB/s "where, when"'
            )
        return value

    @property
    def floor(self) -> float:
        """The shortest time of a kernel, in seconds."""
        return self.figure("floor") or 0.0

    @property
    def gap(self) -> float:
        """Seconds between two kernels of a stream."""
        return self.figure("gap") or 0.0

    # -- communicating ---------------------------------------------------------------------------

    def bandwidth(self, collective: str, level: str) -> float:
        """Bytes per second and direction of a device.

        Raises:
            UserError: the cluster does not say.
        """
        asked: str | None = collective
        while asked is not None:
            value = self.figure("rate", asked, level)
            if value is not None:
                return value
            asked = COLLECTIVES_LIKE.get(asked)
        value = self.figure("rate", level)
        if value is None:
            value = self.figure("peak", level)
            if value is not None:
                self.note(f"rate[{level}] is not given: its peak")
        if value is None:
            raise UserError(
                f"cluster '{self.cluster.name}' does not say how fast its"
                f" {'nodes' if level == 'scale_up' else 'network'} are:"
                f' peak[{level}] = 50 GB/s "where, when"'
            )
        return value

    def latency(self, collective: str, level: str) -> float:
        """Seconds until the first byte."""
        asked: str | None = collective
        while asked is not None:
            value = self.figure("latency", asked, level)
            if value is not None:
                return value
            asked = COLLECTIVES_LIKE.get(asked)
        value = self.figure("latency", level)
        if value is None:
            self.note(f"latency[{level}] is not given: none")
        return value or 0.0

    def charge(self, sms: int | None) -> float:
        """The share of a device's multiprocessors that communication takes while it runs."""
        all_sms = self.figure("sms")
        taken = float(sms) if sms is not None else self.figure("communication_sms")
        if not taken:
            return 0.0
        if all_sms is None:
            self.note("sms is not given: communication takes none")
            return 0.0
        if taken >= all_sms:
            raise UserError(
                f"{taken:.0f} of {all_sms:.0f} SMs for communication leave none to compute with"
            )
        return taken / all_sms

    # -- memory ----------------------------------------------------------------------------------

    def capacity(self) -> float | None:
        """Bytes of a device that a program may have; None if the cluster does not say.

        Raises:
            UserError: as much is reserved as there is.
        """
        memory, reserved = self.figure("memory"), self.figure("reserved") or 0.0
        if memory is None:
            return None
        if reserved >= memory:
            raise UserError(
                f"cluster '{self.cluster.name}' reserves {gigabytes(reserved)} of a device's"
                f" {gigabytes(memory)}, which leaves nothing to run in"
            )
        return memory - reserved

    def note(self, sentence: str) -> None:
        self.notes[sentence] = None
