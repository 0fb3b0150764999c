"""``model.generate``: what ends a sequence, which tokens are drawn, and what is refused."""

import pytest
import torch
from small import compiled, model, prompts

import dslc
from backends.pytorch.inputs import InputError
from backends.pytorch.sampling import choose

NEW = 12
TOKENS = prompts(3, 5)
LENGTHS = torch.tensor([5, 2, 4])


class Letters:
    """Reads every token as a letter, and 27 to 50 as two."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) * (1 + i // 27) for i in ids)


def generate(**options):
    return [s.tolist() for s in model().generate(TOKENS, LENGTHS, max_new_tokens=NEW, **options)]


def first(sequence: list[int], stop: list[int], begin: int) -> int:
    """Where a stop begins, after the prompt; the end if nowhere."""
    places = range(begin, len(sequence) - len(stop) + 1)
    return next((i for i in places if sequence[i : i + len(stop)] == stop), len(sequence))


def test_sequences_of_tokens_end_a_sequence_and_are_left_out():
    whole = generate()
    stops = [whole[0][7:9], whole[2][10:11]]
    for sequence, full, length in zip(generate(stop=stops), whole, LENGTHS.tolist(), strict=True):
        ends = {first(full, s, length) + len(s): first(full, s, length) for s in stops}
        at = ends[min(ends)]
        assert sequence == full[:at]
    assert generate(stop=[[999]]) == whole == generate(stop=[])


def test_no_stop_is_found_in_the_prompt():
    both = TOKENS[0, :2].tolist()
    stopped = model().generate(TOKENS[:1], max_new_tokens=2, stop=[both])[0].tolist()
    assert stopped[:5] == TOKENS[0].tolist()


def test_texts_end_a_sequence_whatever_tokens_they_span():
    whole = generate()
    text = Letters().decode(whole[0][5:])
    stop = text[4:7]
    out = generate(stop=stop, tokenizer=Letters())
    kept = Letters().decode(out[0][5:])
    assert kept == text[: len(kept)] and stop not in kept
    at = text.index(stop)
    assert len(kept) <= at < len(Letters().decode(whole[0][5 : len(out[0]) + 1]))
    assert generate(stop=["nowhere", stop], tokenizer=Letters())[0] == out[0]


def test_a_sequence_that_stopped_costs_no_more_steps():
    whole = generate()
    told: list[list[int]] = []
    stop = [whole[0][6:8]]
    generate(stop=stop, on_token=lambda step, new: told.append(new.tolist()))
    ended = next(i for i, new in enumerate(told) if new[0] == -1)
    assert [new[0] for new in told[:ended]] == whole[0][5 : 5 + ended]  # those of the stop too
    assert all(new[0] == -1 for new in told[ended:])


def test_with_a_stop_the_result_is_a_list():
    out = model().generate(TOKENS, max_new_tokens=2, stop=[[999]])
    assert isinstance(out, list) and [len(s) for s in out] == [7, 7, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "x"}, "stop 'x' is a text, which needs tokenizer=...: anything with decode(list "
                        "of token numbers)"),
        ({"stop": [[]]}, "stop holds an empty one, which would end everything at once"),
        ({"stop": ["a", ""]}, "stop holds an empty one, which would end everything at once"),
        ({"stop": [5, 7]}, "stop holds 5: each stop is a text or a list of token numbers, such as "
                           '["\\n\\n", [13, 13]]'),
        ({"min_p": -0.1}, "min_p is -0.1: it must be at least 0 and at most 1"),
        ({"min_p": 1.01}, "min_p is 1.01: it must be at least 0 and at most 1"),
        ({"top_p": 0}, "top_p is 0: it must be above 0 and at most 1"),
        ({"temperature": float("inf")}, "temperature is inf: it must be 0 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1: it cannot be negative"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_in_a_sentence(options, message):
    with pytest.raises(InputError) as caught:
        model().generate(TOKENS, **options)
    assert str(caught.value) == message


# -- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"min_p": 0.5}, [1, 3]),  # at least half of 0.4
        ({"min_p": 0.2}, [0, 1, 3]),
        ({"min_p": 0.2, "top_p": 0.7}, [1, 3]),  # both
        ({"min_p": 0.999, "top_p": 0.99}, [1]),
        ({"min_p": 1.0}, [1]),
        ({"min_p": 0.0}, [0, 1, 2, 3]),
    ],
)
def test_min_p_keeps_what_is_likely_beside_the_likeliest(options, kept):
    probability = torch.tensor([0.15, 0.4, 0.05, 0.4 - 1e-3])
    logits = probability.log().expand(4000, -1)
    chosen = choose(logits, range(4000), 0, temperature=1.0, seed=4, **options)
    share = torch.bincount(chosen, minlength=4) / 4000
    expected = torch.zeros(4)
    expected[kept] = probability[kept] / probability[kept].sum()
    assert (share - expected).abs().max() < 0.03


def test_min_p_looks_at_probabilities_after_the_temperature():
    logits = torch.tensor([0.3, 0.7]).log().expand(500, -1)
    hot = choose(logits, range(500), 0, temperature=9.0, min_p=0.8, seed=1)
    cold = choose(logits, range(500), 0, temperature=1.0, min_p=0.8, seed=1)
    assert hot.float().mean() < 0.9 and (cold == 1).all()


def test_drawn_tokens_are_those_that_transformers_could_draw():
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 40, generator=generator) * 3
    scores = TemperatureLogitsWarper(1.3)(None, logits)
    scores = MinPLogitsWarper(0.03)(None, TopPLogitsWarper(0.95)(None, scores))
    possible = set(scores[0].isfinite().nonzero().flatten().tolist())
    assert 3 < len(possible) < 40
    drawn = choose(
        logits.expand(6000, -1), range(6000), 0, temperature=1.3, top_p=0.95, min_p=0.03, seed=2
    )
    assert set(drawn.tolist()) == possible


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_no_numbers_are_found_out(temperature):
    broken = dslc.load(compiled())
    broken.module.norm.gain.data[3] = float("nan")
    with pytest.raises(InputError) as caught:
        broken.generate(TOKENS, temperature=temperature)
    assert str(caught.value) == (
        "the logits of sequence 0 are NaN after 0 new tokens: the weights hold what is no number, "
        "or the dtype is too narrow for them"
    )
