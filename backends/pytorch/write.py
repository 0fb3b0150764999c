"""Writing a random checkpoint in the published form, in little memory whatever its size.

The header of a safetensors file says where every tensor will be, so it is written first and values
are drawn, rounded and written a few million at a time. (The safetensors library writes tensors that
are in memory, a whole file of them.)
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from backends.pytorch.checkpoint import INDEX
from backends.pytorch.initialise import CHUNK, values
from backends.pytorch.memory import shown
from backends.pytorch.tensorfile import DTYPES
from compiler.errors import UserError
from compiler.tensors import Pattern, Tensor

NAMES = {dtype: name for name, dtype in DTYPES.items()}
IN_FLIGHT = 4  # chunks that are drawn while one is written


class DiskFull(UserError):
    """A checkpoint does not fit on its disk; the message says both numbers."""


@dataclass(frozen=True)
class Shard:
    """One file: what it is called and what it holds."""

    file: str
    tensors: tuple[Tensor, ...]


def write_random(
    folder: Path,
    patterns: Iterable[Pattern],
    seed: int,
    dtype: torch.dtype,
    shard_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write ``*.safetensors``, and their index where there are several, into an empty folder.

    Values are those that ``backends.pytorch.initialise`` gives the seed, rounded once.

    Args:
        dtype: of the tensors that do not say otherwise in the source.
        shard_size: bytes after which a new file begins; a larger tensor has a file of its own.
        progress: called with bytes written, and in all.

    Returns:
        Bytes of all tensors.

    Raises:
        DiskFull: the file system has less space than that.
    """
    tensors = [t for pattern in patterns for t in pattern.tensors() if t.elements]
    width = {t: t.elements * stored_as(t, dtype).itemsize for t in tensors}
    total = sum(width.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise DiskFull(f"the checkpoint needs {shown(total)}; its disk has {shown(free)} free")
    shards = _shards(tensors, width, shard_size)
    done = 0
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for shard in shards:
            with open(folder / shard.file, "wb") as file:
                file.write(header([(t, stored_as(t, dtype)) for t in shard.tensors]))
                for chunk in _in_order(pool, _chunks(shard.tensors, seed, dtype)):
                    file.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress(done, total)
    if len(shards) > 1:
        named = {t.name: shard.file for shard in shards for t in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(named.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def stored_as(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor in a checkpoint of ``dtype``."""
    return dtype if tensor.dtype == "act" else torch.float32


def header(tensors: Sequence[tuple[Tensor, torch.dtype]]) -> bytes:
    """What stands before the bytes of these tensors in a safetensors file."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor, dtype in tensors:
        size = tensor.elements * dtype.itemsize
        fields[tensor.name] = {
            "dtype": NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at whole words
    return len(text).to_bytes(8, "little") + text


def _shards(tensors: Sequence[Tensor], width: dict[Tensor, int], most: int) -> list[Shard]:
    parts: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + width[tensor] > most:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += width[tensor]
    if len(parts) == 1:
        return [Shard("model.safetensors", tuple(parts[0]))]
    count = len(parts)
    return [
        Shard(f"model-{number:05}-of-{count:05}.safetensors", tuple(part))
        for number, part in enumerate(parts, 1)
    ]


def _chunks(
    tensors: Iterable[Tensor], seed: int, dtype: torch.dtype
) -> Iterator[Callable[[], memoryview]]:
    """What makes each piece of a file, in order."""
    for tensor in tensors:
        for start in range(0, tensor.elements, CHUNK):
            stop = min(start + CHUNK, tensor.elements)
            yield _Chunk(tensor, seed, start, stop, stored_as(tensor, dtype))


@dataclass(frozen=True)
class _Chunk:
    tensor: Tensor
    seed: int
    start: int
    stop: int
    dtype: torch.dtype

    def __call__(self) -> memoryview:
        drawn = torch.from_numpy(values(self.tensor, self.seed, self.start, self.stop))
        return memoryview(drawn.to(self.dtype).view(torch.uint8).numpy().data)


def _in_order(
    pool: ThreadPoolExecutor, work: Iterable[Callable[[], memoryview]]
) -> Iterator[memoryview]:
    """Results in the order of the work, a few of them made ahead."""
    waiting: deque[Future[memoryview]] = deque()
    for make in work:
        waiting.append(pool.submit(make))
        if len(waiting) > IN_FLIGHT:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
