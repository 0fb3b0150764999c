"""Generation: prefill once, then one token of each sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backends.pytorch import sampling
from backends.pytorch.inputs import INTEGERS, InputError, check_prompts, counts_of
from backends.pytorch.runtime import Cache, Step
from backends.pytorch.stopping import Endings, Stop
from backends.pytorch.text import Tokenizer

if TYPE_CHECKING:
    from backends.pytorch.model import Model

# What bounds the memory of a long prefill: tokens of all sequences in one step, and numbers that
# are held for pairs of a token and a position of its history (256 MB of f32).
PREFILL_TOKENS = 8192
PREFILL_PAIRS = 1 << 26
FEWEST = 16  # tokens of a sequence in one step, however long its history
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
    *,
    min_p: float = 0.0,
    stop: str | Sequence[Stop] | None = None,
    tokenizer: Tokenizer | None = None,
    cache: Cache | None = None,
    prefill_chunk: int | None = None,
) -> Tensor | list[Tensor]:
    """Continue each sequence with the cached values.

    Args:
        tokens: int64 [batch, time], padded on the right.
        lengths: int64 [batch], how many of them count; all unless given.
        temperature: 0 is greedy; ties go to the lowest token.
        top_p: sample from the likeliest tokens whose probabilities reach this sum.
        min_p: sample from tokens at least this share as likely as the likeliest.
        seed: of the sampling. A sequence's draws depend on the seed and its number in the batch.
        eos: tokens that end a sequence, kept in the result; None never stops.
        on_token: called after each step with its number and int64 [batch]; ``ENDED`` (-1) for
            sequences that have ended before.
        stop: what ends a sequence and is left out of the result: texts, which may span tokens, and
            lists of token numbers. A token that holds the beginning of a text is left out too.
        tokenizer: decodes tokens where ``stop`` has texts: of the package tokenizers, say.
        cache: of ``model.new_cache(batch)``, to go on in later calls. Of each sequence, the
            longest beginning that the cache holds already is not computed again; what else it
            holds is dropped. The result is what a new cache would give.
        prefill_chunk: positions of each sequence that are prefilled at once; fewer take less
            memory.

    Returns:
        int64 [batch, time + max_new_tokens]; with lengths, eos or stop, a list of int64 [length].

    Raises:
        InputError: wrong shapes, dtypes, lengths, token numbers or sampling parameters; more
            positions than the model is made for.
        CacheFull: more positions than the cache has room for.
        MemoryNeeded: the cache does not fit.
    """
    sampling.check(temperature, top_p, min_p)
    prompts = _prompts(model, tokens, lengths, max_new_tokens, cache, prefill_chunk)
    endings = Endings(prompts, eos, stop, tokenizer)
    batch = len(prompts)
    if batch and max_new_tokens:
        longest = max(map(len, prompts)) + max_new_tokens
        if cache is None:
            cache = model.new_cache(batch, capacity=longest)
        model.make_room(cache, longest)
        active = list(range(batch))
        with torch.no_grad(), model.choosing():
            logits = prefill(model, prompts, cache, prefill_chunk)
            for step in range(max_new_tokens):
                new = model.choose(logits, active, step, temperature, top_p, seed, min_p).tolist()
                ended = {s for s, t in zip(active, new, strict=True) if endings.add(s, t)}
                if on_token:
                    told = torch.full((batch,), ENDED)
                    told[active] = torch.tensor(new)
                    on_token(step, told)
                active = [slot for slot in active if slot not in ended]
                if not active or step == max_new_tokens - 1:
                    break
                last = [endings.new[slot][-1] for slot in active]
                logits = decode(model, last, active, cache)
    sequences = [prompt + endings.kept(number) for number, prompt in enumerate(prompts)]
    if lengths is None and eos is None and stop is None:
        return torch.tensor(sequences, dtype=torch.int64, device=tokens.device).view(batch, -1)
    return [torch.tensor(s, dtype=torch.int64, device=tokens.device) for s in sequences]


def prefill(
    model: Model, prompts: Sequence[Sequence[int]], cache: Cache, chunk: int | None = None
) -> Tensor:
    """Bring prompts into a cache, in chunks; what of them it holds already is kept.

    Args:
        chunk: positions of each sequence in one step; as many as memory is bounded for unless
            given.

    Returns:
        The last rows' logits [batch, vocab].
    """
    for slot, prompt in enumerate(prompts):
        _keep_common(cache, slot, prompt)
    logits: Tensor | None = None
    while True:
        most = chunk or _chunk(model, len(prompts), max(cache.lengths), max(map(len, prompts)))
        parts = [
            prompt[start : start + most]
            for prompt, start in zip(prompts, cache.lengths, strict=True)
        ]
        if not any(parts):
            break
        taking = [slot for slot, part in enumerate(parts) if part]
        rows = _step(model, [parts[slot] for slot in taking], taking, cache)
        if logits is None:
            logits = rows.new_zeros(len(prompts), *rows.shape[1:])
        logits[taking] = rows
    assert logits is not None
    return logits


def _chunk(model: Model, batch: int, held: int, longest: int) -> int:
    """How many tokens of each sequence the next step takes."""
    most = PREFILL_TOKENS // batch
    if model.manifest.pairs:
        room = PREFILL_PAIRS // (model.manifest.pairs * batch)
        # Of n tokens after those held, n * (held + n) pairs: as many as there is room for.
        most = min(most, int(((held**2 + 4 * room) ** 0.5 - held) / 2))
    return max(FEWEST, min(most, longest))


def decode(model: Model, tokens: Sequence[int], slots: Sequence[int], cache: Cache) -> Tensor:
    """One token of each of some of a cache's sequences; returns logits [slots, vocab]."""
    logits = model.replays.step(model, tokens, slots, cache)
    if logits is not None:
        return logits
    return _step(model, [[token] for token in tokens], slots, cache)


