"""``dslc init``: a random checkpoint in the published form, for trying things out."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from dslc.commands.options import add_json, add_sizes
from dslc.terminal import note, progress, steps

DEFAULT = ("dsv3", "small")  # where no FILE is named
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(optional=("file", str))
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to; new or empty")
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        help="an .arch file, or the name of a shipped model (dsv3, at its preset small)",
    )
    add_sizes(parser)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the weights (%(default)s)",
    )
    parser.add_argument(
        "--deploy",
        metavar="NAME",
        help="store weights in FP8 as this deployment of the file does: fp8 of dsv3",
    )
    parser.add_argument("--init-seed", metavar="N", type=int, default=0, help="(%(default)s)")
    parser.add_argument(
        "--shard-size",
        metavar="SIZE",
        type=size,
        default="5GB",
        help="a new file begins after so many bytes: 200MB, 4GiB (%(default)s)",
    )
    add_json(parser)


def size(text: str) -> int:
    """``5GB``, ``200MiB`` or bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)?", text, re.IGNORECASE)
    count = int(float(found[1]) * UNITS[(found[2] or "").upper()]) if found else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 5GB, 200MiB or 1000000")
    return count


def run(options: argparse.Namespace) -> int:
    from backends.pytorch.memory import shown as shown_bytes
    from compiler import directory
    from compiler.tensors import patterns
    from dsl.constants import shown
    from dslc.program import compile_file
    from dslc.published import config_of, fp8_config, fp8_weights, unbound

    file, dims = options.file, options.dims
    if file is None:
        file, dims = DEFAULT[0], dims or DEFAULT[1]
    with directory.fresh(options.directory) as folder:  # refuses before the work
        with steps(file) as show:
            program = compile_file(
                file, dims, dict(options.set), model=options.model, progress=show, note=note
            )
        source = program.compiled.source
        config = {"torch_dtype": options.dtype} | config_of(source)
        before = program.after("elaborate")
        stored = patterns(before)
        tiles = {}
        if options.deploy is not None:
            tile, chosen = fp8_weights(program.deployment(options.deploy), before)
            tiles = {p: tile for p in stored if (p.path, p.ranges) in chosen and len(p.shape) == 2}
            config["quantization_config"] = fp8_config(tile)
        text = json.dumps(config, indent=2, sort_keys=True)

        import torch

        from backends.pytorch.weights.write import write_random

        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        with progress("writing") as bar:
            written = write_random(
                folder,
                stored,
                options.init_seed,
                getattr(torch, options.dtype),
                options.shard_size,
                bar,
                tiles,
            )
        files = len(list(folder.glob("*.safetensors")))
    for name, value in unbound(source).items():
        note(
            f"config.json does not say that '{name}' is {shown(value)}, as the file binds it to no "
            f"key: compile with --set {name}={_plain(value)} as well"
        )
    if options.json:
        found = {"directory": str(options.directory), "model": program.name}
        print(json.dumps({**found, "bytes": written, "files": files}))
    else:
        what = "1 file" if files == 1 else f"{files} files"
        print(f"{options.directory}: {program.name}, {shown_bytes(written)} in {what}")
    return 0


def _plain(value: object) -> str:
    """As ``--set`` takes it."""
    return value if isinstance(value, str) else json.dumps(value)
