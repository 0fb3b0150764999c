"""Histories as a GPU's kernels read them: in pages, and packed sequence after sequence.

A slot of the cache is a run of pages, and a page table says which pages a sequence has. Kernels
find positions through the table alone, so that pages need not adjoin.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from backends.pytorch.runtime.cache import Cache
from backends.pytorch.runtime.sizes import PAGE
from backends.pytorch.runtime.step import Step

Store = Callable[[Tensor, Tensor, Tensor], None]  # table [n, width], index [rows], rows


class PagedCache(Cache):
    """A cache whose slots are whole pages."""

    def _allocate(self, shape: Any, axis: int, like: Tensor) -> Tensor:
        full = list(shape)
        full[axis] = pages(self.capacity) * PAGE
        return torch.zeros(full, dtype=like.dtype, device=like.device)

    def memory(self, path: str, x: Tensor) -> Tensor:
        """All slots of a value that is written for the first time, or was before.

        Args:
            x: ``[total, ...]``, the step's tokens.
        """
        if path not in self._memory:
            self._memory[path] = (self._allocate((self.slots, *x.shape), 1, x), 1)
        return self._memory[path][0]


class Places:
    """Where a step's queries and histories lie, int32 as kernels want it; the same for all layers.

    Attributes:
        most_queries, most_positions: of any sequence.
        positions: of all histories together.
    """

    def __init__(self, step: Step):
        self.step = step
        self.most_queries, self.most_positions = step.time, step.history
        self.positions = sum(step.lengths)
        capacity = step.cache.capacity if step.cache is not None else step.history
        self.slot_pages = pages(capacity)

    @cached_property
    def q_offsets(self) -> Tensor:
        """int32 ``[sequences + 1]``: each sequence's first query among the packed ones."""
        return self._offsets(self.step.counts)

    @cached_property
    def k_offsets(self) -> Tensor:
        """int32 ``[sequences + 1]``: each sequence's first position among the packed ones."""
        return self._offsets(self.step.lengths)

    @cached_property
    def lengths(self) -> Tensor:
        """int32 ``[sequences]``: positions of each history."""
        return torch.tensor(self.step.lengths, dtype=torch.int32).to(self.step.device)

    @cached_property
    def page_table(self) -> Tensor:
        """int32 ``[sequences, pages]``: the pages of each sequence, of all that its slot has."""
        slots = torch.tensor(self._slots, dtype=torch.int32)[:, None]
        found = slots * self.slot_pages + torch.arange(self.slot_pages, dtype=torch.int32)
        return found.to(self.step.device)

    @cached_property
    def written(self) -> Tensor:
        """int64 ``[total]``: the row of the cache that each token is written to."""
        return self._slot[self.step.sequence] * (self.slot_pages * PAGE) + self.step.index

    @cached_property
    def read(self) -> Tensor:
        """int64 ``[positions]``: the row of the cache of each packed position."""
        counts = torch.tensor(self.step.lengths, dtype=torch.int64)
        first = counts.cumsum(0) - counts
        sequence = torch.arange(len(counts)).repeat_interleave(counts)
        offset = torch.arange(self.positions) - first[sequence]
        slots = torch.tensor(self._slots, dtype=torch.int64)
        return (slots[sequence] * (self.slot_pages * PAGE) + offset).to(self.step.device)

    @property
    def _slots(self) -> tuple[int, ...]:
        return self.step.slots if self.step.cache is not None else tuple(range(self.step.batch))

    @cached_property
    def _slot(self) -> Tensor:
        return torch.tensor(self._slots, dtype=torch.int64).to(self.step.device)

    def _offsets(self, counts: tuple[int, ...]) -> Tensor:
        found = torch.zeros(len(counts) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor(counts, dtype=torch.int64), 0, out=found[1:])
        return found.to(torch.int32).to(self.step.device)


def places(step: Step) -> Places:
    """A step's, made once."""
    if step.places is None:
        step.places = Places(step)
    found: Places = step.places
    return found


class History:
    """What ``extend`` gives: a cached value of a step's sequences.

    Attributes:
        pages: ``[pages, PAGE, ...]``, of which the step's ``page_table`` tells the sequences'.

    Torch's functions take it for what it stands for, ``[batch, history, ...]``.
    """

    def __init__(self, step: Step, memory: Tensor, new: Tensor):
        self.step, self.memory, self.new = step, memory, new

    @property
    def pages(self) -> Tensor:
        return self.memory.view(-1, PAGE, *self.memory.shape[2:])

    def packed(self, take: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``[positions, ...]``, sequence after sequence.

        Args:
            take: rows ``[n, width]`` of a table by their numbers.
        """
        if not any(self.step.starts):
            return self.new
        width = prod(self.memory.shape[2:])
        rows = take(self.memory.view(-1, width), places(self.step).read)
        return rows.view(-1, *self.memory.shape[2:])

    @cached_property
    def padded(self) -> Tensor:
        """``[batch, history, ...]``."""
        slots = places(self.step)._slot
        return self.memory[slots, : self.step.history]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.padded, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.padded[index]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda h: h.padded, (args, kwargs or {}))
        return function(*args, **kwargs)


def extend(step: Step, module: nn.Module, name: str, x: Tensor, store: Store) -> History:
    """Append a packed value to the history that ``module`` keeps of it.

    Without a cache, the history is this step.

    Args:
        x: ``[total, ...]``.
        store: the kernel that writes rows.
    """
    x = x.contiguous()
    cache = step.cache
    if cache is None:
        shape = (step.batch, places(step).slot_pages * PAGE, *x.shape[1:])
        memory = torch.zeros(shape, dtype=x.dtype, device=x.device)
    else:
        assert isinstance(cache, PagedCache)
        cache.reserve(step.history)
        memory = cache.memory(f"{module.path}.{name}", x)
    width = prod(x.shape[1:])
    with torch.no_grad():
        store(memory.view(-1, width), places(step).written, x.view(-1, width))
    return History(step, memory, x)


def pages(positions: int) -> int:
    """How many pages so many positions take; one at least."""
    return max(1, -(-positions // PAGE))
