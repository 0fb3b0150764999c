"""What memory allows: how fast it is read, and what a decoded token reads."""

from __future__ import annotations

import time

import torch

from compiler.parse import parse
from compiler.report import report

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


def bytes_per_token(graph: str, width: int, history: int) -> int:
    """What a decoded token has to read: the weights it is multiplied with, and its history.

    Args:
        graph: the text of the source's graph.
        width: bytes of a weight, and of a cached number.
        history: positions before the token.
    """
    counted = report(parse(graph))
    cached = counted.cache_bytes_per_token * width // 2  # counted in BF16
    return counted.activated * width + cached * history
