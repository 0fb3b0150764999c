"""``dslc models``: what ships."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from dslc.commands.options import add_json
from dslc.terminal import large, steps, table


def add(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


@dataclass(frozen=True)
class Shipped:
    """A shipped file that declares a model, at its default preset."""

    name: str
    model: str
    presets: list[str]
    parameters: int
    activated: int
    kv_cache_bytes_per_token: int


def run(options: argparse.Namespace) -> int:
    from dsl.files import models_folder, shipped_models

    found = []
    with steps("models") as show:
        for name in shipped_models():
            show(name)
            row = _about(name)
            if row:
                found.append(row)
    if options.json:
        print(
            json.dumps({"folder": str(models_folder()), "models": [asdict(row) for row in found]})
        )
        return 0
    table(
        ("name", "model", "presets", "parameters", "activated", "cache per token"),
        [
            (
                row.name,
                row.model,
                ", ".join(row.presets),
                large(row.parameters),
                large(row.activated),
                f"{row.kv_cache_bytes_per_token:,} B",
            )
            for row in found
        ],
        left=3,
        spare=2,
    )
    return 0


def _about(name: str) -> Shipped | None:
    """A shipped file's model; None if it declares none (a cluster, say)."""
    from compiler.passes.elaborate import run as elaborate
    from compiler.report import report
    from dsl import syntax
    from dsl.program import open_program

    source = open_program(name)
    if source.model is None:
        return None
    numbers = report(elaborate(source))
    declared = [d for d, _ in source.library.declarations(syntax.Dims)]
    return Shipped(
        name=name,
        model=numbers.model,
        presets=[d.name.text for d in declared if isinstance(d, syntax.Dims)],
        parameters=numbers.parameters,
        activated=numbers.activated,
        kv_cache_bytes_per_token=numbers.cache_bytes_per_token,
    )
