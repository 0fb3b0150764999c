"""A plan as one HTML file: no script, no font, no picture from elsewhere, so that it opens anywhere
and can be mailed. What is drawn is SVG; a pointer that rests on a part says what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import ceil, floor, log10

from compiler.planning.plan import Plan
from compiler.planning.streams import Schedule, Task
from dsl.tables import spelled
from dslc.planning.table import KINDS, PARTS, gigabytes, seconds
from dslc.terminal import large

WIDTH = 1000
COLORS = {
    "F": "#4c78a8",
    "B": "#59a14f",
    "I": "#8cd17d",
    "W": "#b6992d",
    "pair": "#79706e",
    "optimizer": "#9d7660",
    "bubble": "#d8d8d8",
    "weights": "#4c78a8",
    "gradients": "#59a14f",
    "activations": "#f28e2b",
    "cache": "#76b7b2",
    "buffers": "#b07aa1",
    "compute": "#4c78a8",
    "communicate": "#e15759",
}
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1040px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.1em; margin: 1.8em 0 .4em; }
table { border-collapse: collapse; } td, th { padding: .15em 1em .15em 0; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.bad { color: #c0392b; font-weight: 600; } .dim { opacity: .65; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 12px; fill: currentColor; }
.key span { display: inline-block; margin-right: 1.2em; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
"""


def html(plan: Plan, name: str) -> str:
    """The whole page."""
    deployment = plan.deployment
    cluster = deployment.cluster
    assert cluster is not None
    mesh = " x ".join(f"{a.name} {a.size}" for a in deployment.mesh.axes) or "one device"
    title = f"{name}, {deployment.name}: {plan.gpus:,} {cluster.device}"
    body = "".join(
        [
            f"<h1>{escape(title)}</h1><p class=dim>{escape(mesh)}</p>",
            *(f"<p class=bad>Does not hold: {escape(problem)}</p>" for problem in plan.problems),
            _table(_summary(plan)),
            "<h2>Memory of a GPU</h2>",
            _memory(plan),
            *_timeline(plan),
            *_lanes(plan),
            *_roofline(plan),
            "<h2>What matters most</h2>",
            _table(
                [
                    (a.name, a.value, f"{a.effect:+.1%} tokens/s if a tenth worse", a.source)
                    for a in plan.assumptions
                ]
            ),
            "<h2>Computed with</h2>",
            _table([(spelled(k), f.text, f.source) for k, f in plan.figures.items()]),
            *(f"<p class=dim>{escape(note)}</p>" for note in plan.notes),
        ]
    )
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    icon = '<link rel="icon" href="data:,">'  # or a browser asks the server for one
    return f"<!doctype html><html lang=en><head>{head}{icon}</head><body>{body}</body></html>\n"


def _summary(plan: Plan) -> list[tuple[str, ...]]:
    rows = [
        ("step" if plan.step is not None else "forward pass", seconds(plan.seconds)),
        ("tokens per second", f"{large(plan.tokens)} ({plan.tokens / plan.gpus:,.0f} per GPU)"),
        ("tokens per day", large(plan.tokens * 86_400)),
        ("GPU hours per trillion tokens", large(plan.gpu_hours_per_trillion)),
    ]
    if plan.serving is not None and plan.serving.tpot is not None:
        rows.insert(1, ("time per output token", seconds(plan.serving.tpot)))
    if plan.mfu is not None:
        rows.append(("MFU", f"{plan.mfu:.1%}"))
    if plan.dollars_per_trillion is not None:
        rows.append(("dollars per trillion tokens", large(plan.dollars_per_trillion)))
    part = plan.step or plan.serving
    assert part is not None
    if part.communication:
        hidden = 1 - part.exposed / part.communication
        rows.append(("communication", f"{seconds(part.communication)}, {hidden:.0%} hidden"))
    return [*rows]


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _key(names: Sequence[tuple[str, str]]) -> str:
    spans = (f'<span><i style="background:{COLORS[k]}"></i>{escape(n)}</span>' for k, n in names)
    return f"<p class=key>{''.join(spans)}</p>"


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _rect(x: float, y: float, width: float, height: float, color: str, title: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0.2):.2f}" height="{height:g}"'
        f' fill="{color}"><title>{escape(title)}</title></rect>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _memory(plan: Plan) -> str:
    memory = plan.memory
    most = max(memory.total, plan.capacity or 0.0)
    at, parts = 0.0, []
    for kind in KINDS:
        bytes = float(getattr(memory, kind))
        width = bytes / most * WIDTH
        parts.append(_rect(at, 0, width, 34, COLORS[kind], f"{kind} {gigabytes(bytes)}"))
        at += width
    if plan.capacity is not None:
        x = plan.capacity / most * WIDTH
        parts.append(f'<path d="M{x - 1:.1f} 0V40" stroke="currentColor" stroke-width="2"/>')
        parts.append(_text(x - 6, 52, f"{gigabytes(plan.capacity)} to give", "end"))
    parts.append(_text(0, 52, f"{gigabytes(memory.total)} needed"))
    named = [
        (k, f"{k} {gigabytes(float(getattr(memory, k)))}") for k in KINDS if getattr(memory, k)
    ]
    return _svg(58, parts, "memory by kind") + _key(named)


