"""A plan: what a deployment would cost, how fast it would run, and what that rests on.

plan = make(source, final, deployment)
plan.as_data()      # what ``dslc plan --json`` prints
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compiler.errors import UserError
from compiler.ir import Program
from compiler.planning.costs import Measured
from compiler.planning.model import Subject
from compiler.planning.rates import Key, Rates, gigabytes
from compiler.planning.serving import Pass, Serving
from compiler.planning.streams import Schedule, Task
from compiler.planning.training import Memory, Step, Training
from compiler.report import report
from dsl.clusters import Figure
from dsl.deploy.typed import Deployment
from dsl.tables import spelled

DAY = 86_400.0
HOUR = 3600.0
TRILLION = 1e12
WORSE = 0.1  # how much worse a figure is made to see what it matters
MATTERING = 3


@dataclass(frozen=True)
class Assumption:
    """A figure that a plan rests on, and what a worse one would do.

    Attributes:
        effect: relative change of tokens per second if the figure were a tenth worse.
    """

    name: str
    value: str
    source: str
    effect: float

    @property
    def text(self) -> str:
        worse = f"10% worse changes tokens/s by {self.effect:+.1%}"
        return f"{self.name} = {self.value} ({self.source}): {worse}"


@dataclass(frozen=True)
class Plan:
    """What ``dslc plan`` shows. Times are in seconds, memory in bytes.

    Attributes:
        step, serving: the training step, or the pass of serving.
        tokens: per second, of the whole deployment.
        figures: those of the cluster that were used; ``notes``: what stood in for missing ones.
        problems: why the deployment does not hold.
    """

    deployment: Deployment
    step: Step | None
    serving: Pass | None
    tokens: float
    mfu: float | None
    capacity: float | None
    price: float | None
    figures: Mapping[Key, Figure]
    notes: tuple[str, ...]
    assumptions: tuple[Assumption, ...]
    measured: str | None = None
    model_flops: float = 0.0
    problems: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        return self.deployment.mesh.size

    @property
    def memory(self) -> Memory:
        part = self.step or self.serving
        assert part is not None
        return part.memory

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.memory.total <= self.capacity

    @property
    def seconds(self) -> float:
        part = self.step or self.serving
        assert part is not None
        return part.seconds

    @property
    def gpu_hours_per_trillion(self) -> float:
        return self.gpus * TRILLION / self.tokens / HOUR

    @property
    def dollars_per_trillion(self) -> float | None:
        return None if self.price is None else self.price * self.gpu_hours_per_trillion

    @property
    def lanes(self) -> tuple[list[Task], Schedule] | None:
        """Computing and communicating of one rank, task by task: a pair, or a pass."""
        if self.step is not None:
            return self.step.pair
        return None if self.serving is None else (self.serving.tasks, self.serving.schedule)

    @property
    def per_node(self) -> int:
        cluster = self.deployment.cluster
        return min(cluster.per_node if cluster is not None else 1, self.gpus)

    def as_data(self) -> dict[str, Any]:
        """The object that ``--json`` prints; the interface of docs and outside checks."""
        memory, step = self.memory, self.step
        part = step or self.serving
        assert part is not None
        time: dict[str, float | None] = dict.fromkeys(
            ("step", "forward", "backward", "weight", "pair", "bubble", "optimizer")
        )
        time["step"] = self.seconds
        if step is not None:
            parts = step.parts
            time |= {
                "forward": parts["F"],
                "backward": parts["B"] + parts["I"],
                "weight": parts["W"],
                "pair": parts["pair"],
                "bubble": parts["bubble"],
                "optimizer": parts["optimizer"],
            }
        trains = step is not None
        return {
            "gpus": self.gpus,
            "mesh": dict(self.deployment.mesh.sizes),
            "fits": self.fits,
            "memory_per_gpu_bytes": {
                "weights": memory.weights,
                "gradients": memory.gradients,
                "optimizer": memory.optimizer,
                "activations": memory.activations,
                "cache": memory.cache,
                "buffers": memory.buffers,
                "total": memory.total,
            },
            "time": time,
            "tokens_per_second": self.tokens,
            "tokens_per_second_per_node": self.tokens / self.gpus * self.per_node,
            "tokens_per_second_per_gpu": self.tokens / self.gpus,
            "tpot_seconds": None if self.serving is None else self.serving.tpot,
            "tokens_per_day": self.tokens * DAY,
            "mfu": self.mfu,
            "gpu_hours_per_trillion_tokens": self.gpu_hours_per_trillion,
            "dollars_per_trillion_tokens": self.dollars_per_trillion,
            "communication": {
                "total_seconds": part.communication,
                "exposed_seconds": part.exposed,
            },
            "assumptions": [a.text for a in self.assumptions],
            "memory_capacity_bytes": self.capacity,
            "weights_by_format_bytes": dict(memory.weights_by_format),
            "pair": None if not trains or self.lanes is None else _lanes(self.lanes[1]),
            "pass": None if trains or self.lanes is None else _lanes(self.lanes[1]),
            "rates": {
                spelled(key): {"value": f.value, "written": f.text, "source": f.source}
                for key, f in self.figures.items()
            },
            "notes": list(self.notes),
            "problems": list(self.problems),
        }


def _lanes(schedule: Schedule) -> dict[str, float]:
    return {
        "sequential_seconds": schedule.sequential,
        "overlapped_seconds": schedule.total,
        "bound_seconds": schedule.bound,
        "least_seconds": schedule.least,
        "hidden_fraction": schedule.hidden,
        "reachable_fraction": schedule.reachable,
    }


Planner = Callable[[Rates, bool], tuple[Step | None, Pass | None, float]]


def make(
    source: Program,
    final: Program,
    deployment: Deployment,
    measured: Measured | None = None,
    weigh: bool = True,
) -> Plan:
    """Plan a deployment.

    Args:
        source: as elaborated; ``final``: after the last pass.
        measured: durations that replace modelled ones.
        weigh: find which assumptions matter most (a plan for each figure that was used).

    Raises:
        UserError: the deployment has no load or no cluster, or its cluster lacks figures.
    """
    subject = Subject(source, final, deployment)
    rates = subject.rates()
    planner = _planner(subject, measured)
    step, serving, tokens = planner(rates, True)
    capacity = rates.capacity()
    training = report(source, deployment.train.sequence) if deployment.train else None
    mfu = None
    flops = 0.0
    if training is not None and training.training_flops is not None:
        flops = training.training_flops
        peak = next(
            (
                value
                for name in subject.precision.own_format
                if (value := rates.figure("peak", name)) is not None
            ),
            None,
        )
        mfu = None if peak is None else tokens * flops / (deployment.mesh.size * peak)
    price = rates.figure("price")
    used = dict(rates.used)
    return Plan(
        deployment,
        step,
        serving,
        tokens,
        mfu,
        capacity,
        price,
        used,
        tuple(rates.notes),
        _assumptions(subject, planner, used) if weigh else (),
        None if measured is None else measured.source,
        flops,
        tuple(_problems(deployment, step, serving, capacity)),
    )


def _planner(subject: Subject, measured: Measured | None) -> Planner:
    deployment = subject.deployment
    ways = deployment.mesh.ways(deployment.batch_axes)
    if deployment.train is not None:
        train = deployment.train
        training = Training(subject)

        def trained(rates: Rates, thorough: bool) -> tuple[Step | None, Pass | None, float]:
            step = training.step(rates, measured, thorough)
            return step, None, train.batch * train.sequence / step.seconds

        return trained
    if deployment.serve is None:
        name = deployment.name
        raise UserError(
            f"deployment '{name}' says neither what is trained nor what is served: add"
            " 'train batch = ...' or 'serve decode context = ...'"
        )
    serving = Serving(subject)
    utilisation = deployment.serve.utilisation
    if not utilisation:
        raise UserError(
            f"deployment '{deployment.name}' is under load for none of its time: utilisation must"
            " be above 0"
        )

    def served(rates: Rates, thorough: bool) -> tuple[Step | None, Pass | None, float]:
        done = serving.step(rates, measured, thorough)
        return None, done, done.tokens * ways / done.seconds * utilisation

    return served


def _problems(
    deployment: Deployment, step: Step | None, serving: Pass | None, capacity: float | None
) -> list[str]:
    out = []
    part = step or serving
    assert part is not None
    if capacity is not None and part.memory.total > capacity:
        cluster = deployment.cluster
        device = cluster.device if cluster is not None else "device"
        out.append(
            f"it does not fit: a rank needs {gigabytes(part.memory.total)}, and a {device} has"
            f" {gigabytes(capacity)} to give"
        )
    if serving is not None and not serving.within:
        tpot = deployment.serve.tpot if deployment.serve is not None else None
        assert tpot is not None and serving.tpot is not None
        out.append(
            f"a token takes {serving.tpot * 1e3:.1f} ms, and tpot asks for {tpot * 1e3:g} ms"
        )
    return out


# What is better when it is smaller.
COSTS = ("latency", "floor", "gap", "communication_sms", "reserved")
NOT_ASSUMED = ("price", "memory", "reserved", "peak", "sms")


def _assumptions(
    subject: Subject, planner: Planner, used: Mapping[Key, Figure]
) -> tuple[Assumption, ...]:
    """The figures that matter most: each is made a tenth worse, and the plan made again."""
    found = []
    usual = planner(subject.rates(), False)[2]
    for key, figure in used.items():
        if key[0] in NOT_ASSUMED and not (key[0] == "peak" and ("rate", *key[1:]) not in used):
            continue
        factor = 1 + WORSE if key[0] in COSTS else 1 - WORSE
        worse = subject.rates({key: factor})
        effect = planner(worse, False)[2] / usual - 1
        found.append(Assumption(figure.name, figure.text, figure.source, effect))
    return tuple(sorted(found, key=lambda a: -abs(a.effect))[:MATTERING])
