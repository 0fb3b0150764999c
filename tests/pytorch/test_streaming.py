"""Text as tokens come: whole characters, nothing of a stop string, and in all what the whole is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spelling import bytewise, pieces, wordpieces

from backends.pytorch.text import Characters, Text

KINDS = {"bytes": bytewise(), "pieces": pieces(), "words": wordpieces()}
TEXTS = [
    "the wind",
    "a€b 😀😀é😀 wé€",
    "é😀é😀é😀é😀é😀",
    "€€€€ the",
    "😀",
    "  the  wind ",
    "line\nline\n\nthe",
]


def shown(tokenizer, tokens, context=()):
    characters = Characters(tokenizer, context)
    return [characters.add(token) for token in tokens]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_make_the_whole_and_hold_no_half_character(kind, text):
    tokenizer = KINDS[kind]
    tokens = tokenizer.encode(text).ids
    parts = shown(tokenizer, tokens)
    assert "".join(parts) == tokenizer.decode(tokens)
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_a_prompt_reads_as_it_does_behind_it(kind, text, cut):
    tokenizer = KINDS[kind]
    tokens = tokenizer.encode(text).ids
    before = Characters(tokenizer, tokens[:cut])
    whole = tokenizer.decode(tokens)
    rest = "".join(before.add(token) for token in tokens[cut:])
    assert whole.endswith(rest)
    head = whole.removesuffix(rest) if rest else whole
    assert tokenizer.decode(tokens[:cut]).rstrip("\N{REPLACEMENT CHARACTER}") == head


def test_a_character_is_shown_with_its_last_byte():
    tokenizer = KINDS["bytes"]
    tokens = tokenizer.encode("€", add_special_tokens=False).ids
    assert len(tokens) == 2 and shown(tokenizer, tokens) == ["", "€"]
    crossing = tokenizer.encode("é😀", add_special_tokens=False).ids
    assert shown(tokenizer, crossing) == ["", "é", "", "", "😀"]


def test_special_tokens_between_words_keep_the_space():
    tokenizer = KINDS["pieces"]
    end = tokenizer.token_to_id("</s>")
    the, wind = (tokenizer.encode(w, add_special_tokens=False).ids for w in ("the", "wind"))
    tokens = [*the, end, *wind, end, end, *the]
    assert "".join(shown(tokenizer, tokens)) == "the wind the" == tokenizer.decode(tokens)


def test_bytes_that_are_no_character_are_shown_as_such_in_the_end():
    tokenizer = KINDS["bytes"]
    lone = tokenizer.encode("€", add_special_tokens=False).ids[1]  # a continuation byte
    the = tokenizer.encode("the", add_special_tokens=False).ids
    parts = shown(tokenizer, [lone] * 6 + the)
    assert "".join(parts) == "\N{REPLACEMENT CHARACTER}" * 6 + "the"


def test_a_prompt_that_ends_within_a_character():
    tokenizer = KINDS["bytes"]
    first, second = tokenizer.encode("€", add_special_tokens=False).ids
    assert shown(tokenizer, [second], context=[first]) == ["€"]


def test_only_a_short_stretch_is_decoded():
    """Not the whole each time, which costs the square of the length."""
    lengths = []

    class Counting:
        def decode(self, ids: list[int]) -> str:
            lengths.append(len(ids))
            return KINDS["pieces"].decode(ids)

    tokens = KINDS["pieces"].encode("the wind € " * 200).ids
    shown(Counting(), tokens)
    assert max(lengths) < 16


def test_a_tokenizer_is_whatever_decodes():
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    text = Text(Letters(), stop=["cd"])
    assert [text.add(ord(c)) for c in "abcde"] == ["a", "b", "", "", ""]
    assert (text.text, text.stopped, text.tokens) == ("ab", True, 2)


# -- stop strings ---------------------------------------------------------------------------------


def run(text: str, *stop: str, kind: str = "bytes") -> tuple[list[str], Text]:
    tokenizer = KINDS[kind]
    watched = Text(tokenizer, stop=stop)
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    parts = [watched.add(token) for token in tokens]
    return [*parts, watched.end()], watched


def test_what_may_begin_a_stop_string_waits():
    parts, watched = run("one\n\ntwo", "\n\n")
    assert parts == ["o", "n", "e", "", "", "", "", "", ""]
    assert (watched.text, watched.stopped, watched.tokens) == ("one", True, 3)
    parts, watched = run("one\ntwo\n", "\n\n")
    assert parts == ["o", "n", "e", "", "\nt", "w", "o", "", "\n"]
    assert (watched.text, watched.stopped) == ("one\ntwo\n", False)


def test_a_stop_string_within_a_token_ends_the_text_there():
    parts, watched = run("win the", "h")  # "the" is one token
    assert "".join(parts) == watched.text == "win t"
    assert watched.tokens == 3  # w, in and the space


def test_the_first_of_several_wins():
    assert run("abcabc", "cab", "bc")[1].text == "a"
    assert run("abab abac", "abac", "zz")[1].text == "abab "
    assert run("aaab", "aab")[1].text == "a"


def test_a_stop_of_half_characters_is_told_whole():
    parts, watched = run("w€😀é", "😀")
    assert "".join(parts) == watched.text == "w€" and watched.tokens == 3


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab\n€😀é ", max_size=24),
    stop=st.lists(st.text(alphabet="ab\n€é ", min_size=1, max_size=3), min_size=1, max_size=3),
    kind=st.sampled_from(["bytes", "pieces"]),
)
def test_nothing_of_a_stop_string_is_ever_shown(text, stop, kind):
    tokenizer = KINDS[kind]
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(tokens)
    parts, watched = run(text, *stop, kind=kind)
    found = [whole.find(s) for s in stop if s in whole]
    assert "".join(parts) == watched.text
    assert watched.stopped == bool(found)
    if found:
        assert whole.startswith(watched.text) and not any(s in watched.text for s in stop)
        assert any(whole[len(watched.text) :].startswith(s) for s in stop)
        assert watched.text.startswith(tokenizer.decode(tokens[: watched.tokens]))
    else:
        assert watched.text == whole and watched.tokens == len(tokens)