def _timeline(plan: Plan) -> Iterator[str]:
    step = plan.step
    if step is None:
        return
    yield "<h2>Pipeline</h2>"
    row, left = 16, 60
    scale = (WIDTH - left) / step.seconds
    parts = [_text(0, rank * row + 11, f"rank {rank}") for rank in range(step.ranks)]
    for event in step.run.events:
        what = ", ".join(
            f"{c.kind} of {c.number}{' from the end' if c.direction else ''}" for c in event.turn
        )
        parts.append(
            _rect(
                left + event.start * scale,
                event.rank * row,
                (event.end - event.start) * scale,
                row - 3,
                COLORS[event.kind],
                f"{what}: {seconds(event.end - event.start)} at {seconds(event.start)}",
            )
        )
    optimizer = step.parts["optimizer"]
    for rank in range(step.ranks):
        x = left + step.run.end * scale
        parts.append(
            _rect(x, rank * row, optimizer * scale, row - 3, COLORS["optimizer"], "optimizer")
        )
    yield _svg(step.ranks * row + 4, parts, "every chunk of the step, by rank")
    named = [(k, f"{what} {seconds(step.parts[k])}") for k, what in PARTS.items() if step.parts[k]]
    yield _key(named)


def _lanes(plan: Plan) -> Iterator[str]:
    if plan.lanes is None:
        return
    tasks, schedule = plan.lanes
    what = "One overlapped pair" if plan.step is not None else "One forward pass"
    yield f"<h2>{what}</h2>"
    yield _streams(tasks, schedule)
    yield _key([("compute", "computing"), ("communicate", "communicating")])
    yield (
        f"<p>{seconds(schedule.sequential)} one after the other,"
        f" {seconds(schedule.total)} overlapped, {seconds(schedule.bound)} at least:"
        f" {schedule}.</p>"
    )


def _streams(tasks: Sequence[Task], schedule: Schedule) -> str:
    scale = WIDTH / (schedule.total or 1.0)
    rows = {"compute": 0, "communicate": 30}
    parts = [
        _rect(
            slot.start * scale,
            rows[tasks[slot.task].stream],
            (slot.end - slot.start) * scale - 0.4,
            26,
            COLORS[tasks[slot.task].stream],
            f"{tasks[slot.task].name}: {seconds(slot.end - slot.start)}",
        )
        for slot in schedule.slots
    ]
    return _svg(58, parts, "computing and communicating streams")


def _roofline(plan: Plan) -> Iterator[str]:
    part = plan.step or plan.serving
    assert part is not None
    points = [p for p in part.points if p.flops and p.bytes and p.seconds]
    memory = plan.figures.get(("rate", "memory")) or plan.figures.get(("peak", "memory"))
    roofs = {
        ", ".join(key[1:]): f.value
        for key, f in plan.figures.items()
        if key[0] == "rate" and key[-1] in {p.format for p in points}
    }
    if not points or memory is None or not roofs:
        return
    yield "<h2>Roofline of a layer, forward</h2>"
    xs = [p.flops / p.bytes for p in points]
    ys = [p.flops / p.seconds for p in points]
    low, high = floor(log10(min(xs))), ceil(log10(max(xs)))
    bottom, top = floor(log10(min(ys))), ceil(log10(max([*ys, *roofs.values()])))
    height, left, head, foot = 330, 70, 12, 30

    def x(value: float) -> float:
        return left + (log10(value) - low) / (high - low) * (WIDTH - left - 10)

    def y(value: float) -> float:
        return head + (top - log10(value)) / (top - bottom) * (height - head - foot)

    parts = []
    for power in range(low, high + 1):
        anchor = "end" if power == high else "middle"
        parts.append(_text(x(10.0**power), height - 8, f"{10.0**power:g}", anchor))
    for power in range(bottom, top + 1):
        tick = f"{10.0 ** (power - 12):g} T"
        parts.append(_text(left - 8, y(10.0**power) + 4, tick, "end"))
        parts.append(
            f'<path d="M{left} {y(10.0**power):.1f}H{WIDTH}" stroke="currentColor" opacity=".12"/>'
        )
    first = max(10.0**low, 10.0**bottom / memory.value)  # where the slope enters the picture
    last = min(10.0**high, 10.0**top / memory.value)
    if first < last:
        ends = [f"{x(at):.1f} {y(at * memory.value):.1f}" for at in (first, last)]
        parts.append(f'<path d="M{"L".join(ends)}" stroke="{COLORS["communicate"]}"/>')
    for roof, value in roofs.items():
        title = f"<title>{escape(roof)}: {value / 1e12:,.0f} TFLOPS</title>"
        parts.append(
            f'<path d="M{left} {y(value):.1f}H{WIDTH}" stroke="{COLORS["compute"]}"'
            f' stroke-dasharray="4 4">{title}</path>'
        )
    for point, a, b in zip(points, xs, ys, strict=True):
        title = f"{point.name} ({point.format}): {b / 1e12:,.0f} TFLOPS, {a:,.0f} FLOPs per byte"
        parts.append(
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="5" fill="{COLORS["activations"]}">'
            f"<title>{escape(title)}</title></circle>"
        )
    yield _svg(height, parts, "FLOP/s over FLOPs per byte, both logarithmic")
    yield "<p class=dim>FLOP/s over FLOPs per byte. Dashed: what a class of kernels reaches.</p>"
