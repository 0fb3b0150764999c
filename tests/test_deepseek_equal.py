"""Our DeepSeek-V3 against transformers: equal logits, however the tokens are fed to it.

Each case of tests/oracle/cases.py is compiled from models/dsv3.arch for the dims of a checkpoint
that transformers wrote, then loaded with its weights.
"""

import pytest
import torch

from oracle.cases import (
    CASES,
    YARN,
    checkpoint,
    load,
    model,
    padded,
    prompts,
    reference,
    refused,
    rows,
)
from oracle.checkpoint import read_tensors, write_checkpoint
from oracle.compare import assert_equal

every_case = pytest.mark.parametrize("case", CASES)


def decode(model, cache, sequences, start):
    """Feed what is left of each sequence from `start` on, one token of each at a time."""
    out = [[] for _ in sequences]
    for t in range(start, len(sequences[0])):
        step = model(torch.stack([s[t] for s in sequences])[:, None], cache=cache)
        assert step.shape[:2] == (len(sequences), 1)
        for i, row in enumerate(step[:, 0]):
            out[i].append(row)
    return [torch.stack(o) for o in out]


@every_case
def test_one_sequence(case):
    [tokens] = prompts(case, (23,))
    logits = model(case)(tokens[None])
    assert logits.dtype == torch.float32
    assert_equal(logits[0], reference(case).logits([tokens])[0])


@every_case
def test_ragged_batch(case):
    sequences = prompts(case)
    tokens, lengths = padded(sequences, junk=5)
    logits = model(case)(tokens, lengths)
    assert logits.shape[:2] == tokens.shape
    assert torch.isfinite(logits).all()
    for ours, theirs in zip(rows(logits, lengths), reference(case).logits(sequences), strict=True):
        assert_equal(ours, theirs)


@every_case
def test_token_by_token(case):
    sequences = prompts(case, (11, 11))
    cache = model(case).new_cache(2)
    ours = decode(model(case), cache, sequences, 0)
    for a, b in zip(ours, reference(case).logits(sequences), strict=True):
        assert_equal(a, b)


