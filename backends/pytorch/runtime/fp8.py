"""Quantised values: codes, and a scale for each tile of them.

What quantising means is defined in ``docs/deployments.md`` and computed for any declared format by
``compiler/numerics.py``; here it is done where the values are, with torch's own types for the
elements. A product is that of what both operands stand for, with sums in float32: more exact than
any promotion of partial sums asks for.

No gradient passes a quantised product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import frexp
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiler import numerics
from compiler.coding import Coding
from dsl.diagnostics import Source, Span
from dsl.formats import NumberFormat

__all__ = [
    "Coded",
    "CodedWeight",
    "Coding",
    "code_type",
    "moved_codes",
    "number_format",
    "quantised_matrix",
    "quantize",
    "scaled_linear",
    "wide",
]

# In which type the codes of a format are kept: the first that has all of its values.
FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32)
BAND = 1 << 22  # numbers of a weight that are widened at once


def number_format(
    name: str,
    *,
    exponent: int = 0,
    fraction: int = 0,
    bias: int = 0,
    integer: int = 0,
    sign: bool = True,
    infinities: bool = False,
    nans: bool = False,
    largest: float,
    scale: NumberFormat | None = None,
    rounding: str = "nearest",
) -> NumberFormat:
    """A number format as ``.arch`` files declare them, all said."""
    bits = integer or sign + exponent + fraction
    nowhere = Span(Source("", ""), 1, 1, 1, 1)
    element = (bool(integer), sign, exponent, fraction, bias, infinities, nans, bits, largest)
    return NumberFormat(name, *element, scale, None, rounding, (), nowhere)


@cache
def code_type(format: NumberFormat) -> torch.dtype:
    """The type in which codes are kept."""
    if format.integer:
        return torch.int8 if format.largest <= 127 and format.signed else torch.float32
    smallest = (1 - format.bias if format.fraction else -format.bias) - format.fraction
    for dtype in FLOATS:
        info = torch.finfo(dtype)
        if (
            format.largest <= info.max
            and 2.0**-format.fraction >= info.eps
            and smallest >= frexp(info.smallest_normal * info.eps)[1] - 1
        ):
            return dtype
    return torch.float64


@cache
def _is_its_type(format: NumberFormat) -> bool:
    """Whether torch's conversion to the codes' type rounds as the format does."""
    dtype = code_type(format)
    if not dtype.is_floating_point or dtype.itemsize > 1:
        return False
    info = torch.finfo(dtype)
    smallest = (1 - format.bias) - format.fraction
    return (
        format.signed
        and format.fraction > 0
        and 2.0**-format.fraction == info.eps
        and format.largest == info.max
        and smallest == frexp(info.smallest_normal * info.eps)[1] - 1
    )


@dataclass(frozen=True)
class Coded:
    """Codes and scales of a value, one row of tiles along its last axes.

    Attributes:
        codes: ``[*rows, *columns]``, in ``code_type(coding.format)``.
        scales: float32 ``[*rows, tiles]``; a tile is ``coding.columns`` of the flattened columns.
        columns: how many axes are columns.
        exact: what was quantised, where somebody asked to keep it (``dslc compare``).
    """

    codes: Tensor
    scales: Tensor
    coding: Coding
    columns: int = 1
    exact: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def wide(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes stand for: code x scale in float32, then rounded once."""
        codes = self.codes.float().flatten(-self.columns)
        size = self.coding.columns or max(codes.shape[-1], 1)
        scales = self.scales.repeat_interleave(size, -1)[..., : codes.shape[-1]]
        return (codes * scales).to(dtype).reshape(self.codes.shape)

    def of(self, exact: Tensor) -> Coded:
        """The same, and what it was."""
        return replace(self, exact=exact)

    # What routing does with rows: the same to codes and scales.

    def _rows(self, change: Callable[[Tensor], Tensor]) -> Coded:
        exact = None if self.exact is None else change(self.exact)
        return Coded(change(self.codes), change(self.scales), self.coding, self.columns, exact)

    def each(self, change: Callable[[Tensor], Tensor]) -> Coded:
        """Codes and scales sent where their rows go; what was quantised stays."""
        return Coded(change(self.codes), change(self.scales), self.coding, self.columns)

    def __getitem__(self, index: Any) -> Coded:
        return self._rows(lambda part: part[index])

    def flatten(self, start: int, end: int) -> Coded:
        return self._rows(lambda part: part.flatten(start, end))

    def index_select(self, axis: int, index: Tensor) -> Coded:
        return self._rows(lambda part: part.index_select(axis, index))

    def split(self, counts: Sequence[int]) -> tuple[Coded, ...]:
        parts = zip(self.codes.split(counts), self.scales.split(counts), strict=True)
        return tuple(Coded(codes, scales, self.coding, self.columns) for codes, scales in parts)

    def expand(self, *shape: int) -> Coded:
        """Rows are repeated; ``shape`` is that of the codes."""
        rows = shape[: len(shape) - self.columns]
        return Coded(
            self.codes.expand(*shape),
            self.scales.expand(*rows, self.scales.shape[-1]),
            self.coding,
            self.columns,
            None if self.exact is None else self.exact.expand(*shape),
        )


