"""Deployments as the compiler reads them: every name resolved, every number known.

``docs/deployments.md`` says what each part means. A deployment never changes the mathematics, only
precision, order and place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from dsl.clusters import Cluster
from dsl.diagnostics import Diagnostic, Span
from dsl.extents import Extent
from dsl.formats import NumberFormat, Tile


@dataclass(frozen=True)
class Axis:
    """A mesh axis and how many ranks stand along it."""

    name: str
    size: int
    span: Span


@dataclass(frozen=True)
class Mesh:
    """The ranks in a row-major grid: neighbours along the last axis have neighbouring numbers.

    Rank r is device ``r % per_node`` of node ``r // per_node``. Without a mesh there is one rank.
    """

    axes: tuple[Axis, ...] = ()

    @property
    def size(self) -> int:
        return prod(axis.size for axis in self.axes)

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {axis.name: axis.size for axis in self.axes}

    def ways(self, axes: tuple[str, ...]) -> int:
        """Into how many parts a value that is split over ``axes`` falls."""
        return prod(self.sizes.get(name, 1) for name in axes)  # one that is not there is told

    def stride(self, name: str) -> int:
        """How far apart in rank number two neighbours along an axis are."""
        names = [axis.name for axis in self.axes]
        return prod(axis.size for axis in self.axes[names.index(name) + 1 :])

    def nodes_spanned(self, name: str, per_node: int) -> int:
        """Over how many nodes of ``per_node`` devices the ranks along an axis lie, at most."""
        stride, size = self.stride(name), self.sizes[name]
        return size if stride >= per_node else -(-stride * size // per_node)


@dataclass(frozen=True)
class Target:
    """What a rule speaks of, resolved.

    Attributes:
        kind: for ``shard``: batch, optimizer, gradients, parameters, time, history, index, extent
            (every index of this constant's extent), array (an array of blocks). For ``precision``
            and ``recompute``: parameter, state, use, array, block, value.
        block: the block it belongs to; None for what is the program's.
        name: its name there.
    """

    kind: str
    block: str | None
    name: str
    span: Span

    def __str__(self) -> str:
        return self.name if self.block is None else f"{self.block}.{self.name}"


@dataclass(frozen=True)
class Split:
    """An index or array of blocks as it occurs in the model, and how a rule divides it.

    ``extent`` entries and ``redundant`` copies lie on ``ways`` ranks, ``each`` on every one.
    """

    block: str
    name: str
    extent: int
    redundant: int
    ways: int

    @property
    def each(self) -> int:
        return (self.extent + self.redundant) // self.ways


@dataclass(frozen=True)
class ShardRule:
    """``target -> axes``, the first axis outermost.

    Attributes:
        axes: mesh axes; none keeps the target whole on every rank.
        replicas: ``-> replicas``: each parameter's share is split over all axes it is whole on.
        redundant: further copies of an array's blocks, chosen by a load balancer.
        splits: what the rule divides at the present sizes.
        reaches: the indices it divides where parameters have them, as (block, index, extent): one
            that a block passes on is another block's own.
    """

    target: Target
    axes: tuple[str, ...]
    replicas: bool
    redundant: int
    span: Span
    splits: tuple[Split, ...] = ()
    reaches: tuple[tuple[str, str, Extent], ...] = ()


@dataclass(frozen=True)
class Stage:
    """Layers of one pipeline stage, as half-open ranges of an array, and entry points or uses that
    run with it."""

    layers: tuple[tuple[str, int, int], ...]
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stages:
    """A pipeline over a mesh axis. Stage i runs on coordinate i modulo the axis' size."""

    axis: str
    stages: tuple[Stage, ...]
    span: Span


@dataclass(frozen=True)
class Stored:
    """An operand's format and tile. ``format`` None: as the values are."""

    format: NumberFormat | None
    tile: Tile | None = None

    def __str__(self) -> str:
        name = "act" if self.format is None else self.format.name
        return name if self.tile is None else f"{name} {self.tile}"


@dataclass(frozen=True)
class PrecisionRule:
    """How some contractions are run, or how some values are kept.

    Attributes:
        label: the name that reports call the rule by.
        selects: contractions, parameter (contractions with a parameter), cached (what is kept from
            token to token), act (every value of the model's own element type), named (``targets``).
        targets, exceptions: what is named, and what is left as it is.
        roles: by operand: weights, activations, gradients for contractions; values for the rest.
        promote: partial sums go to float32 after this many summed elements; None: at the end.
    """

    label: str
    selects: str
    targets: tuple[Target, ...]
    exceptions: tuple[Target, ...]
    roles: Mapping[str, Stored]
    promote: int | None
    span: Span


@dataclass(frozen=True)
class Overlap:
    """Which schedule hides communication. ``sms``: given to communication while it runs; None
    leaves it to the cluster's ``communication_sms``."""

    schedule: str
    sms: int | None
    span: Span | None


@dataclass(frozen=True)
class Train:
    """A training step.

    Attributes:
        batch: sequences per step, over all ranks; ``sequence``: their length in tokens.
        micro_batch: sequences of one rank that go through the model together.
        weight: what an entry point's loss counts; 1 where nothing is said, 0 leaves it out.
        gradients, master, moments: how gradients, master weights and optimizer moments are kept.
        imbalance: the busiest rank's share of routed work over the mean.
        casts: fused (with the kernel that makes a value) or separate.
        sources: where a setting's number comes from, if written down.
    """

    batch: int
    sequence: int
    micro_batch: int
    weight: Mapping[str, float]
    gradients: NumberFormat
    master: NumberFormat
    moments: NumberFormat
    imbalance: float
    casts: str
    sources: Mapping[str, str]
    span: Span


@dataclass(frozen=True)
class Serve:
    """The load that an inference deployment is for.

    Attributes:
        phase: prefill or decode.
        batch_per_rank: decode: sequences in flight per rank of the batch axes; None: as many as
            ``tpot`` and memory allow.
        tokens_per_rank: prefill: tokens per forward pass and rank of the batch axes; None: whole
            prompts, as many as memory allows.
        tpot: decode: the longest time per output token, in seconds; None: no limit.
        prompt: prefill: tokens per prompt; ``context``: decode: cached positions, mean.
        cache_hits: the share of prompt tokens that need no computing.
        utilisation: the share of time under full load.
        draft: the entry point that drafts further tokens; ``accepted``: the share that is kept.
        imbalance, casts, sources: as for training.
    """

    phase: str
    batch_per_rank: int | None
    tokens_per_rank: int | None
    tpot: float | None
    prompt: int | None
    context: int | None
    cache_hits: float
    utilisation: float
    draft: str | None
    accepted: float
    imbalance: float
    casts: str
    sources: Mapping[str, str]
    span: Span


@dataclass(frozen=True)
class Deployment:
    """How a model is run: where, in which precision, in which order.

    Attributes:
        cluster: None for local processes, of which there are ``mesh.size``.
        bases: deployments it was declared from, nearest first.
        problems: what does not hold at the present sizes; ``choose`` raises them.
    """

    name: str
    model: str
    cluster: Cluster | None
    bases: tuple[str, ...]
    mesh: Mesh
    stages: Stages | None
    shard: tuple[ShardRule, ...]
    precision: tuple[PrecisionRule, ...]
    overlap: Overlap
    recompute: tuple[Target, ...]
    train: Train | None
    serve: Serve | None
    span: Span
    problems: tuple[Diagnostic, ...] = field(default=(), repr=False)

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes over which sequences are spread."""
        return next((r.axes for r in self.shard if r.target.kind == "batch"), ())

    @property
    def micro_batches(self) -> int | None:
        """How many micro-batches of a training step go through each rank."""
        if self.train is None:
            return None
        return self.train.batch // (self.mesh.ways(self.batch_axes) * self.train.micro_batch)
