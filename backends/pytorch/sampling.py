"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backends.pytorch.asked import InputError, uniform
from backends.pytorch.asked import check_sampling as check

__all__ = ["check", "choose", "uniform"]


def refuse_nan(nan: torch.Tensor, rows: Sequence[int], step: int) -> None:
    """
    Args:
        nan: bool [sequences]: whose logits hold NaN.

    Raises:
        InputError: those of a sequence do.
    """
    if nan.any():
        bad = [row for row, one in zip(rows, nan.tolist(), strict=True) if one]
        raise InputError(
            f"the logits of sequence {bad[0]} are NaN after {step} new tokens: the weights hold "
            "what is no number, or the dtype is too narrow for them"
        )


def choose(
    logits: torch.Tensor,
    rows: Sequence[int],
    step: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """The next token of each sequence.

    A draw depends on the seed, the sequence's number and the step alone: not on which other
    sequences are in the batch, which of them have ended, or the device.

    Args:
        logits: [sequences, vocab].
        rows: each sequence's number in the caller's batch.
        step: how many tokens have been generated before.
        temperature: 0 takes the likeliest token, the lowest of several.
        top_p: draw from the likeliest tokens whose probabilities reach this sum, one at least.
        min_p: draw from tokens that are at least this share as likely as the likeliest. Where both
            are given, tokens must pass both.

    Returns:
        int64 [sequences].

    Raises:
        InputError: logits are NaN, of which no token is the likeliest.
    """
    refuse_nan(logits.amax(-1).isnan(), rows, step)
    if temperature == 0:
        return logits.argmax(-1)
    # f64, so that the sum of a large vocabulary's probabilities is exact enough to draw from.
    probability = (logits.to(torch.float64) / temperature).softmax(-1)
    ordered, tokens = probability.sort(stable=True, dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    if top_p < 1:
        ordered = ordered.masked_fill(before >= top_p, 0)
        ordered[:, 0] = probability.max(-1).values
    if min_p > 0:
        ordered = ordered.masked_fill(ordered < min_p * ordered[:, :1], 0)
    upto = ordered.cumsum(-1)
    draws = [uniform(seed, row, step) for row in rows]
    at = torch.tensor(draws, dtype=torch.float64).to(upto.device) * upto[:, -1]
    chosen = torch.searchsorted(upto, at[:, None], right=True)
    # A draw that rounds up to the sum must not fall on a token that was cut off.
    last = (ordered > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(-1, chosen.minimum(last)).squeeze(-1)
