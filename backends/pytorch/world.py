"""How many processes were launched together, and which one this is; imports no torch."""

from __future__ import annotations

import os
from math import prod

from compiler.errors import UserError
from compiler.manifest import Manifest


class RankError(UserError):
    """The processes that were launched are not those that the program was compiled for, or they do
    not run the same."""


def is_worker() -> bool:
    """Is this one process of several that were launched together?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_world(manifest: Manifest, processes: int | None = None) -> None:
    """
    Args:
        processes: how many there will be; those that were launched unless given.

    Raises:
        RankError: there are not as many processes as the mesh has ranks.
    """
    count = world() if processes is None else processes
    ranks = prod(manifest.mesh.values())
    if ranks == count:
        return
    if manifest.mesh:
        mesh = " x ".join(f"{axis} = {size}" for axis, size in manifest.mesh.items())
        needs = f"deployment '{manifest.deployment}' has {ranks} ranks ({mesh})"
    else:
        needs = "the model was compiled without a mesh, for 1 process"
    were = "1 process is there" if count == 1 else f"{count} processes are there"
    how = f": dslc run --nproc {ranks}, or torchrun" if ranks > 1 else ""
    raise RankError(f"{needs}, and {were}{how}")
