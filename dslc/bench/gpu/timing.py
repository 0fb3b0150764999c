"""Each case timed beside its rivals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from backends.triton.kernel import Operator
from dslc.bench.gpu.cases import Case
from dslc.bench.gpu.machine import COLD, Machine, Roof, loaded
from dslc.bench.gpu.record import Record, digest

MOST_COPIES = 8


def time_cases(
    machine: Machine,
    cases: Iterable[Case],
    record: Record,
    seconds: float,
    progress: Callable[[str], None],
) -> int:
    """Time what the record lacks, for so long at most. Returns how many cases are left."""
    end = time.monotonic() + seconds
    if record.roof is None:
        progress("copies and dense products")
        record.set_roof(asdict(machine.roof()))
    assert record.roof is not None
    roof = Roof(**record.roof)
    left = 0
    for case in cases:
        mark = digest(case.operator)
        if record.has(case.name, mark):
            continue
        if time.monotonic() >= end:
            left += 1
            continue
        progress(case.name)
        record.add(case.name, {"digest": mark, **_timed(machine, case, roof)})
    return left


def _timed(machine: Machine, case: Case, roof: Roof) -> dict[str, Any]:
    cost = case.operator.traffic(case.sizes)
    copies = max(1, min(MOST_COPIES, int(COLD // max(cost.least, 1)) + 1))
    row: dict[str, Any] = {
        "kernel": case.operator.name,
        "sizes": dict(case.sizes),
        "bytes": cost.bytes,
        "least_bytes": cost.least,
        "flops": cost.flops,
        "roof_seconds": roof.seconds(
            min(cost.bytes, cost.least), cost.flops, dtype_of(case.operator)
        ),
    }
    if case.published is not None:
        row["published"] = asdict(case.published)
    try:
        given = [case.example(case.sizes, machine.device) for _ in range(copies)]
        function = getattr(loaded(case.operator), case.operator.name)
        result = _first(function(*given[0]))
        row["seconds"] = machine.seconds([partial(function, *one) for one in given])
    except Exception as error:  # one kernel that fails is a row, not the end of the run
        return row | {"failed": said(error)}
    row["torch"], row["absent"] = {}, {}
    for name, make in case.rivals.items():
        try:
            calls = [make(*one) for one in given]
            if case.near is not None and "difference" not in row:
                row["difference"] = difference(result, _first(calls[0]()))
                row["differs"] = not row["difference"] <= case.near
            row["torch"][name] = machine.seconds(calls)
        except Exception as error:  # this torch lacks it, or it runs out of memory
            row["absent"][name] = said(error)
    return row


def dtype_of(operator: Operator) -> str:
    """What its products multiply, as the roof names it."""
    types = [a.type for kernel in operator.kernels for a in kernel.arguments]
    return "float8_e4m3fn" if types.count("*fp8e4nv") > 1 else "bfloat16"


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, Sequence) else result


def difference(ours: Any, theirs: Any, norm: bool = False) -> float:
    """The largest difference, relative to the largest number; with ``norm``, in 2-norms."""
    ours, theirs = ours.float().flatten(), theirs.float().flatten()
    if norm:
        return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
    most = float(theirs.abs().max()) if theirs.numel() else 0.0
    return float((ours - theirs).abs().max()) / max(most, 1e-30)


def said(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__
