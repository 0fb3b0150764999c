"""``dslc run``: generate with a compiled model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import UserError
from compiler.manifest import read
from dslc.cli import INTERRUPTED
from dslc.commands.options import add_json, not_yet
from dslc.prompts import conversation, encoded, need_tokenizer, open_tokenizer
from dslc.terminal import note, progress

if TYPE_CHECKING:
    from torch import Tensor

    from backends.pytorch.model import Model
    from dslc.transcript import Transcript, Watch


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
    parser.add_argument(
        "--chat",
        action="store_true",
        help="prompts are messages for the checkpoint's chat template; only answers are shown",
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=32, help="(%(default)s)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 takes the likeliest token"
    )
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="(%(default)s)")
    parser.add_argument(
        "--min-p",
        metavar="P",
        type=float,
        default=0.0,
        help="only tokens at least this share as likely as the likeliest (%(default)s)",
    )
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end a sequence before this text; may be repeated",
    )
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
    tokenizer = open_tokenizer(options.checkpoint)
    prompts = _prompts(options, tokenizer)

    from backends.pytorch.inputs import check_prompts
    from backends.pytorch.load import load
    from backends.pytorch.memory import keep_freed
    from backends.pytorch.sampling import check
    from dslc.transcript import Transcript, Watch

    # Before weights are loaded, which may take minutes.
    check(options.temperature, options.top_p, options.min_p)
    check_prompts(read(options.directory), prompts, options.max_new_tokens)
    keep_freed()
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
    live = sys.stdout.isatty() and not options.json and len(prompts) == 1
    watch = Watch()
    transcript = Transcript(prompts, tokenizer, options.stop, options.chat, live)
    interrupted = False
    try:
        tokens = _generate(model, tokenizer, options, watch, transcript)
    except KeyboardInterrupt:  # what there is by then is printed
        interrupted = True
        tokens = transcript.tokens()
    transcript.end()
    texts = transcript.texts()
    if options.json:
        timing = watch.timing(sum(map(len, prompts)))
        print(json.dumps({"tokens": tokens, "text": texts, "timing": timing}))
    elif not live:
        for number in range(len(prompts)):
            print(transcript.text(number))
    if options.checkpoint is None:
        note("weights are random, as there is no --checkpoint")
    return INTERRUPTED if interrupted else 0


def _prompts(options: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """The prompts as tokens.

    Raises:
        UserError: an option needs a tokenizer or a template that is not there.
    """
    if options.stop:
        need_tokenizer(tokenizer, options.checkpoint, "--stop")
        if not all(options.stop):
            raise UserError("--stop needs a text: an empty one would end everything at once")
    if options.chat and options.tokens:
        raise UserError("--chat makes messages of --prompt; --tokens are taken as they are")
    if options.prompt:
        need_tokenizer(tokenizer, options.checkpoint, "--prompt", "; --tokens takes token numbers")
    if options.chat:
        prompts = conversation(tokenizer, options.checkpoint, options.prompt)
    else:
        prompts = options.tokens or [encoded(tokenizer, text) for text in options.prompt]
    if not all(prompts):
        raise UserError("a prompt needs at least one token")
    return prompts


def _generate(
    model: Model,
    tokenizer: Any,
    options: argparse.Namespace,
    watch: Watch,
    transcript: Transcript,
) -> list[list[int]]:
    """Prompt and continuation of each sequence."""
    import torch

    from backends.pytorch.checkpoint import eos_tokens

    prompts = transcript.prompts
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)

    def on_token(step: int, new: Tensor) -> None:
        watch.token(step, new.tolist())
        transcript.token(new.tolist())

    # Special tokens have no text, so that one given as --stop is found by its number.
    special = [[n] for text in options.stop if (n := tokenizer.token_to_id(text)) is not None]
    watch.start()
    out = model.generate(
        padded,
        lengths,
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.seed,
        eos=eos_tokens(options.checkpoint) if options.checkpoint else None,
        on_token=on_token,
        min_p=options.min_p,
        stop=[*options.stop, *special],
        tokenizer=tokenizer,
    )
    return [sequence.tolist() for sequence in out]
