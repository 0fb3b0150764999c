"""Reading a checkpoint's weights into a model: one tensor of memory beside the model's own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from backends.pytorch.ahead.blocks import BlockedWeight
from backends.pytorch.checkpoint import Checkpoint, CheckpointError, Match, Source
from backends.pytorch.tensorfile import DTYPES, Reader, TensorFileError
from compiler.tensors import Tensor


def fill(
    match: Match,
    destination: Callable[[Tensor], torch.Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read every tensor into its place, one after the other in the order of the files.

    Beside the destinations, memory for one tensor as stored is needed.

    Args:
        destination: gives the memory of a tensor, of its shape, in the dtype it is to have.
        progress: called with bytes read and bytes in all.

    Raises:
        CheckpointError: a file has changed since it was matched.
    """
    total = sum(source.stored.size for source in match.sources)
    done = 0
    in_file_order = sorted(match.sources, key=lambda s: (s.stored.file, s.stored.start))
    with Reader() as weights, Reader() as scales, torch.no_grad():
        for source in in_file_order:
            try:
                _fill_one(source, match.checkpoint, destination(source.tensor), weights, scales)
            except TensorFileError as error:
                raise CheckpointError(
                    f"the checkpoint changed while it was read: {error}"
                ) from None
            done += source.stored.size
            if progress:
                progress(done, total)


def _fill_one(
    source: Source, checkpoint: Checkpoint, into: torch.Tensor, weights: Reader, scales: Reader
) -> None:
    stored = source.stored
    if source.scale is not None:
        assert checkpoint.block is not None
        if isinstance(into, BlockedWeight):
            weights.read(stored, into.data8.view(torch.float8_e4m3fn))
            scales.read(source.scale, into.scale)
            return
        scale = scales.read(source.scale)
        dequantise(weights.read(stored), scale, checkpoint.block, into)
        return
    in_place = into.device.type == "cpu" and into.is_contiguous()
    if in_place and into.dtype == DTYPES[stored.dtype]:
        weights.read(stored, into)
    else:
        into.copy_(weights.read(stored))


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
    for number, scales in enumerate(scale_inv):  # block row by block row: little memory beside
        part = slice(number * rows, (number + 1) * rows)
        wide = scales.repeat_interleave(columns)[: weight.shape[1]]
        into[part].copy_(weight[part].to(torch.float32) * wide)
