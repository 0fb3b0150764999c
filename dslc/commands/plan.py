"""``dslc plan``: what a deployment would cost and how fast it would run, without a GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from compiler.errors import UserError
from dslc.commands.options import add_json, add_source, compiled
from dslc.terminal import note, steps


def add(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument(
        "--costs",
        metavar="FILE",
        type=Path,
        help="JSON with measured seconds of a layer, in place of modelled ones",
    )
    parser.add_argument(
        "--trace", metavar="OUT.json", type=Path, help="write a timeline for Perfetto or Chrome"
    )
    parser.add_argument(
        "--html", metavar="OUT.html", type=Path, help="write a report that stands by itself"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try other meshes and micro-batches within the same number of GPUs",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    name, options.deploy = options.deploy, None  # planned, not compiled for
    from compiler.pipeline import STAGES
    from compiler.planning import search
    from compiler.planning.costs import read_costs
    from compiler.planning.plan import make

    measured = read_costs(options.costs) if options.costs is not None else None
    with steps(options.file) as progress:
        program = compiled(options, progress)
        if name is None:
            known = ", ".join(program.compiled.source.deployments) or "the file declares none"
            raise UserError(f"plan needs a deployment: --deploy NAME ({known})")
        deployment = program.deployment(name)
        progress("plan")
        plan = make(program.after(STAGES[0]), program.after(), deployment, measured)
        found = search.Searched([], 0)
        if options.search:
            if measured is not None:
                raise UserError("--search plans other meshes, and --costs were measured on one")
            found = search.search(program.after(STAGES[0]), program.after(), deployment, progress)
    if options.trace is not None:
        from dslc.planning.trace import trace

        write(options.trace, json.dumps(trace(plan)))
    if options.html is not None:
        from dslc.planning.html import html

        write(options.html, html(plan, program.name))
    if options.json:
        data = plan.as_data()
        if options.search:
            data["search"] = search.as_data(found.best)
        print(json.dumps(data))
        for problem in plan.problems:
            note(problem)
        return 0
    from dslc.planning.table import show, show_search

    show(plan, program.name)
    if options.search:
        show_search(found, plan.gpus)
    return 0


def write(path: Path, text: str) -> None:
    """Write a file whole.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
