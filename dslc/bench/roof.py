"""What memory allows: how fast it is read, and what a decoded token reads."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from math import prod

import torch

from backends.pytorch.ahead.plan import Plan
from backends.pytorch.names import attribute_path
from compiler.parse import parse
from compiler.report import report
from compiler.tensors import Pattern

BYTES = 1 << 30
TIMES = 7


def bandwidth(threads: int) -> float:
    """Bytes per second that ``threads`` read: the best of several sums over a large tensor."""
    torch.set_num_threads(threads)
    numbers = torch.ones(BYTES // 4)
    numbers.sum()
    seconds = []
    for _ in range(TIMES):
        started = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - started)
    return BYTES / min(seconds)


def bytes_per_token(
    graph: str, width: int, history: int, plan: Plan | None = None, patterns: Sequence[Pattern] = ()
) -> int:
    """What a decoded token has to read: the weights it is multiplied with, and its history.

    Args:
        graph: the text of the source's graph.
        width: bytes of a weight, and of a cached number.
        history: positions before the token.
        plan: of a compiled step, which says what is kept in one byte a number.
        patterns: the model's parameters; those that are kept as codes are read as such.
    """
    counted = report(parse(graph))
    cached = counted.cache_bytes_per_token * width // 2  # counted in BF16
    read = counted.activated * width
    shares = {_plain(row.path): row.activated / row.parameters for row in counted.blocks}
    for pattern in patterns:
        first = next(iter(pattern.tensors()), None)
        if first is None or "main" not in pattern.entries:
            continue
        share = shares.get(_plain(pattern.path).rpartition(".")[0], 1.0)
        if plan and plan.place(attribute_path(first.path))[0] in plan.blocked:
            read -= int(pattern.elements * share * (width - 1))
        elif pattern.coding is not None:
            rows = pattern.shape[0] if len(pattern.shape) > 1 else 1
            stored = pattern.coding.bytes(rows, prod(pattern.shape) // rows)
            read -= int(len(pattern) * share * (prod(pattern.shape) * width - stored))
    return read + cached * history


def _plain(path: str) -> str:
    return re.sub(r"\[[^\]]*\]", "", path)
