"""``dslc run``: generate with a compiled model."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import UserError
from dslc.commands.options import add_json, not_yet
from dslc.terminal import note, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from backends.pytorch.model import Model


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="what dslc compile wrote")
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        help="a Hugging Face checkpoint; without one, weights are random",
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", action="append", help="may be repeated")
    given.add_argument(
        "--tokens",
        metavar="1,2,3",
        action="append",
        type=tokens,
        help="a prompt as token numbers; may be repeated",
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=32, help="(%(default)s)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 takes the likeliest token"
    )
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="(%(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the sampling")
    parser.add_argument("--init-seed", metavar="N", type=int, default=0, help="of random weights")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="(%(default)s)")
    parser.add_argument(
        "--dtype", metavar="NAME", help="float32 or bfloat16 (as the checkpoint says, or float32)"
    )
    parser.add_argument("--nproc", metavar="N", type=int, default=1, help="local processes")
    parser.add_argument("--record-loads", metavar="FILE", type=Path, help="of the experts")
    add_json(parser)


def tokens(text: str) -> list[int]:
    """``1,2,3``."""
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a list of token numbers with commas between them: 1,2,3"
        ) from None


def run(options: argparse.Namespace) -> int:
    if options.nproc != 1:
        raise not_yet(f"--nproc {options.nproc}")
    if options.record_loads:
        raise not_yet("--record-loads")
    tokenizer = _tokenizer(options.checkpoint)
    if options.prompt and tokenizer is None:
        where = (
            f"{options.checkpoint} has no tokenizer.json"
            if options.checkpoint
            else "no --checkpoint"
        )
        raise UserError(f"--prompt needs a tokenizer ({where}); --tokens takes token numbers")
    prompts = options.tokens or [tokenizer.encode(text).ids for text in options.prompt]
    if not all(prompts):
        raise UserError("a prompt needs at least one token")

    from backends.pytorch.load import load

    with progress("loading") as bar:
        model = load(
            options.directory,
            options.checkpoint,
            options.device,
            options.dtype,
            options.init_seed,
            progress=bar,
            note=note,
        )
    watch = _Watch(len(prompts))
    stream = None if options.json or len(prompts) > 1 else _Stream(prompts[0], tokenizer)
    out = _generate(model, prompts, options, watch, stream)
    texts = [tokenizer.decode(sequence) for sequence in out] if tokenizer else None
    if options.json:
        timing = watch.timing(sum(map(len, prompts)))
        print(json.dumps({"tokens": out, "text": texts, "timing": timing}))
    elif stream:
        stream.end()
    else:
        for number, sequence in enumerate(out):
            print(texts[number] if texts else ",".join(map(str, sequence)))
    if options.checkpoint is None:
        note("weights are random, as there is no --checkpoint")
    return 0


def _generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    options: argparse.Namespace,
    watch: _Watch,
    stream: _Stream | None,
) -> list[list[int]]:
    import torch

    from backends.pytorch.checkpoint import eos_tokens

    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    out = [list(prompt) for prompt in prompts]

    def on_token(step: int, new: Tensor) -> None:
        watch.token(step, new.tolist())
        for sequence, token in zip(out, new.tolist(), strict=True):
            if token >= 0:
                sequence.append(token)
        if stream:
            stream.token(out[0])

    watch.start()
    with contextlib.suppress(KeyboardInterrupt):  # what there is by then is printed
        model.generate(
            padded,
            lengths,
            options.max_new_tokens,
            options.temperature,
            options.top_p,
            options.seed,
            eos=eos_tokens(options.checkpoint) if options.checkpoint else None,
            on_token=on_token,
        )
    return out


class _Watch:
    """Times prefill, up to the first token, and decode, from there on."""

    def __init__(self, batch: int):
        self.batch = batch
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


class _Stream:
    """Prints one sequence as it grows, on standard output; at once in a pipe, at its end."""

    def __init__(self, prompt: Sequence[int], tokenizer: Any):
        self.tokenizer = tokenizer
        self.live = sys.stdout.isatty()
        self.tokens: list[int] = list(prompt)
        self.shown = ""
        self._show()

    def token(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self._show()

    def end(self) -> None:
        self.live = True
        self._show(whole=True)
        print()

    def _show(self, whole: bool = False) -> None:
        if not self.live:
            return
        text = self._text()
        # A character of several tokens is not shown before it is whole.
        if whole or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def _text(self) -> str:
        if self.tokenizer is None:
            return ",".join(map(str, self.tokens))
        text: str = self.tokenizer.decode(self.tokens)
        return text


def _tokenizer(checkpoint: Path | None) -> Any:
    """The checkpoint's tokenizer, if it has one.

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
