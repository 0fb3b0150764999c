"""This process' place among those of a job: ``torchrun`` says it in the environment."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError, DistNetworkError
from torch.distributed.distributed_c10d import _get_default_store

from backends.pytorch.copies import Copies
from backends.pytorch.faults import Pulse
from backends.pytorch.runtime import Mesh
from backends.pytorch.weights.checkpoint import Checkpoint
from backends.pytorch.world import RankError, check_world, meeting_place, rank, world
from compiler.manifest import FILE_NAME, Manifest

# Ranks may differ in how long they take; whether they live is another's affair (faults.py).
TIMEOUT = timedelta(minutes=30)
MEETING = timedelta(seconds=300)  # for all processes to come up
NAMED = timedelta(seconds=15)  # for the name of the host where they meet to be known
SAMPLE = 64  # bytes of each tensor that tell checkpoints apart
BESIDE = ("generation_config.json", "tokenizer.json")  # what ends a text, and what its tokens are
_loads = count()  # every rank loads the same models in the same order
SHORT = 40  # characters of what differs that a message shows


def connect(
    mesh: Mesh,
    manifest: Manifest,
    alike: Mapping[str, Any],
    device: torch.device,
    files: str = "",
) -> Copies | None:
    """Meet the other ranks and take this one's place in the mesh.

    Args:
        alike: what must be the same on all ranks, by what it is called.
        files: what tells this rank's checkpoint from copies of it.

    Returns:
        The copies of the checkpoint that ranks have, if not all have the same files.

    Raises:
        RankError: there are not as many processes as ranks, or they do not run the same.
    """
    check_world(manifest)
    copies = None
    if "RANK" in os.environ:
        store = _joined()
        copies = agree(PrefixStore(f"load/{next(_loads)}", store), alike, files)
    if "RANK" in os.environ and not dist.is_initialized():
        pulse = Pulse(_client, rank(), world()) if world() > 1 else None
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=rank(),
            world_size=world(),
            timeout=TIMEOUT,
        )
        atexit.register(_leave, pulse)
    mesh.connect(rank())
    return copies if copies is not None and copies.differ else None


def _leave(pulse: Pulse | None) -> None:
    if pulse is not None:
        pulse.end()
    if dist.is_initialized():
        dist.destroy_process_group()


@cache
def _joined() -> Store:
    """The job's store, which torchrun's agent keeps; without one, rank 0 does. If whoever runs this
    has made a process group already, that one's."""
    if dist.is_initialized():
        return PrefixStore("dslc", _get_default_store())
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _client(host=rank() == 0 and not agent)


def _client(host: bool = False) -> Store:
    address, port = meeting_place()
    _known(address)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(address, port, world(), host, MEETING, wait_for_workers=False)
    except DistNetworkError as error:
        first = str(error).splitlines()[0]
        what = "cannot be opened" if host else "cannot be reached"
        raise RankError(f"the job's store at {address}:{port} {what}: {first}") from None
    return PrefixStore(f"dslc/{attempt}", store)


def _known(address: str) -> None:
    """
    Raises:
        RankError: there is no host of this name; of one that is just starting, not for a while.
    """
    deadline = time.monotonic() + NAMED.seconds
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                problem = error.strerror or error
                raise RankError(
                    f"MASTER_ADDR is '{address}', and no such host is known: {problem}"
                ) from None
            time.sleep(1)


def agree(store: Store, alike: Mapping[str, Any], files: str = "") -> Copies:
    """Compare what must be the same on all ranks, before any group is made.

    Returns:
        The copies of the checkpoint that ranks have.

    Raises:
        RankError: a rank has something else; says which, and what.
    """
    mine = {"host": socket.gethostname(), "files": files, **alike}
    store.set(f"alike/{rank()}", json.dumps(mine))
    first: dict[str, Any] = json.loads(store.get("alike/0"))
    ranks = [first]
    for number in range(1, world()):
        other = json.loads(_told(store, "alike", number))
        ranks.append(other)
        for what in alike:
            if other.get(what) != first.get(what):
                raise RankError(
                    f"rank {number} ({other['host']}) has another {what} than rank 0 "
                    f"({first['host']}){_difference(other.get(what), first.get(what))}"
                )
    # Rank 0 may keep the store: it does not go on, and perhaps end, before all have read.
    store.set(f"heard/{rank()}", "")
    if rank() == 0:
        for number in range(1, world()):
            _told(store, "heard", number)
    return Copies(store, rank(), [r["host"] for r in ranks], [r["files"] for r in ranks])


def _told(store: Store, what: str, number: int) -> bytes:
    """What a rank has put into the store, once it has.

    Raises:
        RankError: it has not for long, or the store is gone.
    """
    try:
        return store.get(f"{what}/{number}")
    except DistNetworkError:
        raise RankError("the job's store is gone: the process that kept it has ended") from None
    except DistError:
        raise RankError(
            f"rank {number} has not come up for {MEETING.seconds} s: {world()} were launched"
        ) from None


def _difference(other: Any, first: Any) -> str:
    """What differs, in few words."""
    if isinstance(other, dict) and isinstance(first, dict):
        keys = [k for k in {**first, **other} if first.get(k) != other.get(k)]
        listed = ", ".join(
            f"{k} {_short(other.get(k))} and {_short(first.get(k))}" for k in keys[:3]
        )
        return f": {listed}"
    return f": {_short(other)} and {_short(first)}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= SHORT else f"{text[:SHORT]}..."


def alike(
    directory: Path,
    manifest: Manifest,
    checkpoint: Checkpoint | None,
    **more: Any,
) -> dict[str, Any]:
    """What must be the same on all ranks of a model."""
    text = (directory / FILE_NAME).read_bytes()
    sizes = dict(manifest.constants)
    return {
        "set of dims": sizes,
        "compiled directory": hashlib.sha256(text).hexdigest()[:12],
        "checkpoint": None if checkpoint is None else fingerprint(checkpoint),
        **more,
    }


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of names, shapes and places of all tensors, of some bytes from the middle of each, and
    of what else the checkpoint says: checkpoints of the same form and other weights differ in it,
    and it reads little (3 MB of 50,000 tensors). Where ranks have copies, all that they read is
    compared besides (``copies.py``)."""
    found = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in BESIDE:
        path = checkpoint.folder / name
        found.update(path.read_bytes() if path.is_file() else b"none")
    by_file: dict[Path, list[Any]] = {}
    for stored in checkpoint.tensors.values():
        by_file.setdefault(stored.file, []).append(stored)
    for file in sorted(by_file):
        with open(file, "rb") as data:
            for stored in sorted(by_file[file], key=lambda s: s.start):
                about = f"{stored.name} {stored.dtype} {stored.shape} {stored.start}"
                found.update(about.encode())
                data.seek(stored.start + max(0, stored.size - SAMPLE) // 2)
                found.update(data.read(min(SAMPLE, stored.size)))
    return found.hexdigest()[:12]
