"""The stacked weights of a module as one file that is mapped into memory.

A checkpoint holds a layer's and an expert's weights as tensors of their own, in any order; a module
reads them stacked. So they are laid out once, beside the compiled directory, and every later run
maps the file: it loads at once, and the system holds each page once, whatever number of processes
reads it. The file is a safetensors file, which IREE's own tools read too. Its tensors begin at
multiples of 64 bytes, as IREE copies what does not; what lies between is named as a tensor as well.

What a file was made of (the module's layout, and the checkpoint's files with their sizes and
times) is hashed into its name and its header. Another checkpoint, or one that was changed, is
another file. The header also has the time that the file itself was written, which its own time must
be: what was changed since is written again, without reading gigabytes to see it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from backends.mlir.artifact import Layout
from backends.mlir.weights import HELD, Array, Progress, fill, listed
from backends.pytorch.memory import require, shown
from backends.pytorch.weights.checkpoint import Match, match, open_checkpoint
from backends.pytorch.weights.tensorfile import TensorFileError, read_header
from compiler.manifest import Manifest

ALIGNED = 64  # bytes: what IREE takes as it is
SUFFIX = ".weights"
SECOND = 10**9  # ns
FILLER = "~"  # names of what lies between tensors
VERSION = 1
STORED = {"f32": "F32", "bf16": "BF16", "f8E4M3FN": "F8_E4M3", "f8E5M2": "F8_E5M2", "i8": "I8"}
Note = Callable[[str], None]


@dataclass(frozen=True)
class Places:
    """Where each weight lies in one stretch of memory, in bytes from its begin."""

    starts: dict[str, int]
    size: int

    @staticmethod
    def of(layout: Layout) -> Places:
        starts, at = {}, 0
        for key, row in layout.weights.items():
            starts[key] = at
            at += -(-prod(row.shape) * HELD[row.element].itemsize // ALIGNED) * ALIGNED
        return Places(starts, at)

    def arrays(self, layout: Layout, memory: Array) -> dict[str, Array]:
        """The weights as views of ``memory``, uint8 [size]."""
        found = {}
        for key, row in layout.weights.items():
            held, start = HELD[row.element], self.starts[key]
            flat = memory[start : start + prod(row.shape) * held.itemsize]
            found[key] = flat.view(held).reshape(row.shape)
        return found


def weights_of(
    layout: Layout,
    manifest: Manifest,
    directory: Path,
    checkpoint: Path | None,
    seed: int = 0,
    progress: Progress | None = None,
    note: Note = lambda _: None,
) -> dict[str, Array] | Path:
    """Every weight of a module by its name there, or the archive that holds them.

    Args:
        directory: the compiled one, beside which the archive lies.
        checkpoint: a Hugging Face checkpoint folder; without one, weights are random, and held.
        note: told, in a sentence, what was written, or why nothing could be.

    Raises:
        CheckpointError: the checkpoint does not fit; every tensor at fault is named.
        ManifestError: the module reads what the manifest does not list.
        MemoryNeeded: there is no archive, and the weights do not fit into memory.
    """
    patterns = listed(layout, manifest)
    places = Places.of(layout)
    if checkpoint is None:
        return _held(
            layout, places, lambda into: fill(patterns, into, None, seed, progress, layout.dtype)
        )
    # All are matched, so that a checkpoint is judged as it is elsewhere.
    every = [row.pattern() for row in manifest.parameters]
    found = match(open_checkpoint(checkpoint), every, manifest.ignored)
    name = made_of(layout, found)
    folder = Path(os.path.realpath(directory) + SUFFIX)
    path = folder / f"{name[:16]}.safetensors"
    if is_whole(path, name, layout):
        return path

    def write(into: dict[str, Array]) -> None:
        fill(patterns, into, found, seed, progress)

    try:
        with _written(path) as (file, waited):
            # Another process may have written it while this one waited.
            if waited and is_whole(path, name, layout):
                return path
            _write(file, name, layout, places, write)
    except OSError as error:
        note(
            f"the weights are read into memory: {folder} cannot be written "
            f"({error.strerror or error})"
        )
        return _held(layout, places, write)
    for other in folder.glob("*.safetensors"):
        if other != path:
            with suppress(OSError):
                other.unlink()
    note(
        f"the weights were laid out for the module in {path} ({shown(places.size)}); "
        "later runs map that file"
    )
    return path


def made_of(layout: Layout, found: Match) -> str:
    """A hash of everything that an archive's bytes follow from, without reading the weights."""
    files = {s.stored.file for s in found.sources} | {
        s.scale.file for s in found.sources if s.scale
    }
    about = {
        "version": VERSION,
        "weights": {key: row.model_dump(mode="json") for key, row in layout.weights.items()},
        "block": found.checkpoint.block,
        "files": sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files),
        "tensors": sorted(
            (s.stored.name, s.stored.file.name, s.stored.start, s.stored.dtype)
            for s in found.sources
        ),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def is_whole(path: Path, name: str, layout: Layout) -> bool:
    """Whether a file holds these weights, all of them."""
    try:
        stored = read_header(path)
        with open(path, "rb") as file:
            changed = os.fstat(file.fileno()).st_mtime_ns
            length = int.from_bytes(file.read(8), "little")
            metadata = json.loads(file.read(length)).get("__metadata__", {})
        whole = all(not tensor.is_cut_off for tensor in stored.values())
        same = all(
            (tensor := stored.get(key)) is not None
            and (tensor.dtype, tensor.shape) == (STORED[row.element], row.shape)
            and tensor.start % ALIGNED == 0
            for key, row in layout.weights.items()
        )
    except (OSError, TensorFileError, ValueError):
        return False
    as_written = metadata.get("written") == str(changed // SECOND)
    return whole and same and as_written and metadata.get("made_of") == name


def _held(layout: Layout, places: Places, write: Callable[[Any], None]) -> dict[str, Array]:
    """Weights in this process's memory, where IREE reads them."""
    require("loading the weights", places.size, "cpu")
    memory = np.empty(places.size + ALIGNED, np.uint8)
    begin = -memory.ctypes.data % ALIGNED
    arrays = places.arrays(layout, memory[begin : begin + places.size])
    write(arrays)
    return arrays


def _write(
    file: IO[bytes],
    name: str,
    layout: Layout,
    places: Places,
    write: Callable[[dict[str, Array]], None],
) -> None:
    # In even seconds, which every file system can keep, and past: a change is later in any case.
    written = time.time_ns() // SECOND // 2 * 2 - 2
    entries: dict[str, Any] = {"__metadata__": {"made_of": name, "written": str(written)}}
    for number, (key, row) in enumerate(layout.weights.items()):
        start = places.starts[key]
        stop = start + prod(row.shape) * HELD[row.element].itemsize
        entries[key] = {
            "dtype": STORED[row.element], "shape": row.shape, "data_offsets": [start, stop],
        }  # fmt: skip
        if filler := -stop % ALIGNED:
            entries[f"{FILLER}{number}"] = {
                "dtype": "U8", "shape": [filler], "data_offsets": [stop, stop + filler],
            }  # fmt: skip
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % ALIGNED)
    begin = 8 + len(header)
    # Taken from the disk first: what is mapped and cannot be written kills the process.
    os.posix_fallocate(file.fileno(), 0, begin + places.size)
    file.write(len(header).to_bytes(8, "little") + header)
    file.flush()
    if places.size:
        memory = np.memmap(file, np.uint8, "r+", begin, (places.size,))
        write(places.arrays(layout, memory))
        memory.flush()
        del memory
    os.utime(file.fileno(), ns=(written * SECOND, written * SECOND))


@contextmanager
def _written(path: Path) -> Any:
    """A file that takes its name when it is whole; and whether another writer was waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)
    waited = False
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waited = True
        for left in path.parent.glob(".*.writing"):  # of writers that were killed
            left.unlink()
        partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.writing"
        try:
            with open(partial, "w+b") as file:
                yield file, waited
                os.fsync(file.fileno())
            if os.path.getsize(partial):
                os.replace(partial, path)
                os.fsync(lock)
        finally:
            with suppress(FileNotFoundError):
                partial.unlink()
    finally:
        os.close(lock)
