"""``dslc bench --kernels``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from dslc.bench.gpu.machine import Gpu, absent, versions
from dslc.terminal import note, steps, table

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
    from dslc.bench.gpu.cases import cases
    from dslc.bench.gpu.record import Record, default_path
    from dslc.bench.gpu.timing import time_cases

    gpu = Gpu()
    path = options.output or default_path(gpu.name)
    record = Record(path, gpu.name, versions())
    wanted = [case for case in cases(gpu.target) if (options.only or "") in case.name]
    with steps(gpu.name) as show:
        left = time_cases(gpu, wanted, record, options.seconds, show)
    if options.json:
        print(json.dumps({**record.data, "left": left}))
    else:
        show_record(record.data)
    note(f"written to {path}")
    if left:
        note(f"{left} of {len(wanted)} are left: the same command goes on with them")
    return 0


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
        "" if figure is None else "met" if met else "missed",
    ]
