"""Reading a checkpoint's weights into a model: one tensor of memory beside the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from backends.pytorch.ahead.blocks import BlockedWeight
from backends.pytorch.runtime.fp8 import CodedWeight
from backends.pytorch.weights.checkpoint import Checkpoint, CheckpointError, Match, Source
from backends.pytorch.weights.dtypes import DTYPES
from backends.pytorch.weights.tensorfile import Reader, Stored, TensorFileError
from compiler.shards import OwnTensor
from compiler.tensors import Tensor


class Log(Protocol):
    """Is told of a tensor's parts as they are read, and when all of it has been."""

    def add(self, stored: Stored, data: memoryview) -> None: ...
    def done(self, name: str) -> None: ...


def fill(
    match: Match,
    destination: Callable[[Tensor], torch.Tensor],
    progress: Callable[[int, int], None] | None = None,
    log: Log | None = None,
) -> int:
    """Read every tensor into its place, one after the other in the order of the files.

    Beside the destinations, memory for one tensor as stored is needed.

    Args:
        destination: gives the memory of a tensor, of its shape, in the dtype it is to have.
        progress: called with bytes read and bytes in all.
        log: told what is read of each tensor.

    Returns:
        Bytes read.

    Raises:
        CheckpointError: a file has changed since it was matched.
    """
    total = sum(_size(source) for source in match.sources)
    done = 0
    in_file_order = sorted(match.sources, key=lambda s: (s.stored.file, s.stored.start))
    heard = None if log is None else log.add
    with Reader(heard) as weights, Reader(heard) as scales, torch.no_grad():
        filler = _Filler(match.checkpoint, weights, scales)
        for source in in_file_order:
            try:
                filler.fill(source, destination(source.tensor))
            except TensorFileError as error:
                raise CheckpointError(
                    f"the checkpoint changed while it was read: {error}"
                ) from None
            if log is not None:
                log.done(source.tensor.name)
            done += _size(source)
            if progress:
                progress(done, total)
        return weights.bytes + scales.bytes


def _size(source: Source) -> int:
    """Bytes that are read of a tensor."""
    tensor = source.tensor
    if isinstance(tensor, OwnTensor):
        return tensor.elements * DTYPES[source.stored.dtype].itemsize
    return source.stored.size


class _Filler:
    """Reads tensors straight into their place where they are stored as they are wanted; else by
    way of one piece of memory for all of them. (A new one for each would leave holes between the
    weights that the allocator does not give back: half of a model more was measured.)"""

    def __init__(self, checkpoint: Checkpoint, weights: Reader, scales: Reader):
        self.checkpoint = checkpoint
        self.weights = weights
        self.scales = scales
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._largest = max((s.size for s in checkpoint.tensors.values()), default=0)

    def fill(self, source: Source, into: torch.Tensor) -> None:
        stored = source.stored
        if isinstance(source.tensor, OwnTensor) and not source.tensor.is_whole:
            self._fill_part(source, source.tensor, into)
            return
        if isinstance(into, CodedWeight):
            self._coded(source, into)
            return
        if source.scale is not None:
            assert self.checkpoint.block is not None
            if isinstance(into, BlockedWeight):
                self.weights.read(stored, into.data8.view(torch.float8_e4m3fn))
                self.scales.read(source.scale, into.scale)
                return
            scale = self.scales.read(source.scale)
            dequantise(self._read(stored), scale, self.checkpoint.block, into)
            return
        in_place = into.device.type == "cpu" and into.is_contiguous()
        if in_place and into.dtype == DTYPES[stored.dtype]:
            self.weights.read(stored, into)
        else:
            into.copy_(self._read(stored))

    def _fill_part(self, source: Source, tensor: OwnTensor, into: torch.Tensor) -> None:
        """A rank's part of a tensor; its scales are read whole."""
        exact = torch.empty(tensor.shape, dtype=DTYPES[source.stored.dtype])
        self.weights.read_parts(source.stored, tensor.stretches(), exact)
        if source.scale is not None:
            assert self.checkpoint.block is not None
            scale = self.scales.read(source.scale)
            for axis, along in enumerate(self.checkpoint.block):
                rows = [torch.arange(begin, end) for begin, end in tensor.runs[axis]]
                scale = scale.index_select(axis, torch.cat(rows) // along)
            exact = exact.float() * scale
        if isinstance(into, CodedWeight):
            # In the stored tensor's tiles, whose scales come out as they were if it has such.
            _check_tiles(tensor, (into.coding.rows, into.coding.columns))
            into.fill(exact.to(into.codes.device))
        else:
            into.copy_(exact)

    def _coded(self, source: Source, into: CodedWeight) -> None:
        """Codes as they are stored, if they are such; else the weight is quantised now."""
        block = self.checkpoint.block
        if source.scale is None or block is None:
            into.fill(self._read(source.stored).to(into.codes.device))
            return
        tile = (into.coding.rows, into.coding.columns)
        if block == tile and into.codes.dtype == DTYPES[source.stored.dtype]:
            into.codes.copy_(self._read(source.stored))
            into.scale.copy_(self.scales.read(source.scale))
            return
        exact = torch.empty(source.stored.shape)
        dequantise(self._read(source.stored), self.scales.read(source.scale), block, exact)
        into.fill(exact.to(into.codes.device))

    def _read(self, stored: Stored) -> torch.Tensor:
        """As it is stored; valid until the next one is read."""
        if not self._memory.numel():
            self._memory = torch.empty(self._largest, dtype=torch.uint8)
        typed = self._memory[: stored.size].view(DTYPES[stored.dtype]).view(stored.shape)
        return self.weights.read(stored, typed)


def _check_tiles(tensor: OwnTensor, tile: tuple[int | None, int | None]) -> None:
    """
    Raises:
        CheckpointError: a rank's part of a tensor does not begin and end with tiles.
    """
    for runs, along, size in zip(tensor.runs, tile, tensor.stored_shape, strict=True):
        for begin, end in runs:
            whole = along or size
            if begin % whole or (end % whole and end != size):
                raise CheckpointError(
                    f"'{tensor.name}' cannot be kept in tiles of {whole}: a rank has {begin} .. "
                    f"{end} of its {size} rows or columns; divide it otherwise, or except it from "
                    "the deployment's precision"
                )


def dequantise(
    weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int], into: torch.Tensor
) -> None:
    """``into = weight * scale_inv``, each scale for one block: exact in f32, then rounded once.

    Args:
        weight: float8_e4m3fn [rows, columns].
        scale_inv: float32 [ceil(rows / block[0]), ceil(columns / block[1])]; edge blocks are
            partial.
        into: [rows, columns] of any float dtype.
    """
    rows, columns = block
    height, width = weight.shape
    wide = torch.empty(min(rows, height), width)  # for all rows of blocks, one after the other
    for number, scales in enumerate(scale_inv):
        part = slice(number * rows, min((number + 1) * rows, height))
        exact = wide[: part.stop - part.start]
        exact.copy_(weight[part])
        exact *= scales.repeat_interleave(columns)[:width]
        into[part].copy_(exact)
