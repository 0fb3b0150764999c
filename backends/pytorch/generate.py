"""Generation: prefill once, then one token of each sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backends.pytorch.inputs import InputError, counts_of
from backends.pytorch.runtime import Cache, Step
from backends.pytorch.sampling import choose

if TYPE_CHECKING:
    from backends.pytorch.model import Model

PREFILL_TOKENS = 8192  # of all sequences in one step: bounds the memory of a long prefill
ENDED = -1  # what ``on_token`` is given for a sequence that has ended


def generate(
    model: Model,
    tokens: Tensor,
    lengths: Tensor | None = None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos: int | Sequence[int] | None = None,
    on_token: Callable[[int, Tensor], None] | None = None,
) -> Tensor | list[Tensor]:
    """Continue each sequence with the latent cache.

    Args:
        tokens: int64 [batch, time], padded on the right.
        lengths: int64 [batch], how many of them count; all unless given.
        temperature: 0 is greedy; ties go to the lowest token.
        top_p: sample from the likeliest tokens whose probabilities reach this sum.
        seed: of the sampling. A sequence's draws depend on the seed and its number in the batch.
        eos: tokens that end a sequence, kept in the result; None never stops.
        on_token: called after each step with its number and int64 [batch]; ``ENDED`` (-1) for
            sequences that have ended before.

    Returns:
        int64 [batch, time + max_new_tokens]; with lengths or eos, a list of int64 [length].

    Raises:
        InputError: wrong shapes, dtypes, lengths, token numbers or sampling parameters.
        MemoryNeeded: the cache does not fit.
    """
    counts, ends = _checked(model, tokens, lengths, max_new_tokens, temperature, top_p, eos)
    batch = len(counts)
    sequences = [row[:n].tolist() for row, n in zip(tokens.cpu(), counts, strict=True)]
    if batch and max_new_tokens:
        cache = model.new_cache(batch, capacity=max(counts) + max_new_tokens)
        active = list(range(batch))
        with torch.no_grad():
            logits = prefill(model, tokens, counts, cache)
            for step in range(max_new_tokens):
                new = choose(logits, active, step, temperature, top_p, seed).tolist()
                for slot, token in zip(active, new, strict=True):
                    sequences[slot].append(token)
                if on_token:
                    told = torch.full((batch,), ENDED)
                    told[active] = torch.tensor(new)
                    on_token(step, told)
                active = [slot for slot in active if sequences[slot][-1] not in ends]
                if not active or step == max_new_tokens - 1:
                    break
                last = [sequences[slot][-1] for slot in active]
                logits = decode(model, last, active, cache)
    if lengths is None and eos is None:
        return torch.tensor(sequences, dtype=torch.int64, device=tokens.device).view(batch, -1)
    return [torch.tensor(s, dtype=torch.int64, device=tokens.device) for s in sequences]


def prefill(model: Model, tokens: Tensor, counts: Sequence[int], cache: Cache) -> Tensor:
    """Put prompts into an empty cache, in chunks; returns the last rows' logits [batch, vocab]."""
    chunk = max(16, PREFILL_TOKENS // len(counts))
    logits: Tensor | None = None
    for start in range(0, max(counts), chunk):
        part = [min(max(n - start, 0), chunk) for n in counts]
        width = max(part)
        rows = model.run(
            "main",
            (tokens[:, start : start + width],),
            torch.tensor(part),
            cache,
            last_only=True,
        )[:, 0]
        if logits is None:
            logits = rows
        else:
            there = torch.tensor(part, device=rows.device)[:, None] > 0
            logits = torch.where(there, rows, logits)
    assert logits is not None
    return logits


def decode(model: Model, tokens: Sequence[int], slots: Sequence[int], cache: Cache) -> Tensor:
    """One token of each of some of a cache's sequences; returns logits [slots, vocab]."""
    device = model.device
    step = Step([1] * len(slots), device=device, cache=cache, slots=slots)
    name = model.manifest.entries["main"].inputs[0].name
    packed = torch.tensor(tokens, dtype=torch.int64).to(device)
    return model.step("main", step, {name: packed})


def _checked(
    model: Model,
    tokens: Tensor,
    lengths: Tensor | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos: int | Sequence[int] | None,
) -> tuple[list[int], set[int]]:
    """The prompts' lengths, and the tokens that end a sequence."""
    counts, time = counts_of("tokens", [tokens], lengths, None)
    if time == 0:
        raise InputError("a prompt needs at least one token")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}: it cannot be negative")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}: it must be 0 or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}: it must be above 0 and at most 1")
    takes = model.manifest.entries["main"].inputs
    if len(takes) != 1:
        names = ", ".join(i.name for i in takes)
        raise InputError(f"'main' takes {names}; only models of one input of tokens generate")
    return counts, {eos} if isinstance(eos, int) else set(eos or ())
