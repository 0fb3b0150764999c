"""What callers pass: checked, and brought from [batch, time] to packed rows and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backends.pytorch.runtime import Cache, Step
from compiler.errors import UserError
from compiler.manifest import InputRow, Manifest

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class InputError(UserError, ValueError):
    """Arguments that a model cannot be run on."""


class NotAvailable(UserError):
    """An entry whose weights the checkpoint did not hold."""


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


def check_context(manifest: Manifest, positions: int, what: str = "") -> None:
    """
    Args:
        what: what would have so many positions, if it is not just a sequence.

    Raises:
        InputError: a sequence of so many positions is longer than the source allows.
    """
    limit = manifest.context
    if limit is not None and positions > limit.positions:
        raise InputError(
            f"{what or f'a sequence of {positions:,} positions'}; the model is made for "
            f"{limit.positions:,} ({limit.text}, {limit.place})"
        )


def check_prompts(
    manifest: Manifest, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Whether prompts can be continued at all.

    Raises:
        InputError: the model takes other inputs than tokens, a prompt has others than the model's
            or none, or there is no room for so many new ones.
    """
    takes = manifest.entries["main"].inputs
    if len(takes) != 1 or takes[0].below is None:
        names = ", ".join(i.name for i in takes)
        raise InputError(f"'main' takes {names}; only models of one input of tokens generate")
    if not all(prompts):
        raise InputError("a prompt needs at least one token")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}: it cannot be negative")
    for token in (token for prompt in prompts for token in prompt):
        if not 0 <= token < takes[0].below:
            raise InputError(f"'{takes[0].name}' {token} is not one of 0 .. {takes[0].below - 1}")
    longest = max(map(len, prompts), default=0)
    total = longest + max_new_tokens
    check_context(
        manifest,
        total,
        f"a prompt of {longest:,} and {max_new_tokens:,} new tokens are {total:,} positions",
    )


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
