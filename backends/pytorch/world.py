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
    """
    Raises:
        RankError: what the environment says is no rank.
    """
    number, count = _said("RANK", 0), world()
    if number >= count:
        raise RankError(f"RANK is {number} of WORLD_SIZE {count}: ranks are 0 .. {count - 1}")
    return number


def world() -> int:
    """
    Raises:
        RankError: what the environment says is no number of processes.
    """
    return max(1, _said("WORLD_SIZE", 1))


def meeting_place() -> tuple[str, int]:
    """Where the processes meet: a host and a port.

    Raises:
        RankError: the environment does not say, or says something else.
    """
    host = os.environ.get("MASTER_ADDR", "")
    if not host:
        raise RankError("MASTER_ADDR does not say on which host processes meet; torchrun sets it")
    port = _said("MASTER_PORT", 0)
    if not 0 < port < 1 << 16:
        raise RankError("MASTER_PORT does not say at which port processes meet; torchrun sets it")
    return host, port


def _said(name: str, default: int) -> int:
    """A number that whoever launches processes has put into the environment."""
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit():
        raise RankError(f"{name} is '{text}', which is no number; torchrun sets it")
    return int(text)


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
