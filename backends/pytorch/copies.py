"""Whether ranks that read copies of a checkpoint read the same numbers.

Hosts without a common file system have copies of their own, and most of a copy is read by no rank
of its host. So what a rank has loaded is read once more by a rank that has another copy, which
compares hashes: a rank reads about twice as much, and no more than that. Ranks that have the same
files, as all of one machine do, read nothing for it.

A file is the same if its inode, size and times are: nobody can choose when an inode changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from backends.pytorch.weights.checkpoint import Checkpoint
from backends.pytorch.weights.tensorfile import Reader, Stored, TensorFileError
from backends.pytorch.world import RankError

PATIENCE = timedelta(minutes=30)  # for another rank to have loaded its part
PIECE = 1 << 24  # bytes that are read at once
DIGEST = 12  # bytes
Region = tuple[int, int, int, int, int]  # number of the file, start, size; steps of, how often


class Store(Protocol):
    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


def identity(checkpoint: Checkpoint) -> str:
    """What tells a checkpoint's files from any copy of them."""
    found = []
    for file in files(checkpoint):
        about = file.stat()
        found.append([about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def files(checkpoint: Checkpoint) -> list[Path]:
    return sorted({stored.file for stored in checkpoint.tensors.values()})


class Log:
    """What a rank has read of each tensor: where, and the hash of its bytes."""

    def __init__(self, checkpoint: Checkpoint):
        self._number = {file: n for n, file in enumerate(files(checkpoint))}
        self.read: dict[str, tuple[list[Region], str]] = {}
        self._regions: list[Region] = []
        self._hash = hashlib.blake2b(digest_size=DIGEST)

    def add(self, stored: Stored, data: memoryview) -> None:
        """A part of a tensor has been read. Parts that are as long and as far apart as those
        before are counted."""
        self._hash.update(data)
        number, start, size = self._number[stored.file], stored.start, stored.size
        if self._regions:
            file, first, same, step, count = self._regions[-1]
            last = first + step * (count - 1)
            if (file, same) == (number, size) and (count == 1 or start - last == step):
                self._regions[-1] = (file, first, size, start - last, count + 1)
                return
        self._regions.append((number, start, size, 0, 1))

    def done(self, name: str) -> None:
        """All of a tensor has been read."""
        self.read[name] = (self._regions, self._hash.hexdigest())
        self._regions, self._hash = [], hashlib.blake2b(digest_size=DIGEST)


@dataclass(frozen=True)
class Copies:
    """The copies that ranks have.

    Args:
        hosts: of each rank. ``identities``: of each rank's files.
    """

    store: Store
    rank: int
    hosts: Sequence[str]
    identities: Sequence[str]

    @property
    def differ(self) -> bool:
        return len(set(self.identities)) > 1

    def compares(self) -> list[int]:
        """The ranks whose numbers this one looks for in its own copy: those of a copy are dealt out
        to the ranks that have the next one."""
        kinds = list(dict.fromkeys(self.identities))
        members = {k: [n for n, own in enumerate(self.identities) if own == k] for k in kinds}
        mine = self.identities[self.rank]
        before = members[kinds[kinds.index(mine) - 1]]
        own = members[mine]
        return [n for place, n in enumerate(before) if own[place % len(own)] == self.rank]

    def compare(self, checkpoint: Checkpoint, log: Log) -> int:
        """Compare what this rank and others have read.

        Returns:
            Bytes that were read for it.

        Raises:
            RankError: another rank's copy holds other numbers; says whose, and where.
        """
        self.store.set(f"read/{self.rank}", json.dumps(log.read))
        with Reader() as reader:
            for other in self.compares():
                key = f"read/{other}"
                self.store.wait([key], PATIENCE)
                read: Mapping[str, tuple[list[list[int]], str]] = json.loads(self.store.get(key))
                name = self._other(reader, checkpoint, log, read)
                if name is not None:
                    one, two = sorted((self.rank, other))
                    raise RankError(
                        f"rank {two} ({self.hosts[two]}) has another checkpoint than rank {one} "
                        f"({self.hosts[one]}): '{name}' holds other numbers"
                    )
            return reader.bytes

    def _other(
        self,
        reader: Reader,
        checkpoint: Checkpoint,
        log: Log,
        read: Mapping[str, tuple[list[list[int]], str]],
    ) -> str | None:
        """A tensor of another rank that is not so in this one's copy."""
        own = files(checkpoint)
        for name, (regions, digest) in read.items():
            known = log.read.get(name)
            if known is not None and [list(r) for r in known[0]] == regions:
                if known[1] != digest:
                    return name
                continue
            try:
                if _digest(reader, name, own, regions) != digest:
                    return name
            except (TensorFileError, IndexError):
                return name
        return None


def _digest(
    reader: Reader, name: str, own: Sequence[Path], regions: Iterable[Sequence[int]]
) -> str:
    found = hashlib.blake2b(digest_size=DIGEST)
    buffer = bytearray(PIECE)
    for number, start, size, step, count in regions:
        for turn in range(count):
            for begin in range(0, size, PIECE):
                part = memoryview(buffer)[: min(PIECE, size - begin)]
                at = start + step * turn + begin
                piece = Stored(name, own[number], "U8", (len(part),), at, len(part), 0)
                reader.read_bytes(piece, part)
                found.update(part)
    return found.hexdigest()
