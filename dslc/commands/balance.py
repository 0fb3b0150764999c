"""``dslc balance``: from measured loads to which rank holds which blocks, and which have copies."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from compiler.balance import Balanced, balance, placed
from compiler.errors import UserError
from dslc.commands.options import add_json, add_sizes, positive
from dslc.loads import Loads, read_loads


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("loads", metavar="LOADS.json", type=Path, help="of run --record-loads")
    parser.add_argument("--deploy", metavar="NAME", help="places, groups, nodes and ranks of it")
    parser.add_argument(
        "--file", metavar="FILE", help="the deployment's file (the one that loads were recorded of)"
    )
    add_sizes(parser)
    parser.add_argument("--replicas", metavar="N", type=positive, help="places for blocks, in all")
    parser.add_argument("--groups", metavar="N", type=positive, help="groups of blocks (1)")
    parser.add_argument("--nodes", metavar="N", type=positive, help="nodes (1)")
    parser.add_argument("--gpus", metavar="N", type=positive, help="ranks on all nodes together")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="for run --placement")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    loads = read_loads(options.loads)
    given = [options.replicas, options.groups, options.nodes, options.gpus]
    if options.deploy is not None:
        if any(given):
            raise UserError("--deploy says how many replicas, groups, nodes and GPUs there are")
        numbers = _deployed(options, loads)
    elif options.replicas is None or options.gpus is None:
        raise UserError("give --deploy NAME, or --replicas and --gpus (and --groups, --nodes)")
    else:
        numbers = (options.replicas, options.groups or 1, options.nodes or 1, options.gpus)
    made = [balance(row, *numbers) for row in loads.loads]
    data = _data(made, loads)
    if options.output is not None:
        try:
            options.output.write_text(json.dumps(data) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{options.output} cannot be written: {error.strerror}") from None
    if options.json:
        print(json.dumps(data))
    else:
        _print(made, loads, numbers)
    return 0


def _deployed(options: argparse.Namespace, loads: Loads) -> tuple[int, int, int, int]:
    """Places, groups, nodes and ranks of a deployment's array of blocks.

    Raises:
        UserError: it is not known of which file, or it deals out no array, or several, of so many.
    """
    from dsl.constants import Choices
    from dsl.deploy.check import choose
    from dsl.deploy.placed import dealt
    from dsl.deploy.placed import placed as tree
    from dsl.program import open_program

    file = options.file or loads.file or _declaring(options.deploy)
    chosen = dict(options.set)
    if options.dims is None and options.file is None:
        chosen = {**loads.dims, **chosen}
    source = open_program(file, Choices(chosen, preset=options.dims), options.model)
    deployment = choose(source, options.deploy)
    blocks = {len(row) for row in loads.loads}
    found = {
        (use.blocks + use.redundant, use.groups, deployment.mesh.ways(use.axes), use.axes)
        for use in dealt(tree(source, deployment))
        if {use.blocks} == blocks
    }
    if len(found) != 1:
        counts = ", ".join(map(str, sorted(blocks)))
        raise UserError(
            f"deployment '{options.deploy}' of {file} deals out {len(found) or 'no'} "
            f"array{'s' if len(found) > 1 else ''} of {counts} blocks, which the loads are of"
        )
    ((places, groups, ranks, axes),) = found
    per_node = deployment.cluster.per_node if deployment.cluster else ranks
    spanned = 1
    for axis in axes:
        spanned = max(spanned, deployment.mesh.nodes_spanned(axis, per_node))
    return places, groups, spanned if ranks % spanned == 0 else 1, ranks


def _declaring(deployment: str) -> str:
    """The shipped file that declares a deployment."""
    from dsl.files import models_folder, shipped_models

    found = [
        name
        for name in shipped_models()
        if f"deploy {deployment} " in (models_folder() / f"{name}.arch").read_text()
    ]
    if len(found) != 1:
        raise UserError(f"of which file is the deployment '{deployment}'? give it with --file FILE")
    return found[0]


def _data(made: list[Balanced], loads: Loads) -> dict[str, object]:
    found: dict[str, object] = {
        "phy2log": [list(one.numbers) for one in made],
        "log2phy": [[list(places) for places in one.places] for one in made],
        "counts": [[len(places) for places in one.places] for one in made],
        "imbalance": [one.imbalance for one in made],
    }
    return found if loads.arrays is None else {**found, "arrays": loads.arrays}


def _print(made: list[Balanced], loads: Loads, numbers: tuple[int, int, int, int]) -> None:
    from dslc.terminal import table

    places, _, _, ranks = numbers
    each = places // ranks
    rows = []
    for number, (one, row) in enumerate(zip(made, loads.loads, strict=True)):
        name = loads.arrays[number] if loads.arrays else str(number)
        before = ""
        if len(row) % ranks == 0:
            before = f"{placed(row, range(len(row)), ranks).imbalance:.3f}"
        copied = sum(len(p) > 1 for p in one.places)
        rows.append((name, before, f"{one.imbalance:.3f}", str(copied)))
    print(f"{places} places on {ranks} ranks, {each} on each; busiest rank over the mean:")
    table(("array", "in order", "balanced", "blocks with copies"), rows)
