"""What a model is asked: token numbers, texts, or messages in the form it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compiler.errors import UserError
from dslc.chat import open_template


def open_tokenizer(checkpoint: Path | None) -> Any:
    """The checkpoint's ``tokenizers.Tokenizer``, if it has one.

    Raises:
        UserError: tokenizer.json is not one.
    """
    if checkpoint is None or not (checkpoint / "tokenizer.json").exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{checkpoint / 'tokenizer.json'} cannot be read: {error}") from None


def need_tokenizer(tokenizer: Any, checkpoint: Path | None, option: str, instead: str = "") -> None:
    """
    Raises:
        UserError: there is no tokenizer for an option that needs one.
    """
    if tokenizer is None:
        where = f"{checkpoint} has no tokenizer.json" if checkpoint else "no --checkpoint"
        raise UserError(f"{option} needs a tokenizer ({where}){instead}")


def encoded(tokenizer: Any, text: str) -> list[int]:
    """A text as tokens, with those that the tokenizer sets around every text: none of them twice,
    where the text begins with it already."""
    tokens: list[int] = tokenizer.encode(text).ids
    plain: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    twice = bool(plain) and tokens[: 1 + len(plain)] == [plain[0], *plain]
    return plain if twice and _is_special(tokenizer, plain[0]) else tokens


def _is_special(tokenizer: Any, token: int) -> bool:
    known = tokenizer.get_added_tokens_decoder().get(token)
    return known is not None and known.special


def conversation(tokenizer: Any, checkpoint: Path, texts: Sequence[str]) -> list[list[int]]:
    """Each text as a user's message, in the checkpoint's form, up to where the answer begins."""
    template = open_template(checkpoint)
    rendered = [template.render([{"role": "user", "content": text}]) for text in texts]
    # The template has written the special tokens; the tokenizer would add its own once more.
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in rendered]
