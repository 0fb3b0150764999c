"""Tests that hold a family's model to transformers, however tokens are fed to it.

A test module that imports them has a fixture `case` (see families.py).
"""

import torch

from oracle.cases import padded, rows
from oracle.compare import assert_equal, assert_greedy

__all__ = [
    "test_a_case_is_well_conditioned",
    "test_chunked_prefill_then_decode",
    "test_decode_after_ragged_prefill",
    "test_greedy_tokens",
    "test_one_sequence_and_a_ragged_batch",
    "test_token_by_token",
]


def decode(model, cache, sequences, start):
    """Feed what is left of each sequence from `start` on, one token of each at a time."""
    steps = [
        model(torch.stack([s[t] for s in sequences])[:, None], cache=cache)[:, 0]
        for t in range(start, len(sequences[0]))
    ]
    return torch.stack(steps, 1)


def test_a_case_is_well_conditioned(case):
    """No routing decision hangs on rounding, and logits are of ordinary size and not all alike."""
    sequences = case.prompts(23, 1, 9, 16)
    assert case.reference.routing_margin(sequences) > 1e-5
    logits = torch.cat(case.reference.logits(sequences))
    assert 0.3 < logits.std() < 10
    assert len(logits.argmax(-1).unique()) > 10


def test_one_sequence_and_a_ragged_batch(case):
    sequences = case.prompts(23, 1, 9, 16)
    expected = case.reference.logits(sequences)
    alone = case.model(sequences[0][None])
    assert alone.dtype == torch.float32
    assert_equal(alone[0], expected[0], "one sequence")
    tokens, lengths = padded(sequences, junk=5)
    logits = case.model(tokens, lengths)
    assert logits.shape[:2] == tokens.shape and torch.isfinite(logits).all()
    for ours, theirs in zip(rows(logits, lengths), expected, strict=True):
        assert_equal(ours, theirs, "ragged batch")


def test_token_by_token(case):
    sequences = case.prompts(13, 13)
    ours = decode(case.model, case.model.new_cache(2), sequences, 0)
    for a, b in zip(ours, case.reference.logits(sequences), strict=True):
        assert_equal(a, b)


def test_chunked_prefill_then_decode(case):
    sequences = case.prompts(26, 26)
    tokens, cache, logits, start = torch.stack(sequences), case.model.new_cache(2), [], 0
    for width in (7, 1, 3, 11):
        logits.append(case.model(tokens[:, start : start + width], cache=cache))
        start += width
    logits.append(decode(case.model, cache, sequences, start))
    for a, b in zip(torch.cat(logits, 1), case.reference.logits(sequences), strict=True):
        assert_equal(a, b)


def test_decode_after_ragged_prefill(case):
    """Each sequence goes on at its own position, whatever stood in the padding."""
    sequences = case.prompts(21, 9, 14, 5)
    tokens, lengths = padded([s[:-4] for s in sequences], junk=7)
    cache = case.model.new_cache(4)
    first = rows(case.model(tokens, lengths, cache=cache), lengths)
    later = decode(case.model, cache, [s[-4:] for s in sequences], 0)
    for a, b, theirs in zip(first, later, case.reference.logits(sequences), strict=True):
        assert_equal(torch.cat([a, b]), theirs)


def test_greedy_tokens(case):
    """Of a ragged batch, by the model's own generation."""
    sequences = case.prompts(17, 1, 8)
    tokens, lengths = padded(sequences, junk=3)
    for prompt, output in zip(
        sequences, case.model.generate(tokens, lengths, max_new_tokens=10), strict=True
    ):
        assert_greedy(case.reference, prompt, output, 10)
