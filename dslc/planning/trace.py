"""A plan's timeline in the trace event format that chrome://tracing and ui.perfetto.dev open.

One process is the pipeline, a thread for each rank, with every chunk of the step; the other is one
rank's device, with a stream that computes and one that communicates, task by task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compiler.planning.plan import Plan

NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "weights", "pair": "pair"}
COLORS = {
    "F": "good",
    "B": "rail_response",
    "I": "rail_animation",
    "W": "terrible",
    "pair": "vsync_highlight_color",
}
PIPELINE, DEVICE = 1, 2
STREAMS = {"compute": 1, "communicate": 2}


def trace(plan: Plan) -> dict[str, Any]:
    """The object to write as JSON; times are in microseconds, as the format asks."""
    events = [*_pipeline(plan), *_device(plan)]
    about = {"deployment": plan.deployment.name, "seconds": plan.seconds}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _pipeline(plan: Plan) -> Iterator[dict[str, Any]]:
    step = plan.step
    if step is None:
        return
    yield _name(PIPELINE, None, "pipeline")
    for rank in range(step.ranks):
        yield _name(PIPELINE, rank + 1, f"rank {rank}")
    for event in step.run.events:
        what = [f"{NAMES[c.kind]} of {'<>'[1 - c.direction]}{c.number}" for c in event.turn]
        yield {
            "name": " + ".join(what),
            "cat": event.kind,
            "ph": "X",
            "ts": event.start * 1e6,
            "dur": (event.end - event.start) * 1e6,
            "pid": PIPELINE,
            "tid": event.rank + 1,
            "cname": COLORS[event.kind],
        }
    optimizer = step.parts["optimizer"]
    for rank in range(step.ranks):
        yield {
            "name": "optimizer",
            "cat": "optimizer",
            "ph": "X",
            "ts": step.run.end * 1e6,
            "dur": optimizer * 1e6,
            "pid": PIPELINE,
            "tid": rank + 1,
        }


def _device(plan: Plan) -> Iterator[dict[str, Any]]:
    if plan.lanes is None:
        return
    tasks, schedule = plan.lanes
    what = "one pair of a rank in the middle" if plan.step is not None else "one forward pass"
    yield _name(DEVICE, None, what)
    for stream, thread in STREAMS.items():
        yield _name(DEVICE, thread, stream)
    for slot in schedule.slots:
        task = tasks[slot.task]
        yield {
            "name": task.name,
            "cat": task.stream,
            "ph": "X",
            "ts": slot.start * 1e6,
            "dur": (slot.end - slot.start) * 1e6,
            "pid": DEVICE,
            "tid": STREAMS[task.stream],
        }


def _name(process: int, thread: int | None, name: str) -> dict[str, Any]:
    what = "process_name" if thread is None else "thread_name"
    event = {"name": what, "ph": "M", "pid": process, "args": {"name": name}}
    return event if thread is None else {**event, "tid": thread}