def quantize(x: Tensor, coding: Coding, columns: int = 1) -> Coded:
    """Codes of a value, each row by itself.

    Args:
        x: ``[*rows, *columns]`` of any float dtype.
        coding: with tiles of one row.
        columns: how many of the last axes are columns; tiles lie along them, flattened.
    """
    wide = x.detach().float().flatten(-columns)
    count = wide.shape[-1]
    size = coding.columns or max(count, 1)
    tiles = F.pad(wide, (0, -count % size)).unflatten(-1, (-1, size))
    scales = _scales(tiles.abs().amax(-1), coding)
    codes = to_codes(tiles / scales[..., None], coding.format).flatten(-2)[..., :count]
    return Coded(codes.reshape(x.shape), scales, coding, columns)


def _scales(largest: Tensor, coding: Coding) -> Tensor:
    if coding.format.scale is None:
        return torch.ones_like(largest)
    return numerics.scales(largest, coding.format)


def to_codes(x: Tensor, format: NumberFormat) -> Tensor:
    """The nearest codes, clamped to the largest."""
    if _is_its_type(format):
        return x.clamp(-format.largest, format.largest).to(code_type(format))
    return numerics.nearest(x, format).to(code_type(format))


# -- weights ---------------------------------------------------------------------------------------


class CodedWeight(Tensor):
    """A parameter that is kept as codes and scales; what else reads it gets a wide copy.

    Attributes:
        codes: [n, ...], in ``code_type(coding.format)``.
        scale: float32 [tiles of rows, tiles of columns]; columns are all axes but the first.
        coding: format and tile.
    """

    codes: Tensor
    scale: Tensor
    coding: Coding

    @staticmethod
    def __new__(
        cls, codes: Tensor, scale: Tensor, coding: Coding, dtype: torch.dtype
    ) -> CodedWeight:
        made: CodedWeight = Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=dtype, device=codes.device
        )
        made.codes, made.scale, made.coding = codes, scale, coding
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CodedWeight({list(self.shape)}, {{{self.coding}}}, {self.dtype})"

    def wide(self, dtype: torch.dtype | None = None) -> Tensor:
        """What the codes stand for: code x scale in float32, then rounded once."""
        out = torch.empty(self.codes.shape, dtype=dtype or self.dtype, device=self.codes.device)
        into = out.view(-1, out.shape[-1]) if out.ndim == 1 else out.flatten(1)
        for start, part in self.bands():
            into[start : start + len(part)] = part
        return out

    def bands(self) -> Any:
        """(first row, float32 rows) of the matrix, some rows of tiles at a time."""
        matrix = self.codes.view(1, -1) if self.codes.ndim == 1 else self.codes.flatten(1)
        rows, columns = matrix.shape
        high, wide = self.coding.rows or max(rows, 1), self.coding.columns or max(columns, 1)
        tiles = max(1, BAND // max(1, high * columns))
        for at in range(0, self.scale.shape[0], tiles):
            scale = self.scale[at : at + tiles]
            part = matrix[at * high : (at + tiles) * high].float()
            spread = scale.repeat_interleave(wide, 1)[:, :columns]
            yield at * high, part.mul_(spread.repeat_interleave(high, 0)[: len(part)])

    def fill(self, weight: Tensor) -> None:
        """Quantise a weight into this one's memory."""
        matrix = weight[None] if weight.ndim == 1 else weight.flatten(1)
        into = self.codes.view(1, -1) if self.codes.ndim == 1 else self.codes.flatten(1)
        high = self.coding.rows or max(len(matrix), 1)
        tiles = max(1, BAND // max(1, high * matrix.shape[1]))
        if (self.coding.format.scale or self.coding.format).scale is not None:
            tiles = len(self.scale)  # scales that are scaled per tensor need all of it
        for at in range(0, len(self.scale), tiles):
            part = matrix[at * high : (at + tiles) * high]
            codes, scale = quantised_matrix(part, self.coding)
            into[at * high : at * high + len(part)] = codes
            self.scale[at : at + tiles] = scale

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            (self,) = args
            return CodedWeight(self.codes, self.scale, self.coding, self.dtype)
        flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        if func._schema.is_mutable and any(isinstance(w, CodedWeight) for w in flat):
            raise RuntimeError("a weight that is kept as codes cannot be written to")
        wide = torch.utils._pytree.tree_map_only(
            CodedWeight, lambda w: w.wide(), (args, kwargs or {})
        )
        return func(*wide[0], **wide[1])


def quantised_matrix(matrix: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """Codes [rows, columns] and scales [tiles of rows, tiles of columns] of a matrix."""
    wide = matrix.detach().float()
    rows, columns = wide.shape
    high, across = coding.rows or max(rows, 1), coding.columns or max(columns, 1)
    padded = F.pad(wide, (0, -columns % across, 0, -rows % high))
    tiles = padded.unflatten(1, (-1, across)).unflatten(0, (-1, high))
    scale = _scales(tiles.abs().amax((1, 3)), coding)
    codes = to_codes(tiles.div_(scale[:, None, :, None]), coding.format)
    return codes.flatten(2).flatten(0, 1)[:rows, :columns], scale


def scaled_linear(
    x: Coded, weight: Tensor, promote: int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """``x`` times a stored matrix, transposed: ``[*rows, n]``.

    Args:
        weight: [n, ...]; a ``CodedWeight``, whose columns are those of ``x``.
        promote: elements after which hardware moves its partial sums to float32.
        dtype: of the result; the weight's unless given.
    """
    wide = x.wide().flatten(-x.columns)
    stored = weight.data if not isinstance(weight, CodedWeight) else weight
    if not isinstance(stored, CodedWeight):
        return F.linear(wide, stored.float().flatten(1)).to(dtype or stored.dtype)
    parts = [F.linear(wide, rows) for _, rows in stored.bands()]
    product = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return product.to(dtype or stored.dtype)


def wide(value: Coded | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What codes stand for; of a weight that is kept as codes, not rounded in between."""
    if isinstance(value, Coded):
        return value.wide(dtype)
    return value.wide(dtype) if isinstance(value, CodedWeight) else value.to(dtype)


@contextmanager
def moved_codes(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, parameters that are kept as codes are out of the way of ``Module._apply``; behind it
    they are where ``change`` moves a tensor, and stand for its dtype."""
    held: list[tuple[dict[str, Any], str, CodedWeight]] = []
    for owner in module.modules():
        parameters: dict[str, Any] = owner._parameters
        held += [(parameters, n, w) for n, w in parameters.items() if isinstance(w, CodedWeight)]
    for parameters, name, _ in held:
        parameters[name] = None
    yield
    for parameters, name, weight in held:
        there = change(torch.empty(0, dtype=weight.dtype, device=weight.codes.device))
        codes, scale = weight.codes.to(there.device), weight.scale.to(there.device)
        moved = CodedWeight(codes, scale, weight.coding, there.dtype)
        parameters[name] = nn.Parameter(moved, requires_grad=False)
