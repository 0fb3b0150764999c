"""Options that several subcommands take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dslc.program import Program

Constant = int | float | bool | str | None
WORDS: dict[str, Constant] = {"true": True, "false": False, "null": None}


def add_source(parser: argparse.ArgumentParser) -> None:
    """What says which model, and at which sizes."""
    parser.add_argument(
        "file", metavar="FILE", help="an .arch file, or the name of a shipped model"
    )
    add_sizes(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        help="a Hugging Face checkpoint, whose config.json gives the dims",
    )
    parser.add_argument("--deploy", metavar="NAME", help="a deployment of the file")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Which model of a file, and its constants."""
    parser.add_argument("--model", metavar="NAME", help="one of several models of the file")
    parser.add_argument("--dims", metavar="PRESET", help="a preset of the file, such as small")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        type=setting,
        help="a constant's value, by its name or its key in config.json; may be repeated",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def setting(text: str) -> tuple[str, Constant]:
    """``NAME=VALUE``: a number, true, false, null or a text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    if value in WORDS:
        return name, WORDS[value]
    for number in (int, float):
        try:
            return name, number(value)
        except ValueError:
            continue
    return name, value


def compiled(
    options: argparse.Namespace, progress: Callable[[str], None], verify: bool = False
) -> Program:
    """The program that the options ask for."""
    from dslc.program import compile_file
    from dslc.terminal import note

    return compile_file(
        options.file,
        options.dims,
        dict(options.set),
        options.checkpoint,
        options.deploy,
        getattr(options, "backend", "pytorch"),
        getattr(options, "target", "cpu"),
        options.model,
        verify,
        progress,
        note,
        getattr(options, "dtype", None),
    )


def not_yet(what: str) -> UserError:
    """What the interface names and this version does not do."""
    return UserError(f"{what} is not built yet")
