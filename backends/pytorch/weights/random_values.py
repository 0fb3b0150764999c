"""Random values of a tensor, as a function of the seed and the tensor's checkpoint name alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from math import prod

import numpy as np

from compiler.shards import OwnTensor
from compiler.tensors import Initial, Tensor

# By what a tensor does: the middle and half the width of its values. Gains stay near 1 and what is
# added stays near 0, so that signals neither fade nor grow over the layers; states are small.
AROUND: dict[Initial, tuple[float, float]] = {
    "gain": (1.0, 0.1),
    "shift": (0.0, 0.05),
    "state": (0.0, 0.01),
}


def values(tensor: Tensor, seed: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Values ``start`` to ``stop`` of a tensor's row-major elements, float32.

    Matrices have variance 1 / columns, so that a product with inputs of variance 1 has variance 1.
    """
    shape = tensor.stored_shape if isinstance(tensor, OwnTensor) else tensor.shape
    stop = prod(shape) if stop is None else stop
    key = hashlib.sha256(f"{seed}\0{tensor.name}".encode()).digest()
    # Two 32-bit halves of each 64-bit word: begin at an even element, so that words are whole.
    skip = start % 2
    stream = np.random.PCG64(int.from_bytes(key[:16], "little")).advance((start - skip) // 2)
    unit = np.random.Generator(stream).random(stop - start + skip, dtype=np.float32)[skip:]
    middle, half = AROUND.get(tensor.pattern.initial) or (0.0, (3 / shape[-1]) ** 0.5)
    unit *= np.float32(2 * half)
    unit += np.float32(middle - half)
    return unit


def stretches(tensor: Tensor) -> Iterable[tuple[int, int]]:
    """Which of the stored tensor's elements these are: all, or a rank's part."""
    return tensor.stretches() if isinstance(tensor, OwnTensor) else [(0, tensor.elements)]