@every_case
def test_chunked_prefill_then_decode(case):
    """Chunks of odd sizes take turns between the expanded and the absorbed order of attention."""
    sequences = prompts(case, (26, 26))
    tokens, cache, logits, start = torch.stack(sequences), model(case).new_cache(2), [], 0
    for width in (7, 1, 3, 11):
        logits.append(model(case)(tokens[:, start : start + width], cache=cache))
        start += width
    logits.append(torch.stack(decode(model(case), cache, sequences, start)))
    for a, b in zip(torch.cat(logits, 1), reference(case).logits(sequences), strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("case", ["plain", "yarn", "wide_ranks"])
def test_ragged_chunks(case):
    """A sequence that has ended takes no more part: its chunks are empty."""
    sequences = prompts(case)
    tokens, lengths = padded(sequences, junk=96 if case == "plain" else 1)
    cache, start = model(case).new_cache(len(sequences), capacity=23), 0
    logits = [[] for _ in sequences]
    for width in (8, 1, 9, 5):
        counts = (lengths - start).clamp(0, width)
        part = model(case)(tokens[:, start : start + width], counts, cache=cache)
        for mine, row in zip(logits, rows(part, counts), strict=True):
            mine.append(row)
        start += width
    for ours, theirs in zip(logits, reference(case).logits(sequences), strict=True):
        assert_equal(torch.cat(ours), theirs)


@every_case
def test_decode_after_ragged_prefill(case):
    """Each sequence goes on at its own position, whatever stood in the padding."""
    sequences = prompts(case, (21, 9, 14, 5))
    tokens, lengths = padded([s[:-4] for s in sequences], junk=7)
    cache = model(case).new_cache(4)
    first = rows(model(case)(tokens, lengths, cache=cache), lengths)
    later = decode(model(case), cache, [s[-4:] for s in sequences], 0)
    expected = reference(case).logits(sequences)
    for a, b, theirs in zip(first, later, expected, strict=True):
        assert_equal(torch.cat([a, b]), theirs)


def test_what_stands_in_the_padding_does_not_matter():
    sequences = prompts("plain")
    valid = []
    for junk in (0, 96):
        tokens, lengths = padded(sequences, junk)
        valid.append(torch.cat(rows(model("plain")(tokens, lengths), lengths)))
    assert_equal(valid[0], valid[1])


def test_last_row_only():
    sequences = prompts("yarn")
    tokens, lengths = padded(sequences)
    cache = model("yarn").new_cache(len(sequences))
    last = model("yarn")(tokens, lengths, cache=cache, last_only=True)
    assert last.numel() == len(sequences) * 97
    expected = torch.stack([logits[-1] for logits in reference("yarn").logits(sequences)])
    assert_equal(last.reshape(len(sequences), 97), expected)


def test_truncated_cache_forgets():
    """As after rejected speculation: each sequence drops some positions and goes on differently."""
    first, second = prompts("plain", (13, 13)), prompts("yarn", (13, 13))
    cache = model("plain").new_cache(2)
    model("plain")(torch.stack(first), cache=cache)
    keep = torch.tensor([10, 4])
    cache.truncate(keep)
    mixed = [torch.cat([a[:k], b[k:]]) for a, b, k in zip(first, second, keep, strict=True)]
    tokens, counts = padded([s[k:] for s, k in zip(mixed, keep, strict=True)])
    ours = rows(model("plain")(tokens, counts, cache=cache), counts)
    for a, b, k in zip(ours, reference("plain").logits(mixed), keep, strict=True):
        assert_equal(a, b[k:])


def test_a_full_cache_refuses_more():
    cache = model("plain").new_cache(1, capacity=4)
    with refused("4"):
        model("plain")(torch.stack(prompts("plain", (5,))), cache=cache)


@pytest.mark.parametrize("scaling", [None, YARN])
def test_config_forms_and_shards_make_no_difference(tmp_path, scaling):
    """One set of weights in four dresses: both forms of config.json, one file or many."""
    import dslc

    [tokens] = prompts("plain", (23,))
    seen = []
    for form in ("published", "v5"):
        for sharded in (False, True):
            path = tmp_path / f"{form}-{sharded}"
            write_checkpoint(path, form=form, sharded=sharded, rope_scaling=scaling)
            dslc.compile("dsv3", checkpoint=str(path)).save(str(path / "compiled"))
            loaded = dslc.load(str(path / "compiled"), checkpoint=str(path), dtype="float32")
            seen.append(loaded(tokens[None]))
    assert all(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("case", ["plain", "yarn_v5", "no_query_rank"])
def test_state_dict_is_the_checkpoint(case):
    """Every tensor of the file under its name; MTP need not repeat embedding and head."""
    stored, ours = read_tensors(checkpoint(case)), model(case).state_dict()
    repeated = {
        n for n in stored if n.endswith((".embed_tokens.weight", "shared_head.head.weight"))
    }
    repeated -= {"model.embed_tokens.weight"}
    assert set(stored) - repeated <= set(ours) <= set(stored)
    for name, tensor in ours.items():
        assert torch.equal(tensor, stored[name]), name


def test_a_state_dict_can_be_loaded_back():
    source, target = model("plain"), load("plain", checkpoint("plain"))
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    target.load_state_dict(source.state_dict())
    tokens, lengths = padded(prompts("plain"))
    assert torch.equal(target(tokens, lengths), source(tokens, lengths))


def test_trace_shows_the_latents_that_are_cached():
    """A value by the name it has in the source: here the compressed keys and values of a layer."""
    [tokens] = prompts("plain", (9,))
    seen = []
    norm = reference("plain").model.model.layers[1].self_attn.kv_a_layernorm
    hook = norm.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    reference("plain").logits([tokens])
    hook.remove()
    values = model("plain").trace(["layers[1].attn.c_kv"], tokens[None])
    assert_equal(values["layers[1].attn.c_kv"].reshape(9, 11), seen[0], tolerance=2e-5)
