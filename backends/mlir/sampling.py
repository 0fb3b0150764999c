"""Choosing the next token, in numpy: what ``backends/pytorch/sampling.py`` chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.pytorch.asked import InputError, uniform


def choose(
    logits: NDArray[np.float32],
    rows: Sequence[int],
    step: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    min_p: float = 0.0,
) -> NDArray[np.int64]:
    """The next token of each sequence.

    Args:
        logits: [sequences, vocab].
        rows: each sequence's number in the caller's batch.
        step: how many tokens have been generated before.

    Returns:
        int64 [sequences].

    Raises:
        InputError: logits are NaN, of which no token is the likeliest.
    """
    nan = np.isnan(logits).any(-1)
    if nan.any():
        bad = rows[int(nan.argmax())]
        raise InputError(
            f"the logits of sequence {bad} are NaN after {step} new tokens: the weights hold "
            "what is no number, or the dtype is too narrow for them"
        )
    if temperature == 0:
        return logits.argmax(-1)
    # f64, so that the sum of a large vocabulary's probabilities is exact enough to draw from.
    scaled: NDArray[Any] = logits.astype(np.float64) / temperature
    grown = np.exp(scaled - scaled.max(-1, keepdims=True))
    probability = grown / grown.sum(-1, keepdims=True)
    tokens = np.argsort(-probability, axis=-1, kind="stable")
    ordered = np.take_along_axis(probability, tokens, -1)
    if top_p < 1:
        before = ordered.cumsum(-1) - ordered
        first = ordered[:, 0].copy()
        ordered[before >= top_p] = 0
        ordered[:, 0] = first
    if min_p > 0:
        ordered[ordered < min_p * ordered[:, :1]] = 0
    upto = ordered.cumsum(-1)
    chosen = []
    for number, row in enumerate(rows):
        draw = uniform(seed, row, step) * upto[number, -1]
        at = int(np.searchsorted(upto[number], draw, side="right"))
        # A draw that rounds up to the sum must not fall on a token that was cut off.
        at = min(at, int((ordered[number] > 0).sum()) - 1)
        chosen.append(tokens[number, at])
    return np.array(chosen, np.int64)
