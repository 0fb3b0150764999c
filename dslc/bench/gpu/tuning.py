"""Trying a kernel's tilings on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from backends.triton.kernel import Config, Kernel, Operator
from backends.triton.tuning import Table
from dslc.bench.gpu.machine import Machine, loaded

COUNTED = ("tokens", "sequences")  # the sizes that a bound on a kernel's count can be of


def tune(
    machine: Machine,
    operators: Iterable[Operator],
    table: Table,
    path: Path,
    *,
    seconds: float,
    most: int,
    progress: Callable[[str], None],
) -> tuple[int, int, list[str]]:
    """Time the most promising tilings of each kernel that the table lacks, for so long at most.

    Tilings are tried in the order of the generator's model, ``most`` of each kernel and bound at
    most; each kernel's rows are written as soon as they are known.

    Returns:
        How many kernels were tuned now, how many are left, and the operators that have no example
        to be timed on.
    """
    end = time.monotonic() + seconds
    done = left = 0
    without: list[str] = []
    for operator in operators:
        todo = [k for k in operator.kernels if k.candidates and not table.has(k)]
        if not todo:
            continue
        if operator.example is None:
            without.append(operator.name)
            continue
        for kernel in todo:
            if time.monotonic() >= end:
                left += 1
                continue
            best = []
            for i, config in enumerate(kernel.configs):
                progress(kernel.name if config.upto is None else f"{kernel.name} to {config.upto}")
                best.append(_fastest(machine, operator, kernel, i, most))
            table.add(kernel, best)
            table.write(path)
            done += 1
    return done, left, without


def tilings(kernel: Kernel, number: int, most: int) -> list[Config]:
    """What is tried in the place of one configuration: it, then the most promising others."""
    used = kernel.configs[number]
    found = {used.text(): used}
    for candidate in kernel.candidates:
        found.setdefault(candidate.text(), replace(candidate, upto=used.upto))
    return list(found.values())[:most]


def _fastest(
    machine: Machine, operator: Operator, kernel: Kernel, number: int, most: int
) -> tuple[Config, float]:
    """The fastest tiling and its time. One that does not run here is passed over; the one that is
    used has to run."""
    assert operator.example is not None
    arguments = operator.example(_sizes(operator, kernel.configs[number]), machine.device)
    best: tuple[Config, float] | None = None
    for config in tilings(kernel, number, most):
        # Alone in its table, so that the launcher picks it whatever the count.
        tried = replace(kernel, configs=(replace(config, upto=None),), candidates=())
        kernels = tuple(tried if k.name == kernel.name else k for k in operator.kernels)
        try:
            module = loaded(replace(operator, kernels=kernels))
            call: Callable[[], Any] = partial(getattr(module, operator.name), *arguments)
            taken = machine.seconds([call])
        except Exception:  # too much shared memory, say
            if best is None:
                raise
            continue
        if best is None or taken < best[1]:
            best = (config, taken)
    assert best is not None
    return best


def _sizes(operator: Operator, config: Config) -> Mapping[str, int]:
    """The sizes that are shown, with the count that the configuration is bounded by."""
    if config.upto is None:
        return operator.shown
    counted = next(name for name in COUNTED if name in operator.shown)
    return {**operator.shown, counted: config.upto}
