"""One step of a model: which tokens it takes, of which sequences, and what came before them.

A value takes one of three layouts. *Packed*: it varies over the step's tokens and not over their
history; the tokens of all sequences stand behind one another, so padding does not exist.
*Padded*: it has the history dim, or is one value per sequence: ``[batch, ...]`` in front, tokens
padded to the longest count and histories to the longest history. *Plain*: the same for all
sequences (parameters, tables). ``pad`` and ``pack`` go between the first two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from backends.pytorch.runtime.cache import Cache
from backends.pytorch.runtime.recurrence import chunks

T = TypeVar("T")
FEW = 4  # tokens that are computed one by one in a linear recurrence too
MOST_REMEMBERED = 1 << 24  # pairs of a token and a position of its history


class Step:
    """The tokens of one forward pass, packed ``[total]`` sequence by sequence.

    Attributes:
        counts: how many tokens each sequence has in this step; ``batch`` is their number, ``time``
            the largest of them, ``total`` their sum.
        starts: how many positions each sequence had before; 0 without a cache.
        history: positions of the longest sequence so far, this step's included.
        position: int64 ``[total]``, the position of each token in its sequence.
        sequence: int64 ``[total]``, the number of each token's sequence within the step.
        rows: int64 ``[wanted]``, the packed rows whose result is wanted; None for all.
        cache, slots: where earlier values are kept, and the slot of each sequence.
    """

    def __init__(
        self,
        counts: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        cache: Cache | None = None,
        slots: Sequence[int] | None = None,
        position: Tensor | None = None,
        rows: Tensor | None = None,
        last_only: bool = False,
    ):
        """A step of ``counts[i]`` tokens for each sequence i.

        Args:
            cache: holds earlier positions; without one, the history is the step itself.
            slots: the cache's slot of each sequence; 0, 1, ... unless given.
            position: int64 ``[total]``; unless given, sequences go on where they were.
            rows: the packed rows whose result is wanted.
            last_only: want the last row of each sequence (of those that have tokens).

        Raises:
            ValueError: negative counts, or slots that are missing, repeated or not there.
        """
        self.counts = tuple(int(n) for n in counts)
        self.batch = len(self.counts)
        self.places: Any = None  # what paged.places makes, where kernels ask for it
        self.total = sum(self.counts)
        self.time = max(self.counts, default=0)
        self.even = len(set(self.counts)) <= 1
        self.device = torch.device(device)
        self.cache = cache
        self.slots = tuple(range(self.batch)) if slots is None else tuple(slots)
        if min(self.counts, default=0) < 0:
            raise ValueError(f"a sequence cannot have {min(self.counts)} tokens")
        if len(self.slots) != self.batch or len(set(self.slots)) != self.batch:
            raise ValueError(f"{self.batch} sequences need as many different slots: {self.slots}")
        if cache is not None and not all(0 <= slot < cache.slots for slot in self.slots):
            raise ValueError(f"the cache has slots 0 to {cache.slots - 1}, not {self.slots}")
        self.starts = tuple(cache.lengths[s] if cache else 0 for s in self.slots)
        self.lengths = tuple(a + n for a, n in zip(self.starts, self.counts, strict=True))
        self.history = max(self.lengths, default=0)
        self.in_order = position is None  # positions are places in the history
        self._position = position
        self._remembered: dict[object, object] = {}
        self.may_halve = False  # whoever makes the steps of all ranks says so on each of them
        self._after: dict[str, Tensor] = {}  # states after the step, which commit hands the cache
        if last_only and rows is None:
            ends = torch.tensor(self.counts, dtype=torch.int64).cumsum(0) - 1
            rows = ends[torch.tensor(self.counts, dtype=torch.int64) > 0].to(self.device)
        self.rows = rows

    # -- what each token is ----------------------------------------------------------------------

    @cached_property
    def sequence(self) -> Tensor:
        """int64 ``[total]``: the number of each token's sequence within the step."""
        counts = torch.tensor(self.counts, dtype=torch.int64)
        return torch.arange(self.batch).repeat_interleave(counts).to(self.device)

    @cached_property
    def offset(self) -> Tensor:
        """int64 ``[total]``: the number of each token among its sequence's tokens of this step."""
        if self.even:
            return torch.arange(self.time, device=self.device).repeat(self.batch)
        counts = torch.tensor(self.counts, dtype=torch.int64)
        before = (counts.cumsum(0) - counts).repeat_interleave(counts)
        return (torch.arange(self.total) - before).to(self.device)

    @cached_property
    def index(self) -> Tensor:
        """int64 ``[total]``: each token's place in its sequence's history."""
        starts = torch.tensor(self.starts, dtype=torch.int64).to(self.device)
        return self.offset + starts[self.sequence]

    @cached_property
    def position(self) -> Tensor:
        """int64 ``[total]``: the position of each token; its place in the history unless given."""
        return self.index if self._position is None else self._position

    @cached_property
    def history_position(self) -> Tensor:
        """int64 ``[batch, history]``: the positions of the history."""
        if self.cache is None:
            return self.pad(self.position)
        return torch.arange(self.history, device=self.device).expand(self.batch, -1)

    @cached_property
    def slot_of_sequence(self) -> Tensor:
        """int64 ``[batch]``: each sequence's slot in the cache."""
        return torch.tensor(self.slots, dtype=torch.int64).to(self.device)

    @cached_property
    def slot(self) -> Tensor:
        """int64 ``[total]``: each token's slot in the cache."""
        return self.slot_of_sequence[self.sequence]

    @cached_property
    def history_valid(self) -> Tensor | None:
        """bool ``[batch, history]``: which positions are there; None when all are."""
        return self._valid(self.lengths, self.history)

    @cached_property
    def time_valid(self) -> Tensor | None:
        """bool ``[batch, time]``: which padded tokens are there; None when all are."""
        return self._valid(self.counts, self.time)

    def _valid(self, lengths: tuple[int, ...], longest: int) -> Tensor | None:
        if all(n == longest for n in lengths):
            return None
        ends = torch.tensor(lengths, dtype=torch.int64).to(self.device)
        return torch.arange(longest, device=self.device) < ends[:, None]

    # -- two micro-batches -----------------------------------------------------------------------

    @cached_property
    def halves(self) -> tuple[Step, Step] | None:
        """The step as two, of its first sequences and of the others, about as many tokens each;
        None if it is run as it is. Either may have no sequence at all."""
        if not self.may_halve:
            return None
        if self.cache is not None:  # what one half has written must not move for the other's sake
            self.cache.reserve(self.history)
        before = [0, *accumulate(self.counts)]
        cut = min(range(self.batch + 1), key=lambda i: (abs(2 * before[i] - self.total), -i))
        own = None if self.in_order else self.position
        parts = []
        for some in (slice(0, cut), slice(cut, self.batch)):
            start, stop = before[some.start], before[some.stop]
            parts.append(
                Step(
                    self.counts[some],
                    device=self.device,
                    cache=self.cache,
                    slots=self.slots[some] if self.cache is not None else None,
                    position=None if own is None else own[start:stop],
                )
            )
        return parts[0], parts[1]

    def parted(self, x: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
        """The rows of a packed value that are each half's; views."""
        assert self.halves is not None
        first, second = x.split([half.total for half in self.halves], axis)
        return first, second

    # -- between layouts -------------------------------------------------------------------------

    def pad(self, x: Tensor, axis: int = 0) -> Tensor:
        """Packed to padded: ``[..., total, ...]`` to ``[batch, ..., time, ...]``.

        ``axis`` is where the tokens stand. A view when all counts are equal. Padding repeats the
        sequence's last token, so that nothing is computed from it that is not a finite number
        elsewhere too, forward or backward.
        """
        if self.even:
            return x.unflatten(axis, (self.batch, self.time)).movedim(axis, 0)
        rows = x.movedim(axis, 0).index_select(0, self._padded_row.flatten())
        return rows.unflatten(0, (self.batch, self.time)).movedim(1, axis + 1)

    def pack(self, x: Tensor, axis: int = 0) -> Tensor:
        """Padded to packed: ``[batch, ..., time, ...]`` to ``[..., total, ...]``.

        ``axis`` is where the tokens stand, not counting the batch. A view where strides allow.
        """
        rows = x.movedim(axis + 1, 1)
        if self.even:
            return rows.flatten(0, 1).movedim(0, axis)
        return rows.flatten(0, 1).index_select(0, self._packed_row).movedim(0, axis)

    @cached_property
    def _padded_row(self) -> Tensor:
        """int64 ``[batch, time]``: the packed row of each padded token; where there is none, the
        sequence's last one, or any if it has none."""
        counts = torch.tensor(self.counts, dtype=torch.int64)
        first = counts.cumsum(0) - counts
        offset = torch.minimum(torch.arange(self.time), (counts - 1).clamp(min=0)[:, None])
        return (first[:, None] + offset).clamp(max=self.total - 1).to(self.device)

    @cached_property
    def _packed_row(self) -> Tensor:
        """int64 ``[total]``: the padded row, of ``batch * time``, of each packed token."""
        return self.sequence * self.time + self.offset

    def select(self, x: Tensor, axis: int = 0) -> Tensor:
        """The rows whose result is wanted, of a packed value with its tokens at ``axis``."""
        return x if self.rows is None else x.index_select(axis, self.rows)

    def spread(self, x: Tensor) -> Tensor:
        """One value per sequence, ``[batch, ...]``, for each of its tokens: ``[total, ...]``."""
        return x.expand(self.batch, *x.shape[1:]).index_select(0, self.sequence)

    # -- within sequences --------------------------------------------------------------------------

    @cached_property
    def history_index(self) -> Tensor:
        """int64 ``[1, history]``: 0, 1, 2, ... along the history."""
        return torch.arange(self.history, device=self.device)[None]

    def within_history(self, x: Tensor, axis: int, fill: float = 0) -> Tensor:
        """``[batch, ..., history, ...]`` with ``fill`` where a sequence has no such position."""
        return _within(x, self.history_valid, axis, fill)

    def within_time(self, x: Tensor, axis: int, fill: float = 0) -> Tensor:
        """``[batch, ..., time, ...]`` with ``fill`` where a sequence has no such token."""
        return _within(x, self.time_valid, axis, fill)

    def history_mean(self, x: Tensor, axis: int) -> Tensor:
        """The mean over each sequence's own history; 0 for one that has none."""
        return _mean(self.within_history(x, axis), self.lengths, axis)

    def time_mean(self, x: Tensor, axis: int) -> Tensor:
        """The mean over each sequence's own tokens of this step; 0 for one that has none."""
        return _mean(self.within_time(x, axis), self.counts, axis)

    def remembered(self, key: object, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once for all layers of the step.

        Only of steps that are short enough for what is kept to be small.
        """
        if self.batch * self.time * self.history > MOST_REMEMBERED:
            return make()
        if key not in self._remembered:
            self._remembered[key] = make()
        return cast(T, self._remembered[key])

    # -- what came before ------------------------------------------------------------------------

    def extend(self, module: nn.Module, name: str, x: Tensor, axis: int = 0) -> Tensor:
        """Append a packed value to the history that ``module`` keeps of it, and read all of it.

        Returns:
            ``[batch, ..., history, ...]``. Without a cache, this step's values: ``pad(x, axis)``.
        """
        if self.cache is None:
            return self.pad(x, axis)
        return self.cache.extend(f"{module.path}.{name}", x, axis, self)

    def recent(self, module: nn.Module, name: str, x: Tensor, kept: int, axis: int = 0) -> Tensor:
        """A packed value with the last ``kept`` of each sequence before it: all that a shift reads.

        Returns:
            ``[batch, ..., kept + time, ...]``, zeros where a sequence had fewer. The cache keeps
            the last ones after the step when it is committed.
        """
        now = self.pad(x, axis)
        shape = list(now.shape)
        shape[axis + 1] = kept
        before = now.new_zeros(shape)
        path = f"{module.path}.{name}"
        if self.cache is None:
            return torch.cat([before, now], axis + 1)
        window = torch.cat([self.cache.recall(path, before, self), now], axis + 1)
        if self.even:
            after = window.narrow(axis + 1, self.time, kept)
        else:
            counts = torch.tensor(self.counts, dtype=torch.int64)
            rows = (counts[:, None] + torch.arange(kept)).to(self.device)
            sequences = torch.arange(self.batch, device=self.device)[:, None]
            after = window.movedim(axis + 1, 1)[sequences, rows].movedim(1, axis + 1)
        self._after[path] = after.detach()
        return window

    def before(
        self,
        x: Tensor,
        axis: int,
        first: int,
        count: int | None = None,
        sign: int = 1,
        kept: int | None = None,
    ) -> Tensor:
        """A history read some tokens before each of the step; 0 before a sequence's first token.

        Args:
            x: ``[batch, ..., history, ...]``, the history at ``axis``.
            first: which token is read, counted from each of the step; not above 0.
            count: read so many, each ``sign`` after the one before.
            kept: ``x`` is what ``recent`` gives, ``[batch, ..., kept + time, ...]``.

        Returns:
            ``[total, ...]``, with ``count``: ``[total, count, ...]``.
        """
        rows = (self.index if kept is None else self.offset + kept) + first
        sequence = self.sequence
        if count is not None:
            rows = rows[:, None] + sign * torch.arange(count, device=self.device)
            sequence = sequence[:, None]
        found = x.movedim(axis, 1)[sequence, rows.clamp(min=0)]
        if (
            kept is not None
            or min(self.starts, default=0) + first + min(0, sign * ((count or 1) - 1)) >= 0
        ):
            return found
        there = (rows >= 0).reshape(*rows.shape, *[1] * (found.ndim - rows.ndim))
        return torch.where(there, found, 0)

    def scan(
        self,
        module: nn.Module,
        name: str,
        start: Tensor,
        body: Callable[..., Tensor],
        moving: Sequence[Tensor],
        fixed: Sequence[Tensor] = (),
        read: Callable[..., Tensor] | None = None,
        asked: Sequence[Tensor] = (),
        known: Sequence[Tensor] = (),
        linear: bool = False,
    ) -> Tensor:
        """A state that is replaced token by token: ``state = body(state, *moving, *fixed)``.

        Each sequence goes on from what ``module`` kept of it, or begins with ``start``; padding
        does not touch it. The cache keeps the states after the step when it is committed.

        Args:
            start: ``[...]``, the state before a first token, the same for all sequences.
            body: one token of every sequence: ``[batch, ...]`` of the state and of each moving one.
            moving: packed values ``[total, ...]``; ``fixed``: values that are the same for all.
            read: what is wanted of each state, ``read(state, *asked, *known)``: all of it, unless
                given. ``asked`` are packed, ``known`` the same for all.
            linear: ``moving`` are scale, write, value and read of a linear recurrence, ``asked`` is
                its query (``compiler/passes/linear.py``): many tokens may be computed at once.

        Returns:
            packed ``[total, ...]``.
        """
        state = start.expand(self.batch, *start.shape)
        path = f"{module.path}.{name}"
        if self.cache is not None:
            state = self.cache.recall(path, state, self)
        given = [self.pad(x) for x in moving]
        wanted = [self.pad(x) for x in asked]
        if linear and self.time > FEW:
            result, state = self._in_chunks(state, given, wanted)
            if self.cache is not None:
                self._after[path] = state.detach()
            return self.pack(result)
        made: list[Tensor] = []
        if not self.time:  # a rank without tokens: what one token would give tells the shape
            one, ask = ([x.new_zeros(len(x), *x.shape[2:]) for x in y] for y in (given, wanted))
            after = body(state, *one, *fixed)
            found = after if read is None else read(after, *ask, *known)
            return found.new_zeros(0, *found.shape[1:])
        for token in range(self.time):
            after = body(state, *(x[:, token] for x in given), *fixed)
            if self.time_valid is not None:
                there = self.time_valid[:, token].reshape(-1, *[1] * (state.ndim - 1))
                after = torch.where(there, after, state)
            state = after
            if read is not None:
                made.append(read(state, *(x[:, token] for x in wanted), *known))
            else:
                made.append(state)
        if self.cache is not None:
            self._after[path] = state.detach()
        return self.pack(torch.stack(made, 1))

    @staticmethod
    def _still(x: Tensor, valid: Tensor, fill: float) -> Tensor:
        return torch.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, fill)

    def _in_chunks(
        self, state: Tensor, given: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A linear recurrence over the step's tokens; padding scales by 1 and writes nothing."""
        scale, write, value, *read = given
        if self.time_valid is not None:
            scale = self._still(scale, self.time_valid, 1.0)
            write = self._still(write, self.time_valid, 0.0)
        return chunks(state, scale, write, value, read[0] if read else None, wanted[0])

    def commit(self) -> None:
        """Let the cache count this step's positions. Call it once, when the step has been run."""
        if self.cache is not None:
            for half in self.__dict__.get("halves") or ():  # states that they kept, if any ran
                for path, state in half._after.items():
                    known = self._after.get(path)
                    self._after[path] = state if known is None else torch.cat([known, state])
            self.cache.commit(self.slots, self.lengths, self._after)


def _within(x: Tensor, valid: Tensor | None, axis: int, fill: float) -> Tensor:
    if valid is None:
        return x
    shape = [1] * x.ndim
    shape[0], shape[axis] = valid.shape
    return torch.where(valid.reshape(shape), x, fill)


def _mean(x: Tensor, counts: Sequence[int], axis: int) -> Tensor:
    """``x`` is zero where nothing is."""
    total = x.sum(axis)
    among = torch.tensor(counts, device=x.device).clamp(min=1).to(x.dtype)
    return total / among.reshape(-1, *[1] * (total.ndim - 1))
