"""Random weights, so that any architecture runs before there is a checkpoint.

A value depends on the seed and the tensor's checkpoint name alone: not on the order of loading,
the run's dtype, the device, the number of threads or processes. Each tensor has its own generator,
whose stream can be entered anywhere, so that a rank may draw its own rows only.

Values are uniform, not normal: uniform numbers are integers times a power of two, the same to the
last bit on every machine, while a logarithm or a cosine may differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import torch

from backends.pytorch.runtime.fp8 import CodedWeight
from compiler.tensors import Initial, Pattern, Tensor

# By what a tensor does: the middle and half the width of its values. Gains stay near 1 and what is
# added stays near 0, so that signals neither fade nor grow over the layers; states are small.
AROUND: dict[Initial, tuple[float, float]] = {
    "gain": (1.0, 0.1),
    "shift": (0.0, 0.05),
    "state": (0.0, 0.01),
}
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
            drawn = torch.from_numpy(values(tensor, seed)).view(tensor.shape)
            into.fill(drawn.to(into.dtype).to(into.codes.device))
            return
        flat = into.view(-1)
        for start in range(0, tensor.elements, CHUNK):
            stop = min(start + CHUNK, tensor.elements)
            flat[start:stop].copy_(torch.from_numpy(values(tensor, seed, start, stop)))


def values(tensor: Tensor, seed: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Values ``start`` to ``stop`` of a tensor's row-major elements, float32.

    Matrices have variance 1 / columns, so that a product with inputs of variance 1 has variance 1.
    """
    stop = prod(tensor.shape) if stop is None else stop
    key = hashlib.sha256(f"{seed}\0{tensor.name}".encode()).digest()
    # Two 32-bit halves of each 64-bit word: begin at an even element, so that words are whole.
    skip = start % 2
    stream = np.random.PCG64(int.from_bytes(key[:16], "little")).advance((start - skip) // 2)
    unit = np.random.Generator(stream).random(stop - start + skip, dtype=np.float32)[skip:]
    middle, half = AROUND.get(tensor.pattern.initial) or (0.0, (3 / tensor.shape[-1]) ** 0.5)
    unit *= np.float32(2 * half)
    unit += np.float32(middle - half)
    return unit
