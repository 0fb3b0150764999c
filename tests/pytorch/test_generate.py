"""Calling and generating: batches, ragged prompts, caches, sampling, and what is refused."""

import pytest
import torch
from small import SIZES, model, prompts

import dslc
from backends.pytorch import generate as generation
from backends.pytorch import memory
from backends.pytorch.inputs import InputError
from backends.pytorch.sampling import choose, uniform

NEW = 6
LENGTHS = torch.tensor([7, 2, 5])
TOKENS = prompts(3, 7)


def by_hand(tokens: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """Greedy generation without a cache: the whole sequence again for each token."""
    for _ in range(new):
        tokens = torch.cat([tokens, model()(tokens)[:, -1:].argmax(-1)], 1)
    return tokens


# -- calling --------------------------------------------------------------------------------------


def test_rows_past_the_lengths_are_zero_and_the_others_are_what_they_are_alone():
    logits = model()(TOKENS, LENGTHS)
    assert logits.shape == (3, 7, SIZES["vocab"])
    for row, tokens, length in zip(logits, TOKENS, LENGTHS, strict=True):
        alone = model()(tokens[None, :length])[0]
        assert torch.allclose(row[:length], alone, atol=1e-5)
        assert not row[length:].any()


def test_last_only_is_one_row_per_sequence():
    last = model()(TOKENS, LENGTHS, last_only=True)
    assert last.shape == (3, 1, SIZES["vocab"])
    whole = model()(TOKENS, LENGTHS)
    for row, all_rows, length in zip(last, whole, LENGTHS, strict=True):
        assert torch.allclose(row[0], all_rows[length - 1], atol=1e-5)


def test_a_sequence_may_sit_out_a_step_with_a_cache():
    cache = model().new_cache(3)
    first = model()(TOKENS[:, :4], torch.tensor([4, 0, 2]), cache=cache, last_only=True)
    assert not first[1].any() and first[0].any()
    assert cache.lengths == [4, 0, 2]
    none = model()(TOKENS[:, :4], torch.tensor([0, 0, 0]), cache=cache)
    assert none.shape == (3, 4, SIZES["vocab"]) and not none.any()
    assert cache.lengths == [4, 0, 2]


def test_gradients_flow_without_a_cache_and_not_at_all_with_one():
    assert model()(TOKENS).requires_grad
    assert not model()(TOKENS, cache=model().new_cache(3)).requires_grad


def test_other_entries_are_methods_and_derive_their_shifted_inputs():
    whole = model().mtp(TOKENS)
    assert whole.shape == (3, 6, SIZES["vocab"])
    ragged = model().mtp(TOKENS, lengths=LENGTHS)
    assert torch.equal(ragged, model().mtp(TOKENS, LENGTHS))
    for row, alone, length in zip(ragged, whole, LENGTHS, strict=True):
        assert torch.allclose(row[: length - 1], alone[: length - 1], atol=1e-5)


def test_integers_of_other_widths_are_tokens_too():
    assert torch.equal(model()(TOKENS.int()), model()(TOKENS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(TOKENS.float()), "'token' must be int64, not float32"),
        (lambda m: m(TOKENS.bool()), "'token' must be int64, not bool"),
        (lambda m: m(TOKENS[0]), "'token' must be [batch, time], not [7]"),
        (lambda m: m(TOKENS + 50), "is not one of 0 .. 50"),
        (lambda m: m(TOKENS - 51), "is not one of 0 .. 50"),
        (lambda m: m(TOKENS, torch.tensor([8, 2, 5])), "lengths[0] is 8: not 1 .. 7"),
        (lambda m: m(TOKENS, torch.tensor([7, 0, 5])), "lengths[1] is 0: not 1 .. 7"),
        (lambda m: m(TOKENS, torch.tensor([7, 2])), "lengths must be [3], not [2]"),
        (lambda m: m(TOKENS, LENGTHS.float()), "lengths must be an int64 tensor [batch], not fl"),
        (lambda m: m(TOKENS, [7, 2, 5]), "lengths must be an int64 tensor [batch], not list"),
        (lambda m: m(TOKENS, cache=m.new_cache(2)), "the cache holds 2 sequences, not 3"),
        (lambda m: m.run("mtp", (TOKENS, TOKENS)), "'mtp' takes 1 inputs (token), not 2"),
        (lambda m: m.run("mpt", (TOKENS,)), "there is no entry 'mpt'; there is 'mtp'"),
        (lambda m: m.generate(TOKENS[:, :0]), "a prompt needs at least one token"),
        (lambda m: m.generate(TOKENS, max_new_tokens=-1), "max_new_tokens is -1"),
        (lambda m: m.generate(TOKENS, temperature=-0.5), "temperature is -0.5"),
        (lambda m: m.generate(TOKENS, temperature=float("nan")), "temperature is nan"),
        (lambda m: m.generate(TOKENS, top_p=0.0), "top_p is 0.0"),
        (lambda m: m.trace(["layers[1].attn.ckw"], TOKENS), "did you mean 'layers[1].attn.ckv'"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(call, message):
    with pytest.raises(InputError) as caught:
        call(model())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_in_the_padding_need_not_be_tokens():
    tokens = TOKENS.clone()
    tokens[1, 2:] = -100
    assert torch.equal(model()(tokens, LENGTHS), model()(TOKENS, LENGTHS))


def test_a_cache_too_large_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda _: 10_000)
    per_token = model().cache_bytes_per_token()
    assert per_token == 3 * (7 + 4) * 4
    with pytest.raises(memory.MemoryNeeded) as caught:
        model().generate(TOKENS, max_new_tokens=1000)
    needed = 3 * 1007 * per_token
    assert f"needs {needed / 1000:,.1f} KB; cpu has 10.0 KB available" in str(caught.value)


# -- generating -----------------------------------------------------------------------------------


def test_greedy_generation_is_the_likeliest_token_each_time():
    out = model().generate(TOKENS, max_new_tokens=NEW)
    assert out.dtype == torch.int64 and torch.equal(out, by_hand(TOKENS))


def test_ragged_prompts_go_on_as_they_would_alone():
    out = model().generate(TOKENS, LENGTHS, max_new_tokens=NEW)
    for sequence, tokens, length in zip(out, TOKENS, LENGTHS, strict=True):
        assert torch.equal(sequence, by_hand(tokens[None, :length])[0])


def test_a_long_prompt_is_taken_in_chunks(monkeypatch):
    whole = model().generate(prompts(2, 40), torch.tensor([40, 19]), max_new_tokens=NEW)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 1)  # then 16 positions at a time
    parts = model().generate(prompts(2, 40), torch.tensor([40, 19]), max_new_tokens=NEW)
    assert [a.tolist() for a in parts] == [b.tolist() for b in whole]


def test_nothing_new_is_the_prompt():
    assert torch.equal(model().generate(TOKENS, max_new_tokens=0), TOKENS)
    out = model().generate(TOKENS, LENGTHS, max_new_tokens=0)
    assert [len(sequence) for sequence in out] == LENGTHS.tolist()


def test_a_sequence_ends_at_its_end_of_sequence():
    full = model().generate(TOKENS, max_new_tokens=NEW)
    eos = [int(full[0, 8]), int(full[2, 10])]
    told = []
    out = model().generate(
        TOKENS, max_new_tokens=NEW, eos=eos, on_token=lambda step, new: told.append(new.tolist())
    )
    for row, sequence, column in zip(full.tolist(), out, zip(*told, strict=True), strict=True):
        new = row[7:]
        kept = next((i + 1 for i, token in enumerate(new) if token in eos), NEW)
        assert sequence.tolist() == row[: 7 + kept]
        assert list(column) == new[:kept] + [generation.ENDED] * (len(told) - kept)


def test_generation_stops_when_all_have_ended():
    steps = []
    full = model().generate(TOKENS[:1], max_new_tokens=1)
    model().generate(TOKENS[:1], eos=int(full[0, -1]), on_token=lambda step, _: steps.append(step))
    assert steps == [0]


# -- sampling -------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_the_rest_of_the_batch():
    sampled = model().generate(TOKENS, max_new_tokens=NEW, temperature=1.0, seed=5)
    alone = model().generate(TOKENS[:1], max_new_tokens=NEW, temperature=1.0, seed=5)
    assert torch.equal(sampled[:1], alone)
    same = model().generate(TOKENS[:1].expand(2, -1), max_new_tokens=12, temperature=1.0, seed=5)
    assert not torch.equal(same[0], same[1])


def test_uniform_draws_are_uniform_and_the_same_everywhere():
    draws = torch.tensor([uniform(1, row, step) for row in range(50) for step in range(200)])
    counts = torch.histc(draws, bins=10, min=0, max=1)
    assert ((counts - 1000).abs() < 150).all()
    assert uniform(0, 0, 0) == 0.8027226048777543
    assert uniform(-1, 3, 7) == uniform(2**64 - 1, 3, 7)


@pytest.mark.parametrize("top_p", [1.0, 0.6, 0.3])
def test_tokens_are_drawn_as_their_probabilities_say(top_p):
    probability = torch.tensor([0.1, 0.45, 0.05, 0.4])
    kept = {1.0: [0, 1, 2, 3], 0.6: [1, 3], 0.3: [1]}[top_p]
    rows = range(4000)
    logits = probability.log().expand(4000, -1)
    chosen = choose(logits, rows, 0, temperature=1.0, top_p=top_p, seed=2)
    share = torch.bincount(chosen, minlength=4) / 4000
    expected = torch.zeros(4)
    expected[kept] = probability[kept] / probability[kept].sum()
    assert (share - expected).abs().max() < 0.03


def test_temperature_sharpens_and_ties_go_to_the_lowest_token():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert choose(logits, [0], 0).item() == 1
    assert all(choose(logits, [0], s, 1e-4, seed=1).item() in (1, 2) for s in range(20))
    assert choose(logits, [0], 0, temperature=1.0, top_p=1e-9).item() == 1


def test_errors_are_for_users():
    assert issubclass(InputError, dslc.UserError) and issubclass(InputError, ValueError)
    assert issubclass(memory.MemoryNeeded, dslc.UserError)
