"""Histories as a GPU's kernels read them: in pages, and packed sequence after sequence.

A page has room for ``PAGE`` positions of a sequence, and a table says which pages a sequence has:
kernels find positions through it alone, so that pages lie anywhere.
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
BLANK, SCRAP = 0, 1  # pages that no slot has: one of zeros, one that anything may be written to
OWN = 2  # the first page that a slot may have


class PagedCache(Cache):
    """A cache whose slots have pages, as many as their positions take.

    A page that a slot gives back holds zeros again, and is the next that is taken.

    Attributes:
        version: another number whenever memory or the table was allocated anew: what holds
            addresses of them (a CUDA graph) is of no use then.
    """

    def __init__(self, slots: int, capacity: int | None = None):
        super().__init__(slots, capacity)
        self.version = 0
        self._pages: list[list[int]] = [[] for _ in range(slots)]
        each = pages(self.capacity) if capacity is not None else 1
        self._count = OWN + slots * each  # of all pages, of which these are free:
        self._free = list(range(self._count - 1, OWN - 1, -1))
        self._pool: dict[str, Tensor] = {}  # path: [pages, PAGE, ...]
        self._table: Tensor | None = None
        self._unsaid: list[tuple[int, int, int]] = []  # slot, number, page: not in the table yet

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(memory.nbytes for memory in self._pool.values())

    def paths(self) -> list[str]:
        return [*self._pool, *super().paths()]

    def holds(self, path: str) -> bool:
        return path in self._pool or super().holds(path)

    def history(self, path: str, slot: int, length: int) -> Tensor:
        """The first ``length`` positions of a value in a slot. What lies in pages is copied."""
        if path not in self._pool:
            return super().history(path, slot, length)
        memory = self._pool[path]
        own = torch.tensor(self._pages[slot][: pages(length)], device=memory.device)
        return memory[own].flatten(0, 1)[:length]

    def pages_of(self, slot: int) -> tuple[int, ...]:
        """The pages that a slot has, in the order of its positions."""
        return tuple(self._pages[slot])

    def claim(self, slot: int, positions: int) -> None:
        """Give a slot the pages that so many positions take.

        Raises:
            CacheFull: the cache was made for fewer.
        """
        self.reserve(positions)
        own = self._pages[slot]
        while len(own) < pages(positions):
            if not self._free:
                self._grow()
            page = self._free.pop()
            self._unsaid.append((slot, len(own), page))
            own.append(page)

    def memory(self, path: str, x: Tensor) -> Tensor:
        """``[pages, PAGE, ...]`` of a value that is written for the first time, or was before.

        Args:
            x: ``[total, ...]``, the step's tokens.
        """
        if path not in self._pool:
            shape = (self._count, PAGE, *x.shape[1:])
            self._pool[path] = torch.zeros(shape, dtype=x.dtype, device=x.device)
            self.version += 1
        return self._pool[path]

    def table(self, device: torch.device) -> Tensor:
        """int32 ``[slots + 1, pages]``: the pages of each slot, ``BLANK`` where it has no more. The
        last row is no slot's: all of it is the page that anything may be written to."""
        width = pages(self.capacity)
        if self._table is None or self._table.shape[1] != width or self._table.device != device:
            whole = torch.full((self.slots + 1, width), BLANK, dtype=torch.int32)
            whole[self.slots] = SCRAP
            for slot, own in enumerate(self._pages):
                whole[slot, : len(own)] = torch.tensor(own, dtype=torch.int32)
            with torch.inference_mode(False):  # written in steps inside and outside of that mode
                self._table, self._unsaid = whole.to(device).clone(), []
            self.version += 1
        if self._unsaid:
            slot, number, page = torch.tensor(self._unsaid).T.to(device)
            self._table[slot, number] = page.to(torch.int32)
            self._unsaid = []
        return self._table

    def _grow(self) -> None:
        """Twice the pages, all of what is held copied."""
        before, self._count = self._count, 2 * self._count
        self._free += range(self._count - 1, before - 1, -1)
        for path, old in self._pool.items():
            new = old.new_zeros(self._count, *old.shape[1:])
            new[:before] = old
            self._pool[path] = new
        self.version += 1

    def _cut(self, slot: int, length: int) -> None:
        super()._cut(slot, length)
        own = self._pages[slot]
        kept = -(-length // PAGE)
        for memory in self._pool.values():
            if length % PAGE:
                memory[own[kept - 1], length % PAGE :] = 0
            memory[own[kept:]] = 0
        self._unsaid += [(slot, number, BLANK) for number in range(kept, len(own))]
        self._free += reversed(own[kept:])
        del own[kept:]


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
        if isinstance(step.cache, PagedCache):
            for slot, length in zip(step.slots, step.lengths, strict=True):
                step.cache.claim(slot, length)

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
        """int32 ``[sequences, pages]``: the pages of each sequence."""
        cache = self.step.cache
        if cache is None:
            each = pages(self.step.history)
            own = torch.arange(self.step.batch * each, dtype=torch.int32, device=self.step.device)
            return own.view(self.step.batch, each)
        assert isinstance(cache, PagedCache)
        return cache.table(self.step.device).index_select(0, self.step.slot_of_sequence)

    @cached_property
    def written(self) -> Tensor:
        """int64 ``[total]``: the row of the cache that each token is written to."""
        return self._rows(self.step.sequence, self.step.index)

    @cached_property
    def read(self) -> Tensor:
        """int64 ``[positions]``: the row of the cache of each packed position."""
        counts = torch.tensor(self.step.lengths, dtype=torch.int64)
        first = counts.cumsum(0) - counts
        sequence = torch.arange(len(counts)).repeat_interleave(counts)
        offset = torch.arange(self.positions) - first[sequence]
        return self._rows(sequence.to(self.step.device), offset.to(self.step.device))

    def _rows(self, sequence: Tensor, position: Tensor) -> Tensor:
        page = self.page_table[sequence, position // PAGE].long()
        return page * PAGE + position % PAGE

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
        self.step, self.pages, self.new = step, memory, new

    def packed(self, take: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``[positions, ...]``, sequence after sequence.

        Args:
            take: rows ``[n, width]`` of a table by their numbers.
        """
        if not any(self.step.starts):
            return self.new
        width = prod(self.pages.shape[2:])
        rows = take(self.pages.view(-1, width), places(self.step).read)
        return rows.view(-1, *self.pages.shape[2:])

    @cached_property
    def padded(self) -> Tensor:
        """``[batch, history, ...]``."""
        length = self.step.history
        own = places(self.step).page_table[:, : pages(length)]
        return self.pages[own.long()].flatten(1, 2)[:, :length]

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
    at = places(step)
    if step.cache is None:
        shape = (at.page_table.numel(), PAGE, *x.shape[1:])
        memory = torch.zeros(shape, dtype=x.dtype, device=x.device)
    else:
        assert isinstance(step.cache, PagedCache)
        memory = step.cache.memory(f"{module.path}.{name}", x)
    width = prod(x.shape[1:])
    with torch.no_grad():
        store(memory.view(-1, width), at.written, x.view(-1, width))
    return History(step, memory, x)


def pages(positions: int) -> int:
    """How many pages so many positions take; one at least."""
    return max(1, -(-positions // PAGE))
