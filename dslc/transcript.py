"""What ``dslc run`` shows of sequences while they grow, and how fast they do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from backends.pytorch.text import Text


class Numbers:
    """Reads tokens as their numbers, where there is no tokenizer."""

    def decode(self, tokens: Sequence[int]) -> str:
        return ",".join(map(str, tokens))


class Transcript:
    """The new tokens of each sequence and their text.

    Args:
        tokenizer: without one, the text is token numbers with commas.
        stop: texts that end a sequence.
        reply: show what comes after the prompt alone.
        live: show the first sequence on standard output as it grows.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        tokenizer: Any = None,
        stop: Sequence[str] = (),
        reply: bool = False,
        live: bool = False,
    ):
        self.prompts = [list(prompt) for prompt in prompts]
        self.new: list[list[int]] = [[] for _ in prompts]
        self.reply = reply
        self.live = live
        self._reads = tokenizer is not None
        self._tokenizer = tokenizer or Numbers()
        self._texts = [Text(self._tokenizer, prompt, stop) for prompt in self.prompts]
        self._before = ["" if reply else self._tokenizer.decode(p) for p in self.prompts]
        self._shown = 0
        self._show()

    def token(self, new: Sequence[int]) -> None:
        """The next token of each sequence; negative where one has ended."""
        for number, token in enumerate(new):
            if token >= 0:
                self.new[number].append(token)
                self._texts[number].add(token)
        self._show()

    def end(self) -> None:
        """No more tokens come: what was held back is text as well."""
        for text in self._texts:
            text.end()
        self._show()
        if self.live:
            print()

    def tokens(self) -> list[list[int]]:
        """Prompt and continuation of each sequence, up to the stop text."""
        return [
            prompt + new[: text.tokens]
            for prompt, new, text in zip(self.prompts, self.new, self._texts, strict=True)
        ]

    def texts(self) -> list[str] | None:
        """The text of each sequence, if there is a tokenizer."""
        return [self.text(n) for n in range(len(self.prompts))] if self._reads else None

    def text(self, number: int) -> str:
        """A sequence as it is shown."""
        text = self._before[number] + self._texts[number].text
        # Some tokenizers write the space before a word only where something stands before it.
        if self.reply and text.startswith(" "):
            alone = self._tokenizer.decode(self.new[number][:8])
            text = text if alone.startswith(" ") else text[1:]
        return text

    def _show(self) -> None:
        if self.live:
            text = self.text(0)
            print(text[self._shown :], end="", flush=True)
            self._shown = len(text)


class Watch:
    """Times prefill, up to the first token, and decode, from there on."""

    def __init__(self) -> None:
        self.decoded = 0
        self.started = self.first = self.last = 0.0

    def start(self) -> None:
        self.started = time.perf_counter()

    def token(self, step: int, new: Sequence[int]) -> None:
        self.last = time.perf_counter()
        if step == 0:
            self.first = self.last
        else:
            self.decoded += sum(token >= 0 for token in new)

    def timing(self, prompt_tokens: int) -> dict[str, float | None]:
        """Tokens per second of all sequences together; None where nothing was timed."""
        prefill, decode = self.first - self.started, self.last - self.first
        return {
            "prefill_tokens_per_second": prompt_tokens / prefill if self.first else None,
            "decode_tokens_per_second": self.decoded / decode if self.decoded else None,
        }
