"""Deployments, clusters and number formats as data and as rows of a table, for ``dslc inspect``."""

from __future__ import annotations

from typing import Any

from dsl.clusters import Cluster
from dsl.deploy.clauses import DECODE, PREFILL, TRAIN
from dsl.deploy.typed import Deployment, PrecisionRule, Serve, ShardRule, Stages, Stored, Train
from dsl.diagnostics import Span
from dsl.formats import NumberFormat

Row = tuple[str, str, str]  # what, how, and a word of explanation or a place in the source

_SELECTS = {
    "contractions": "every contraction",
    "parameter": "contractions with a parameter",
    "cached": "cached values",
    "act": "values of the model's own type",
}


# -- data ------------------------------------------------------------------------------------------


def describe(deployment: Deployment) -> dict[str, Any]:
    """A deployment as JSON-able data. Times are in seconds, shares between 0 and 1."""
    cluster, stages = deployment.cluster, deployment.stages
    return {
        "name": deployment.name,
        "model": deployment.model,
        "bases": list(deployment.bases),
        "cluster": None if cluster is None else describe_cluster(cluster),
        "ranks": deployment.mesh.size,
        "mesh": dict(deployment.mesh.sizes),
        "stages": None if stages is None else _stages(stages),
        "shard": [_shard(rule) for rule in deployment.shard],
        "precision": [_precision(rule) for rule in deployment.precision],
        "overlap": {"schedule": deployment.overlap.schedule, "sms": deployment.overlap.sms},
        "recompute": [str(target) for target in deployment.recompute],
        "train": None if deployment.train is None else _load(deployment.train),
        "serve": None if deployment.serve is None else _load(deployment.serve),
        "problems": [problem.message for problem in deployment.problems],
        "span": str(deployment.span),
    }


def describe_cluster(cluster: Cluster) -> dict[str, Any]:
    """A cluster as data; figures in FLOP/s, bytes/s, bytes, seconds, watts and USD/h."""
    return {
        "name": cluster.name,
        cluster.kind: cluster.device,
        "per_node": cluster.per_node,
        "nodes": cluster.nodes,
        "target": cluster.target,
        "figures": {
            figure.name: {"value": figure.value, "written": figure.text, "source": figure.source}
            for figure in cluster.figures.values()
        },
        "span": str(cluster.span),
    }


def describe_format(format: NumberFormat) -> dict[str, Any]:
    """A number format as data."""
    return {
        "name": format.name,
        "bits": format.bits,
        "integer": format.integer,
        "signed": format.signed,
        "exponent": format.exponent,
        "fraction": format.fraction,
        "bias": format.bias,
        "infinities": format.infinities,
        "nans": format.nans,
        "largest": format.largest,
        "scale": None if format.scale is None else format.scale.name,
        "tile": None if format.tile is None else [format.tile.rows, format.tile.columns],
        "rounding": format.rounding,
        "span": str(format.span),
    }


def _stages(stages: Stages) -> dict[str, Any]:
    listed = [
        {"layers": [list(layers) for layers in stage.layers], "with": list(stage.extras)}
        for stage in stages.stages
    ]
    return {"axis": stages.axis, "stages": listed}


def _shard(rule: ShardRule) -> dict[str, Any]:
    divides = [
        {"index": f"{s.block}.{s.name}", "extent": s.extent, "ways": s.ways, "each": s.each}
        for s in rule.splits
    ]
    return {
        "target": str(rule.target),
        "kind": rule.target.kind,
        "axes": list(rule.axes),
        "replicas": rule.replicas,
        "redundant": rule.redundant,
        "divides": divides,
        "span": str(rule.span),
    }


def _precision(rule: PrecisionRule) -> dict[str, Any]:
    return {
        "label": rule.label,
        "for": rule.selects,
        "targets": [str(target) for target in rule.targets],
        "except": [str(target) for target in rule.exceptions],
        "roles": {name: _role(stored) for name, stored in rule.roles.items()},
        "promote": rule.promote,
        "span": str(rule.span),
    }


def _role(stored: Stored) -> dict[str, Any]:
    tile = stored.tile
    return {
        "format": None if stored.format is None else stored.format.name,
        "tile": None if tile is None else [tile.rows, tile.columns],
    }


def _load(load: Train | Serve) -> dict[str, Any]:
    """The settings of a load, by the names they are written with."""
    values = {name: value for name, value in vars(load).items() if name not in ("span", "sources")}
    out = {n: v.name if isinstance(v, NumberFormat) else v for n, v in values.items()}
    if isinstance(load, Train):
        out["weight"] = dict(load.weight)
    return {**out, "sources": dict(load.sources)}


# -- tables ----------------------------------------------------------------------------------------


