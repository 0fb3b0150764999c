"""A checkpoint's chat template: what turns messages into the text that its model was trained on.

Templates are programs that come with a checkpoint. They run in jinja2's sandbox, in which
transformers runs them too and whose additions they expect: ``raise_exception``, ``strftime_now``,
``tojson`` without HTML's escapes, loops that can be left, and blocks marked ``generation``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from compiler.errors import UserError
from dslc.config import read_object

ALONE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class ChatTemplate:
    """The text of a template, where it is from, and the special tokens it may name."""

    text: str
    path: Path
    tokens: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages of "role" and "content", up to where the model's answer begins.

        The text holds every special token that the model expects, the first one included: encode
        it without adding any.

        Raises:
            UserError: jinja2 is missing, or the template is none, fails or refuses the messages.
        """
        try:
            import jinja2
        except ImportError:
            raise UserError("--chat needs jinja2: pip install jinja2") from None
        try:
            template = _environment().from_string(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{self.path} holds no template, line {error.lineno}: {error.message}"
            ) from None
        try:
            return template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.tokens,
            )
        except _Refused as error:
            raise UserError(f"the template in {self.path} refuses this: {error}") from None
        except Exception as error:  # a template can fail in every way that a program can
            kind = type(error).__name__
            raise UserError(f"the template in {self.path} fails: {kind}: {error}") from None


def open_template(checkpoint: Path) -> ChatTemplate:
    """The template of a checkpoint folder: of a file of its own, or of the tokenizer's config.

    Raises:
        UserError: there is none, or the file cannot be read.
    """
    config: dict[str, Any] = {}
    if (checkpoint / CONFIG).exists():
        config = read_object(checkpoint / CONFIG)
    tokens = {key: text for key in config if (text := _token(key, config[key])) is not None}
    path = checkpoint / ALONE
    if path.exists():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), path, tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    match config.get("chat_template"):
        case str(text):
            return ChatTemplate(text, checkpoint / CONFIG, tokens)
        case [*several]:  # by name, for other uses
            for named in several:
                match named:
                    case {"name": "default", "template": str(text)}:
                        return ChatTemplate(text, checkpoint / CONFIG, tokens)
    raise UserError(
        f"--chat needs a chat template: {checkpoint} has no {ALONE}, and no chat_template in "
        f"{CONFIG}"
    )


def _token(key: str, value: Any) -> str | None:
    """The text of ``bos_token`` and others, which may stand within an object."""
    if not key.endswith("_token"):
        return None
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


class _Refused(Exception):
    """What a template raises itself."""


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what a model wrote, for training: here it is only text."""

        tags = {"generation"}  # noqa: RUF012 -- as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise _Refused(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
