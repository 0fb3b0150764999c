"""Writing a random checkpoint in the published form, in little memory whatever its size.

The header of a safetensors file says where every tensor will be, so it is written first and values
are drawn, rounded and written a few million at a time. (The safetensors library writes tensors that
are in memory, a whole file of them.)
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import torch

from backends.pytorch.memory import shown
from backends.pytorch.weights.checkpoint import INDEX, scale_name
from backends.pytorch.weights.dtypes import DTYPES
from backends.pytorch.weights.initialise import CHUNK, values
from backends.pytorch.weights.stacks import Stacks, stacked
from compiler.errors import UserError
from compiler.tensors import Pattern, Tensor

NAMES = {dtype: name for name, dtype in DTYPES.items()}
FP8 = torch.float8_e4m3fn
FP8_LARGEST = torch.finfo(FP8).max
IN_FLIGHT = 4  # chunks that are drawn while one is written

Tile = tuple[int, int]  # rows and columns that share a scale
Bytes = memoryview


class DiskFull(UserError):
    """A checkpoint does not fit on its disk; the message says both numbers."""


@dataclass(frozen=True)
class Stored:
    """How a tensor is written: in ``dtype``, or in FP8 with a scale for each tile."""

    tensor: Tensor
    dtype: torch.dtype
    tile: Tile | None = None

    @property
    def scales(self) -> tuple[int, int] | None:
        """The shape of its scales."""
        if self.tile is None:
            return None
        rows, columns = self.tensor.shape
        return ceil(rows / self.tile[0]), ceil(columns / self.tile[1])

    @property
    def parts(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of what is kept of it."""
        name, shape = self.tensor.name, self.tensor.shape
        if self.scales is None:
            return [(name, self.dtype, shape)]
        return [(name, FP8, shape), (scale_name(name), torch.float32, self.scales)]

    @property
    def size(self) -> int:
        return sum(prod(shape) * dtype.itemsize for _, dtype, shape in self.parts)