def rows(deployment: Deployment) -> list[Row]:
    """A deployment for the eye, a line for each decision."""
    out: list[Row] = []
    cluster, mesh = deployment.cluster, deployment.mesh
    if cluster is not None:
        shape = f"{cluster.nodes} nodes of {cluster.per_node} {cluster.device}"
        out.append(("cluster", cluster.name, shape))
    axes = " x ".join(f"{axis.name} {axis.size}" for axis in mesh.axes) or "one device"
    out.append(("mesh", axes, f"{mesh.size:,} ranks" if mesh.axes else ""))
    out += _stage_rows(deployment)
    out += [_shard_row(rule) for rule in deployment.shard]
    for rule in deployment.precision:
        out += _precision_rows(rule, deployment.train is not None)
    if deployment.overlap.schedule != "none":
        sms = deployment.overlap.sms
        out.append(("overlap", deployment.overlap.schedule, "" if sms is None else f"{sms} SMs"))
    if deployment.recompute:
        out.append(("recompute", ", ".join(str(t) for t in deployment.recompute), ""))
    out += _load_rows(deployment)
    out += [("does not hold", p.message, _at(p.span)) for p in deployment.problems]
    return out


def cluster_rows(cluster: Cluster) -> list[Row]:
    """A cluster's figures with their sources."""
    head = (
        "devices",
        f"{cluster.size:,} {cluster.device}",
        f"{cluster.nodes} x {cluster.per_node}",
    )
    return [head, *((f.name, f.text, f.source) for f in cluster.figures.values())]


def _stage_rows(deployment: Deployment) -> list[Row]:
    stages = deployment.stages
    if stages is None:
        return []
    sizes = [sum(stop - start for _, start, stop in stage.layers) for stage in stages.stages]
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][0] == size:
            runs[-1][1] += 1
        else:
            runs.append([size, 1])
    shown = ", ".join(str(n) if times == 1 else f"{n} x {times}" for n, times in runs)
    extras = [f"{e} with stage {i}" for i, s in enumerate(stages.stages) for e in s.extras]
    return [("stages", f"{stages.axis}: {shown} layers", ", ".join(extras))]


def _shard_row(rule: ShardRule) -> Row:
    if rule.replicas:
        where = "all ranks that hold the same parameter"
    else:
        where = ", ".join(rule.axes) or "nothing"
    parts = []
    for split in rule.splits:
        copies = f" + {split.redundant}" if split.redundant else ""
        parts.append(
            f"{split.block}.{split.name}: {split.extent:,}{copies} = {split.ways} x {split.each:,}"
        )
    return ("shard", f"{rule.target} over {where}", "; ".join(parts))


def _precision_rows(rule: PrecisionRule, trains: bool) -> list[Row]:
    selects = _SELECTS.get(rule.selects) or ", ".join(str(t) for t in rule.targets)
    excepted = ", ".join(str(t) for t in rule.exceptions)
    first = (f"precision {rule.label}", selects, f"except {excepted}" if excepted else "")
    roles = [
        ("", f"{name} {stored}", _about(stored.format))
        for name, stored in rule.roles.items()
        if trains or name != "gradients"
    ]
    every = [("", f"sums to float32 every {rule.promote}", "")] if rule.promote else []
    return [first, *roles, *every]


def _about(format: NumberFormat | None) -> str:
    """``8 bits to 448, f32 scales``."""
    if format is None:
        return ""
    scales = "" if format.scale is None else f", {format.scale.name} scales"
    rounded = "" if format.rounding == "nearest" else f" ({format.rounding})"
    return f"{format.bits} bits to {format.largest:g}{scales}{rounded}"


def _load_rows(deployment: Deployment) -> list[Row]:
    load = deployment.train or deployment.serve
    if load is None:
        return []
    if isinstance(load, Serve):
        what, shown_names = f"serve {load.phase}", DECODE if load.phase == "decode" else PREFILL
    else:
        what, shown_names = "train", TRAIN
    out: list[Row] = []
    for name, value in _load(load).items():
        if name not in shown_names or value is None:
            continue
        if name == "weight":
            at = load.sources
            out += [
                ("", f"weight[{e}] {w:g}", at.get(f"weight[{e}]", "")) for e, w in value.items()
            ]
            continue
        if name == "tpot":
            shown = f"{value * 1e3:g} ms"
        elif name in ("cache_hits", "utilisation", "accepted"):
            shown = f"{value:.1%}".replace(".0%", "%")
        else:
            shown = f"{value:,}" if isinstance(value, int) else str(value)
        out.append((what if not out else "", f"{name} {shown}", load.sources.get(name, "")))
    if deployment.micro_batches is not None:
        out.append(("", f"{deployment.micro_batches:,} micro-batches per rank", ""))
    return out


def _at(span: Span | None) -> str:
    return "" if span is None else str(span)
