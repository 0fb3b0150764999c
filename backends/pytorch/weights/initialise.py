"""Random weights, so that any architecture runs before there is a checkpoint.

A value depends on the seed and the tensor's checkpoint name alone: not on the order of loading,
the run's dtype, the device, the number of threads or processes. Each tensor has its own generator,
whose stream can be entered anywhere, so that a rank may draw its own rows only.

Values are uniform, not normal: uniform numbers are integers times a power of two, the same to the
last bit on every machine, while a logarithm or a cosine may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from backends.pytorch.runtime.fp8 import CodedWeight
from backends.pytorch.weights.random_values import stretches, values
from compiler.tensors import Pattern, Tensor

__all__ = ["fill", "values"]

CHUNK = 1 << 22  # values drawn at once


def fill(
    patterns: Iterable[Pattern],
    destination: Callable[[Tensor], torch.Tensor],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Give every tensor random values.

    Args:
        destination: gives the memory of a tensor, of its shape, in the dtype it is to have.
        progress: called with bytes filled, and in all.
    """
    tensors = [t for pattern in patterns for t in pattern.tensors() if t.elements]
    done = 0
    # Drawing releases the interpreter's lock; values do not depend on which thread draws them.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        memory = [destination(tensor) for tensor in tensors]
        total = sum(into.nbytes for into in memory)
        filled = pool.map(_fill_one, tensors, memory, [seed] * len(tensors))
        for into, _ in zip(memory, filled, strict=True):
            done += into.nbytes
            if progress:
                progress(done, total)


def _fill_one(tensor: Tensor, into: torch.Tensor, seed: int) -> None:
    with torch.no_grad():
        if isinstance(into, CodedWeight):
            parts = [values(tensor, seed, begin, end) for begin, end in stretches(tensor)]
            drawn = torch.cat([torch.from_numpy(part) for part in parts]).view(tensor.shape)
            into.fill(drawn.to(into.dtype).to(into.codes.device))
            return
        flat, done = into.view(-1), 0
        for begin, end in stretches(tensor):
            for start in range(begin, end, CHUNK):
                stop = min(start + CHUNK, end)
                drawn = torch.from_numpy(values(tensor, seed, start, stop))
                flat[done : done + len(drawn)].copy_(drawn)
                done += len(drawn)
