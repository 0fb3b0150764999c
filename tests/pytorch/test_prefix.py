"""A cache kept between calls of ``generate``: what it holds is not computed again, and the result
is that of a new one."""

from random import Random

import pytest
import torch
from small import model, prompts

from backends.pytorch.inputs import InputError
from backends.pytorch.runtime import Cache
from backends.pytorch.runtime.cache import CacheFull

NEW = 5
TOKENS = prompts(2, 9)


@pytest.fixture
def ran(monkeypatch):
    """How many tokens of each sequence every step took."""
    counts: list[tuple[int, ...]] = []
    step = type(model()).step

    def counted(self, entry, taken, inputs):
        counts.append(taken.counts)
        return step(self, entry, taken, inputs)

    monkeypatch.setattr(type(model()), "step", counted)
    return counts


def generate(tokens, lengths=None, **options):
    return model().generate(tokens, lengths, max_new_tokens=NEW, **options)


def test_a_conversation_goes_on_where_it_was(ran):
    cache = model().new_cache(1)
    first = generate(TOKENS[:1], cache=cache)
    assert torch.equal(first, generate(TOKENS[:1]))
    assert cache.tokens[0] == first[0, :-1].tolist()  # the last one has not been run
    longer = torch.cat([first, prompts(1, 3, seed=8)], 1)
    ran.clear()
    again = generate(longer, cache=cache)
    assert ran[0] == (longer.shape[1] - cache_length(first),)
    assert torch.equal(again, generate(longer))


def cache_length(sequence) -> int:
    return sequence.shape[1] - 1


def test_what_differs_is_dropped(ran):
    cache = model().new_cache(1)
    generate(TOKENS[:1], cache=cache)
    other = TOKENS[:1].clone()
    other[0, 6] = (other[0, 6] + 1) % 51
    ran.clear()
    assert torch.equal(generate(other, cache=cache), generate(other))
    assert ran[0] == (3,)


def test_the_same_prompt_again_runs_its_last_token_only(ran):
    cache = model().new_cache(2)
    generate(TOKENS, cache=cache)
    ran.clear()
    assert torch.equal(generate(TOKENS, cache=cache), generate(TOKENS))
    assert ran[0] == (1, 1)
    shorter = TOKENS[:, :4]
    assert torch.equal(generate(shorter, cache=cache), generate(shorter))


def test_sequences_of_a_batch_share_different_beginnings(ran):
    cache = model().new_cache(2)
    generate(TOKENS, torch.tensor([9, 4]), cache=cache)
    mixed = torch.stack([TOKENS[0], TOKENS[0]])
    mixed[0, 5] = 0 if TOKENS[0, 5] else 1
    lengths = torch.tensor([9, 7])
    ran.clear()
    got = generate(mixed, lengths, cache=cache)
    assert ran[0][0] == 4 and ran[0][1] >= 6
    assert [g.tolist() for g in got] == [w.tolist() for w in generate(mixed, lengths)]


def test_what_a_step_put_there_counts_and_what_came_otherwise_does_not(ran):
    cache = model().new_cache(1)
    model()(TOKENS[:1, :6], cache=cache)
    ran.clear()
    assert torch.equal(generate(TOKENS[:1], cache=cache), generate(TOKENS[:1]))
    assert ran[0] == (3,)
    cache = model().new_cache(1)
    model().mtp(TOKENS[:1, :6], cache=cache)  # fills it for another entry
    assert cache.lengths == [5] and cache.tokens == [[]]
    model()(TOKENS[:1, 5:7], cache=cache)
    assert cache.tokens == [[]]  # positions in between are not known
    assert torch.equal(generate(TOKENS[:1], cache=cache), generate(TOKENS[:1]))


