"""This process' place among those of a job: ``torchrun`` says it in the environment."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from backends.pytorch.checkpoint import Match
from backends.pytorch.runtime import Mesh
from compiler.errors import UserError
from compiler.manifest import Manifest

TIMEOUT = timedelta(seconds=20)  # after which a rank that waits for another gives up


class RankError(UserError):
    """The processes that were launched are not those that the program was compiled for."""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_world(manifest: Manifest) -> None:
    """
    Raises:
        RankError: there are not as many processes as the mesh has ranks.
    """
    ranks = 1
    for size in manifest.mesh.values():
        ranks *= size
    if ranks == world():
        return
    if manifest.mesh:
        mesh = " x ".join(f"{axis} = {size}" for axis, size in manifest.mesh.items())
        message = f"deployment '{manifest.deployment}' has {ranks} ranks ({mesh})"
    else:
        message = "the model was compiled without a mesh, for 1 process"
    raise RankError(
        f"{message}, and {world()} {'was' if world() == 1 else 'were'} launched: "
        f"dslc run --nproc {ranks}, or torchrun"
    )


def connect(
    mesh: Mesh,
    manifest: Manifest,
    directory: Path,
    found: Match | None,
    seed: int,
    device: torch.device,
) -> Mesh:
    """Join the other ranks and take this one's place in the mesh."""
    check_world(manifest)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    mesh.connect(rank())
    return mesh
