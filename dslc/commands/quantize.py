"""``dslc quantize``: a checkpoint in published FP8, or an FP8 one in BF16."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compiler.errors import UserError
from dslc.commands.options import add_json
from dslc.terminal import note, progress, steps

KEY = "quantization_config"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a Hugging Face checkpoint")
    parser.add_argument("directory", metavar="OUT", type=Path, help="where to; new or empty")
    parser.add_argument(
        "--to", choices=("fp8", "bf16"), default="fp8", help="what it becomes (%(default)s)"
    )
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="the model, whose deployment says which weights become FP8 (the shipped one that "
        "config.json is of)",
    )
    parser.add_argument(
        "--deploy", metavar="NAME", default="fp8", help="a deployment of it (%(default)s)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from compiler import directory

    with directory.fresh(options.directory) as folder:  # refuses before the work
        found = _written(options, folder)
    if options.json:
        print(json.dumps({"directory": str(options.directory), "to": options.to, **found}))
    else:
        from backends.pytorch.memory import shown

        print(
            f"{options.directory}: {found['converted']:,} weights in {options.to.upper()}, "
            f"{found['copied']:,} other tensors as they were, {shown(found['bytes'])}"
        )
    return 0


def _written(options: argparse.Namespace, folder: Path) -> dict[str, int]:
    from backends.pytorch.weights import convert
    from backends.pytorch.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(options.checkpoint)
    config: dict[str, Any] = dict(checkpoint.config)
    if options.to == "bf16":
        items = convert.to_bf16(checkpoint)
        config.pop(KEY, None)
        if not any(item.changed for item in items):
            raise UserError(f"{options.checkpoint} holds no FP8 weights")
    else:
        items, config[KEY] = _quantised(options, checkpoint, config)
    with progress("writing") as bar:
        size = convert.write(checkpoint, items, folder, config, bar)
    changed = sum(item.changed for item in items)
    return {"converted": changed, "copied": len(items) - changed, "bytes": size}


def _quantised(
    options: argparse.Namespace, checkpoint: Any, config: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    from backends.pytorch.weights import convert
    from backends.pytorch.weights.checkpoint import match
    from compiler import tensors
    from dslc.program import SOURCE, compile_file
    from dslc.published import coding_config, codings, shipped_for

    file = options.file or shipped_for(config)
    with steps(file) as show:
        program = compile_file(
            file, checkpoint=options.checkpoint, deploy=options.deploy, progress=show, note=note
        )
    chosen = codings(program.after(SOURCE))
    elaborated = program.after("elaborate")
    match(checkpoint, tensors.patterns(elaborated), tensors.ignored(elaborated))
    items = convert.to_codes(checkpoint, chosen)
    if not any(item.changed for item in items):
        raise UserError(f"{options.checkpoint} is in FP8 already")
    return items, coding_config(next(iter(chosen.values())))