def test_truncating_forgets_the_tokens_too():
    cache = model().new_cache(1)
    model()(TOKENS[:1], cache=cache)
    cache.truncate([4])
    assert cache.tokens == [TOKENS[0, :4].tolist()]
    model()(TOKENS[1:, :2], cache=cache)
    assert cache.tokens == [TOKENS[0, :4].tolist() + TOKENS[1, :2].tolist()]


def test_a_cache_that_cannot_be_truncated_is_filled_again(monkeypatch, ran):
    def refuse(*_: object) -> None:
        raise ValueError("a recurrent state cannot be taken back")

    monkeypatch.setattr(Cache, "truncate", refuse)
    cache = model().new_cache(2)
    first = generate(TOKENS, cache=cache)
    ran.clear()
    assert torch.equal(generate(TOKENS, cache=cache), first)
    assert ran[0] == (9, 9)
    longer = torch.cat([first, prompts(2, 2, seed=3)], 1)  # nothing to take back
    ran.clear()
    assert torch.equal(generate(longer, cache=cache), generate(longer))
    assert ran[0] == (3, 3)


def test_conversations_that_take_turns_back_are_what_they_are_anew():
    random = Random(0)
    cache = model().new_cache(2)
    said = [[1, 2, 3], [4]]
    for turn in range(10):
        for words in said:
            if random.random() < 0.4:
                del words[random.randint(1, len(words)) :]
            words += [random.randrange(51) for _ in range(random.randint(0, 6))]
        lengths = torch.tensor([len(words) for words in said])
        tokens = torch.zeros(2, int(lengths.max()), dtype=torch.int64)
        for row, words in zip(tokens, said, strict=True):
            row[: len(words)] = torch.tensor(words)
        options = {
            "max_new_tokens": random.randint(0, 4),
            "temperature": random.choice([0.0, 1.0]),
            "seed": turn,
        }
        chunk = random.choice([None, 1, 3])
        kept = model().generate(tokens, lengths, cache=cache, prefill_chunk=chunk, **options)
        said = [s.tolist() for s in model().generate(tokens, lengths, **options)]
        assert [s.tolist() for s in kept] == said


def test_sampling_does_not_depend_on_what_was_kept():
    cache = model().new_cache(2)
    generate(TOKENS, cache=cache)
    hot = {"temperature": 1.5, "min_p": 0.01, "seed": 3}
    assert torch.equal(generate(TOKENS, cache=cache, **hot), generate(TOKENS, **hot))


def test_more_than_a_cache_holds_is_refused_before_it_is_touched(ran):
    cache = model().new_cache(2, capacity=12)
    message = (
        "the cache was made for 12 positions per sequence, and 14 are needed: "
        "new_cache(batch, capacity=14), or no capacity, and it grows"
    )
    for call in (
        lambda: generate(TOKENS, cache=cache),
        lambda: model()(prompts(2, 14), cache=cache),
    ):
        with pytest.raises(CacheFull) as caught:
            call()
        assert str(caught.value) == message
    assert cache.lengths == [0, 0] and cache.nbytes == 0
    model()(prompts(2, 12), cache=cache)
    with pytest.raises(CacheFull, match="made for 12 positions per sequence, and 13 are needed"):
        model()(prompts(2, 1), cache=cache)
    assert cache.lengths == [12, 12]


def test_a_cache_for_other_sequences_is_refused():
    with pytest.raises(InputError, match=r"^the cache holds 3 sequences, not 2$"):
        generate(TOKENS, cache=model().new_cache(3))


@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
def test_prompts_in_chunks_are_prompts(chunk, ran):
    lengths = torch.tensor([9, 4])
    whole = generate(TOKENS, lengths)
    ran.clear()
    parts = generate(TOKENS, lengths, prefill_chunk=chunk)
    assert [p.tolist() for p in parts] == [w.tolist() for w in whole]
    assert max(max(counts) for counts in ran) == min(chunk, 9)
    with pytest.raises(InputError, match=r"^prefill_chunk is 0: it must be at least 1$"):
        generate(TOKENS, prefill_chunk=0)
