"""What a model can be asked, whatever runs it: positions, prompts, sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence

from compiler.errors import UserError
from compiler.manifest import Manifest

WORD = 1 << 64


class InputError(UserError, ValueError):
    """Arguments that a model cannot be run on."""


class NotAvailable(UserError):
    """An entry whose weights the checkpoint did not hold."""


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


def check_sampling(temperature: float, top_p: float, min_p: float) -> None:
    """Raises ``InputError`` for parameters that nothing can be drawn with."""
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}: it must be 0 or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}: it must be above 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise InputError(f"min_p is {min_p}: it must be at least 0 and at most 1")


def uniform(seed: int, row: int, step: int) -> float:
    """A number in [0, 1): splitmix64 (Steele et al. 2014) of the three numbers."""
    state = 0
    for number in (seed, row, step):
        state = _mixed(state ^ _mixed(number % WORD))
    return (state >> 11) / (1 << 53)


def _mixed(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) % WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % WORD
    return state ^ (state >> 31)
