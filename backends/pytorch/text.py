"""The text of a sequence while its tokens come: whole characters, and nothing of a stop string.

A character may be several tokens, and what a token reads as depends on those before it. Decoding
all of a sequence for each new token would cost its square, so a short stretch is decoded, which
begins early enough to read as it does in the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character
LONGEST = 4  # bytes of a UTF-8 character, so that it is whole after so many tokens


class Tokenizer(Protocol):
    """``tokenizers.Tokenizer``, those of transformers, or anything else that decodes."""

    def decode(self, ids: list[int], /) -> str: ...


class Characters:
    """Text from tokens, character by character."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        """``context`` are tokens before: their text is not given again."""
        self._tokenizer = tokenizer
        self._tokens = list(context)
        self._begin = 0  # of the stretch that is decoded
        self._settled = 0  # tokens whose text has been given, all of it
        self._given = 0  # characters of the stretch's text that have been given
        self._waiting = 0  # tokens since the last that added a character
        if self._tokens:
            self._settle(self._decoded())
            self._given = len(self._decoded().rstrip(BROKEN))

    def add(self, token: int) -> str:
        """The characters that are whole from now on; often none, or several."""
        self._tokens.append(token)
        text = self._decoded()
        whole = text.rstrip(BROKEN)
        self._waiting += 1
        if len(whole) > self._given:
            self._waiting = 0
        elif len(text) > len(whole) and self._waiting < LONGEST:
            return ""
        if self._waiting >= LONGEST:  # no character is that long: the bytes really are broken
            whole = text
        new = whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(whole) == len(text):
            self._settle(text)
        return new

    @property
    def whole(self) -> bool:
        """Does a character end where the last token ends?"""
        return self._settled == len(self._tokens)

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._tokens[self._begin :])

    def _settle(self, text: str) -> None:
        """Begin the stretch later, at tokens that have a text of their own: special ones have
        none, and what follows would read as if it stood first."""
        alone = self._tokenizer.decode(self._tokens[self._settled :])
        if alone.strip(BROKEN):
            self._begin, text = self._settled, alone
        self._settled = len(self._tokens)
        self._given = len(text)
        self._waiting = 0


class Text:
    """The text after a prompt, up to the first stop string.

    ``add`` gives what may be shown: all of it together is ``text``, which never holds a part of a
    stop string that then completes.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), stop: Iterable[str] = ()):
        self.text = ""  # what may be shown
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""  # may be the beginning of a stop string
        self._characters = Characters(tokenizer, context)
        self._ends: list[tuple[int, bool]] = []  # of each token: characters, and are they whole

    def add(self, token: int) -> str:
        """What may be shown now that this token has come. Nothing, once it has stopped."""
        if self.stopped:
            return ""
        self._held += self._characters.add(token)
        length = len(self.text) + len(self._held)
        self._ends.append((length, self._characters.whole))
        at = min((i for s in self._stop if (i := self._held.find(s)) >= 0), default=None)
        if at is not None:
            self.stopped = True
            return self._show(at, keep=False)
        return self._show(len(self._held) - self._overlap())

    def end(self) -> str:
        """What was held back, now that no more tokens come. A character that was not finished is
        left out."""
        return "" if self.stopped else self._show(len(self._held))

    @property
    def tokens(self) -> int:
        """How many of the tokens stand wholly before the stop string."""
        if not self.stopped:
            return len(self._ends)
        count = next(i for i, (end, _) in enumerate(self._ends) if end > len(self.text))
        while count and not self._ends[count - 1][1]:
            count -= 1
        return count

    def _show(self, length: int, keep: bool = True) -> str:
        new = self._held[:length]
        self.text += new
        self._held = self._held[length:] if keep else ""
        return new

    def _overlap(self) -> int:
        """How many of the last characters may begin a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._held))
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(s.startswith(end) for s in self._stop):
                return length
        return 0
