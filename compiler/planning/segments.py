"""Layers as a few segments: what a rank computes between two points of communication.

Kernels that wait for the same collectives, and that the same collectives wait for, are one segment:
of a layer with routed experts, attention and router; the shared expert; the routed ones; what comes
after; and dispatch and combine themselves. Nothing here names these: they come out of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx

from compiler.planning.costs import Measured
from compiler.planning.kernels import COMMUNICATION, Kernel
from compiler.planning.streams import Stream, Task
from compiler.planning.times import Phases


@dataclass
class Segment:
    """``needs`` are numbers of segments of the same layer. ``group`` is what measured durations are
    given for: attention (what dispatch waits for), mlp (the rest), dispatch, combine, dense (a
    layer that sends nothing). ``pieces`` are runs of its kernels, between which another task of
    the stream may come. ``anew`` are segments whose values it reads backward that are computed
    again, itself among them."""

    name: str
    stream: Stream
    phases: Phases
    needs: tuple[int, ...]
    group: str
    kernels: list[Kernel] = field(default_factory=list)
    pieces: list[Phases] = field(default_factory=list)
    anew: tuple[int, ...] = ()

    @property
    def flops(self) -> float:
        return sum(k.flops for k in self.kernels)

    @property
    def aside(self) -> bool:
        """Does it only copy what the backward pass reads? The next layer does not wait for it."""
        return all(k.kept for k in self.kernels)


Layer = list[Segment]
PIECES = 4


def segments(kernels: Sequence[Kernel], phases: Sequence[Phases], name: str) -> Layer:
    """The segments of one layer, each after those that it needs."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    for number, kernel in enumerate(kernels):
        graph.add_node(number)
        graph.add_edges_from((need, number) for need in kernel.needs)
    sends = [i for i, k in enumerate(kernels) if k.kind in COMMUNICATION]
    before = {i: frozenset(nx.ancestors(graph, i)) for i in sends}
    after = {i: frozenset(nx.descendants(graph, i)) for i in sends}
    groups: dict[object, list[int]] = {}
    for number in graph:
        if number in before:
            groups[number] = [number]
            continue
        waits = frozenset(i for i in sends if number in after[i])
        awaited = frozenset(i for i in sends if number in before[i])
        groups.setdefault((waits, awaited), []).append(number)
    home = {number: key for key, numbers in groups.items() for number in numbers}
    whole: nx.DiGraph[object] = nx.DiGraph()
    whole.add_nodes_from(groups)
    whole.add_edges_from((home[a], home[b]) for a, b in graph.edges if home[a] != home[b])
    order = list(nx.lexicographical_topological_sort(whole, key=lambda k: min(groups[k])))
    position = {key: number for number, key in enumerate(order)}
    dispatches = {i for i in sends if kernels[i].kind == "dispatch"}
    out: Layer = []
    for key in order:
        numbers = groups[key]
        own = [kernels[i] for i in numbers]
        kind = own[0].kind if numbers[0] in before else ""
        sent = {i for i in dispatches if numbers[0] in before[i]}
        group = kind or ("dense" if not dispatches else "attention" if sent else "mlp")
        needs = tuple(sorted(position[p] for p in whole.predecessors(key)))
        total = sum((phases[i] for i in numbers), Phases(0.0))
        label = f"{name} {kind or _label(own)}"
        stream: Stream = "communicate" if kind else "compute"
        pieces = [total] if kind else _pieces([phases[i] for i in numbers])
        products = [i for i in numbers if kernels[i].product is not None and not kind]
        reads = {*numbers, *(n for i in products for n in kernels[i].needs)}
        anew = tuple(sorted({position[home[n]] for n in reads if phases[n].again}))
        out.append(Segment(label, stream, total, needs, group, own, pieces, anew))
    return out


def _pieces(phases: Sequence[Phases]) -> list[Phases]:
    """Runs of kernels of about the same length, at most ``PIECES``."""
    whole = sum(p.all for p in phases)
    out: list[Phases] = []
    done = 0.0
    for one in phases:
        if out and done < whole * len(out) / PIECES:
            out[-1] = out[-1] + one
        else:
            out.append(one)
        done += one.all
    return out


def _label(kernels: Sequence[Kernel]) -> str:
    """After the place where most of its time goes: ``attn``, ``expert``, ``shared``."""
    heaviest = max(kernels, key=lambda k: (k.flops, k.bytes))
    return heaviest.name.partition(":")[0]


# -- tasks of both streams -------------------------------------------------------------------------


def forward(layers: Sequence[Layer], tag: str = "", split: bool = True) -> list[Task]:
    """The tasks of one micro-batch through these layers.

    Args:
        split: segments in their pieces, so that others may come between.
    """
    tasks: list[Task] = []
    last: tuple[int, ...] = ()
    for layer in layers:
        ends: list[int] = []  # the last task of each segment
        for segment in layer:
            needs = tuple(ends[n] for n in segment.needs) or last
            for piece in segment.pieces if split else [segment.phases]:
                name = f"{segment.name}{tag}"
                tasks.append(Task(name, segment.stream, piece.forward, needs))
                needs = (len(tasks) - 1,)
            ends.append(len(tasks) - 1)
        done = {need for segment in layer for need in segment.needs}
        done |= {n for n, segment in enumerate(layer) if segment.aside}
        last = tuple(end for n, end in enumerate(ends) if n not in done)
    return tasks


