"""What a model remembers of earlier steps: a tensor for each value marked ``cached``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.errors import UserError

if TYPE_CHECKING:
    from backends.pytorch.runtime.step import Step

FIRST_CAPACITY = 64  # positions that a growing cache starts with


class CacheFull(UserError, ValueError):
    """More positions than a cache of fixed capacity holds."""


class Cache:
    """Values of earlier positions, in ``slots`` rows of up to ``capacity`` positions each.

    A slot holds one sequence. Memory is allocated when a value is first written, with that value's
    dtype and device: ``[slots, ...]`` with ``capacity`` where the value has its time axis, so for
    ``c_kv[s, c]`` it is ``[slots, capacity, c]``. Positions past a slot's length hold zeros, so
    that what masking multiplies by zero is never a stale infinity.

    What a ``scan`` keeps has no positions: one value for each slot, ``[slots, ...]``, that of the
    slot's last position.

    ``lengths`` says how many positions of each slot count; it moves when a step is committed, so
    that a step that failed, or that is run again through another entry point, leaves no trace.

    ``tokens`` are those that the first positions of each slot came from, as far as that is known:
    what a later call may go on from instead of computing it again.
    """

    def __init__(self, slots: int, capacity: int | None = None):
        """An empty cache. With a ``capacity`` it never grows; without one it doubles as needed."""
        if slots < 0 or (capacity is not None and capacity < 0):
            raise ValueError(f"a cache of {slots} slots of {capacity} positions")
        self.slots = slots
        self.capacity = FIRST_CAPACITY if capacity is None else capacity
        self.lengths: list[int] = [0] * slots
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self._grows = capacity is None
        self._memory: dict[str, tuple[Tensor, int]] = {}  # path: (memory, its time axis)
        self._latest: dict[str, Tensor] = {}  # path: the state of each slot

    @property
    def grows(self) -> bool:
        """Is there no limit but memory?"""
        return self._grows

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far."""
        states = sum(state.nbytes for state in self._latest.values())
        return states + sum(memory.nbytes for memory, _ in self._memory.values())

    def paths(self) -> list[str]:
        """What is remembered: ``layers.3.attn.c_kv``, in the order of first writing."""
        return [*self._memory, *self._latest]

    def holds(self, path: str) -> bool:
        """Has this value been written before?"""
        return path in self._memory

    def history(self, path: str, slot: int, length: int) -> Tensor:
        """The first ``length`` positions of a value in a slot, to be read or written; a view."""
        memory, axis = self._memory[path]
        return memory[slot].narrow(axis - 1, 0, length)

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` positions in every slot.

        Raises:
            CacheFull: the cache was made with a smaller capacity.
        """
        if capacity <= self.capacity:
            return
        if not self._grows:
            raise CacheFull(
                f"the cache was made for {self.capacity:,} positions per sequence, and "
                f"{capacity:,} are needed: new_cache(batch, capacity={capacity}), or no capacity, "
                "and it grows"
            )
        self.capacity = max(capacity, 2 * self.capacity)
        longest = max(self.lengths, default=0)
        for path, (old, axis) in self._memory.items():
            new = self._allocate(old.shape, axis, old)
            new.narrow(axis, 0, longest).copy_(old.narrow(axis, 0, longest))
            self._memory[path] = (new, axis)

    def truncate(self, lengths: Sequence[int] | Tensor, slots: Sequence[int] | None = None) -> None:
        """Keep only the first ``lengths[i]`` positions of slot i (or of ``slots[i]``).

        Raises:
            ValueError: a slot is shorter than that, or the number of lengths is wrong; or the model
                keeps a state, and the slot would end neither where it does nor empty.
        """
        wanted = [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        chosen = list(range(self.slots)) if slots is None else list(slots)
        if len(wanted) != len(chosen):
            raise ValueError(f"{len(wanted)} lengths for {len(chosen)} slots")
        for slot, length in zip(chosen, wanted, strict=True):
            if not 0 <= length <= self.lengths[slot]:
                raise ValueError(f"slot {slot} holds {self.lengths[slot]} positions, not {length}")
            if self._latest and length not in (0, self.lengths[slot]):
                raise ValueError(
                    f"slot {slot} cannot end at {length} of its {self.lengths[slot]} positions: "
                    f"'{next(iter(self._latest))}' is a state, kept as it is after the last one"
                )
        for slot, length in zip(chosen, wanted, strict=True):
            self._cut(slot, length)

    def reset(self, slot: int) -> None:
        """Forget all of a slot: it is as new, for another sequence."""
        self._cut(slot, 0)

    def _cut(self, slot: int, length: int) -> None:
        dropped = self.lengths[slot] - length
        if dropped:
            for memory, axis in self._memory.values():
                memory[slot].narrow(axis - 1, length, dropped).zero_()
            self.lengths[slot] = length
            del self.tokens[slot][length:]

    def remember(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        """These are the tokens of a slot's positions from ``start`` on. Where positions before
        them came from other inputs, nothing is known that a call could go on from."""
        if len(self.tokens[slot]) == start:
            self.tokens[slot] += tokens

    def extend(self, path: str, x: Tensor, axis: int, step: Step) -> Tensor:
        """Write a step's packed values and return the histories of its sequences.

        Args:
            path: whose value this is, ``layers.3.attn.c_kv``.
            x: ``[..., total, ...]`` with the step's tokens at ``axis``.

        Returns:
            ``[batch, ..., history, ...]``: a view where the slots are consecutive.
        """
        self.reserve(step.history)
        if path not in self._memory:
            shape = (self.slots, *x.shape)
            self._memory[path] = (self._allocate(shape, axis + 1, x), axis + 1)
        memory, at = self._memory[path]
        first = step.slots[0] if step.slots else 0
        adjoining = step.slots == tuple(range(first, first + step.batch))
        with torch.no_grad():
            if adjoining and step.even and len(set(step.starts)) == 1:
                written = memory.narrow(0, first, step.batch).narrow(at, step.starts[0], step.time)
                written.copy_(step.pad(x, axis))
            else:
                memory.movedim(at, 1)[step.slot, step.index] = x.movedim(axis, 0).to(memory.dtype)
        if adjoining:
            rows = memory.narrow(0, first, step.batch)
        else:
            rows = memory.index_select(0, step.slot_of_sequence)
        return rows.narrow(at, 0, step.history)

    def recall(self, path: str, start: Tensor, step: Step) -> Tensor:
        """The states of a step's sequences: ``start``, ``[batch, ...]``, for those that begin."""
        self.reserve(step.history)  # a cache of fixed capacity refuses what is too long
        if path not in self._latest:
            return start
        found = self._latest[path][step.slot_of_sequence]
        if all(step.starts):
            return found
        begun = torch.tensor(step.starts).to(start.device) > 0
        return torch.where(begun.reshape(-1, *[1] * (start.ndim - 1)), found, start)

    def commit(
        self,
        slots: Sequence[int],
        lengths: Iterable[int],
        states: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Let the slots' lengths be these: their new positions count from now on.

        Args:
            states: by path, ``[len(slots), ...]``: what scans keep after these positions.
        """
        for path, state in (states or {}).items():
            if path not in self._latest:
                shape = (self.slots, *state.shape[1:])
                self._latest[path] = torch.zeros(shape, dtype=state.dtype, device=state.device)
            self._latest[path][list(slots)] = state
        for slot, length in zip(slots, lengths, strict=True):
            self.lengths[slot] = length

    def _allocate(self, shape: Sequence[int], axis: int, like: Tensor) -> Tensor:
        full = list(shape)
        full[axis] = self.capacity
        return torch.zeros(full, dtype=like.dtype, device=like.device)
