"""Checks deployments and what they stand on, and makes their typed forms.

Mistakes in names are mistakes of the file, whichever deployment is asked for. What does not hold at
the present sizes (64 ranks for 16 experts of a small preset) is a problem of one deployment: ``dslc
check`` reports it, and so does choosing that deployment; the model compiles without it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsl import syntax as ast
from dsl.clusters import Cluster, clusters
from dsl.deploy import syntax as written
from dsl.deploy.clauses import Values, recomputed, serve, train
from dsl.deploy.inherit import Clauses, Home, inherited
from dsl.deploy.names import Anatomy, shard_target
from dsl.deploy.precision import precision_rule
from dsl.deploy.sizes import Sizes
from dsl.deploy.stages import Ranges, StageMaker, check_schedule, overlap
from dsl.deploy.typed import Axis, Deployment, Mesh, ShardRule
from dsl.diagnostics import Diagnostic, DiagnosticError, Diagnostics, Note, Span, near
from dsl.extents import ExtentError
from dsl.files import Library, Unit
from dsl.formats import Formats, NumberFormat
from dsl.instances import Instance, Instances
from dsl.tables import Tables

if TYPE_CHECKING:
    from dsl.program import CheckedProgram

MOST_RANKS = 1 << 24
SHARED_STATE = ("optimizer", "gradients", "parameters")  # what -> replicas is for


@dataclass(frozen=True)
class Declared:
    """What a file and its imports declare beside the model."""

    formats: dict[str, NumberFormat]
    clusters: dict[str, Cluster]
    deployments: dict[str, Deployment]


def check_deployments(
    library: Library,
    instances: Instances,
    model: tuple[ast.Block, Unit] | None,
    found: Diagnostics,
) -> Declared:
    """Number formats, clusters and the deployments of ``model`` (of every model without one)."""
    tables = Tables(library, found)
    formats = Formats(tables, found)
    declared = formats.all()
    made = clusters(tables, declared, found)
    homes = [
        (d, u) for d, u in library.declarations(written.Deploy) if isinstance(d, written.Deploy)
    ]
    _check_twice(homes, found)
    by_name: dict[str, list[Home]] = {}
    for deploy, unit in homes:
        by_name.setdefault(deploy.name.text, []).append((deploy, unit))
    context = _Context(library, instances, tables, formats, made, found)
    deployments: dict[str, Deployment] = {}
    for deploy, unit in homes:  # the file that was asked for comes last and has the last word
        clauses = inherited(deploy, unit, by_name, tables.broken, found)
        deployment = None if clauses is None else _Maker(context, clauses).make()
        if deployment is None or clauses is None:
            continue
        if model is None or clauses.model is model[0]:
            deployments[deployment.name] = deployment
    return Declared(declared, made, deployments)


def choose(program: CheckedProgram, name: str) -> Deployment:
    """The deployment called ``name``, which holds at the program's sizes.

    Raises:
        DiagnosticError: there is none, or what does not hold.
    """
    deployment = program.deployments.get(name)
    if deployment is None:
        known = program.deployments
        listed = f"deployments: {', '.join(known)}" if known else "the file declares none"
        hint = near(name, known) or listed
        message = f"no deployment of '{program.name}' is called '{name}'"
        raise DiagnosticError([Diagnostic("E0806", message, hint=hint)])
    if deployment.problems:
        raise DiagnosticError(deployment.problems)
    return deployment


def _check_twice(homes: list[Home], found: Diagnostics) -> None:
    first: dict[tuple[str, int], written.Deploy] = {}
    for deploy, unit in homes:
        before = first.setdefault((deploy.name.text, id(unit)), deploy)
        if before is not deploy:
            found.error(
                "E0203",
                f"deployment '{deploy.name.text}' is declared twice",
                deploy.name.span,
                notes=[(before.name.span, "first declared here")],
            )


@dataclass
class _Context:
    """What all deployments of a program share."""

    library: Library
    instances: Instances
    tables: Tables
    formats: Formats
    clusters: dict[str, Cluster]
    found: Diagnostics

    def __post_init__(self) -> None:
        self.sound = not self.found.found  # the model's blocks have no mistakes
        self._anatomies: dict[int, Anatomy] = {}
        self._roots: dict[int, Instance | None] = {}
        self.used: dict[object, Instance] = {}

    def anatomy(self, model: ast.Block, unit: Unit) -> Anatomy:
        if id(model) not in self._anatomies:
            self._anatomies[id(model)] = Anatomy(self.library, model, unit)
        return self._anatomies[id(model)]

    def root(self, model: ast.Block, unit: Unit) -> Instance | None:
        """The model at its sizes; None if they wait for a checkpoint, or have been reported."""
        if id(model) not in self._roots:
            self._roots[id(model)] = None
            if self.sound:
                with suppress(DiagnosticError):
                    self._roots[id(model)] = self.instances.root(model, unit)
        return self._roots[id(model)]


class _Maker:
    """Makes one deployment out of its clauses."""

    def __init__(self, context: _Context, clauses: Clauses):
        self.context = context
        self.clauses = clauses
        self.found = context.found
        self.problems = Diagnostics()
        self.values = Values(context.instances.constants, self.problems)
        self.anatomy = context.anatomy(clauses.model, clauses.home)
        self.staged = clauses.stages.axis if clauses.stages is not None else None

    def make(self) -> Deployment | None:
        """The deployment, with what does not hold at these sizes; None after a diagnostic."""
        context, clauses, found, values = self.context, self.clauses, self.found, self.values
        before = len(found.found)
        cluster = self._cluster()
        mesh = self._mesh()
        shard = self._shard(mesh)
        precision = [
            precision_rule(c, self.anatomy, context.formats, found) for c in clauses.precision
        ]
        training = serving = maker = None
        match clauses.load:
            case written.Train(span=span):
                training = train(
                    clauses.options, span, self.anatomy, values, context.formats, found
                )
            case written.Serve(phase=phase):
                serving = serve(phase, clauses.options, self.anatomy, values, found)
        if clauses.stages is not None and serving is None:
            maker = StageMaker(clauses.stages, self.anatomy, values, found)
            maker.check_names()
        chosen = overlap(clauses.overlap, maker is not None, found)
        recompute = recomputed(clauses.recompute, self.anatomy, found) if clauses.recompute else ()
        if chosen is None or len(found.found) > before:
            return None
        deployment = Deployment(
            clauses.deploy.name.text,
            clauses.model.name.text,
            cluster,
            clauses.bases,
            mesh,
            None,
            shard,
            tuple(rule for rule in precision if rule is not None),
            chosen,
            recompute,
            training,
            serving,
            clauses.deploy.name.span,
        )
        if context.sound and not values.waiting:
            deployment = self._at_sizes(deployment, maker)
        return replace(deployment, problems=tuple(map(self._placed, self.problems.found)))

    def _placed(self, problem: Diagnostic) -> Diagnostic:
        """A problem of an inherited clause says which deployment it is a problem of."""
        own, at = self.clauses.deploy, problem.span
        if at is None or (at.source == own.span.source and at.line in range(*_lines(own.span))):
            return problem
        note = Note(own.name.span, f"'{own.name.text}' inherits this")
        return replace(problem, notes=(*problem.notes, note))

    # -- clauses ---------------------------------------------------------------------------------

    def _cluster(self) -> Cluster | None:
        name = self.clauses.cluster
        if name is None:
            return None
        self.context.tables.merged("cluster", name, "import clusters")
        return self.context.clusters.get(name.text)

    def _mesh(self) -> Mesh:
        clause, axes = self.clauses.mesh, dict[str, Axis]()
        for axis in clause.axes if clause is not None else ():
            name = axis.name.text
            if name in axes:
                self.found.error(
                    "E0809",
                    f"mesh axis '{name}' is given twice",
                    axis.name.span,
                    notes=[(axes[name].span, "first given here")],
                )
            if name == "replicas":
                self.found.error("E0810", "'replicas' is no name for a mesh axis", axis.name.span)
            size = self.values.count(axis.value, 1, MOST_RANKS, name)
            axes[name] = Axis(name, size or 1, axis.name.span)
        if self.staged is not None and self.staged.text not in axes:
            self._no_axis(self.staged)
        return Mesh(tuple(axes.values()))

    def _no_axis(self, name: ast.Name) -> None:
        clause = self.clauses.mesh
        known = [a.name.text for a in clause.axes] if clause is not None else []
        self.found.error(
            "E0810",
            f"the mesh has no axis '{name.text}'"
            if clause is not None
            else f"'{name.text}' is no mesh axis: this deployment has no mesh",
            name.span,
            notes=[(None if clause is None else clause.span, "the mesh is here")],
            hint=near(name.text, known) or (f"its axes are {', '.join(known)}" if known else ""),
        )

    def _shard(self, mesh: Mesh) -> tuple[ShardRule, ...]:
        rules = [self._rule(rule, mesh) for rule in self.clauses.shard]
        return tuple(rule for rule in rules if rule is not None)

    def _rule(self, rule: written.ShardRule, mesh: Mesh) -> ShardRule | None:
        staged = self.staged
        target = shard_target(rule.place, self.anatomy, self.found)
        replicas = [a.text for a in rule.axes] == ["replicas"]
        axes: dict[str, ast.Name] = {}
        for axis in () if replicas else rule.axes:
            if axis.text in axes:
                self.found.error(
                    "E0810",
                    f"'{axis.text}' divides '{rule.place}' twice",
                    axis.span,
                    notes=[(axes[axis.text].span, "it stands here already")],
                )
            elif axis.text not in mesh.sizes:
                self._no_axis(axis)
            elif staged is not None and axis.text == staged.text:
                self.found.error(
                    "E0810",
                    f"'{axis.text}' carries the stages and divides nothing else",
                    axis.span,
                    notes=[(staged.span, "stages are spread over it here")],
                )
            axes[axis.text] = axis
        if target is None:
            return None
        if replicas and target.kind not in SHARED_STATE:
            self.found.error(
                "E0810",
                f"'{target}' has no replicas to be spread over",
                rule.axes[0].span,
                hint="replicas is for optimizer, gradients and parameters",
            )
        redundant = 0
        if rule.redundant is not None:
            if target.kind != "array":
                self.found.error(
                    "E0813", "only an array of blocks has redundant copies", rule.redundant.span
                )
            redundant = self.values.count(rule.redundant, 0, MOST_RANKS, "redundant") or 0
        return ShardRule(target, tuple(axes), replicas, redundant, rule.span)

    # -- sizes -----------------------------------------------------------------------------------

    def _at_sizes(self, deployment: Deployment, maker: StageMaker | None) -> Deployment:
        """The deployment at the model's present sizes; what does not hold goes to ``problems``."""
        clauses, mesh = self.clauses, deployment.mesh
        root = self.context.root(clauses.model, clauses.home)
        if root is not None:
            try:
                stages = maker.make(mesh, self._ranges(root)) if maker is not None else None
                shard = self._divided(root, deployment.shard, mesh)
            except ExtentError:
                return deployment  # sizes come with a checkpoint
            deployment = replace(deployment, stages=stages, shard=shard)
        self._check_mesh(deployment)
        if not self.problems.found:
            self._check_load(deployment)
        return deployment

    def _ranges(self, root: Instance) -> Ranges:
        """First and last layer of each array that the model chains."""
        ranges: dict[str, tuple[int, int]] = {}
        sizes = self.context.instances.sizes
        for use in root.block.uses:
            if use.array is not None and use.name in self.anatomy.own.chained:
                start = root.extent(use.array.start).at(sizes)
                stop = start + root.extent(use.array.extent).at(sizes)
                low, high = ranges.get(use.name, (start, stop))
                ranges[use.name] = (min(low, start), max(high, stop))
        return ranges

    def _divided(
        self, root: Instance, shard: tuple[ShardRule, ...], mesh: Mesh
    ) -> tuple[ShardRule, ...]:
        """The rules with what each divides."""
        follow = Sizes(self.context.instances, shard, mesh, self.problems, self.context.used)
        try:
            follow.visit(root)
        except DiagnosticError:
            return shard  # reported with the model
        return tuple(
            replace(
                r,
                splits=tuple(follow.splits.get(r.span, ())),
                reaches=tuple(follow.reached.get(r.span, ())),
            )
            for r in shard
        )

    def _check_mesh(self, deployment: Deployment) -> None:
        clause, mesh, cluster = self.clauses.mesh, deployment.mesh, deployment.cluster
        if clause is None:
            return
        if cluster is not None and mesh.size > cluster.size:
            self.problems.error(
                "E0816",
                f"the mesh has {mesh.size:,} ranks, and cluster '{cluster.name}' has"
                f" {cluster.size:,} devices",
                clause.span,
                " x ".join(str(a.size) for a in mesh.axes),
                notes=[
                    (cluster.span, f"nodes: {cluster.nodes}, devices in each: {cluster.per_node}")
                ],
            )
        used = {a for r in deployment.shard for a in r.axes}
        used |= {self.staged.text} if self.staged is not None else set()
        for axis in mesh.axes:
            if axis.size > 1 and axis.name not in used:
                self.problems.error(
                    "E0819",
                    f"nothing is spread over mesh axis '{axis.name}': its {axis.size} ranks would"
                    " all do the same",
                    axis.span,
                    hint=f"shard batch -> {axis.name} gives each its own sequences",
                )

    def _check_load(self, deployment: Deployment) -> None:
        training, stages = deployment.train, deployment.stages
        if training is not None:
            ways = deployment.mesh.ways(deployment.batch_axes)
            per_round = ways * training.micro_batch
            if training.batch % per_round:
                self.problems.error(
                    "E0815",
                    f"a batch of {training.batch:,} does not divide into rounds of"
                    f" {per_round:,} sequences: {ways:,} ranks with {training.micro_batch} each",
                    training.span,
                )
        ranks = deployment.mesh.sizes[stages.axis] if stages is not None else 1
        check_schedule(
            deployment.overlap, stages, training, ranks, deployment.micro_batches, self.problems
        )


def _lines(span: Span) -> tuple[int, int]:
    return span.line, span.end_line + 1
