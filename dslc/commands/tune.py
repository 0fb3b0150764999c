"""``dslc tune``: the fastest tilings of a compiled model's kernels, found on this GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from compiler.errors import UserError
from dslc.commands.options import add_json, positive
from dslc.terminal import note, steps


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="what dslc compile --target wrote"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="the table of tilings (~/.cache/dslc/tuned/GPU.json, or in $DSLC_TUNED)",
    )
    parser.add_argument(
        "--seconds",
        metavar="N",
        type=positive,
        default=480,
        help="stop after so long; the next run goes on (%(default)s)",
    )
    parser.add_argument(
        "--most", metavar="N", type=positive, default=8, help="tilings of a kernel (%(default)s)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from dslc.bench.gpu.machine import Gpu, absent, versions

    reason = absent()
    if reason is not None:
        raise UserError(f"kernels are tuned by timing them, and {reason}")
    from backends.triton import tuning
    from dslc.bench.gpu.compiled import operators_of
    from dslc.bench.gpu.tuning import tune

    gpu = Gpu()
    operators = operators_of(options.directory, gpu.target)
    path = options.output or tuning.default_path(gpu.name)
    table = tuning.Table(gpu.name, gpu.target.name, versions()["triton"])
    if path.exists():
        table = tuning.read(path)
        if table.gpu != gpu.name:
            raise UserError(f"{path} is of {table.gpu}, and this is {gpu.name}: name another file")
    with steps(gpu.name) as show:
        done, left, without = tune(
            gpu,
            operators,
            table,
            path,
            seconds=options.seconds,
            most=options.most,
            progress=show,
        )
    if options.json:
        found = {"file": str(path), "tuned": done, "left": left, "not_timed": without}
        print(json.dumps(found))
        return 0
    print(f"{done} kernels tuned, {len(table.kernels)} in {path}; dslc compile --target uses them")
    if without:
        note(f"not timed, for want of an example: {', '.join(sorted(without))}")
    if left:
        note(f"{left} are left: the same command goes on with them")
    return 0
