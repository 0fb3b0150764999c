"""Reading safetensors files: a JSON header of names, dtypes, shapes and offsets, then plain bytes.

Tensors are read with ``pread`` straight into the memory they are wanted in. A memory map would save
nothing (the weights are copied or converted anyway), would count every page it touched as resident,
and would kill the process with a signal if the file shrank meanwhile; here a short read is an
error.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

LONGEST_HEADER = 100_000_000  # the format's own limit, bytes

# Bits per element of every dtype the format knows; only those of ``dtypes.py`` can be read.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class TensorFileError(Exception):
    """A file that is not what the safetensors format says, or that ends early."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes are: ``size`` bytes from ``start`` on in a file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    file_size: int

    @property
    def is_cut_off(self) -> bool:
        return self.start + self.size > self.file_size

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_header(path: Path) -> dict[str, Stored]:
    """What a file holds, by name.

    A file that ends before its tensors do is not refused here: see ``Stored.is_cut_off``.

    Raises:
        TensorFileError: the file cannot be opened, or its header is not one.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for its writer
            raise TensorFileError("this is not a file")
        file_size = about.st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if file_size < 8 or length > min(LONGEST_HEADER, file_size - 8):
                raise TensorFileError(f"the file ends within its header ({file_size:,} bytes)")
            header = json.loads(file.read(length))
    except OSError as error:
        raise TensorFileError(error.strerror or str(error)) from None
    except (ValueError, RecursionError):
        raise TensorFileError("the header is not JSON") from None
    if not isinstance(header, dict):
        raise TensorFileError("the header is not an object")
    header.pop("__metadata__", None)
    return {
        name: _stored(path, name, fields, 8 + length, file_size) for name, fields in header.items()
    }


def _stored(path: Path, name: str, fields: object, base: int, file_size: int) -> Stored:
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            if not all(type(n) is int and n >= 0 for n in shape) or not 0 <= start <= stop:
                raise TensorFileError(f"the header's entry of '{name}' has negative sizes")
        case _:
            raise TensorFileError(f"the header's entry of '{name}' lacks dtype, shape or offsets")
    if dtype in BITS and prod(shape) * BITS[dtype] != (stop - start) * 8:
        raise TensorFileError(
            f"the header gives '{name}' {stop - start:,} bytes, which is not {dtype} {shape}"
        )
    return Stored(name, path, dtype, tuple(shape), base + start, stop - start, file_size)


class Reader:
    """Reads tensors of any number of files; keeps the file it read last open.

    Use as a context manager.

    Args:
        heard: told what has been read, once it has: a tensor or a part of one, and its bytes.
    """

    def __init__(self, heard: Callable[[Stored, memoryview], None] | None = None) -> None:
        self._heard = heard
        self._path: Path | None = None
        self._handle = -1
        self.bytes = 0  # that have been read

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def read(self, stored: Stored, into: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor as it is stored, on the CPU.

        Args:
            into: contiguous CPU tensor of the stored dtype and shape, filled and returned.

        Raises:
            TensorFileError: the file ends before the tensor does, or cannot be read.
        """
        import torch

        from backends.pytorch.weights.dtypes import DTYPES

        if into is None:
            into = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        if stored.size:
            # numpy has no bf16 or fp8; as bytes, all dtypes are alike.
            self.read_bytes(
                stored, memoryview(into.detach().view(-1).view(torch.uint8).numpy().data)
            )
        return into

    def read_bytes(self, stored: Stored, view: memoryview) -> None:
        """A tensor's bytes, ``stored.size`` of them; needs no torch.

        Raises:
            TensorFileError: the file ends before the tensor does, or cannot be read.
        """
        self._open(stored.file)
        done = 0
        while done < stored.size:
            try:
                count = os.preadv(self._handle, [view[done:]], stored.start + done)
            except OSError as error:
                raise TensorFileError(f"{stored.file}: {error.strerror}") from None
            if not count:
                raise TensorFileError(f"{stored.file} ends within '{stored.name}'")
            done += count
            self.bytes += count
        if self._heard is not None:
            self._heard(stored, view)

    def read_parts(
        self, stored: Stored, stretches: Iterable[tuple[int, int]], into: torch.Tensor
    ) -> torch.Tensor:
        """Stretches of a tensor's elements, behind one another; no other byte is read.

        Args:
            stretches: begin and end, in elements.
            into: contiguous CPU tensor of the stored dtype, filled and returned.
        """
        width, done, flat = into.element_size(), 0, into.view(-1)
        for begin, end in stretches:
            part = replace(
                stored, start=stored.start + begin * width, size=(end - begin) * width, shape=()
            )
            self.read(part, flat[done : done + end - begin])
            done += end - begin
        return into

    def _open(self, path: Path) -> None:
        if path != self._path:
            self._close()
            try:
                self._handle = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise TensorFileError(f"{path}: {error.strerror}") from None
            self._path = path

    def _close(self) -> None:
        if self._path is not None:
            os.close(self._handle)
            self._path = None
