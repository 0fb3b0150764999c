"""A checkpoint in another number format: published FP8 to BF16, and back.

File by file and tensor by tensor: beside one tensor, nothing is in memory. What is not converted
is copied byte for byte, under the name of the file it was in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from backends.pytorch.memory import shown
from backends.pytorch.runtime.fp8 import quantised_matrix
from backends.pytorch.weights.allocate import coded_shapes
from backends.pytorch.weights.checkpoint import (
    FLOATS,
    FP8,
    INDEX,
    Checkpoint,
    CheckpointError,
    cut_off,
    scale_name,
    wrong_scale,
)
from backends.pytorch.weights.dtypes import DTYPES
from backends.pytorch.weights.fill import dequantise
from backends.pytorch.weights.stacks import stacked
from backends.pytorch.weights.tensorfile import Reader, Stored, TensorFileError
from backends.pytorch.weights.write import DiskFull
from compiler.coding import Coding

CHUNK = 1 << 24  # bytes that are copied at once
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """One tensor of a new file: of a dtype and shape as its header says them."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        bits = {"F32": 32, "BF16": 16, FP8: 8}[self.dtype]
        return prod(self.shape) * bits // 8


@dataclass(frozen=True)
class Item:
    """What becomes of one tensor of the old checkpoint.

    Attributes:
        parts: what the new file holds of it; empty: nothing.
        coding: it is quantised; ``scale``: it is widened; neither: it is copied.
    """

    stored: Stored
    parts: tuple[Part, ...]
    coding: Coding | None = None
    scale: Stored | None = None

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts) if self.changed else self.stored.size

    @property
    def changed(self) -> bool:
        return self.coding is not None or self.scale is not None


def to_bf16(checkpoint: Checkpoint) -> list[Item]:
    """Every FP8 weight as BF16, scales left out.

    Raises:
        CheckpointError: a weight has no scales, or such as do not fit, or is cut off, or is of a
            type that nothing is known of; all of them are named.
    """
    problems = list(checkpoint.broken.items())
    items, scales = [], set()
    with Reader() as reader:
        for name, stored in checkpoint.tensors.items():
            scale = checkpoint.tensors.get(scale_name(name))
            if stored.is_cut_off:
                problems.append((name, cut_off(stored)))
                continue
            if stored.dtype != FP8:
                if scale is not None:  # converted half it would be neither form
                    problems.append((name, _not_scaled(stored)))
                continue
            scales.add(scale_name(name))
            problem = wrong_scale(checkpoint, reader, stored, scale)
            if problem:
                problems.append((name, problem))
            items.append(Item(stored, (Part(name, "BF16", stored.shape),), scale=scale))
    _refuse(checkpoint, problems)
    rest = [s for n, s in checkpoint.tensors.items() if s.dtype != FP8 and n not in scales]
    return [*items, *(Item(s, ()) for s in rest)]


def to_codes(checkpoint: Checkpoint, codings: Mapping[str, Coding]) -> list[Item]:
    """The named tensors in the published form; those that are in it already stay.

    Args:
        codings: by the tensors' names: E4M3 elements, a tile of rows x columns.

    Raises:
        CheckpointError: a tensor cannot be quantised so; all of them are named.
    """
    problems = list(checkpoint.broken.items())
    stacks = {stacked(name)[0] for name in codings if name not in checkpoint.tensors}
    problems += [
        (name, "is stacked, one tensor for several matrices; only matrices have blocks")
        for name in sorted(stacks & checkpoint.tensors.keys())
    ]
    items = []
    for name, stored in checkpoint.tensors.items():
        coding = codings.get(name)
        if coding is not None and stored.dtype != FP8 and scale_name(name) in checkpoint.tensors:
            problems.append((name, _not_scaled(stored)))
            continue
        if coding is None or (
            stored.dtype == FP8 and checkpoint.block == (coding.rows, coding.columns)
        ):
            items.append(Item(stored, ()))
        elif stored.dtype == FP8:
            block = f"{checkpoint.block}, not ({coding.rows}, {coding.columns})"
            problems.append((name, f"is FP8 in blocks of {block}: convert it to bf16 first"))
        elif stored.dtype not in FLOATS or len(stored.shape) != 2:
            problems.append(
                (name, f"is {stored}; only matrices of {', '.join(FLOATS)} have blocks")
            )
        else:
            codes, scales = coded_shapes(stored.shape, coding)
            parts = (Part(name, FP8, codes), Part(scale_name(name), "F32", scales))
            items.append(Item(stored, parts, coding=coding))
    _refuse(checkpoint, problems)
    return items


