"""``dslc calibrate``: measure this machine into a cluster file that deployments can name."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.errors import UserError
from dslc.commands.options import positive
from dslc.terminal import steps

if TYPE_CHECKING:
    from dslc.planning.measure import Found

NAME = "here"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", metavar="FILE", dest="output", type=Path, help="where to write it (standard output)"
    )
    parser.add_argument(
        "--ranks",
        metavar="N",
        type=positive,
        help="processes that measure together, each a device (every GPU; 2 on a CPU)",
    )


def run(options: argparse.Namespace) -> int:
    from dslc.planning import measure

    device, there = measure.devices()
    count = options.ranks or there
    if device == "cuda" and count > there:
        raise UserError(f"--ranks {count}, and there are {there} GPUs")
    with steps("calibrate") as progress:
        progress(f"products, memory and transfers of {count} processes on this {device}")
        name, found = measure.machine(device, count)
    text = written(name, found, "gpu" if device == "cuda" else "cpu", count)
    if options.output is None:
        print(text, end="")
        return 0
    try:
        options.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {options.output}: {error.strerror}") from None
    return 0


def written(name: str, found: Sequence[Found], kind: str, count: int) -> str:
    """The cluster file: cluster ``here`` of devices ``this_device``."""
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    width = max(len(f.name) for f in found)
    lines = [
        f'  {f.name:<{width}} = {f.written:<14} "measured on this machine, {date}: {f.how}"'
        for f in found
    ]
    figures = "\n".join(lines)
    return f"""edition 2026

# Written by dslc calibrate on {date}: {name}. A file that imports this one can say `on {NAME}`.

import std.formats

device this_device {{
{figures}
}}

cluster {NAME} {{ {kind} = this_device, per_node = {count}, nodes = 1 }}
"""
