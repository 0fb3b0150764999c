"""The ``dslc`` command: what it takes, and how it ends.

Each subcommand is a module of ``dslc/commands`` with ``add(parser)`` for its options and
``run(options)`` for the work; only the one that is asked for is imported. Exit status: 0, 1 for
mistakes a user can mend (one message on standard error, no traceback), 2 for misuse.

argparse rather than typer: importing it costs 20 ms instead of 80, of a ``check`` that takes 300.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import dslc
from compiler.errors import UserError
from dsl.diagnostics import DiagnosticError

COMMANDS = {
    "check": "find every mistake of .arch files",
    "inspect": "what a model is: parameters, cache and FLOPs per token, by block",
    "compile": "compile an .arch file into a directory",
    "plan": "what a deployment would cost and how fast it would run, without a GPU",
    "run": "generate with a compiled model",
    "bench": "time a compiled model beside what its user would otherwise run",
    "compare": "find where two implementations of a model first differ, by source line",
    "tune": "find the fastest tilings of a compiled model's kernels on this GPU",
    "balance": "place the blocks of arrays, and copies of busy ones, on ranks",
    "init": "write a random checkpoint of a model",
    "quantize": "write a checkpoint in published FP8, or an FP8 one in BF16",
    "models": "the models that ship with dslc",
}
NO_SUCH_FILE = "E0201"
INTERRUPTED = 130  # what shells report of a process that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its status."""
    gc.set_threshold(100_000, 20, 20)  # a compiler makes much at once and keeps most of it
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status. Misuse raises SystemExit(2), as argparse does."""
    parser = _parser(arguments)
    options = _parsed(parser, arguments)
    debug = getattr(options, "debug", False)
    try:
        status: int = import_module(f"dslc.commands.{options.command}").run(options)
        sys.stdout.flush()  # here, so that a closed pipe is found here
        return status
    except DiagnosticError as error:
        print(error, file=sys.stderr)
        return 2 if _is_misuse(error) else 1
    except UserError as error:
        if debug:
            raise
        _tell(error, str(error))
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `dslc inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        kind = type(error).__name__
        _tell(error, f"{kind}: {error}\n(--debug shows where this comes from)")
        return 1


def _tell(error: BaseException, text: str) -> None:
    """Show a message; of several processes that were launched together, one does."""
    if "RANK" in os.environ:
        import_module("backends.pytorch.faults").failed(error, text)
    else:
        print(f"error: {text}", file=sys.stderr)


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """As ``parse_args``; but an argument that may be left out (the command's ``optional``) may also
    stand behind options, where argparse of Python 3.11 does not look for it any more."""
    options, rest = parser.parse_known_args(arguments)
    name, kind = getattr(options, "optional", (None, str))
    if len(rest) == 1 and name and not rest[0].startswith("-") and not getattr(options, name):
        setattr(options, name, kind(rest[0]))
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _is_misuse(error: DiagnosticError) -> bool:
    """Is it not a file's mistake, but that there is no such file?"""
    return all(d.code == NO_SUCH_FILE and d.span is None for d in error.diagnostics)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors"
    )
    parser = argparse.ArgumentParser(
        prog="dslc",
        description="A compiler for model architectures written as equations.",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"dslc {dslc.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, does in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=does, description=f"{does}.", parents=[common])
        if name in arguments:  # the others' modules need not be imported
            import_module(f"dslc.commands.{name}").add(subparser)
    return parser
