"""The kernels of a compiled directory, with what tuning may try."""

from __future__ import annotations

import json
from pathlib import Path

from backends.triton.generate import INDEX, generate
from backends.triton.kernel import Operator
from backends.triton.targets import Target
from compiler import manifest
from compiler.errors import UserError
from compiler.parse import parse


def operators_of(directory: Path, target: Target) -> tuple[Operator, ...]:
    """Generated again from the directory's graph.

    Raises:
        UserError: it has no kernels, or they are for another GPU than ``target``.
    """
    files = manifest.verified_files(directory, manifest.read(directory))
    if INDEX not in files:
        raise UserError(
            f"{directory} was compiled for the CPU, where there are no kernels to tune; compile it "
            f"with --target {target.name}"
        )
    index = json.loads(files[INDEX])
    if index["target"] != target.name:
        raise UserError(
            f"{directory} was compiled for {index['target']}, and this GPU is {target.name}"
        )
    program = parse(files["graph.txt"].decode())
    return generate(program, target, index["dtype"]).operators
