"""What is shown to a person: progress and tables on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Progress = Callable[[int, int], None]  # done, and in all


@contextmanager
def progress(what: str, unit: str = "B") -> Iterator[Progress | None]:
    """A bar with rate and time left on standard error; nothing where that is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = [TextColumn("{task.description}"), BarColumn()]
    if unit == "B":
        columns += [DownloadColumn(), TransferSpeedColumn()]
    console = Console(stderr=True)
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def steps(what: str) -> Iterator[Callable[[str], None]]:
    """Names of steps, each in place of the one before, on standard error; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    longest = 0

    def show(step: str) -> None:
        nonlocal longest
        line = f"{what}: {step}"
        longest = max(longest, len(line))
        sys.stderr.write(f"\r{line:<{longest}}")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write(f"\r{'':<{longest}}\r")
        sys.stderr.flush()


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, spare: int | None = None
) -> None:
    """A table on standard output.

    Args:
        left: how many columns are words; the others are numbers, which are never cut off.
        spare: the column that is left out where the terminal is too narrow for all.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # In a pipe nothing is cut off: rich would take 80 columns.
    console = Console(
        width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False, emoji=False
    )
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    if spare is not None and sum(widths) + 2 * len(widths) > console.width:
        headings = [*headings[:spare], *headings[spare + 1 :]]
        rows = [[*row[:spare], *row[spare + 1 :]] for row in rows]
        widths.pop(spare)
        left -= 1
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for number, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        if number < left:
            shown.add_column(heading, no_wrap=True)
        else:
            shown.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for row in rows:
        shown.add_row(*row)
    console.print()
    console.print(shown)


def large(count: float, units: str = " kMBT") -> str:
    """671,026,404,352 is "671.0 B" (billion), as papers write it."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:,.1f} {units[unit]}" if unit else f"{count:,.0f}"


def flops(count: float) -> str:
    """250,469,842,944 is "250.5 GFLOP"."""
    return f"{large(count, ' kMGTPE')}FLOP" if count >= 1000 else f"{count:,.0f}"


def note(sentence: str) -> None:
    """Something the user should know, on standard error."""
    print(f"note: {sentence}", file=sys.stderr)