def _not_scaled(stored: Stored) -> str:
    return f"has scales '{scale_name(stored.name)}', but is {stored}, not {FP8}"


def _refuse(checkpoint: Checkpoint, problems: list[tuple[str, str]]) -> None:
    if problems:
        count = "1 thing is" if len(problems) == 1 else f"{len(problems):,} things are"
        raise CheckpointError(
            f"the checkpoint in {checkpoint.folder} cannot be converted: {count} wrong", problems
        )


def write(
    checkpoint: Checkpoint,
    items: list[Item],
    folder: Path,
    config: dict[str, Any],
    progress: Progress | None = None,
) -> int:
    """Write the new checkpoint into an empty folder; returns the bytes of its tensors.

    Files beside tensors (a tokenizer) are copied, ``config.json`` is ``config``.

    Raises:
        DiskFull: the file system has less space than it takes.
        CheckpointError: the old checkpoint changed meanwhile, or holds numbers that no scale fits.
    """
    total = sum(item.size for item in items)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise DiskFull(f"the checkpoint needs {shown(total)}; its disk has {shown(free)} free")
    by_file: dict[str, list[Item]] = {}
    for item in items:
        by_file.setdefault(item.stored.file.name, []).append(item)
    done = 0
    named: dict[str, str] = {}
    with Reader() as weights, Reader() as scales, torch.no_grad():
        for name in sorted(by_file):
            inside = sorted(by_file[name], key=lambda item: item.stored.start)
            with open(folder / name, "wb") as file:
                file.write(_header(inside))
                for item in inside:
                    _write(file, checkpoint, item, weights, scales)
                    done += item.size
                    if progress:
                        progress(done, total)
            named |= {part: name for item in inside for part, *_ in _fields(item)}
    if checkpoint.index or len(by_file) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(named.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in sorted(checkpoint.folder.iterdir()):
        if (
            path.is_file()
            and path.suffix != ".safetensors"
            and path.name
            not in (
                INDEX,
                "config.json",
            )
        ):
            shutil.copy(path, folder / path.name)
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    return total


def _fields(item: Item) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and bytes of what a file holds of an item."""
    if not item.changed:
        stored = item.stored
        yield stored.name, stored.dtype, stored.shape, stored.size
    for part in item.parts if item.changed else ():
        yield part.name, part.dtype, part.shape, part.size


def _header(items: list[Item]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, size in (field for item in items for field in _fields(item)):
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at whole words
    return len(text).to_bytes(8, "little") + text


def _write(
    file: BinaryIO, checkpoint: Checkpoint, item: Item, weights: Reader, scales: Reader
) -> None:
    stored = item.stored
    try:
        if not item.changed:
            for data in _bytes_of(stored):
                file.write(data)
            return
        weight = weights.read(stored)
        if item.scale is not None:
            assert checkpoint.block is not None
            out = torch.empty(stored.shape, dtype=DTYPES["BF16"])
            dequantise(weight, scales.read(item.scale), checkpoint.block, out)
            _put(file, out)
            return
    except TensorFileError as error:
        raise CheckpointError(f"the checkpoint changed while it was read: {error}") from None
    assert item.coding is not None
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(
            f"the checkpoint in {checkpoint.folder} cannot be converted: 1 thing is wrong",
            [(stored.name, "holds NaN or infinite numbers, which no scale fits")],
        )
    codes, scale = quantised_matrix(weight, item.coding)
    _put(file, codes)
    _put(file, scale)


def _bytes_of(stored: Stored) -> Iterator[bytes]:
    with open(stored.file, "rb") as source:
        source.seek(stored.start)
        left = stored.size
        while left:
            data = source.read(min(left, CHUNK))
            if not data:
                raise TensorFileError(f"{stored.file} ends within '{stored.name}'")
            left -= len(data)
            yield data


def _put(file: BinaryIO, tensor: torch.Tensor) -> None:
    file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data))
