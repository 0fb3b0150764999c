"""The stacked weights of a module: random ones, or those of a checkpoint, read into their places.

IREE takes the bytes as they lie here. bfloat16 is held as uint16: numpy has no such type.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.mlir.artifact import Layout, laid_out
from backends.mlir.step import key_of
from backends.pytorch.weights.checkpoint import CheckpointError, Match, Source
from backends.pytorch.weights.random_values import values
from backends.pytorch.weights.tensorfile import Reader, Stored, TensorFileError
from compiler.manifest import Manifest, ManifestError
from compiler.tensors import Pattern, Tensor

Array = NDArray[Any]
Progress = Callable[[int, int], None]
HELD: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "bf16": np.dtype(np.uint16)}


def listed(layout: Layout, manifest: Manifest) -> dict[str, Pattern]:
    """What the module reads, by the name of the stacked weight.

    Raises:
        ManifestError: the manifest does not list it, or has another shape.
    """
    known = {key_of(p): p for p in (row.pattern() for row in manifest.parameters)}
    for key, row in layout.weights.items():
        if key not in known:
            raise ManifestError(f"the module reads '{key}', which the manifest does not list")
        shape = laid_out(known[key], row.lanes)
        if row.shape != shape:
            raise ManifestError(
                f"the module reads '{key}' as {list(row.shape)}, the manifest has {list(shape)}"
            )
    return {key: known[key] for key in layout.weights}


def fill(
    patterns: dict[str, Pattern],
    arrays: dict[str, Array],
    found: Match | None,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write every weight into its place.

    Args:
        found: a checkpoint that fits; without one, weights are random.
        seed: of random weights.
        progress: called with bytes done and in all.

    Raises:
        CheckpointError: a file changed meanwhile.
    """
    if found is None:
        _draw(patterns, arrays, seed, progress)
    else:
        _read(found, patterns, arrays, progress)


def _places(pattern: Pattern, array: Array) -> list[tuple[Tensor, Array]]:
    """Each tensor of a pattern with its part of the stacked array."""
    numbers = product(*(range(len(r)) for r in pattern.ranges))
    return [(t, array[at]) for t, at in zip(pattern.tensors(), numbers, strict=True)]


def _draw(
    patterns: dict[str, Pattern], arrays: dict[str, Array], seed: int, progress: Progress | None
) -> None:
    total, done = sum(a.nbytes for a in arrays.values()), 0
    for key, pattern in patterns.items():
        for tensor, into in _places(pattern, arrays[key]):
            _store(values(tensor, seed).reshape(tensor.shape), into)
            done += into.nbytes
            if progress:
                progress(done, total)


def _read(
    found: Match,
    patterns: dict[str, Pattern],
    arrays: dict[str, Array],
    progress: Progress | None,
) -> None:
    places = {
        tensor.name: into
        for key, pattern in patterns.items()
        for tensor, into in _places(pattern, arrays[key])
    }
    sources = [s for s in found.sources if s.tensor.name in places]
    sources.sort(key=lambda s: (s.stored.file, s.stored.start))
    total, done = sum(s.stored.size for s in sources), 0
    with Reader() as reader, Reader() as scales:
        for source in sources:
            try:
                _fill(source, places[source.tensor.name], reader, scales, found)
            except TensorFileError as error:
                raise CheckpointError(
                    f"the checkpoint changed while it was read: {error}"
                ) from None
            done += source.stored.size
            if progress:
                progress(done, total)


def _fill(source: Source, into: Array, reader: Reader, scales: Reader, found: Match) -> None:
    stored = source.stored
    same = stored.dtype == "F32" and into.dtype == np.float32
    same |= stored.dtype == "BF16" and into.dtype == np.uint16
    if same and into.ndim > len(stored.shape):
        into[...] = _laid(_bytes(stored, reader).view(into.dtype).reshape(stored.shape), into)
        return
    if same and into.flags.c_contiguous:
        reader.read_bytes(stored, into.reshape(-1).data.cast("B"))
        return
    wide = _widened(_bytes(stored, reader), stored)
    if source.scale is not None:
        block = found.checkpoint.block
        assert block is not None
        scale = _widened(_bytes(source.scale, scales), source.scale)
        for axis, size in enumerate(block):
            scale = np.repeat(scale, size, axis)[
                (slice(None),) * axis + (slice(0, stored.shape[axis]),)
            ]
        wide = wide * scale
    _store(wide, into)


def _bytes(stored: Stored, reader: Reader) -> NDArray[np.uint8]:
    raw = np.empty(stored.size, np.uint8)
    reader.read_bytes(stored, raw.data)
    return raw


def _widened(raw: NDArray[np.uint8], stored: Stored) -> NDArray[np.float32]:
    """The values as float32, which holds all of the stored formats exactly."""
    if stored.dtype == "F32":
        wide = raw.view("<f4")
    elif stored.dtype == "F16":
        wide = raw.view("<f2").astype(np.float32)
    elif stored.dtype == "BF16":
        wide = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        wide = _e4m3()[raw]
    return np.asarray(wide, np.float32).reshape(stored.shape)


def _laid(tensor: Array, into: Array) -> Array:
    """A tensor as it lies in its place: packed, if that has an axis more."""
    if tensor.ndim == into.ndim:
        return tensor
    rows, columns, lanes = into.shape
    return tensor.reshape(rows, lanes, columns).swapaxes(1, 2)


def _e4m3() -> NDArray[np.float32]:
    """What each byte of OCP's E4M3 stands for: no infinities, one NaN of either sign."""
    byte = np.arange(256)
    sign, exponent, fraction = np.where(byte < 128, 1.0, -1.0), (byte >> 3) & 15, byte & 7
    normal = (8 + fraction) * 2.0 ** (exponent - 10.0)
    found = sign * np.where(exponent == 0, fraction * 2.0**-9, normal)
    found[(byte & 127) == 127] = np.nan
    return found.astype(np.float32)


def _store(wide: NDArray[np.float32], into: Array) -> None:
    """In the module's type and layout; to bfloat16 the nearest, ties to even."""
    wide = _laid(wide, into)
    if into.dtype == np.float32:
        into[...] = wide
        return
    bits = np.ascontiguousarray(wide).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    into[...] = np.where(np.isnan(wide), 0x7FC0, rounded).astype(np.uint16)
