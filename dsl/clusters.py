"""Clusters: what their devices and links can do at best, and what is reached.

A cluster is one table of figures: those of its device, with its own over them. ``peak`` is what the
hardware is built for, ``rate`` what kernels and collectives have been seen to reach, per device and
direction; every figure carries the source and the year that it was written down with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dsl import syntax as ast
from dsl.deploy.syntax import Figure as Written
from dsl.deploy.syntax import Quantity
from dsl.diagnostics import Diagnostics, Span, near
from dsl.formats import NumberFormat, word
from dsl.tables import Key, Merged, Tables, count, key_of, spelled
from dsl.units import example, measure

# Classes of kernels that a rate is given for, beside "memory": kernels bound by memory.
KERNELS = (
    "gemm gemm_dgrad gemm_wgrad grouped_gemm grouped_gemm_dgrad grouped_gemm_wgrad "
    "attention attention_backward decode_attention"
).split()
COLLECTIVES = "dispatch combine all_to_all all_reduce reduce_scatter all_gather send".split()
LEVELS = ("scale_up", "scale_out")  # inside a node, between nodes

# A figure's name -> what it measures, without brackets. "count" and "word" have no unit.
PLAIN: dict[str, tuple[str, ...]] = {
    "memory": ("memory",),
    "reserved": ("memory",),
    "sms": ("count",),
    "communication_sms": ("count",),
    "floor": ("time",),
    "gap": ("time",),
    "power": ("power",),
    "price": ("price",),
    "target": ("word",),
}
KEYED = ("peak", "rate", "latency")
TOPOLOGY = ("gpu", "cpu", "per_node", "nodes")
MAY_BE_ZERO = ("latency", "floor", "gap", "reserved", "communication_sms", "price")
MOST_DEVICES = 1 << 24

_YEAR = re.compile(r"\b(?:19|20)\d\d\b")


@dataclass(frozen=True)
class Figure:
    """One figure of a cluster. ``value`` is in base units (FLOP/s, bytes/s, bytes, s, W, USD/h); a
    rate given as a share of its peak is resolved. ``text`` is as written."""

    key: Key
    value: float
    text: str
    source: str
    span: Span

    @property
    def name(self) -> str:
        return spelled(self.key)


@dataclass(frozen=True)
class Cluster:
    """``nodes`` times ``per_node`` devices of one kind.

    Attributes:
        device: the name of its device; ``kind`` is gpu or cpu.
        target: what code is compiled for (``sm_90``), if known.
        figures: by name and keys: ``("memory",)``, ``("rate", "gemm", "e4m3")``.
    """

    name: str
    device: str
    kind: str
    per_node: int
    nodes: int
    target: str | None
    figures: Mapping[Key, Figure]
    span: Span

    @property
    def size(self) -> int:
        return self.per_node * self.nodes

    def value(self, *key: str) -> float | None:
        """A figure in base units: ``value("peak", "scale_up")``; None if it is not given."""
        figure = self.figures.get(key)
        return None if figure is None else figure.value

    def of_format(self, name: str, *before: str, format: NumberFormat) -> Figure | None:
        """A figure for a number format, or for the nearest format it was declared from:
        ``of_format("rate", "gemm", format=mxfp8)`` may be that of e4m3."""
        for one in (format.name, *format.bases):
            if (name, *before, one) in self.figures:
                return self.figures[(name, *before, one)]
        return None


def clusters(
    tables: Tables, formats: Mapping[str, NumberFormat], found: Diagnostics
) -> dict[str, Cluster]:
    """Every cluster without mistakes; devices are checked whether or not a cluster has them."""
    for device in tables.all("device"):
        _Checker(tables, formats, found).table(device, PLAIN)
    made = ((t.name, _cluster(t, tables, formats, found)) for t in tables.all("cluster"))
    return {name: cluster for name, cluster in made if cluster is not None}


def _cluster(
    table: Merged, tables: Tables, formats: Mapping[str, NumberFormat], found: Diagnostics
) -> Cluster | None:
    checker = _Checker(tables, formats, found)
    figures = checker.table(table, {**PLAIN, **dict.fromkeys(TOPOLOGY, ())})
    kinds = [kind for kind in ("gpu", "cpu") if (kind,) in table.figures]
    name = table.table.name
    if len(kinds) != 1:
        _missing(found, name, "which device it is made of", "gpu = H800")
        return None
    written = table.figures[(kinds[0],)]
    device_name = word(written)
    if device_name is None:
        found.error("E0805", f"'{kinds[0]}' must name a device", written.span)
        return None
    device = tables.merged("device", device_name, "import clusters")
    sides = {side: checker.side(table, side) for side in ("per_node", "nodes")}
    if device is None or checker.has_failed() or None in sides.values():
        return None
    figures = _Checker(tables, formats, Diagnostics()).table(device, PLAIN) | figures
    resolved = {key: checker.resolved(figure, figures) for key, figure in figures.items()}
    per_node, nodes = sides["per_node"] or 1, sides["nodes"] or 1
    for side, level, of in ((per_node, "scale_up", "node"), (nodes, "scale_out", "network")):
        if side > 1 and ("peak", level) not in resolved:
            _missing(found, name, f"how fast its {of} is", f'peak[{level}] = 50 GB/s "where, when"')
    sms, given = resolved.get(("sms",)), resolved.get(("communication_sms",))
    if sms is not None and given is not None and given.value >= sms.value:
        found.error(
            "E0805",
            f"{given.text} of {sms.text} SMs leave none to compute with",
            given.span,
            notes=[(sms.span, "that many there are")],
        )
    if checker.has_failed():
        return None
    target = {**device.figures, **table.figures}.get(("target",))
    return Cluster(
        name.text,
        device_name.text,
        kinds[0],
        per_node,
        nodes,
        None if target is None else target.value.span.text,
        {key: figure for key, figure in resolved.items() if key not in (("target",),)},
        name.span,
    )


def _missing(found: Diagnostics, name: ast.Name, what: str, hint: str) -> None:
    found.error("E0804", f"cluster '{name.text}' does not say {what}", name.span, hint=hint)


class _Checker:
    """Checks the figures of one table against what may stand in it."""

    def __init__(self, tables: Tables, formats: Mapping[str, NumberFormat], found: Diagnostics):
        self.tables = tables
        self.formats = formats
        self.found = found
        self.failed = False

    def has_failed(self) -> bool:
        return self.failed

    def error(self, code: str, message: str, span: Span, hint: str = "") -> None:
        self.failed = True
        self.found.error(code, message, span, hint=hint)

    def table(self, table: Merged, plain: Mapping[str, tuple[str, ...]]) -> dict[Key, Figure]:
        """The figures with units; topology is read by ``side``."""
        out: dict[Key, Figure] = {}
        for key, written in table.figures.items():
            wanted = self.wanted(table, key, written, plain)
            figure = self.figure(written, wanted) if wanted else None
            if figure is not None:
                out[key] = figure
        return out

    def wanted(
        self, table: Merged, key: Key, written: Written, plain: Mapping[str, tuple[str, ...]]
    ) -> tuple[str, ...]:
        """What the figure called ``key`` measures; nothing for topology or after a diagnostic."""
        name, *keys = key
        known = [*plain, *KEYED]
        if name not in known:
            kind = table.table.kind
            self.error(
                "E0803",
                f"a {kind} has no figure '{name}'",
                written.name.span,
                near(name, known) or f"figures are {', '.join(known)}",
            )
            return ()
        if name in plain:
            if keys:
                self.error("E0803", f"'{name}' takes no brackets", written.span)
                return ()
            return plain[name]
        return self.keyed(name, keys, written)

    def keyed(self, name: str, keys: list[str], written: Written) -> tuple[str, ...]:
        match name, keys:
            case "peak", [one] if one in LEVELS or one == "memory":
                return ("bandwidth",)
            case "peak", [_]:
                return self.format_of(written.keys[0], ("compute",), [*LEVELS, "memory"])
            case "rate", [one] if one in LEVELS or one == "memory":
                return ("bandwidth", "fraction")
            case "rate", [collective, level] if level in LEVELS:
                return self.one_of(collective, COLLECTIVES, written, ("bandwidth", "fraction"))
            case "rate", [kernel, "memory"]:
                return self.one_of(kernel, KERNELS, written, ("bandwidth", "fraction"))
            case "rate", [kernel, _]:
                wanted = self.one_of(kernel, KERNELS, written, ("compute", "fraction"))
                known = [*LEVELS, "memory"]
                return self.format_of(written.keys[1], wanted, known) if wanted else ()
            case "latency", [level] if level in LEVELS:
                return ("time",)
            case "latency", [collective, level] if level in LEVELS:
                return self.one_of(collective, COLLECTIVES, written, ("time",))
        shapes = {
            "peak": "peak[bf16], peak[memory] or peak[scale_up]",
            "rate": "rate[gemm, bf16], rate[memory], rate[scale_up] or rate[dispatch, scale_out]",
            "latency": "latency[scale_up] or latency[dispatch, scale_out]",
        }
        self.error(
            "E0803",
            f"'{spelled((name, *keys))}' is no figure",
            written.span,
            f"write {shapes[name]}",
        )
        return ()

    def one_of(
        self, name: str, known: list[str], written: Written, wanted: tuple[str, ...]
    ) -> tuple[str, ...]:
        if name in known:
            return wanted
        what = "kernels" if known is KERNELS else "collective"
        self.error(
            "E0803",
            f"'{name}' is no {what.replace('kernels', 'class of kernels')}",
            written.keys[0].span,
            near(name, known) or f"there are {', '.join(known)}",
        )
        return ()

    def format_of(
        self, name: ast.Name, wanted: tuple[str, ...], others: list[str]
    ) -> tuple[str, ...]:
        if name.text in self.formats or name.text in self.tables.declared["format"]:
            return wanted
        if name.text in self.tables.broken or "*" in self.tables.broken:
            return ()
        hint = near(name.text, [*self.formats, *others])
        self.error(
            "E0806",
            f"no number format is called '{name.text}'",
            name.span,
            hint or ("" if self.formats else "import std.formats"),
        )
        return ()

    def figure(self, written: Written, wanted: tuple[str, ...]) -> Figure | None:
        """A figure with its value in base units; None after a diagnostic."""
        key, value = key_of(written), written.value
        name = spelled(key)
        if wanted == ("word",):
            if word(written) is None:
                self.error("E0805", f"'{name}' must be a name", written.span, "target = sm_90")
            return None
        if isinstance(value, Quantity) and wanted != ("count",):
            measured = measure(value, wanted, name, self.found)
            self.failed = self.failed or measured is None
            if measured is None:
                return None
            number, text, what = measured.value, measured.text, measured.what
        elif wanted == ("count",):
            given = value.value if isinstance(value, ast.Literal) else None
            counted = count(given, 0, MOST_DEVICES, name, written.span, self.found)
            self.failed = self.failed or counted is None
            if counted is None:
                return None
            number, text, what = float(counted), str(counted), "count"
        else:
            self.error("E0801", f"'{name}' has no unit", value.span, example(wanted))
            return None
        too_low = number <= 0 and key[0] not in MAY_BE_ZERO
        if too_low or (what == "fraction" and number > 1):
            allowed = "above 0" if too_low else "at most 100%"
            self.error("E0805", f"'{name}' must be {allowed}", value.span)
            return None
        source = "" if written.source is None else str(written.source.value)
        if not _YEAR.search(source):
            said = "no source" if not source else "no year in its source"
            self.error(
                "E0802",
                f"'{name}' has {said}",
                written.span if written.source is None else written.source.span,
                f'say where it is from, and when: {name} = {text} "NVIDIA data sheet, 2023"',
            )
            return None
        kept = -number if what == "fraction" else number  # a share, until its peak is known
        return Figure(key, kept, text, source, written.span)

    def resolved(self, figure: Figure, figures: Mapping[Key, Figure]) -> Figure:
        """A rate that was given as a share, as a number; no rate is above its peak."""
        if figure.key[0] != "rate":
            return figure
        peak = figures.get(("peak", figure.key[-1]))
        if figure.value < 0:
            if peak is None:
                name = spelled(("peak", figure.key[-1]))
                self.error(
                    "E0804", f"'{figure.name}' is a share of '{name}'", figure.span, f"{name} = ..."
                )
                return figure
            value = -figure.value * peak.value
            return Figure(figure.key, value, figure.text, figure.source, figure.span)
        if peak is not None and figure.value > peak.value:
            self.failed = True
            self.found.error(
                "E0805",
                f"'{figure.name}' is above its peak",
                figure.span,
                figure.text,
                notes=[(peak.span, peak.text)],
            )
        return figure

    def side(self, table: Merged, name: str) -> int | None:
        """``per_node`` or ``nodes``."""
        written = table.figures.get((name,))
        if written is None:
            _missing(self.found, table.table.name, f"its '{name}'", f"{name} = 8")
            self.failed = True
            return None
        value = written.value.value if isinstance(written.value, ast.Literal) else None
        counted = count(value, 1, MOST_DEVICES, name, written.span, self.found)
        self.failed = self.failed or counted is None
        return counted
