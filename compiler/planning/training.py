"""What a training step takes: its time in parts, its memory, and what hides behind what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

from compiler.errors import UserError
from compiler.planning import pipeline, streams
from compiler.planning.costs import Measured
from compiler.planning.formats import width
from compiler.planning.memory import Held, by_format
from compiler.planning.model import Model, Point, Subject
from compiler.planning.ops import Load
from compiler.planning.rates import Rates
from compiler.planning.segments import Layer, backward, forward, together
from compiler.planning.streams import Schedule, Task
from compiler.planning.times import Sent, Times
from dsl.deploy.typed import Stage, Stages, Train


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by kind; ``weights_by_format`` says more of weights."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    buffers: float = 0.0
    weights_by_format: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.cache
            + self.buffers
        )


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        seconds: of the whole step. ``parts``: mean seconds of a pipeline rank by kind of work
            (F, B, I, W, pair, bubble), and optimizer.
        run: the pipeline, event by event; ``pair``: the overlapped pair of the rank in the middle.
        points: kernels of a layer, for a roofline.
        memory: of the rank that holds most. ``communication``, ``exposed``: seconds of collectives
            of a rank in a step, and how long computing waits for them.
    """

    seconds: float
    parts: Mapping[str, float]
    run: pipeline.Run
    ranks: int
    pair: tuple[list[Task], Schedule] | None
    memory: Memory
    communication: float
    exposed: float
    micro_batches: int
    points: tuple[Point, ...] = ()


@dataclass(frozen=True)
class _Stage:
    layers: list[Layer]
    saved: float
    held: list[Held]


