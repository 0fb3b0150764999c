"""``dslc bench``: a compiled model timed beside what its user would otherwise run."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from compiler.errors import UserError
from dslc.commands.options import add_json, positive
from dslc.terminal import note, steps, table


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", type=Path, nargs="?", help="what dslc compile wrote"
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="time the GPU kernels at sizes of published models instead, beside torch's",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="with --kernels: where timings are kept (benchmarks/results/GPU.json)",
    )
    parser.add_argument(
        "--seconds",
        metavar="N",
        type=positive,
        default=480,
        help="with --kernels: stop after so long; the next run goes on (%(default)s)",
    )
    parser.add_argument("--only", metavar="TEXT", help="with --kernels: names that hold this text")
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        help="the weights of all contestants; without one, the model runs alone on random ones",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(%(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens", metavar="N", type=positive, default=512, help="(%(default)s)"
    )
    parser.add_argument(
        "--new-tokens", metavar="N", type=_several, default=64, help="(%(default)s)"
    )
    parser.add_argument("--rounds", metavar="N", type=positive, default=5, help="(%(default)s)")
    parser.add_argument(
        "--threads", metavar="N", type=positive, help="(all cores this process may use)"
    )
    parser.add_argument("--alone", action="store_true", help="without transformers and llama.cpp")
    add_json(parser)


def _several(text: str) -> int:
    if positive(text) < 2:
        raise argparse.ArgumentTypeError("decoding is timed from the second token on: at least 2")
    return int(text)


def run(options: argparse.Namespace) -> int:
    if options.kernels:
        from dslc.bench.gpu import command

        return command.run(options)
    if options.directory is None:
        raise UserError("dslc bench takes a directory that dslc compile wrote, or --kernels")
    from backends.pytorch.ahead.decoder import read_plan
    from compiler import manifest
    from dslc.bench.contestants import PEERS, Setup
    from dslc.bench.roof import bandwidth, bytes_per_token
    from dslc.bench.rounds import race

    about = manifest.read(options.directory)
    files = manifest.verified_files(options.directory, about)
    threads = options.threads or len(os.sched_getaffinity(0))
    own, dtype = ["dslc"], options.dtype
    if about.backend == "mlir":
        from backends.mlir.artifact import layout_of

        own, dtype = ["mlir", "pytorch"], layout_of(files, about).dtype
    setup = Setup(
        directory=options.directory,
        checkpoint=options.checkpoint,
        dtype=dtype,
        threads=threads,
        vocab=about.entries["main"].inputs[0].below or 1,
        prompt=options.prompt_tokens,
        new=options.new_tokens,
        scratch=Path(),
    )
    with steps(str(options.directory)) as show:
        show("memory")
        speed = bandwidth(threads)
        names = [*own, *([] if options.alone else PEERS)]
        rows, absent = race(names, setup, options.rounds, show)
    width = 4 if dtype == "float32" else 2
    middle = setup.prompt + setup.new // 2
    patterns = [row.pattern() for row in about.parameters]
    plan = read_plan(files)
    read = bytes_per_token(files["source.txt"].decode(), width, middle, plan, patterns)
    roof = {
        "bytes_per_second": speed,
        "bytes_per_token": read,
        "decode_tokens_per_second": speed / read,
    }
    if options.json:
        found: dict[str, Any] = {
            "model": about.model,
            "dtype": dtype,
            "machine": _machine(),
            "threads": threads,
            "prompt_tokens": setup.prompt,
            "new_tokens": setup.new,
            "rounds": options.rounds,
            "rows": [
                {
                    "name": row.name,
                    "about": row.about,
                    "prefill_tokens_per_second": row.prefill,
                    "decode_tokens_per_second": row.decode,
                    "same_tokens": row.agrees,
                }
                for row in rows
            ],
            "absent": absent,
            "roof": roof,
        }
        print(json.dumps(found))
        return 0
    print(
        f"{about.model} in {dtype}, a prompt of {setup.prompt} tokens and {setup.new} new "
        f"ones, {threads} threads of {_machine()}, medians of {options.rounds} rounds"
    )
    shown = [
        [
            row.name,
            f"{row.prefill:,.1f}",
            f"{row.decode:,.1f}",
            f"{row.decode / roof['decode_tokens_per_second']:.0%}",
            f"{row.agrees} of {setup.new}",
        ]
        for row in rows
    ]
    memory = f"memory, {speed / 1e9:.1f} GB/s, {read / 1e6:,.1f} MB a token"
    shown.append([memory, "", f"{roof['decode_tokens_per_second']:,.1f}", "100%", ""])
    table(["", "prefill/s", "decode/s", "of memory", "same tokens"], shown)
    print()
    for row in rows:
        print(f"{row.name}: {row.about}")
    for name, reason in absent.items():
        note(f"{name} does not take part: {reason}")
    return 0


def _machine() -> str:
    """The processor's name, as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
