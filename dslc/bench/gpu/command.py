"""``dslc bench --kernels``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dslc.bench.gpu.machine import Gpu, Machine, absent, versions
from dslc.terminal import note, steps, table

if TYPE_CHECKING:
    from dslc.bench.gpu.record import Record

HEADINGS = ["kernel", "ms", "of roof", "torch ms", "by", "speed-up", "published ms", "aim"]


def run(options: argparse.Namespace) -> int:
    """Time the kernels, or say in one line why not."""
    reason = absent()
    if reason is not None:
        if options.json:
            print(json.dumps({"skipped": reason}))
        else:
            note(f"kernels are not timed: {reason}")
        return 0
    from dslc.bench.gpu.record import Record, default_path

    gpu = Gpu()
    path = options.output or default_path(gpu.name)
    record = Record(path, gpu.name, versions())
    with steps(gpu.name) as show:
        left, count = time_all(gpu, record, options.seconds, show, options.only or "")
    if options.json:
        print(json.dumps({**record.data, "left": left}))
    else:
        show_record(record.data)
    note(f"written to {path}")
    if left:
        note(f"{left} of {count} are left: the same command goes on with them")
    return 0


def time_all(
    machine: Machine,
    record: Record,
    seconds: float,
    progress: Callable[[str], None],
    only: str = "",
    tiny: bool = False,
) -> tuple[int, int]:
    """Time the kernels, then a whole layer, for so long at most.

    Args:
        tiny: at sizes that Triton's interpreter takes: everything is done once, nothing is learnt.

    Returns:
        How many are left, and how many there are.
    """
    from dslc.bench.gpu import layer
    from dslc.bench.gpu.cases import PUBLISHED, TINY, cases
    from dslc.bench.gpu.timing import time_cases

    end = time.monotonic() + seconds
    every = cases(machine.target, TINY if tiny else PUBLISHED)
    wanted = [case for case in every if only in case.name]
    left = time_cases(machine, wanted, record, seconds, progress)
    whole = [case for case in (layer.TINY if tiny else layer.PUBLISHED) if only in case.name]
    rest = max(0.0, end - time.monotonic())
    left += layer.time_layers(machine, record, rest, progress, only, tiny)
    return left, len(wanted) + len(whole)


def show_record(data: Mapping[str, Any]) -> None:
    """The table of what was timed."""
    roof = data["roof"]
    rates = ", ".join(
        f"{rate / 1e12:,.0f} TFLOPS in {name}" for name, rate in roof["flops"].items()
    )
    used = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    print(f"{data['gpu']}, {data['date']}, {used}")
    print(f"the roof: {roof['bytes_per_second'] / 1e9:,.0f} GB/s copied; torch's products {rates}")
    table(HEADINGS, [_shown(name, row) for name, row in data["rows"].items()], spare=4)
    for name, row in data["rows"].items():
        if "failed" in row:
            note(f"{name} failed: {row['failed']}")
        if row.get("differs"):
            note(f"{name} differs from torch's by {row['difference']:.2g} of the largest number")
        for rival, reason in row.get("absent", {}).items():
            note(f"{name}: {rival} does not take part: {reason}")


def _shown(name: str, row: Mapping[str, Any]) -> list[str]:
    if "failed" in row:
        return [name, "failed", *[""] * 6]
    seconds = row["seconds"]
    best = min(row["torch"], key=row["torch"].__getitem__, default=None)
    figure = row.get("published")
    met = figure is not None and seconds * 1e3 <= figure["aim"] * figure["milliseconds"]
    return [
        name,
        f"{seconds * 1e3:.4f}",
        f"{row['roof_seconds'] / seconds:.0%}",
        "" if best is None else f"{row['torch'][best] * 1e3:.4f}",
        best or "",
        "" if best is None else f"{row['torch'][best] / seconds:.2f}",
        "" if figure is None else f"{figure['milliseconds']:.4f}",
        _aim(row, best, met),
    ]


def _aim(row: Mapping[str, Any], best: str | None, met: bool) -> str:
    """Whether what it is meant to reach was: a published time, or so many times torch's speed."""
    if (aim := row.get("aim_speedup")) is not None:
        if best is None:
            return f"{aim:g} x torch"
        reached = row["torch"][best] / row["seconds"] >= aim
        return f"{aim:g} x torch: {'met' if reached else 'missed'}"
    if row.get("published") is None:
        return ""
    return "met" if met else "missed"
