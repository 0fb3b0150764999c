"""``dslc calibrate``: measure this machine into a cluster file that deployments can name."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.errors import UserError
from dslc.terminal import steps

if TYPE_CHECKING:
    from dslc.planning.measure import Found

NAME = "here"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", metavar="FILE", dest="output", type=Path, help="where to write it (standard output)"
    )


def run(options: argparse.Namespace) -> int:
    from dslc.planning import measure

    device, count = measure.devices()
    with steps("calibrate") as progress:
        progress(f"products and memory of this {device}")
        name, found = measure.machine(device)
        progress("transfers between processes")
        found += measure.link() or ()
        if not any(f.name == "peak[scale_up]" for f in found):
            count = 1
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
        f'  {f.name:<{width}} = {f.value:<14} "measured on this machine, {date}: {f.how}"'
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
