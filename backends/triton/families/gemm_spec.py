"""What a product with a stored matrix is: its sizes, its parts, and where their numbers lie."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from backends.triton.families.formats import BYTES, Quantised
from backends.triton.families.product import DESCRIPTOR_ALIGNMENT, Product, has_descriptors
from backends.triton.families.tiling import Shape
from backends.triton.targets import Target


@dataclass(frozen=True)
class Gemm:
    """``out[m, p, n] = sum_k a[m, p, k] * w[p, n, k]``, with ``w`` a part of a stored matrix.

    Attributes:
        n, k: of one of the ``parts`` (heads); a plain linear map has one.
        own: each part has its own ``k`` columns of ``a``; else all share them.
        stored: rows and columns of the stored matrix; None: what the parts take.
        row, column: where in it the first part starts; step: rows from one part to the next.
        transposed: a part's stored rows are summed: ``w[p, k, n]``.
        weights, activations: formats of the operands; None: ``dtype``. Quantised weights alone are
            multiplied as numbers of ``dtype``.
        a_row: elements from one row of ``a`` to the next; None: rows lie side by side.
        dtype, out: torch's dtypes.

    Raises:
        ValueError: K does not start on a tile of scales, or a stored matrix is too small.
    """

    n: int
    k: int
    parts: int = 1
    own: bool = False
    stored: tuple[int, int] | None = None
    row: int = 0
    column: int = 0
    step: int = 0
    transposed: bool = False
    weights: Quantised | None = None
    activations: Quantised | None = None
    a_row: int | None = None
    dtype: str = "bfloat16"
    out: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.activations and not self.weights:
            raise ValueError("quantised activations need quantised weights")
        if self.activations and self.activations.rows != 1:
            raise ValueError("activations have a scale for each row")
        if self.activations and self.transposed:
            raise ValueError("8-bit products sum along stored columns")
        down, across = (self.k, self.n) if self.transposed else (self.n, self.k)
        rows, columns = self.matrix
        last = self.row + (self.parts - 1) * self.between + down
        if last > rows or self.column + across > columns:
            raise ValueError(f"a matrix of {rows} x {columns} has no such part")
        if self.weights and self.block_k < 16:
            tile = f"{self.weights.rows} x {self.weights.columns}"
            raise ValueError(f"what is summed does not start on a tile of {tile}")

    @property
    def between(self) -> int:
        """Rows from one part to the next."""
        return self.step or (self.k if self.transposed else self.n)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the stored matrix."""
        if self.stored is not None:
            return self.stored
        if self.transposed:
            return self.row + self.parts * self.between, self.column + self.n
        return self.row + self.parts * self.between, self.column + self.k

    @property
    def a_columns(self) -> int:
        return self.k * (self.parts if self.own else 1)

    @property
    def starts(self) -> int:
        """The greatest number that the first stored rows of all parts are multiples of; 0: any."""
        return gcd(self.row, self.between if self.parts > 1 else 0)

    @property
    def block_k(self) -> int:
        """How much of K a tile has: within one tile of scales of each operand."""
        if self.weights is None:
            return 64
        block = self.weights.rows if self.transposed else self.weights.columns
        start = self.starts if self.transposed else self.column
        block = gcd(128, block, start)
        return gcd(block, self.activations.columns) if self.activations else block


def name_of(spec: Gemm, p: Product) -> str:
    name = f"gemm_{spec.n}x{spec.k}_{p.short}"
    if spec.parts > 1:
        name += f"_{spec.parts}{'_own' if spec.own else ''}_parts"
    if spec.transposed:
        name += "_transposed"
    if spec.row or spec.column or spec.stored or spec.step:
        rows, columns = spec.matrix
        name += f"_of_{rows}x{columns}_from_{spec.row}_{spec.column}"
        name += f"_step_{spec.step}" if spec.step else ""
    return name + (f"_a_{spec.a_row}" if spec.a_row else "")


