"""What prefill and decoding take: the time of a step, tokens per second, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from compiler.errors import UserError
from compiler.planning import streams
from compiler.planning.costs import Measured
from compiler.planning.memory import Held, by_format
from compiler.planning.model import Model, Point, Subject
from compiler.planning.ops import Load
from compiler.planning.rates import Rates
from compiler.planning.segments import Layer, forward, together
from compiler.planning.streams import Schedule, Task
from compiler.planning.times import Times
from compiler.planning.training import Memory
from compiler.tensors import caches
from dsl.deploy.typed import Serve

MOST_PROMPTS = 64  # a pass of more whole prompts has nothing to win
MOST_SEQUENCES = 4096
EFFORT = 20_000  # two micro-batches of many layers that are alike have little to choose


@dataclass(frozen=True)
class Pass:
    """One forward pass of every rank.

    Attributes:
        sequences: of each rank of the batch axes. ``tokens``: prompt tokens that are done with it,
            or tokens that are generated, per rank of the batch axes.
        within: whether ``tpot`` holds, if it is asked for.
    """

    seconds: float
    sequences: float
    tokens: float
    tpot: float | None
    tasks: list[Task]
    schedule: Schedule
    memory: Memory
    communication: float
    exposed: float
    within: bool = True
    points: tuple[Point, ...] = ()


class Serving:
    """Serving plans of one subject. Models are built once for each batch size that is tried."""

    def __init__(self, subject: Subject):
        deployment = subject.deployment
        assert deployment.serve is not None
        self.subject = subject
        self.serve: Serve = deployment.serve
        self._models: dict[float, Model] = {}
        self._chosen: float | None = None

    @property
    def decodes(self) -> bool:
        return self.serve.phase == "decode"

    @property
    def direct(self) -> bool:
        """Are picks sent one by one? GPUs have low-latency kernels for decoding that do; the
        runtime of compiled programs sends a row once to each place that wants it."""
        cluster = self.subject.deployment.cluster
        return self.decodes and cluster is not None and cluster.kind == "gpu"

    @property
    def parts(self) -> int:
        """Micro-batches of a pass."""
        return 2 if self.subject.deployment.overlap.schedule == "two_microbatches" else 1

    # -- what is asked for -----------------------------------------------------------------------

    def step(self, rates: Rates, measured: Measured | None = None, thorough: bool = True) -> Pass:
        """A pass at these rates, of as many sequences as the deployment says; where it leaves that
        open, as many as memory and ``tpot`` allow.

        Raises:
            UserError: a single sequence is too much.
        """
        effort = EFFORT if thorough else 0
        return self._pass(rates, measured, self._sequences(rates, measured), effort)

    def _sequences(self, rates: Rates, measured: Measured | None) -> float:
        serve = self.serve
        if self._chosen is not None:
            return self._chosen
        if self.decodes and serve.batch_per_rank is not None:
            self._chosen = float(serve.batch_per_rank)
        elif not self.decodes and serve.tokens_per_rank is not None:
            self._chosen = serve.tokens_per_rank / self._length
        else:
            self._chosen = float(self._most(rates, measured))
        return self._chosen

    def _most(self, rates: Rates, measured: Measured | None) -> int:
        """The largest number of sequences that fits and is fast enough."""
        capacity = rates.capacity()
        most = MOST_SEQUENCES if self.decodes else MOST_PROMPTS

        def holds(number: int) -> bool:
            one = self._pass(rates, measured, number, 0)
            return one.within and (capacity is None or one.memory.total <= capacity)

        low, high = 0, 1
        while high <= most and holds(high):
            low, high = high, high * 2
        if low == 0:
            return 1  # the plan says what does not hold
        high = min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    @property
    def _length(self) -> int:
        """Positions of a sequence that one pass computes."""
        serve = self.serve
        if self.decodes:
            return 2 if serve.draft is not None else 1
        assert serve.prompt is not None
        return max(1, round(serve.prompt * (1 - serve.cache_hits)))

    # -- a pass ----------------------------------------------------------------------------------

    def _model(self, sequences: float) -> Model:
        """What a rank computes for one micro-batch."""
        if sequences not in self._models:
            serve, length = self.serve, self._length
            history = serve.context if self.decodes else serve.prompt
            assert history is not None
            wanted = length if self.decodes else 1
            load = Load(sequences / self.parts, length, max(history, length), wanted, self.decodes)
            entries = ["main", *([serve.draft] if serve.draft else [])]
            if any(e not in self.subject.final.entries for e in entries):
                raise UserError(f"the model has no entry point '{entries[-1]}'")
            self._models[sequences] = Model(self.subject, entries, load)
        return self._models[sequences]

    def _pass(self, rates: Rates, measured: Measured | None, sequences: float, effort: int) -> Pass:
        deployment, serve = self.subject.deployment, self.serve
        model = self._model(sequences)
        times = Times(
            rates,
            self.subject.sharding,
            self.subject.precision,
            model.load.tokens,
            direct=self.direct,
        )
        layers = model.layers(times, False, measured)
        all_layers: list[Layer] = []
        for number, block in enumerate(model.blocks):
            all_layers += [layers[number]] * max(1, len(block.piece.layers))
        tasks = forward(all_layers, split=False)
        if self.parts > 1:
            charge = rates.charge(deployment.overlap.sms)
            tagged = [
                [replace(t, name=f"{t.name} {'AB'[part]}") for t in tasks]
                for part in range(self.parts)
            ]
            tasks = together(*tagged)
            schedule = streams.overlapped(tasks, charge, effort)
            alone = streams.sequential(tasks)
            schedule = alone if alone.total < schedule.total else schedule
        else:
            schedule = streams.sequential(tasks)
        seconds = schedule.total
        if self.decodes:
            tokens = sequences * (1 + (serve.accepted if serve.draft else 0.0))
            tpot: float | None = seconds * sequences / tokens
        else:
            assert serve.prompt is not None
            tokens, tpot = sequences * serve.prompt, None
        within = serve.tpot is None or tpot is None or tpot <= serve.tpot
        return Pass(
            seconds,
            sequences,
            tokens,
            tpot,
            tasks,
            schedule,
            self._memory(model, sequences),
            schedule.communicating,
            schedule.exposed,
            within,
            tuple(model.points(times)),
        )

    def _memory(self, model: Model, sequences: float) -> Memory:
        held: dict[tuple[str, int | None], Held] = {}
        per_token = largest = flight = 0.0
        precision = self.subject.precision
        for number, block in enumerate(model.blocks):
            for one in model.held(number, block.piece.layers):
                held[one.path, one.layer] = one
            count = max(1, len(block.piece.layers))
            for op in block.piece.ops:
                if op.node.op == "cache" and not op.node.attrs.get("last"):
                    each = op.inputs[0].elements / model.load.tokens
                    per_token += each * precision.cached * count
            for kernel in block.kernels:
                largest = max(largest, kernel.read + kernel.written)
            sent = sum(k.read for k in block.kernels if k.kind in ("dispatch", "combine"))
            flight = max(flight, sent)
        serve = self.serve
        positions = serve.context if self.decodes else serve.prompt
        assert positions is not None
        states = sum(
            c.elements * precision.value(c.dtype)
            for c in caches(self.subject.source)
            if c.last is not None and "main" in c.entries
        )
        own = list(held.values())
        formats: Mapping[str, float] = by_format(own)
        return Memory(
            sum(h.elements * h.bytes for h in own),
            activations=largest * self.parts,
            cache=sequences * (positions * per_token + states),
            buffers=flight * self.parts,
            weights_by_format=formats,
        )
