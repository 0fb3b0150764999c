"""``dslc inspect``: parameters, activated parameters, cache and FLOPs per token, by block."""

from __future__ import annotations

import argparse
import json
import re

from compiler.casts import Cast
from compiler.manifest import ContextRow
from compiler.pipeline import BY_MODULE
from compiler.report import Report
from compiler.traffic import Traffic, traffic
from dsl.deploy import show as deploy_show
from dslc.commands.options import add_json, add_source, compiled, positive
from dslc.terminal import flops, large, steps, table

SEQUENCE = 4096


def add(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument(
        "--sequence",
        metavar="N",
        type=positive,
        help=f"tokens of the sequence that FLOPs are counted for ({SEQUENCE}, or fewer where a "
        "sequence of this model is never so long)",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    with steps(options.file) as show:
        program = compiled(options, show)
        longest = program.context.positions if program.context else SEQUENCE
        report = program.report(options.sequence or min(SEQUENCE, longest))
    deployment = program.deployed
    if options.json:
        data = as_data(report)
        if deployment is not None:
            data["deployment"] = deploy_show.describe(deployment)
            data["precision"] = [vars(row) for row in program.casts()]
            data["traffic"] = [vars(row) for row in traffic(program.after(BY_MODULE))]
        print(json.dumps(data))
        return 0
    _print(report, program.context)
    if deployment is not None:
        table((f"deployment {deployment.name}", "", ""), deploy_show.rows(deployment), left=3)
        _print_casts(program.casts())
        _print_traffic(traffic(program.after(BY_MODULE)))
    return 0


def _print_traffic(rows: list[Traffic]) -> None:
    """What tokens send between ranks, if every block is picked as often."""
    if not rows:
        return
    headings = ("sent to", "ranks", "reached", "dispatch B/token", "combine B/token", "count")
    table(
        headings,
        [
            (
                row.path,
                f"{row.ranks:,}",
                f"{row.others:.2f} others"
                + (f", {row.other_nodes:.2f} nodes" if row.other_nodes is not None else ""),
                f"{row.dispatch:,.0f}",
                f"{row.combine:,.0f}",
                f"{row.count:,}",
            )
            for row in rows
        ],
    )


def _print_casts(rows: list[Cast]) -> None:
    """The contractions that precision rules speak of or might have, and what became of them."""
    if not rows:
        return
    table(
        ("contraction", "parameter", "at", "source", "activations", "weights", "", "count"),
        [
            (
                row.value or "",
                row.parameter or "",
                row.path or "the model",
                row.source,
                row.activations or "left",
                row.weights or "left",
                row.reason,
                f"{row.count:,}",
            )
            for row in rows
        ],
        left=7,
        spare=3,
    )


def as_data(report: Report) -> dict[str, object]:
    """What ``--json`` prints; the interface of docs and outside checks."""
    return {
        "model": report.model,
        "parameters": {
            "total": report.parameters,
            "activated": report.activated,
            "mtp": report.others,
        },
        "kv_cache": {"bytes_per_token": report.cache_bytes_per_token}
        | ({"bytes_per_sequence": state} if (state := report.state_bytes_per_sequence) else {}),
        "flops": {
            "forward_per_token": report.forward_flops,
            "training_per_token": report.training_flops,
            "sequence": report.sequence,
        },
        "blocks": [vars(row) for row in report.blocks],
    }


def _states(report: Report) -> list[tuple[str, str, str]]:
    """What a sequence keeps beside its cache, if it does."""
    kept = report.state_bytes_per_sequence
    return [("state per sequence", f"{kept:,} bytes", "")] if kept else []


def _print(report: Report, context: ContextRow | None) -> None:
    print(report.model)
    trained = report.training_flops
    rows = [
        ("parameters", f"{report.parameters:,}", large(report.parameters)),
        ("activated per token", f"{report.activated:,}", large(report.activated)),
        ("beside the main model", f"{report.others:,}", large(report.others)),
        ("cache per token, BF16", f"{report.cache_bytes_per_token:,} bytes", ""),
        *_states(report),
        (
            f"FLOPs per token, sequence {report.sequence:,}",
            f"{flops(report.forward_flops)} forward",
            "" if trained is None else f"{flops(trained)} in training",
        ),
    ]
    if context is not None:
        rows.insert(4, ("longest sequence", f"{context.positions:,} positions", ""))
    for what, value, short in rows:
        print(f"  {what:<36} {value:>24}   {short}".rstrip())
    table(
        ("path", "block", "source", "count", "parameters", "activated", "FLOPs"),
        [
            (
                _indented(row.path, report.model),
                row.block,
                row.span,
                f"{row.count:,}",
                large(row.parameters),
                large(row.activated),
                flops(row.flops).removesuffix("FLOP").rstrip(),
            )
            for row in report.blocks
        ],
        left=3,
        spare=2,
    )


def _indented(path: str, model: str) -> str:
    """``layers[3..61].mlp.shared`` is "shared" below "mlp" below "layers[3..61]"."""
    parts = re.split(r"(?<!\.)\.(?!\.)", path)  # the dots of a range are no separators
    return f"{'  ' * len(parts)}{parts[-1]}" if path else model
