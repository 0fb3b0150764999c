"""A plan on a terminal."""

from __future__ import annotations

from compiler.planning.plan import Plan
from compiler.planning.search import Searched, Tried
from dsl.tables import spelled
from dslc.terminal import large, table

BAR = 30  # characters of the longest bar
KINDS = ("weights", "gradients", "optimizer", "activations", "cache", "buffers")
PARTS = {
    "F": "forward alone",
    "pair": "forward and backward, overlapped",
    "B": "backward alone",
    "I": "backward, inputs only",
    "W": "weight gradients alone",
    "bubble": "bubble",
    "optimizer": "optimizer",
}


def show(plan: Plan, name: str) -> None:
    """Print a plan: what matters first, what it rests on last."""
    deployment = plan.deployment
    cluster = deployment.cluster
    assert cluster is not None
    mesh = " x ".join(f"{a.name} {a.size}" for a in deployment.mesh.axes) or "one device"
    print(f"{name}, {deployment.name}: {plan.gpus:,} {cluster.device} ({mesh})")
    for what, value, more in _summary(plan):
        print(f"  {what:<26} {value:>16}   {more}".rstrip())
    for problem in plan.problems:
        print(f"  does not hold: {problem}")
    _memory(plan)
    _time(plan)
    if plan.assumptions:
        table(
            ("what matters most", "", "source", "tokens/s if 10% worse"),
            [(a.name, a.value, a.source, f"{a.effect:+.1%}") for a in plan.assumptions],
            left=3,
        )
    table(
        ("computed with", "", "source"),
        [(spelled(k), f.text, f.source) for k, f in plan.figures.items()]
        + [("note", "", note) for note in plan.notes]
        + ([("durations", "", plan.measured)] if plan.measured else []),
        left=3,
    )


def _summary(plan: Plan) -> list[tuple[str, str, str]]:
    step, serving = plan.step, plan.serving
    out = []
    if step is not None:
        out.append(
            ("step", seconds(step.seconds), f"{step.micro_batches:,} micro-batches per rank")
        )
    if serving is not None:
        count = f"{serving.sequences:,.4g} sequences per rank"
        out.append(("forward pass", seconds(serving.seconds), count))
        if serving.tpot is not None:
            out.append(("time per output token", seconds(serving.tpot), ""))
    out += [
        ("tokens per second", large(plan.tokens), f"{plan.tokens / plan.gpus:,.0f} per GPU"),
        ("per node", large(plan.tokens / plan.gpus * plan.per_node), f"of {plan.per_node}"),
        ("tokens per day", large(plan.tokens * 86_400), ""),
    ]
    if plan.mfu is not None:
        out.append(("MFU", f"{plan.mfu:.1%}", "causal FLOPs of the main model over BF16's peak"))
    dollars = plan.dollars_per_trillion
    out.append(
        (
            "GPU hours per trillion",
            large(plan.gpu_hours_per_trillion),
            "" if dollars is None else f"{large(dollars)} dollars",
        )
    )
    total = plan.memory.total
    if plan.capacity is None:
        out.append(
            ("memory per GPU", gigabytes(total), "the cluster does not say how much there is")
        )
    else:
        says = "fits" if plan.fits else "DOES NOT FIT"
        out.append(("memory per GPU", gigabytes(total), f"of {gigabytes(plan.capacity)}: {says}"))
    return out


def _memory(plan: Plan) -> None:
    memory = plan.memory
    most = max(memory.total, plan.capacity or 0.0)
    rows = []
    for kind in KINDS:
        bytes = float(getattr(memory, kind))
        if not bytes:
            continue
        more = ""
        if kind == "weights":
            named = {"own": "model's own type"}
            parts = memory.weights_by_format.items()
            more = ", ".join(f"{named.get(f, f)} {gigabytes(b)}" for f, b in parts)
        rows.append((kind, gigabytes(bytes), bar(bytes / most), more))
    table(("memory per GPU", "", "", ""), rows, left=4)


def _time(plan: Plan) -> None:
    rows = []
    if plan.step is not None:
        for key, what in PARTS.items():
            if plan.step.parts.get(key):
                value = plan.step.parts[key]
                rows.append((what, seconds(value), bar(value / plan.seconds)))
    part = plan.step or plan.serving
    assert part is not None
    if part.communication:
        hidden = 1 - part.exposed / part.communication
        rows.append(("communication", seconds(part.communication), f"{hidden:.0%} hidden"))
    lanes = plan.lanes
    if lanes is not None:
        schedule = lanes[1]
        halves = plan.deployment.overlap.schedule == "two_microbatches"
        what = "one pair" if plan.step is not None else "two halves" if halves else "a pass"
        rows.append(
            (
                f"{what}, overlapped" if plan.step is not None or halves else what,
                seconds(schedule.total),
                f"{seconds(schedule.sequential)} one after the other,"
                f" {seconds(schedule.bound)} at least: {schedule}",
            )
        )
    if rows:
        table(("time of a rank", "", ""), rows, left=3)


def show_search(found: Searched, gpus: int) -> None:
    """The best deployments of a search, or the one that lacks the least."""
    within = "1 GPU" if gpus == 1 else f"{gpus:,} GPUs"
    rows = [
        (_axes(one), one.batch, one.why, seconds(one.plan.seconds), large(one.tokens))
        for one in found.best
    ]
    if rows:
        title = f"best of {found.count} within {within}"
        table((title, "batch", "why", "step", "tokens/s"), rows, left=3)
        return
    close = ""
    if found.closest is not None:
        one = found.closest
        why = one.plan.problems[0] if one.plan.problems else one.why
        close = f"; the closest, {_axes(one)} with {one.batch}: {why}"
    print(f"\nof {found.count} deployments within {within} none fits{close}")


def _axes(one: Tried) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in one.mesh.items())


def seconds(value: float) -> str:
    """0.0123 is "12.3 ms"."""
    if value >= 1:
        return f"{value:,.2f} s"
    if value >= 1e-3:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e6:.1f} us"


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def bar(share: float) -> str:
    """A bar as long as a share, in eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * BAR * 8)
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
