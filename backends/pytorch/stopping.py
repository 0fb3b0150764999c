"""What ends a sequence: its end-of-sequence tokens, sequences of tokens, and texts."""

from __future__ import annotations

from collections.abc import Sequence

from backends.pytorch.asked import InputError
from backends.pytorch.text import Text, Tokenizer

Stop = str | Sequence[int]


class Endings:
    """Watches the new tokens of a batch of sequences."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        eos: int | Sequence[int] | None = None,
        stop: str | Sequence[Stop] | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        """
        Raises:
            InputError: a stop is empty or neither text nor tokens, or a text has no tokenizer.
        """
        self.eos = {eos} if isinstance(eos, int) else set(eos or ())
        texts, self.sequences = _sorted(stop)
        self.new: list[list[int]] = [[] for _ in prompts]
        self.texts: list[Text] = []
        if texts:
            if tokenizer is None:
                raise InputError(
                    f"stop {texts[0]!r} is a text, which needs tokenizer=...: anything with "
                    "decode(list of token numbers)"
                )
            self.texts = [Text(tokenizer, prompt, texts) for prompt in prompts]

    def add(self, number: int, token: int) -> bool:
        """A new token of a sequence; does it end there?"""
        new = self.new[number]
        new.append(token)
        if self.texts:
            self.texts[number].add(token)
            if self.texts[number].stopped:
                return True
        return token in self.eos or self._stop(new) is not None

    def kept(self, number: int) -> list[int]:
        """The new tokens of a sequence that stand before what stopped it; an end-of-sequence
        token is kept."""
        new = self.new[number]
        stop = self._stop(new)
        count = len(new) - len(stop) if stop else len(new)
        if self.texts:
            count = min(count, self.texts[number].tokens)
        return new[:count]

    def _stop(self, new: list[int]) -> list[int] | None:
        return max((s for s in self.sequences if new[-len(s) :] == s), key=len, default=None)


def _sorted(stop: str | Sequence[Stop] | None) -> tuple[list[str], list[list[int]]]:
    """Texts and sequences of tokens."""
    texts: list[str] = []
    sequences: list[list[int]] = []
    for item in [stop] if isinstance(stop, str) else stop or ():
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, Sequence) and all(isinstance(token, int) for token in item):
            sequences.append([int(token) for token in item])
        else:
            raise InputError(
                f"stop holds {item!r}: each stop is a text or a list of token numbers, "
                'such as ["\\n\\n", [13, 13]]'
            )
        if not item:
            raise InputError("stop holds an empty one, which would end everything at once")
    return texts, sequences
