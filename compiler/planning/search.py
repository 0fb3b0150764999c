"""Other meshes and micro-batches for the same load within the same number of GPUs.

Every way to write the number of ranks as a product over the mesh's axes is tried with every
micro-batch of a few, as far as the rules still divide and the schedule still works. What fits is
ranked by tokens per second of the whole number of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from compiler.errors import UserError
from compiler.ir import Program
from compiler.planning.plan import Plan, make
from dsl.deploy.typed import Deployment, Mesh, ShardRule, Split, Stage, Stages

BEST = 5
MICRO_BATCHES = (1, 2, 4)
SCALES = (0.5, 1.0, 2.0)
MOST = 400  # deployments that are tried


@dataclass(frozen=True)
class Tried:
    """A deployment that fits, and why it is as fast as it is."""

    plan: Plan
    tokens: float  # per second on all GPUs of the search
    batch: str
    why: str

    @property
    def mesh(self) -> dict[str, int]:
        return dict(self.plan.deployment.mesh.sizes)


@dataclass(frozen=True)
class Searched:
    """The best deployments, best first; of ``count`` that were planned. Where none fits, the
    ``closest``: it lacks the least memory."""

    best: list[Tried]
    count: int
    closest: Tried | None = None


def search(
    source: Program,
    final: Program,
    deployment: Deployment,
    progress: Callable[[str], None] = lambda _: None,
) -> Searched:
    """Plan other deployments of the same load.

    Args:
        deployment: its load, rules and cluster are kept.
    """
    gpus = deployment.mesh.size
    found: dict[object, Tried] = {}
    closest: tuple[float, Tried | None] = float("inf"), None
    count = 0
    for other, batch in candidates(deployment):
        if count >= MOST:
            break
        count += 1
        progress(f"{count} deployments planned")
        try:
            plan = make(source, final, other, weigh=False)
        except UserError:
            continue
        tried = Tried(plan, plan.tokens * (gpus // plan.gpus), batch, _why(plan))
        if plan.fits and not plan.problems:
            # Groups that share nothing (dp of a model that is whole in each) are the same plan.
            alike = (batch, plan.seconds, tried.tokens, plan.memory.total)
            found.setdefault(alike, tried)
        elif plan.memory.total / (plan.capacity or 1.0) < closest[0]:
            closest = plan.memory.total / (plan.capacity or 1.0), tried
    best = sorted(found.values(), key=lambda t: -t.tokens)[:BEST]
    return Searched(best, count, None if best else closest[1])


def candidates(deployment: Deployment) -> Iterator[tuple[Deployment, str]]:
    """Deployments that hold, each with its batch in words; the given one is among them."""
    seen: set[object] = set()
    for sizes in _meshes(deployment):
        mesh = Mesh(
            tuple(
                replace(a, size=size) for a, size in zip(deployment.mesh.axes, sizes, strict=True)
            )
        )
        divided = _divided(deployment, mesh)
        if divided is None:
            continue
        for one, batch in _batches(divided):
            key = (sizes, batch)
            if key not in seen:
                seen.add(key)
                yield one, batch


def _meshes(deployment: Deployment) -> Iterator[tuple[int, ...]]:
    """Sizes of the axes: for training with all GPUs; serving may run several smaller groups."""
    axes, gpus = len(deployment.mesh.axes), deployment.mesh.size
    yield tuple(a.size for a in deployment.mesh.axes)
    if deployment.train is not None:
        yield from _factored(gpus, axes)
        return
    for used in (d for d in range(gpus, 1, -1) if gpus % d == 0):
        yield from _factored(used, axes)


def _factored(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 0:
        if number == 1:
            yield ()
        return
    for first in (d for d in range(1, number + 1) if number % d == 0):
        for rest in _factored(number // first, parts - 1):
            yield (first, *rest)


def _divided(deployment: Deployment, mesh: Mesh) -> Deployment | None:
    """The deployment on another mesh; None if something does not divide."""
    rules: list[ShardRule] = []
    for rule in deployment.shard:
        ways = mesh.ways(rule.axes)
        splits: list[Split] = []
        for split in rule.splits:
            copies = split.redundant
            if rule.target.kind == "array" and copies:
                copies += -(split.extent + copies) % ways
            if (split.extent + copies) % ways or copies > split.extent:
                return None
            splits.append(replace(split, ways=ways, redundant=copies))
        most = max((s.redundant for s in splits), default=rule.redundant)
        rules.append(replace(rule, splits=tuple(splits), redundant=most))
    stages = deployment.stages
    if stages is not None:
        stages = _staged(stages, mesh.sizes[stages.axis])
        if stages is None:
            return None
    return replace(deployment, mesh=mesh, shard=tuple(rules), stages=stages)


def _staged(stages: Stages, ranks: int) -> Stages | None:
    """The same layers on another number of ranks: as many each, the last ranks with one fewer."""
    if len(stages.stages) == ranks:
        return stages
    names = {name for stage in stages.stages for name, _, _ in stage.layers}
    if len(names) != 1:
        return None
    (name,) = names
    start = min(at for stage in stages.stages for _, at, _ in stage.layers)
    stop = max(end for stage in stages.stages for _, _, end in stage.layers)
    each, more = divmod(stop - start, ranks)
    if not each:
        return None  # a rank without layers
    bounds = [start + i * each + min(i, more) for i in range(ranks + 1)]
    out = [Stage(((name, a, b),)) for a, b in pairwise(bounds)]
    first, last = stages.stages[0].extras, stages.stages[-1].extras
    out[0] = replace(out[0], extras=first if len(stages.stages) > 1 else ())
    out[-1] = replace(out[-1], extras=(*out[-1].extras, *last))
    return Stages(stages.axis, tuple(out), stages.span)


def _batches(deployment: Deployment) -> Iterator[tuple[Deployment, str]]:
    train, serve = deployment.train, deployment.serve
    if train is not None:
        ways = deployment.mesh.ways(deployment.batch_axes)
        ranks = deployment.mesh.sizes[deployment.stages.axis] if deployment.stages else 1
        for size in dict.fromkeys((train.micro_batch, *MICRO_BATCHES)):
            if train.batch % (ways * size):
                continue
            count = train.batch // (ways * size)
            schedule = deployment.overlap.schedule
            if schedule == "dualpipe" and (ranks % 2 or count % 2 or count < 2 * ranks):
                continue
            one = replace(deployment, train=replace(train, micro_batch=size))
            yield one, f"micro-batch {size}, {count} of them"
    elif serve is not None and serve.batch_per_rank is not None:
        for scale in SCALES:
            batch = max(1, round(serve.batch_per_rank * scale))
            yield replace(deployment, serve=replace(serve, batch_per_rank=batch)), f"batch {batch}"
    elif serve is not None and serve.tokens_per_rank is not None:
        for scale in SCALES:
            tokens = max(1, round(serve.tokens_per_rank * scale))
            one = replace(deployment, serve=replace(serve, tokens_per_rank=tokens))
            yield one, f"{tokens:,} tokens"
    else:
        yield deployment, "as many as fit"


def _why(plan: Plan) -> str:
    """Where its time goes."""
    part = plan.step or plan.serving
    assert part is not None
    said = []
    if plan.step is not None:
        said.append(f"bubble {plan.step.parts['bubble'] / plan.seconds:.0%}")
    said.append(f"waits for communication {part.exposed / plan.seconds:.0%}")
    if plan.capacity is not None:
        said.append(f"{plan.memory.total / plan.capacity:.0%} of memory")
    return ", ".join(said)


def as_data(found: Sequence[Tried]) -> list[dict[str, object]]:
    """What ``--json`` adds under "search"."""
    return [
        {
            "mesh": one.mesh,
            "gpus": one.plan.gpus,
            "batch": one.batch,
            "tokens_per_second": one.tokens,
            "step_seconds": one.plan.seconds,
            "memory_per_gpu_bytes": one.plan.memory.total,
            "why": one.why,
        }
        for one in found
    ]
