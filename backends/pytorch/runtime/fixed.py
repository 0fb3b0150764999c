"""A step whose shapes and addresses are always the same, so that a CUDA graph can replay it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backends.pytorch.runtime.paged import SCRAP, PagedCache, Places
from backends.pytorch.runtime.sizes import PAGE
from backends.pytorch.runtime.step import Step

assert SCRAP  # where rows of no sequence are written


class NotFixed(Exception):
    """What the model asks of a step depends on how long histories are."""


class FixedStep(Step):
    """One token of each of ``batch`` sequences, which the host says nothing of.

    All that kernels ask for is made on the device from three rows of numbers: tokens, positions
    and slots. A row that is no sequence's has the slot behind the last, and writes to a page that
    is nobody's.

    Args:
        staged: int64 ``[3, batch]``: the token of each sequence, its position, and its slot.
        table: the cache's table of pages.
    """

    def __init__(self, cache: PagedCache, staged: Tensor, table: Tensor):
        self.cache, self.table = cache, table
        self.device = staged.device
        self.batch = self.total = staged.shape[1]
        self.time, self.even, self.rows = 1, True, None
        self.counts = (1,) * self.batch
        self.in_order = True
        self.token, self._position, self.slot_of_sequence = staged
        self._after = {}
        self.places = FixedPlaces(self)

    @cached_property
    def sequence(self) -> Tensor:
        return torch.arange(self.batch, device=self.device)

    @property
    def index(self) -> Tensor:
        assert self._position is not None
        return self._position

    def remembered(self, key: object, make: Any) -> Any:
        return make()

    def __getattr__(self, name: str) -> Any:
        raise NotFixed(f"a step's '{name}' depends on how long the histories are")


class FixedPlaces(Places):
    """The places of such a step, made on the device."""

    def __init__(self, step: FixedStep):
        self.step: FixedStep = step
        self.most_queries = 1

    @cached_property
    def q_offsets(self) -> Tensor:
        return torch.arange(self.step.batch + 1, dtype=torch.int32, device=self.step.device)

    @cached_property
    def lengths(self) -> Tensor:
        return (self.step.index + 1).to(torch.int32)

    @cached_property
    def page_table(self) -> Tensor:
        return self.step.table.index_select(0, self.step.slot_of_sequence)

    @cached_property
    def written(self) -> Tensor:
        position = self.step.index
        page = self.page_table.gather(1, (position // PAGE)[:, None])[:, 0]
        return page.long() * PAGE + position % PAGE

    def __getattr__(self, name: str) -> Any:
        raise NotFixed(f"'{name}' of a step's places depends on how long the histories are")
