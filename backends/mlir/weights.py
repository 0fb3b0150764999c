"""The stacked weights of a module: random ones, or those of a checkpoint, read into their places.

IREE takes the bytes as they lie here. bfloat16 is held as uint16: numpy has no such type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.mlir.artifact import Layout, stored
from backends.mlir.coding import SCALES, element_of, lay, quantised
from backends.mlir.step import key_of
from backends.pytorch.weights.checkpoint import CheckpointError, Match, Source
from backends.pytorch.weights.random_values import values
from backends.pytorch.weights.tensorfile import Reader, Stored, TensorFileError
from compiler.coding import Coding
from compiler.manifest import Manifest, ManifestError
from compiler.tensors import Pattern, Tensor

Array = NDArray[Any]
Progress = Callable[[int, int], None]
HELD: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
    **dict.fromkeys(("f8E4M3FN", "f8E5M2", "i8"), np.dtype(np.uint8)),
}
CODES = {"F8_E4M3": "f8E4M3FN", "F8_E5M2": "f8E5M2", "I8": "i8"}  # by a checkpoint's dtype


def listed(layout: Layout, manifest: Manifest) -> dict[str, Pattern]:
    """What the module reads, by the name of the stacked weight.

    Raises:
        ManifestError: the manifest does not list it, or has another shape.
    """
    known = {key_of(p): p for p in (row.pattern() for row in manifest.parameters)}
    keys = list(dict.fromkeys(key.removesuffix(SCALES) for key in layout.weights))
    for key in keys:
        if key not in known:
            raise ManifestError(f"the module reads '{key}', which the manifest does not list")
    packed = {key for key, row in layout.weights.items() if row.lanes}
    expected = stored({key: known[key] for key in keys}, packed, layout.dtype)
    for key in sorted({*expected, *layout.weights}):
        theirs, ours = expected.get(key), layout.weights.get(key)
        if theirs != ours:
            said = [f"{r.element} {list(r.shape)}" if r else "nothing" for r in (ours, theirs)]
            raise ManifestError(
                f"the module reads '{key}' as {said[0]}, the manifest has {said[1]}"
            )
    return {key: known[key] for key in keys}


def fill(
    patterns: dict[str, Pattern],
    arrays: dict[str, Array],
    found: Match | None,
    seed: int = 0,
    progress: Progress | None = None,
    dtype: str = "float32",
) -> None:
    """Write every weight into its place.

    Args:
        found: a checkpoint that fits; without one, weights are random.
        seed: of random weights.
        dtype: the module's, which random weights are rounded to before they are quantised.
        progress: called with bytes done and in all.

    Raises:
        CheckpointError: a file changed meanwhile.
    """
    if found is None:
        _draw(patterns, arrays, seed, progress, dtype)
    else:
        _read(found, patterns, arrays, progress)


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: its part of the stacked array, and that of its codes' scales."""

    tensor: Tensor
    into: Array
    scales: Array | None = None

    @property
    def coding(self) -> Coding | None:
        return self.tensor.pattern.coding

    def store(self, wide: NDArray[np.float32]) -> None:
        """Values in the module's type and layout, quantised if they are kept as codes."""
        if self.coding is None:
            _store(wide, self.into)
        else:
            self.lay(*quantised(wide, self.coding))

    def lay(self, codes: Array, scales: Array) -> None:
        assert self.coding is not None and self.scales is not None
        lay(codes, scales, self.coding, self.into, self.scales)


def _places(pattern: Pattern, key: str, arrays: dict[str, Array]) -> list[Place]:
    """Each tensor of a pattern with its part of the stacked arrays."""
    codes, scales = arrays[key], arrays.get(key + SCALES)
    return [
        Place(tensor, codes[at], None if scales is None else scales[at])
        for tensor, at in zip(
            pattern.tensors(), product(*(range(len(r)) for r in pattern.ranges)), strict=True
        )
    ]


def _draw(
    patterns: dict[str, Pattern],
    arrays: dict[str, Array],
    seed: int,
    progress: Progress | None,
    dtype: str,
) -> None:
    total, done = sum(arrays[key].nbytes for key in patterns), 0
    for key, pattern in patterns.items():
        for place in _places(pattern, key, arrays):
            drawn = values(place.tensor, seed).reshape(place.tensor.shape)
            if place.coding is not None and dtype == "bfloat16":
                short = np.empty(drawn.shape, np.uint16)
                _store(drawn, short)
                drawn = (short.astype(np.uint32) << 16).view(np.float32)
            place.store(drawn)
            done += place.into.nbytes
            if progress:
                progress(done, total)


def _read(
    found: Match,
    patterns: dict[str, Pattern],
    arrays: dict[str, Array],
    progress: Progress | None,
) -> None:
    places = {
        place.tensor.name: place
        for key, pattern in patterns.items()
        for place in _places(pattern, key, arrays)
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


def _fill(source: Source, place: Place, reader: Reader, scales: Reader, found: Match) -> None:
    stored, into, block = source.stored, place.into, found.checkpoint.block
    if place.coding is not None and source.scale is not None:
        as_stored = CODES.get(stored.dtype) == element_of(place.coding)
        if as_stored and block == (place.coding.rows, place.coding.columns):
            codes = _bytes(stored, reader).reshape(stored.shape)
            place.lay(codes, _widened(_bytes(source.scale, scales), source.scale))
            return
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
        assert block is not None
        scale = _widened(_bytes(source.scale, scales), source.scale)
        for axis, size in enumerate(block):
            scale = np.repeat(scale, size, axis)[
                (slice(None),) * axis + (slice(0, stored.shape[axis]),)
            ]
        wide = wide * scale
    place.store(wide)


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