class Training:
    """Training plans of one subject: the graph is read once, times are computed for any rates."""

    def __init__(self, subject: Subject):
        deployment = subject.deployment
        assert deployment.train is not None
        self.subject = subject
        self.train: Train = deployment.train
        left_out = {name for name, weight in self.train.weight.items() if weight == 0}
        known = subject.final.entries
        entries = [name for name in ("main", *known) if name in known and name not in left_out]
        load = Load(
            self.train.micro_batch, self.train.sequence, self.train.sequence, self.train.sequence
        )
        self.model = Model(subject, list(dict.fromkeys(entries)), load)
        self.stages = self._stages()
        ranks = deployment.mesh.sizes[deployment.stages.axis] if deployment.stages else 1
        if deployment.stages is not None and len(self.stages) != ranks:
            raise UserError(_interleaved(deployment.stages, ranks))
        self.ranks = ranks

    # -- stages ----------------------------------------------------------------------------------

    def _stages(self) -> list[list[tuple[int, range]]]:
        """Of each stage, the blocks that it runs, with the layers it has of each; blocks between
        loops stand with the stage of what comes before them, but the first."""
        deployment = self.subject.deployment
        blocks = self.model.blocks
        if deployment.stages is None:
            return [[(n, b.piece.layers) for n, b in enumerate(blocks)]]
        declared = deployment.stages.stages
        out: list[list[tuple[int, range]]] = [[] for _ in declared]
        loops = [n for n, b in enumerate(blocks) if b.piece.child]
        for number, block in enumerate(blocks):
            if block.piece.child:
                for stage, one in zip(out, declared, strict=True):
                    layers = _overlap(one, block.piece.child, block.piece.layers)
                    if layers:
                        stage.append((number, layers))
            elif block.piece.entry != "main":
                at = next((i for i, s in enumerate(declared) if block.piece.entry in s.extras), -1)
                out[at].append((number, range(0)))
            elif not loops or number < loops[0]:
                out[0].append((number, range(0)))
            else:
                out[-1].append((number, range(0)))
        return [sorted(stage, key=lambda s: (s[0], s[1].start)) for stage in out]

    def _made(self, times: Times, measured: Measured | None) -> list[_Stage]:
        layers = self.model.layers(times, True, measured)
        out = []
        for stage, held in zip(self.stages, self._parameters, strict=True):
            own: list[Layer] = []
            saved = 0.0
            for number, numbers in stage:
                count = max(1, len(numbers))
                own += [layers[number]] * count
                saved += self.model.blocks[number].saved * count
            out.append(_Stage(own, saved, held))
        return out

    @cached_property
    def _parameters(self) -> list[list[Held]]:
        """Of each stage, the parameters that a rank holds."""
        out = []
        for stage in self.stages:
            held = {(h.path, h.layer): h for part in stage for h in self.model.held(*part)}
            out.append(list(held.values()))
        return out

    @cached_property
    def _turns(self) -> list[list[pipeline.Turn]]:
        count = self.subject.deployment.micro_batches
        assert count is not None
        return pipeline.SCHEDULES[self._kind](self.ranks, count)

    @property
    def _kind(self) -> str:
        """The pipeline's schedule."""
        schedule = self.subject.deployment.overlap.schedule
        return schedule if schedule in pipeline.SCHEDULES else "1f1b"

    # -- a step ----------------------------------------------------------------------------------

    def step(self, rates: Rates, measured: Measured | None = None, thorough: bool = True) -> Step:
        """Time and memory of a step at these rates.

        Args:
            thorough: many orders of a pair are tried, and memory is counted; else only time.
        """
        deployment, train = self.subject.deployment, self.train
        gradient = width(train.gradients)
        tokens = self.model.load.tokens
        times = Times(
            rates, self.subject.sharding, self.subject.precision, tokens, gradient=gradient
        )
        stages = self._made(times, measured)
        schedule = deployment.overlap.schedule
        hides = schedule in ("dualpipe", "two_microbatches")
        charge = rates.charge(deployment.overlap.sms) if hides else 0.0
        halves = schedule == "two_microbatches"
        effort = streams.EFFORT if thorough else 0
        plans = _Plans(stages, charge, hides, halves, effort)
        chunks = [
            pipeline.Times(
                plans.forward(n).total,
                plans.backward(n).total,
                plans.inputs(n).total,
                plans.weight(n).total,
                stage.saved if thorough else 0.0,
            )
            for n, stage in enumerate(stages)
        ]
        kind, count = self._kind, deployment.micro_batches
        assert count is not None
        pairs_take = cache(lambda f, b: plans.pair(f, b).total)
        run = pipeline.simulate(self._turns, chunks, pairs_take, self._send(times))
        held = self._held(stages, kind)
        of_rank = {id(h): self._optimizer(times, h, kind) for h in held}
        optimizer = max(of_rank.values())
        parts = {**run.parts(self.ranks), "optimizer": optimizer}
        if not thorough:
            memory = Memory(0.0)
            return Step(run.end + optimizer, parts, run, self.ranks, None, memory, 0.0, 0.0, count)
        total, exposed = self._communication(run, plans)
        pairs = [e.turn for e in run.events if e.kind == "pair" and e.rank == self.ranks // 2]
        pair = None
        if pairs:
            f, b = (self._stage_of(self.ranks // 2, c) for c in pairs[len(pairs) // 2])
            pair = (plans.pair_tasks(f, b), plans.pair(f, b))
        return Step(
            run.end + optimizer,
            parts,
            run,
            self.ranks,
            pair,
            self._memory(held, run, times),
            total,
            exposed,
            count,
            tuple(self.model.points(times)),
        )

    def _stage_of(self, rank: int, chunk: pipeline.Chunk) -> int:
        return self.ranks - 1 - rank if chunk.direction else rank

    def _send(self, times: Times) -> float:
        """Seconds until a chunk's result is at the next rank of the pipeline."""
        deployment = self.subject.deployment
        if self.ranks == 1 or deployment.stages is None:
            return 0.0
        stride = deployment.mesh.stride(deployment.stages.axis)
        level = "scale_out" if stride >= self.subject.sharding.per_node else "scale_up"
        rates = times.rates
        return self.model.boundary / rates.bandwidth("send", level) + rates.latency("send", level)

    def _communication(self, run: pipeline.Run, plans: _Plans) -> tuple[float, float]:
        """Seconds of collectives of a rank in a step, and how long computing waits, both means."""
        total = exposed = 0.0
        for event in run.events:
            stage = [self._stage_of(event.rank, chunk) for chunk in event.turn]
            plan = plans.of([c.kind for c in event.turn], stage)
            total += plan.communicating
            exposed += plan.exposed
        return total / self.ranks, exposed / self.ranks

    # -- state -----------------------------------------------------------------------------------

    def _held(self, stages: Sequence[_Stage], kind: str) -> list[list[Held]]:
        """The parameters of each rank; in DualPipe those of a stage of either direction."""
        out = []
        for rank in range(self.ranks):
            own = [stages[rank], *([stages[self.ranks - 1 - rank]] if kind == "dualpipe" else [])]
            found = {(h.path, h.layer): h for stage in own for h in stage.held}
            out.append(list(found.values()))
            if kind == "dualpipe" and rank >= self.ranks // 2:
                out[-1] = out[self.ranks - 1 - rank]  # its twin holds the same
        return out

    def _shares(self, target: str, one: Held) -> float:
        """Into how many parts what belongs to a parameter is split."""
        spread = self.subject.sharding.state(target)
        if spread is None:
            return 1.0
        if spread == ("replicas",):
            return float(one.copies)
        return float(self.subject.deployment.mesh.ways(tuple(a for a in spread if a in one.axes)))

    def _memory(self, held: Sequence[Sequence[Held]], run: pipeline.Run, times: Times) -> Memory:
        train = self.train
        state = width(train.master) + 2 * width(train.moments)
        buffers = self._buffers(times)
        ranks = []
        for rank, own in enumerate(held):
            shares = {name: [self._shares(name, h) for h in own] for name in _STATES}
            ranks.append(
                Memory(
                    sum(
                        h.elements * h.bytes / s
                        for h, s in zip(own, shares["parameters"], strict=True)
                    ),
                    sum(
                        h.elements * width(train.gradients) / s
                        for h, s in zip(own, shares["gradients"], strict=True)
                    ),
                    sum(
                        h.elements * state / s
                        for h, s in zip(own, shares["optimizer"], strict=True)
                    ),
                    run.peaks[rank],
                    0.0,
                    buffers,
                    by_format(own),
                )
            )
        return max(ranks, key=lambda m: m.total)

    def _buffers(self, times: Times) -> float:
        """What is in flight at most: one dispatch and one combine of each direction, and the
        chunks that the pipeline sends and receives."""
        collectives = 0.0
        for block in self.model.blocks:
            own = 0.0
            for kernel in block.kernels:
                if kernel.kind in ("dispatch", "combine"):
                    copies = (
                        kernel.read / max(1.0, times.tokens) if kernel.kind == "combine" else 0.0
                    )
                    own += copies * times.tokens or kernel.read
            collectives = max(collectives, own)
        return 2 * collectives + (4 * self.model.boundary if self.ranks > 1 else 0.0)

    def _optimizer(self, times: Times, held: Sequence[Held], kind: str) -> float:
        """Gradients are reduced over all ranks that hold the same parameter (with DualPipe also the
        one that holds it for the other direction), each updates its share, weights are gathered."""
        train, sharding = self.train, self.subject.sharding
        stages = self.subject.deployment.stages
        twin = stages is not None and kind == "dualpipe"
        by_group: dict[tuple[str, ...], list[Held]] = {}
        for one in held:
            by_group.setdefault(one.axes, []).append(one)
        seconds = touched = 0.0
        for axes, members in by_group.items():
            elements = sum(h.elements for h in members)
            reduced = elements * width(train.gradients)
            weights = sum(h.elements * h.bytes for h in members)
            replicas = sharding.state("optimizer") is not None
            seconds += times.transfer("reduce_scatter", times.reduced(reduced, axes))
            if replicas:
                seconds += times.transfer("all_gather", times.reduced(weights, axes))
            else:
                seconds += times.transfer("all_gather", times.reduced(reduced, axes))
            if twin:  # halves are exchanged with the twin, after the group has reduced its own
                copies = float(members[0].copies)
                seconds += times.transfer("send", Sent((reduced + weights) / 2 / copies, 0.0))
            state = width(train.master) + 2 * width(train.moments)
            share = sum(h.elements / self._shares("optimizer", h) for h in members)
            touched += share * (width(train.gradients) + 2 * state) + weights
        return seconds + touched / times.rates.memory()


ALONE = 1_000  # tasks placed to find an order of a chunk that runs by itself
_STATES = ("parameters", "gradients", "optimizer")


class _Plans:
    """Schedules of chunks on two streams; stages that are alike share them.

    Args:
        hides: communication is overlapped; else it is waited for. ``charge``: the share of the
            multiprocessors that it is left.
        halves: a chunk runs as two micro-batches of half its size, side by side.
        effort: spent on the order of a pair.
    """

    def __init__(
        self, stages: Sequence[_Stage], charge: float, hides: bool, halves: bool, effort: int
    ):
        self.stages = stages
        self.effort = effort
        self.charge = charge
        self.hides = hides
        self.halves = halves
        alike: dict[tuple[int, ...], int] = {}
        self._like = [alike.setdefault(tuple(map(id, s.layers)), n) for n, s in enumerate(stages)]
        self._known: dict[tuple[str, ...], Schedule] = {}

    def _plan(self, kind: str, stages: Sequence[int], make: Callable[[], list[Task]]) -> Schedule:
        key = (kind, *(str(self._like[n]) for n in stages))
        if key not in self._known:
            tasks = make()
            if self.halves and kind in "FB":
                half = [replace(task, seconds=task.seconds / 2) for task in tasks]
                tasks = together(half, half)
            effort = self.effort if kind == "pair" or self.halves else min(self.effort, ALONE)
            best = streams.sequential(tasks)
            if self.hides:
                plan = streams.overlapped(tasks, self.charge, effort)
                best = plan if plan.total <= best.total else best
            self._known[key] = best
        return self._known[key]

    def forward(self, stage: int) -> Schedule:
        layers = self.stages[stage].layers
        return self._plan("F", [stage], lambda: forward(layers))

    def backward(self, stage: int) -> Schedule:
        layers = self.stages[stage].layers
        return self._plan("B", [stage], lambda: backward(layers))

    def inputs(self, stage: int) -> Schedule:
        layers = self.stages[stage].layers
        return self._plan("I", [stage], lambda: backward(layers, weights=False))

    def weight(self, stage: int) -> Schedule:
        layers = self.stages[stage].layers
        return self._plan("W", [stage], lambda: backward(layers, inputs=False))

    def pair_tasks(self, f: int, b: int) -> list[Task]:
        """A forward and a backward chunk, side by side."""
        return together(forward(self.stages[f].layers, " F"), backward(self.stages[b].layers, " B"))

    def pair(self, f: int, b: int) -> Schedule:
        return self._plan("pair", [f, b], lambda: self.pair_tasks(f, b))

    def of(self, kinds: Sequence[str], stages: Sequence[int]) -> Schedule:
        """The schedule of a turn: one chunk, or a pair."""
        if len(kinds) > 1:
            return self.pair(stages[0], stages[1])
        by_kind = {"F": self.forward, "B": self.backward, "I": self.inputs, "W": self.weight}
        return by_kind[kinds[0]](stages[0])


def _interleaved(stages: Stages, ranks: int) -> str:
    """Why stages cannot be planned that ranks take turns in, and what could be."""
    layers = sum(stop - start for stage in stages.stages for _, start, stop in stage.layers)
    each, more = divmod(layers, ranks)
    parts = [(each + 1, more), (each, ranks - more)]
    written = ", ".join(f"{size} x {count}" for size, count in parts if size and count)
    return (
        f"{stages.span}: {len(stages.stages)} stages on {ranks} ranks; interleaved stages are not"
        f" planned yet, so there must be as many as ranks: as ({written})\n"
        "  (a part 'N x M' is M stages of N layers)"
    )


def _overlap(stage: Stage, child: str, layers: range) -> range:
    for name, start, stop in stage.layers:
        if name == child:
            low, high = max(start, layers.start), min(stop, layers.stop)
            if low < high:
                return range(low, high)
    return range(0)