def _step(
    model: Model, parts: Sequence[Sequence[int]], slots: Sequence[int], cache: Cache
) -> Tensor:
    """Tokens of some of a cache's sequences; returns the last rows' logits [slots, vocab]."""
    counts = [len(part) for part in parts]
    step = Step(counts, device=model.device, cache=cache, slots=slots, last_only=max(counts) > 1)
    name = model.manifest.entries["main"].inputs[0].name
    rows = [token for part in parts for token in part]
    return model.step("main", step, {name: torch.tensor(rows, dtype=torch.int64)})


def _keep_common(cache: Cache, slot: int, prompt: Sequence[int]) -> None:
    """Drop what a slot holds beyond the beginning that it shares with a prompt.

    The prompt's last token is run in any case: its logits are what generation starts from.
    """
    held = cache.tokens[slot]
    most = min(len(held), len(prompt) - 1)
    common = next((i for i in range(most) if held[i] != prompt[i]), most)
    if common == cache.lengths[slot]:
        return
    try:
        cache.truncate([common], [slot])
    except ValueError:  # states that cannot be taken back: from the start, then
        cache.reset(slot)


def _prompts(
    model: Model,
    tokens: Tensor,
    lengths: Tensor | None,
    max_new_tokens: int,
    cache: Cache | None,
    chunk: int | None,
) -> list[list[int]]:
    """The prompts without padding. Whatever cannot be run is refused here, before work starts."""
    counts, _ = counts_of("tokens", [tokens], lengths, None)
    if tokens.dtype not in INTEGERS:
        raise InputError(f"tokens must be int64, not {str(tokens.dtype).removeprefix('torch.')}")
    if chunk is not None and chunk < 1:
        raise InputError(f"prefill_chunk is {chunk}: it must be at least 1")
    if cache is not None and cache.slots != len(counts):
        raise InputError(f"the cache holds {cache.slots} sequences, not {len(counts)}")
    prompts = [row[:n].tolist() for row, n in zip(tokens.cpu(), counts, strict=True)]
    check_prompts(model.manifest, prompts, max_new_tokens)
    return prompts
