"""A deployment with pipeline stages as text: what runs where, and in which order.

Nothing executes it yet. The forward programs themselves are the bodies of the graph, in which
``shard`` has placed every value; a stage runs the bodies of its layers one after the other.

    stage 1 on pp 1, and in the other direction on pp 14
      layers[4..8]: Sparse.call
    ...
    pp 0: F0.0 F0.1 ... (F1.0 B0.0) ... W0.3

``F0.3`` is the forward chunk of the fourth micro-batch that enters at the first stage (1 at the
last one); B is a whole backward chunk, I and W its input's and its weight's part; chunks in
parentheses overlap.
"""

from __future__ import annotations

from compiler import spec
from compiler.ir import Program
from compiler.planning.pipeline import Turn, dualpipe, one_f_one_b, zb1p
from dsl.deploy.typed import Deployment, Stage

SCHEDULES = {"1f1b": one_f_one_b, "zb1p": zb1p, "dualpipe": dualpipe}


def is_staged(deployment: Deployment | None) -> bool:
    """Is this for training, or a pipeline: to be looked at, as nothing runs it?"""
    return deployment is not None and (
        deployment.train is not None or deployment.stages is not None
    )


def staged_text(program: Program) -> str:
    """Mesh, stages and schedule of a program's deployment; ends with a newline."""
    deployment = program.deployment
    assert deployment is not None
    axes = ", ".join(f"{axis.name} = {axis.size}" for axis in deployment.mesh.axes)
    lines = [f"deployment {deployment.name} of {deployment.model}", f"mesh {axes}"]
    lines += [f"batch over {', '.join(program.batch) or 'no axis'}"]
    if deployment.stages is None:
        return "\n".join(lines) + "\n"
    chains = _chains(program)
    ways = deployment.mesh.sizes[deployment.stages.axis]
    dual = deployment.overlap.schedule == "dualpipe"
    count = len(deployment.stages.stages)
    for number, stage in enumerate(deployment.stages.stages):
        where = f"{deployment.stages.axis} {number % ways}"
        if dual:
            where += (
                f", and in the other direction on {deployment.stages.axis} {count - 1 - number}"
            )
        lines += ["", f"stage {number} on {where}"]
        lines += [f"  {line}" for line in _stage(stage, number, count, chains)]
    micro_batches = deployment.micro_batches
    schedule = deployment.overlap.schedule
    if schedule in SCHEDULES and micro_batches:
        lines += ["", f"schedule {schedule}, {micro_batches} micro-batches"]
        for rank, turns in enumerate(SCHEDULES[schedule](ways, micro_batches)):
            lines.append(f"{deployment.stages.axis} {rank}: {' '.join(map(_turn, turns))}")
    return "\n".join(lines) + "\n"


Chains = list[tuple[str, int, int, str]]  # an array, its layers that a loop runs over, the body


def _chains(program: Program) -> Chains:
    """Every loop over an array of modules, in the order in which main meets them."""
    found: dict[tuple[str, int, int, str], None] = {}
    for _, graph in spec.scopes(program):
        for node in graph:
            if node.op == "chain":
                index = node.attrs["index"]
                start = index.start.at(program.sizes)
                stop = start + program.size(index)
                found[node.attrs["child"], start, stop, node.attrs["body"]] = None
    return sorted(found, key=lambda c: (c[0], c[1]))


def _stage(stage: Stage, number: int, count: int, chains: Chains) -> list[str]:
    lines = ["what comes before the layers"] if number == 0 else []
    for array, start, stop in stage.layers:
        for name, first, last, body in chains:
            low, high = max(start, first), min(stop, last)
            if name == array and low < high:
                lines.append(f"{array}[{low}..{high}]: {body}")
    lines += ["what comes after the layers"] if number == count - 1 else []
    return lines + [f"{extra}" for extra in stage.extras]


def _turn(turn: Turn) -> str:
    chunks = [f"{chunk.kind}{chunk.direction}.{chunk.number}" for chunk in turn]
    return chunks[0] if len(chunks) == 1 else f"({' '.join(chunks)})"