@dataclass(frozen=True)
class Written:
    """What stands together in a file: a tensor, or the rows of one that is stacked."""

    rows: list[Stored]
    stack: Tensor | None = None

    @property
    def parts(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of what the file holds of it."""
        if self.stack is None:
            return self.rows[0].parts
        return [(self.stack.name, self.rows[0].dtype, self.stack.shape)]

    @property
    def size(self) -> int:
        return sum(row.size for row in self.rows)


def _together(stored: Iterable[Stored], stacks: Stacks) -> list[Written]:
    """Rows of a stack in their order, wherever the source has them."""
    groups: dict[str, list[Stored]] = {}
    for one in stored:
        groups.setdefault(stacks.whole(one.tensor).name, []).append(one)
    made = []
    for name, rows in groups.items():
        whole = stacks.whole(rows[0].tensor)
        is_stack = whole.name != rows[0].tensor.name
        rows.sort(key=lambda row: stacked(row.tensor.name)[1] if is_stack else ())
        if is_stack and sum(row.tensor.elements for row in rows) != whole.elements:
            raise UserError(
                f"'{name}' is stacked {list(whole.shape)}, and the model has only {len(rows)} of "
                "its rows"
            )
        made.append(Written(rows, whole if is_stack else None))
    return made


def write_random(
    folder: Path,
    patterns: Iterable[Pattern],
    seed: int,
    dtype: torch.dtype,
    shard_size: int,
    progress: Callable[[int, int], None] | None = None,
    tiles: Mapping[Pattern, Tile] = {},
) -> int:
    """Write ``*.safetensors``, and their index where there are several, into an empty folder.

    Values are those that ``backends.pytorch.weights.initialise`` gives the seed, rounded once.

    Args:
        dtype: of the tensors that do not say otherwise in the source.
        shard_size: bytes after which a new file begins; a larger tensor has a file of its own.
        progress: called with bytes written, and in all.
        tiles: the matrices that are stored in FP8, and the tile that shares a scale.

    Returns:
        Bytes of all tensors.

    Raises:
        DiskFull: the file system has less space than that.
        UserError: a stacked tensor has rows that the model does not.
    """
    patterns = list(patterns)
    stacks = Stacks.of(patterns)
    stored = [
        Stored(
            tensor,
            dtype if tensor.dtype == "act" else torch.float32,
            tiles.get(pattern) if "[" not in pattern.name else None,
        )
        for pattern in patterns
        for tensor in pattern.tensors()
        if tensor.elements
    ]
    total = sum(s.size for s in stored)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise DiskFull(f"the checkpoint needs {shown(total)}; its disk has {shown(free)} free")
    shards = _shards(_together(stored, stacks), shard_size)
    done = 0
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, inside in shards.items():
            with open(folder / name, "wb") as file:
                file.write(header(inside))
                for data in _data(pool, (row for one in inside for row in one.rows), seed):
                    file.write(data)
                    done += len(data)
                    if progress:
                        progress(done, total)
    if len(shards) > 1:
        named = {
            part[0]: file for file, inside in shards.items() for s in inside for part in s.parts
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(named.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def header(stored: Iterable[Written]) -> bytes:
    """What stands before the bytes of these tensors in a safetensors file."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in (part for s in stored for part in s.parts):
        size = prod(shape) * dtype.itemsize
        fields[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at whole words
    return len(text).to_bytes(8, "little") + text


def _shards(stored: Sequence[Written], most: int) -> dict[str, list[Written]]:
    """What each file holds, by its name."""
    parts: list[list[Written]] = [[]]
    size = 0
    for one in stored:
        if parts[-1] and size + one.size > most:
            parts.append([])
            size = 0
        parts[-1].append(one)
        size += one.size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {
        f"model-{number:05}-of-{len(parts):05}.safetensors": part
        for number, part in enumerate(parts, 1)
    }


# -- values ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Elements ``start`` to ``stop`` of a tensor; of one in tiles, whole rows of them."""

    stored: Stored
    seed: int
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == self.stored.tensor.elements

    def __call__(self) -> tuple[Bytes, torch.Tensor | None]:
        """The bytes, and the scales of these rows of tiles."""
        drawn = torch.from_numpy(values(self.stored.tensor, self.seed, self.start, self.stop))
        if self.stored.tile is None:
            return _bytes(drawn.to(self.stored.dtype)), None
        return _quantised(drawn.view(-1, self.stored.tensor.shape[1]), self.stored.tile)


def _quantised(rows: torch.Tensor, tile: Tile) -> tuple[Bytes, torch.Tensor]:
    """In E4M3, a tile's largest magnitude as its largest number; the scales are float32."""
    out = torch.empty(rows.shape, dtype=FP8)
    scales = torch.empty(ceil(rows.shape[0] / tile[0]), ceil(rows.shape[1] / tile[1]))
    for i, band in enumerate(rows.split(tile[0])):
        largest = torch.stack([part.abs().max() for part in band.split(tile[1], 1)])
        scales[i] = torch.where(largest > 0, largest / FP8_LARGEST, 1.0)
        wide = scales[i].repeat_interleave(tile[1])[: rows.shape[1]]
        out[i * tile[0] : i * tile[0] + len(band)] = (band / wide).to(FP8)
    return _bytes(out), scales


def _bytes(tensor: torch.Tensor) -> Bytes:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _chunks(stored: Iterable[Stored], seed: int) -> Iterator[_Chunk]:
    for one in stored:
        elements, step = one.tensor.elements, CHUNK
        if one.tile is not None:
            band = one.tile[0] * one.tensor.shape[1]
            step = max(1, CHUNK // band) * band
        for start in range(0, elements, step):
            yield _Chunk(one, seed, start, min(start + step, elements))


def _data(pool: ThreadPoolExecutor, stored: Iterable[Stored], seed: int) -> Iterator[Bytes]:
    """The bytes of a file behind its header, a few pieces of them made ahead."""
    waiting: deque[tuple[_Chunk, Future[tuple[Bytes, torch.Tensor | None]]]] = deque()
    scales: list[torch.Tensor] = []

    def first() -> Iterator[Bytes]:
        chunk, made = waiting.popleft()
        data, mine = made.result()
        yield data
        if mine is not None:
            scales.append(mine)
            if chunk.is_last:
                yield _bytes(torch.cat(scales))
                scales.clear()

    for chunk in _chunks(stored, seed):
        waiting.append((chunk, pool.submit(chunk)))
        if len(waiting) > IN_FLIGHT:
            yield from first()
    while waiting:
        yield from first()
