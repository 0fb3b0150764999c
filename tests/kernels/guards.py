"""Tensors between guards: what a kernel reads beside them is an error, as it may be on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

MARGIN = 1 << 14  # bytes on either side


@contextmanager
def guards() -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that copies a tensor to between guards; within, loads and stores are watched."""
    zones: list[tuple[int, int]] = []
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def guarded(x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        memory = torch.zeros(size + 2 * MARGIN + 256, dtype=torch.uint8)
        start = MARGIN + -(memory.data_ptr() + MARGIN) % 256
        first = memory.data_ptr() + start
        zones.extend([(first - MARGIN, first), (first + size, first + size + MARGIN)])
        copy = memory[start : start + size].view(x.dtype).view(x.shape)
        return copy.copy_(x)

    def watched(ptrs: Any, mask: Any) -> None:
        touched = np.asarray(ptrs.data)[np.asarray(mask.data).astype(bool)]
        for low, high in zones:
            assert not ((touched >= low) & (touched < high)).any(), "outside of a tensor"

    def watched_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        watched(ptrs, mask)
        return load(self, ptrs, mask, *rest, **more)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        watched(ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **more)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        yield guarded
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
