"""``dslc check``: every mistake of the files, in one run."""

from __future__ import annotations

import argparse
import json
import sys

from dsl.diagnostics import Diagnostic
from dslc.cli import NO_SUCH_FILE
from dslc.commands.options import add_json, add_sizes


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="an .arch file, or the name of a shipped model"
    )
    add_sizes(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from dsl.constants import Choices
    from dsl.program import check_file

    choices = None
    if options.set or options.dims:
        choices = Choices(set=dict(options.set), preset=options.dims)
    found: list[Diagnostic] = []
    for file in options.files:
        # A file that two others import is read with each; its mistakes are told once.
        found += [d for d in check_file(file, True, choices, options.model) if d not in found]
    mistakes = [d for d in found if not d.is_warning]
    if options.json:
        print(json.dumps({"diagnostics": [as_data(d) for d in found]}))
    elif found:
        print("\n\n".join(d.render() for d in found), file=sys.stderr)
    if not mistakes and not options.json:
        names = ", ".join(options.files)
        print(f"{names}: no mistakes")
    if any(d.code == NO_SUCH_FILE and d.span is None for d in found):
        return 2
    return 1 if mistakes else 0


def as_data(diagnostic: Diagnostic) -> dict[str, object]:
    """A diagnostic for other tools: editors, say. Lines and columns count from 1."""
    span = diagnostic.span
    return {
        "code": diagnostic.code,
        "severity": "warning" if diagnostic.is_warning else "error",
        "message": diagnostic.message,
        "file": span.source.name if span else None,
        "line": span.line if span else None,
        "column": span.column if span else None,
        "end_line": span.end_line if span else None,
        "end_column": span.end_column if span else None,
        "hint": diagnostic.hint or None,
        "text": diagnostic.render(),
    }
