"""``dslc run``: generate with a compiled model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.pytorch.faults import watch_over
from backends.pytorch.world import check_world, is_worker, rank
from compiler.errors import UserError
from compiler.manifest import read
from dslc.cli import INTERRUPTED
from dslc.commands.options import add_json, not_yet, positive
from dslc.prompts import conversation, encoded, need_tokenizer, open_tokenizer
from dslc.terminal import note, progress

if TYPE_CHECKING:
    from torch import Tensor

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
    parser.add_argument("--nproc", metavar="N", type=positive, default=1, help="local processes")
    parser.add_argument(
        "--record-loads",
        metavar="FILE",
        type=Path,
        help="how often each block of an array was picked, as JSON for dslc balance",
    )
    parser.add_argument(
        "--placement",
        metavar="FILE",
        type=Path,
        help="which rank holds which blocks and copies, from dslc balance -o",
    )
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
    refuse_stages(options.directory)
    if options.nproc > 1 and not is_worker():
        return launched(options)
    first = rank() == 0
    if is_worker():
        watch_over()
        check_world(read(options.directory))
    tokenizer = open_tokenizer(options.checkpoint)
    prompts = _prompts(options, tokenizer)

    from backends.pytorch.asked import check_prompts, check_sampling
    from dslc.transcript import Transcript, Watch

    # Before weights are loaded, which may take minutes.
    check_sampling(options.temperature, options.top_p, options.min_p)
    manifest = read(options.directory)
    check_prompts(manifest, prompts, options.max_new_tokens)
    opened = _open_mlir if manifest.backend == "mlir" else _open_pytorch
    with progress("loading") if first else nullcontext() as bar:
        generate = opened(options, bar, prompts)
    live = first and sys.stdout.isatty() and not options.json and len(prompts) == 1
    watch = Watch()
    transcript = Transcript(prompts, tokenizer, options.stop, options.chat, live)
    interrupted = False
    try:
        tokens = _generate(generate, tokenizer, options, watch, transcript)
    except KeyboardInterrupt:  # what there is by then is printed
        interrupted = True
        tokens = transcript.tokens()
    if not first:
        return INTERRUPTED if interrupted else 0
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


def refuse_stages(directory: Path) -> None:
    """
    Raises:
        UserError: the directory holds a training step or a pipeline, which nothing runs yet.
    """
    manifest = read(directory)
    if "stages.txt" in manifest.files:
        raise UserError(
            f"{directory} holds the stages of deployment '{manifest.deployment}' as text; training "
            "and pipelines are not run yet"
        )


def launched(options: argparse.Namespace) -> int:
    """The same command in several processes."""
    check_world(read(options.directory), options.nproc)
    from dslc.launch import launch

    return launch(options.nproc, sys.argv[1:])


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


# Prompts and options of ``generate`` to sequences of token numbers.
Generate = Callable[..., list[list[int]]]
Progress = Callable[[int, int], None]


# What every rank must be asked alike: else they would not take the same steps.
ASKED = ("max_new_tokens", "temperature", "top_p", "min_p", "stop", "seed", "device")


def _asked(options: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    return {
        "prompt": [",".join(map(str, prompt)) for prompt in prompts],
        "set of options": {f"--{n.replace('_', '-')}": getattr(options, n) for n in ASKED},
        "choice to record loads": options.record_loads is not None,
    }


def _open_pytorch(
    options: argparse.Namespace, bar: Progress | None, prompts: list[list[int]]
) -> Generate:
    import torch

    from backends.pytorch.load import load
    from backends.pytorch.memory import keep_freed
    from dslc.loads import counted, read_placement

    keep_freed()
    model = load(
        options.directory,
        options.checkpoint,
        options.device,
        options.dtype,
        options.init_seed,
        progress=bar,
        note=note if rank() == 0 else lambda _: None,
        placements=read_placement(options.placement) if options.placement else None,
        same=_asked(options, prompts) if is_worker() else None,
    )

    def generate(
        prompts: list[list[int]], *, on_token: Callable[[int, list[int]], None], **rest: Any
    ) -> list[list[int]]:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)

        def told(step: int, new: Tensor) -> None:
            on_token(step, new.tolist())

        with counted(model, options.record_loads):
            out = model.generate(padded, lengths, on_token=told, **rest)
        return [sequence.tolist() for sequence in out]

    return generate


def _open_mlir(
    options: argparse.Namespace, bar: Progress | None, prompts: list[list[int]]
) -> Generate:
    from backends.mlir.model import load

    if options.record_loads or options.placement:
        raise not_yet("--record-loads or --placement with the backend 'mlir'")
    if options.device != "cpu":
        raise UserError(f"{options.directory} runs on the CPU, not on '{options.device}'")
    model = load(
        options.directory,
        options.checkpoint,
        options.dtype,
        options.init_seed,
        progress=bar,
        note=note,
    )
    return model.generate


def _generate(
    generate: Generate,
    tokenizer: Any,
    options: argparse.Namespace,
    watch: Watch,
    transcript: Transcript,
) -> list[list[int]]:
    """Prompt and continuation of each sequence."""
    from backends.pytorch.weights.checkpoint import eos_tokens

    def on_token(step: int, new: list[int]) -> None:
        watch.token(step, new)
        transcript.token(new)

    # Special tokens have no text, so that one given as --stop is found by its number.
    special = [[n] for text in options.stop if (n := tokenizer.token_to_id(text)) is not None]
    watch.start()
    return generate(
        transcript.prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        eos=eos_tokens(options.checkpoint) if options.checkpoint else None,
        on_token=on_token,
        min_p=options.min_p,
        stop=[*options.stop, *special],
        tokenizer=tokenizer,
    )