def product_of(spec: Gemm, target: Target) -> Product:
    rows, columns = spec.matrix
    a_row = spec.a_row or spec.a_columns
    a_dtype = spec.activations.element if spec.activations else spec.dtype
    w_dtype = spec.weights.element if spec.weights else spec.dtype
    starts = (a_row, spec.k if spec.own else 0)
    fetched = has_descriptors(target, spec.k, a_dtype, w_dtype, starts, columns)
    if spec.column * BYTES[w_dtype] % DESCRIPTOR_ALIGNMENT:
        fetched = False
    if spec.own and spec.k % spec.block_k:
        fetched = False  # a tile of `a` would reach into the next part
    by_row, scale_at = _scales(spec)
    return Product(
        n=spec.n,
        k=spec.k,
        w_rows=rows,
        w_columns=columns,
        column=spec.column,
        a_row=a_row,
        out_row=spec.parts * spec.n,
        transposed=spec.transposed,
        weights=spec.weights,
        activations=spec.activations,
        dtype=spec.dtype,
        out=spec.out,
        by_row=by_row,
        descriptors=fetched,
        scale_at=scale_at,
        block_k=spec.block_k,
    )


def _scales(spec: Gemm) -> tuple[bool, str]:
    """Whether a tile's weights may have several scales, and where the first are."""
    if spec.weights is None:
        return False, ""
    tall, wide = spec.weights.rows, spec.weights.columns
    across = spec.weights.scales(*spec.matrix)[1]
    if spec.transposed:
        one = gcd(spec.column, wide) % 128 == 0 or spec.column + spec.n <= wide
        return not one, f"({spec.column} + n{'0' if one else ''}) // {wide}"
    one = gcd(spec.starts, tall) % 128 == 0
    row = "w_row" if one else "(w_row + tl.arange(0, BLOCK_N))"
    first = spec.column // wide
    return not one, f"{row} // {tall} * {across}" + (f" + {first}" if first else "")


def times(spec: Gemm) -> str:
    return f"{spec.parts} * " if spec.parts > 1 else ""


def part(spec: Gemm, tiles: str) -> str:
    """From the tile ``across`` to the part, ``n0`` and the first stored row."""
    row = f"{spec.row} + " if spec.row else ""
    if spec.parts == 1:
        found = "n0 = across * BLOCK_N" if tiles == "thin" else "n0 = across * WIDE"
        if spec.transposed:
            return f"{found}\nw_k = tl.full((), {spec.row}, tl.int32)"
        return f"{found}\nw_row = {row}n0"
    wide = "BLOCK_N" if tiles == "thin" else "WIDE"
    found = f"""\
part = across // tl.cdiv(N, {wide})
n0 = across % tl.cdiv(N, {wide}) * {wide}
"""
    if spec.transposed:
        return f"{found}w_k = {row}part * {spec.between}"
    return f"{found}w_row = {row}part * {spec.between} + n0"


def columns(spec: Gemm, p: Product) -> tuple[str, str, str]:
    """First column of ``a``, its first tile of scales, first column of ``out``."""
    if spec.parts == 1:
        return "", "", ""
    if not spec.own:
        return "", "", "part * N"
    tiles = spec.activations.scales(1, spec.k)[1] if spec.activations else 0
    return "part * K", f"part * {tiles}", "part * N"


def shape_of(spec: Gemm, rows: int) -> Shape:
    """What the model of the machine is asked: parts count as columns."""
    a = spec.activations.stored_bytes(1, spec.k) / spec.k if spec.activations else None
    w = spec.weights.stored_bytes(*spec.matrix) if spec.weights else None
    each = BYTES[spec.dtype]
    return Shape(
        m=rows,
        n=spec.n * spec.parts,
        k=spec.k,
        a_bytes=each if a is None else a,
        w_bytes=each if w is None else w / (spec.matrix[0] * spec.matrix[1]),
        out_bytes=BYTES[spec.out],
    )
