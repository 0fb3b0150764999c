"""A rank that loads a checkpoint large enough to see what it takes."""

import json
import shutil
import socket
import sys
from pathlib import Path

import torch

import dslc
from backends.pytorch.weights.checkpoint import open_checkpoint
from backends.pytorch.world import RankError

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))


def rank(folder: Path, name: str, number: int) -> None:
    from rank_memory import measured

    # Once before, so that what a process needs once (libraries, connections) is there.
    dslc.load(folder / "small", checkpoint=folder / "small-checkpoint")
    found = measured(str(folder / name), str(folder / "checkpoint"))
    (folder / f"{name}.{number}.json").write_text(json.dumps(found))


def flipped(checkpoint: Path, tensor: str, to: Path) -> None:
    """A copy of a checkpoint in which one bit of a tensor is another, not near its middle."""
    shutil.copytree(checkpoint, to)
    stored = open_checkpoint(to).tensors[tensor]
    data = bytearray(stored.file.read_bytes())
    data[stored.start + stored.size // 5] ^= 1
    stored.file.write_bytes(data)


def copies(folder: Path, name: str, number: int) -> None:
    """Ranks load from copies: what each rank says, and what it has read."""
    original, copy = folder / "small-checkpoint", folder / "copy"
    cases = {
        "all the same": [original] * 4,
        "two hosts": [original, original, copy, copy],
        "a block's": [original, original, folder / "block", copy],
        "all ranks'": [original, folder / "everyone", original, original],
    }
    found = {}
    for case, checkpoints in cases.items():
        try:
            model = dslc.load(folder / name, checkpoint=checkpoints[number])
            found[case] = [model.bytes_read, model.bytes_compared]
        except RankError as error:
            found[case] = str(error).replace(socket.gethostname(), "here")
    torch.distributed.barrier()  # rank 0 keeps the store
    (folder / f"{name}.{number}.copies.json").write_text(json.dumps(found))