def backward(
    layers: Sequence[Layer], tag: str = "", weights: bool = True, inputs: bool = True
) -> list[Task]:
    """The tasks of one micro-batch's backward pass, the last layer first: a segment's part for the
    inputs waits for those of all that read it, and its weight part for what its input part waits
    for. What is computed again needs no gradient; it waits for the layer's turn, so that memory is
    held for one layer of it.

    Args:
        weights, inputs: which parts; weight parts alone need nothing.
    """
    tasks: list[Task] = []
    before: tuple[int, ...] = ()
    for layer in reversed(layers):
        position: dict[int, int] = {}
        again = _again(layer, tag, before, tasks) if inputs else {}
        for number in reversed(range(len(layer))):
            segment = layer[number]
            readers = [n for n, s in enumerate(layer) if number in s.needs]
            needs = tuple(sorted(position[r] for r in readers)) if inputs else ()
            needs = (needs or before) + tuple(again[n] for n in segment.anew if n in again)
            for piece in reversed(segment.pieces):
                if weights and piece.weight:
                    name = f"{segment.name} W{tag}"
                    tasks.append(Task(name, segment.stream, piece.weight, needs))
                if inputs:
                    name = f"{segment.name}{tag}"
                    tasks.append(Task(name, segment.stream, piece.inputs, needs))
                    position[number] = len(tasks) - 1
                    needs = (len(tasks) - 1,)
        roots = [n for n, s in enumerate(layer) if not s.needs]
        before = tuple(position[n] for n in roots) if inputs else ()
    return tasks


def _again(layer: Layer, tag: str, before: tuple[int, ...], tasks: list[Task]) -> dict[int, int]:
    """Add what a layer computes again; the last task of each segment that does."""
    last: dict[int, int] = {}
    for number, segment in enumerate(layer):
        needs = before
        for piece in segment.pieces:
            if piece.again:
                tasks.append(Task(f"{segment.name} again{tag}", "compute", piece.again, needs))
                needs = (len(tasks) - 1,)
                last[number] = len(tasks) - 1
    return last


def together(*parts: Sequence[Task]) -> list[Task]:
    """Independent tasks side by side."""
    out: list[Task] = []
    for tasks in parts:
        first = len(out)
        out += [replace(t, needs=tuple(first + n for n in t.needs)) for t in tasks]
    return out


def totals(layers: Sequence[Layer]) -> Mapping[str, float]:
    """Seconds of the computing and of the communicating segments, forward and back."""
    out = {"compute": 0.0, "communicate": 0.0}
    for layer in layers:
        for segment in layer:
            phases = segment.phases
            out[segment.stream] += phases.all
    return out


# -- measured durations ----------------------------------------------------------------------------


def measured_layer(layer: Layer, like: Layer, measured: Measured, flops: float) -> Layer:
    """A layer with measured durations. Segments of a group share its time as they did in the model.

    Args:
        like: the layer that durations were measured on.
        flops: FLOPs of this layer over those of that one: how layers without dispatch scale.
    """
    out: Layer = []
    dense = not any(s.group == "dispatch" for s in layer)
    for segment in layer:
        phases: dict[str, float] = {}
        for name in ("forward", "inputs", "weight"):
            own = _taken(segment.phases, name)
            groups = ("attention", "mlp") if dense else (segment.group,)
            modelled = sum(_taken(s.phases, name) for s in like if s.group in groups)
            given = [measured.seconds.get(g, {}).get(name) for g in groups]
            if all(g is None for g in given):
                phases[name] = own
                continue
            total = 0.0
            for group, value in zip(groups, given, strict=True):
                model = sum(_taken(s.phases, name) for s in like if s.group == group)
                total += model if value is None else value
            if dense:
                share = own / (sum(_taken(s.phases, name) for s in layer) or 1.0)
                phases[name] = total * flops * share
            elif modelled:
                phases[name] = own * total / modelled
            else:  # nothing was modelled there: the first segment of the group has it
                first = next(s for s in layer if s.group == segment.group)
                phases[name] = total if first is segment else 0.0
        before = segment.phases
        again = phases["inputs"] * before.again / ((before.inputs + before.again) or 1.0)
        whole = Phases(phases["forward"], phases["inputs"] - again, phases["weight"], again)
        parts = len(segment.pieces)
        pieces = [_scaled(piece, segment.phases, whole, parts) for piece in segment.pieces]
        out.append(replace(segment, phases=whole, pieces=pieces))
    return out


def _taken(phases: Phases, name: str) -> float:
    """Seconds of a phase as a profile has them: what is computed again is a part of backward."""
    return float(getattr(phases, name)) + (phases.again if name == "inputs" else 0.0)


def _scaled(piece: Phases, before: Phases, after: Phases, parts: int) -> Phases:
    """A piece whose segment's times have changed; an even share of what was not there before."""

    def scale(part: float, whole: float, now: float) -> float:
        return part * now / whole if whole else now / parts

    return Phases(
        scale(piece.forward, before.forward, after.forward),
        scale(piece.inputs, before.inputs, after.inputs),
        scale(piece.weight, before.weight, after.weight),
        scale(piece.again, before.again, after.again),
    )
