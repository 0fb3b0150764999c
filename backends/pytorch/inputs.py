"""What callers pass: checked, and brought from [batch, time] to packed rows and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backends.pytorch.asked import InputError as InputError
from backends.pytorch.asked import NotAvailable as NotAvailable
from backends.pytorch.asked import check_context as check_context
from backends.pytorch.asked import check_prompts as check_prompts
from backends.pytorch.runtime import Cache, Step
from compiler.manifest import InputRow

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def counts_of(
    name: str, inputs: Sequence[Tensor], lengths: Tensor | None, cache: Cache | None
) -> tuple[list[int], int]:
    """Valid tokens of each sequence, and the padded number."""
    for x in inputs:
        if x.ndim < 2 or x.shape[:2] != inputs[0].shape[:2]:
            raise InputError(f"'{name}' must be [batch, time], not {list(x.shape)}")
    batch, time = inputs[0].shape[:2]
    if cache is not None and cache.slots != batch:
        raise InputError(f"the cache holds {cache.slots} sequences, not {batch}")
    if lengths is None:
        counts = [time] * batch
    elif not isinstance(lengths, Tensor) or lengths.dtype not in INTEGERS:
        kind = _short(lengths.dtype) if isinstance(lengths, Tensor) else type(lengths).__name__
        raise InputError(f"lengths must be an int64 tensor [batch], not {kind}")
    elif lengths.shape != (batch,):
        raise InputError(f"lengths must be [{batch}], not {list(lengths.shape)}")
    else:
        counts = lengths.tolist()
    least = 0 if cache is not None else 1
    for number, count in enumerate(counts):
        if not min(least, time) <= count <= time:
            raise InputError(
                f"lengths[{number}] is {count}: not {least} .. {time}, what '{name}' has room for"
            )
    return counts, time


def packed(row: InputRow, x: Tensor, counts: Sequence[int], drop: int, cut: int) -> Tensor:
    """The valid rows of a padded input behind one another, without the first ``drop`` and the
    last ``cut`` of each sequence.

    Args:
        x: [batch, time, ...].
        counts: valid rows of each sequence.

    Returns:
        [total, ...]; int64 for numbers of positions, else as given.

    Raises:
        InputError: it has another dtype, or tokens that there are not.
    """
    if row.below is not None or row.dtype == "i64":
        if x.dtype not in INTEGERS:
            raise InputError(f"'{row.name}' must be int64, not {_short(x.dtype)}")
        x = x.to(torch.int64)
    time = x.shape[1]
    if all(n == time for n in counts):
        rows = x[:, drop : time - cut if time > cut else drop].flatten(0, 1)
    else:
        ends = torch.tensor(counts, device=x.device)[:, None]
        at = torch.arange(time, device=x.device)
        rows = x[(at >= drop) & (at < ends - cut)]
    if row.below is not None and rows.numel():
        low, high = (int(n) for n in rows.aminmax())
        if low < 0 or high >= row.below:
            wrong = low if low < 0 else high
            raise InputError(f"'{row.name}' {wrong} is not one of 0 .. {row.below - 1}")
    return rows


def unpacked(rows: Tensor, step: Step, time: int, last_only: bool) -> Tensor:
    """[rows, ...] to [batch, time, ...], or [batch, 1, ...]; zeros where there is no row."""
    if last_only:
        if rows.shape[0] == step.batch:
            return rows[:, None]
        there = torch.tensor(step.counts) > 0
        padded = rows.new_zeros(step.batch, 1, *rows.shape[1:])
        padded[there.to(rows.device), 0] = rows
        return padded
    if step.even and step.time == time:
        return rows.unflatten(0, (step.batch, time))
    # Zeros, not ``step.pad``, which may fill up with whatever is cheapest to run on.
    there = torch.arange(time) < torch.tensor(step.counts)[:, None]
    padded = rows.new_zeros(step.batch, time, *rows.shape[1:])
    padded[there.to(rows.device)] = rows
    return padded


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
