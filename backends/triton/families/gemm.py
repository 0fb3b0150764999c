"""Products of tokens with a stored matrix or a part of it: BF16, block-scaled FP8, FP8 weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from backends.triton.families import product as text
from backends.triton.families.formats import BYTES, Quantised
from backends.triton.families.product import Product, inside, lines
from backends.triton.families.product_example import operand
from backends.triton.families.tiling import (
    MACHINES,
    Shape,
    bound,
    configured,
    thin_bytes,
    thin_configs,
    wide_bytes,
    wide_configs,
)
from backends.triton.kernel import Kernel, Operator, Traffic, pointer
from backends.triton.targets import Target

THIN = 64  # rows up to which weights are the tensor cores' rows


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


def generate(spec: Gemm, target: Target) -> Operator:
    """The operator ``name(a, [a_scales,] w[, w_scales]) -> out``.

    ``a`` [rows, K] (of parts with own columns [rows, parts * K]), ``a_scales`` [rows, tiles] in any
    strides, ``w`` and ``w_scales`` as they are stored, ``out`` [rows, parts * N].
    """
    if (spec.weights is not None) and spec.activations is not None and not target.fp8:
        raise ValueError(f"{target.name} does not multiply {spec.weights.element}")
    p = product_of(spec, target)
    name = name_of(spec, p)
    only = spec.transposed or (spec.weights is not None and spec.activations is None)
    thin = _thin(spec, p, f"{name}_few_rows", target, only)
    kernels: tuple[Kernel, ...] = (thin,)
    if not only:
        kernels = (thin, _wide(spec, p, f"{name}_kernel", target))
    return Operator(
        name=name,
        kernels=kernels,
        launcher=_launcher(spec, p, name, kernels),
        traffic=lambda sizes: _traffic(spec, p, target, kernels, sizes),
        shown={"tokens": 4096},
        example=lambda sizes, device: _example(spec, sizes["tokens"], device),
    )


def _example(spec: Gemm, rows: int, device: str) -> tuple[Any, ...]:
    columns = spec.a_row or spec.a_columns
    a, *a_scales = operand((), rows, columns, spec.activations, spec.dtype, device)
    w = operand((), *spec.matrix, spec.weights, spec.dtype, device)
    return a[:, : spec.a_columns], *a_scales, *w


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
    fetched = text.has_descriptors(target, spec.k, a_dtype, w_dtype, starts, columns)
    if spec.column * BYTES[w_dtype] % text.DESCRIPTOR_ALIGNMENT:
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


def _times(spec: Gemm) -> str:
    return f"{spec.parts} * " if spec.parts > 1 else ""


def _part(spec: Gemm, tiles: str) -> str:
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


def _columns(spec: Gemm, p: Product) -> tuple[str, str, str]:
    """First column of ``a``, its first tile of scales, first column of ``out``."""
    if spec.parts == 1:
        return "", "", ""
    if not spec.own:
        return "", "", "part * N"
    tiles = spec.activations.scales(1, spec.k)[1] if spec.activations else 0
    return "part * K", f"part * {tiles}", "part * N"


def _about(spec: Gemm, p: Product) -> str:
    """The maths, for docstrings."""
    rows, columns = spec.matrix
    of = f"a stored matrix [{rows}, {columns}]"
    if spec.row or spec.column or spec.parts > 1:
        of += f",\nfrom row {spec.row} and column {spec.column}"
    if spec.parts > 1:
        of += f", {spec.parts} parts {spec.between} rows apart"
    maths = "out[m,n] = sum_k a[m,k] * w[n,k]"
    if p.scaled:
        maths = "out[m,n] = sum_j a_scale[m,j] * w_scale[n,j] * sum_{k in tile j} a[m,k] * w[n,k]"
    elif spec.weights:
        maths = "out[m,n] = sum_k a[m,k] * (w_scale * w)[n,k]"
    return f"{maths}.\n\nN = {spec.n}, K = {spec.k}; w is {of}."


def _wide(spec: Gemm, p: Product, name: str, target: Target) -> Kernel:
    configs, candidates = wide_configs(
        lambda rows: shape_of(spec, rows),
        target,
        scaled=p.scaled,
        halves=p.halves,
        widest=_widest(spec, p),
        counts=(128, 256, 512, 1024, 2048, None),
    )
    a_column, a_tile, out_column = _columns(spec, p)
    wide = "BLOCK_N * HALVES" if p.halves else "BLOCK_N"
    loop = lines(
        "# GROUP tiles down, then across: what neighbours read stays in the L2 cache.",
        "strip = GROUP * n_tiles",
        "first = tile // strip * GROUP",
        "high = min(m_tiles - first, GROUP)",
        "m0 = (first + tile % strip % high) * BLOCK_M",
        "across = tile % strip // high",
        _part(spec, "wide"),
        text.wide_sums(p, a_column, a_tile),
        text.wide_store(p, out_column),
    )
    body = lines(
        p.constants(),
        f"WIDE: tl.constexpr = {wide}",
        "end = rows",
        text.wide_descriptors(p, "rows", spec.a_columns),
        "m_tiles = tl.cdiv(rows, BLOCK_M)",
        f"n_tiles = {_times(spec)}tl.cdiv(N, WIDE)",
        "for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, PROGRAMS):",
        inside(loop, 1),
    )
    about = f"""{_about(spec, p)}
A tile of BLOCK_M rows by {"HALVES times " if p.halves else ""}BLOCK_N, {p.block_k} of K at a \
time{", each promoted to float32" if p.scaled else ""}.
PROGRAMS programs take tile after tile, GROUP down and then across.
{_cost(spec, target, 4096)}"""
    parameters = ["BLOCK_M", "BLOCK_N", "GROUP", *(["HALVES"] if p.halves else []), "PROGRAMS"]
    return Kernel(
        name=name,
        source=text.source(name, p.arguments(), parameters, about, body),
        arguments=p.arguments(),
        configs=configs,
        candidates=candidates,
        helpers=p.helpers(),
    )


def _widest(spec: Gemm, p: Product) -> int:
    """Columns of a tile at most: no wider than the part, rounded up; one half if scales differ."""
    widest = 1 << (spec.n - 1).bit_length()
    return min(widest, 128) if p.scaled and not p.halves else widest


PARTIAL = (pointer("partial", "float32"), pointer("arrived", "int32"))


def _thin(spec: Gemm, p: Product, name: str, target: Target, only: bool) -> Kernel:
    """``only``: it also takes many rows."""
    configs, candidates = thin_configs(
        lambda rows: shape_of(spec, rows),
        target,
        block_k=p.block_k,
        k_tiles=p.k_tiles,
        narrowest=spec.n,
        counts=(16, 32, THIN, None) if only else (16, 32, None),
        split=True,
        most=4096 if only else THIN,
    )
    a_column, a_tile, out_column = _columns(spec, p)
    body = lines(
        p.constants(),
        "across = tl.program_id(0)",
        "m0 = tl.program_id(1) * BLOCK_M",
        "end = rows",
        _part(spec, "thin"),
        "first = tl.program_id(2) * tl.cdiv(K_TILES, SPLIT)",
        "last = min(first + tl.cdiv(K_TILES, SPLIT), K_TILES)",
        text.thin_sums(p, "first", "last", a_column, a_tile),
        "if SPLIT > 1:",
        inside(_add_splits(), 1),
        text.thin_store(p, out_column),
    )
    about = f"""{_about(spec, p)}
For few rows: weights are the tensor cores' rows, tokens their columns, so a tile is BLOCK_N
weights by BLOCK_M tokens, {p.block_k} of K at a time. SPLIT programs share K; the last of them adds
their sums in order, so results do not depend on who is last.
{_cost(spec, target, 16)}"""
    arguments = p.arguments(PARTIAL)
    return Kernel(
        name=name,
        source=text.source(name, arguments, ["BLOCK_M", "BLOCK_N", "SPLIT"], about, body),
        arguments=arguments,
        configs=configs,
        candidates=candidates,
        helpers=p.helpers(),
    )


def _add_splits() -> str:
    return """\
tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
lane = tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_M)[None, :] * BLOCK_N
partial_at = partial + tile.to(tl.int64) * (SPLIT * BLOCK_M * BLOCK_N) + lane
tl.store(partial_at + tl.program_id(2) * (BLOCK_M * BLOCK_N), sums)
tl.debug_barrier()  # all of this program's sums are stored before it says so
if tl.atomic_add(arrived + tile, 1, sem="acq_rel") < SPLIT - 1:
    return
sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
for split in tl.range(SPLIT):  # from L2: what others stored may be old in this one's L1
    sums += tl.load(partial_at + split * (BLOCK_M * BLOCK_N), cache_modifier=".cg")"""


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


def _cost(spec: Gemm, target: Target, rows: int) -> str:
    shape, machine = shape_of(spec, rows), MACHINES[target.name]
    slow = "memory" if bound(shape, machine) == shape.compulsory else "the tensor cores"
    return (
        f"At {rows} rows: {shape.flops / 1e9:,.1f} GFLOP, {shape.compulsory / 1e6:,.1f} MB "
        f"if each operand moves once; the bound is {slow}."
    )


def _launcher(spec: Gemm, p: Product, name: str, kernels: tuple[Kernel, ...]) -> str:
    takes = f"a [rows, {spec.a_columns}] -> [rows, {spec.parts * spec.n}]"
    few = f"""\
config = pick({kernels[0].name}_configs, rows)
grid = (
    {_times(spec)}triton.cdiv({spec.n}, config["BLOCK_N"]),
    triton.cdiv(rows, config["BLOCK_M"]),
    config["SPLIT"],
)
tiles = grid[0] * grid[1] if config["SPLIT"] > 1 else 0
sums = tiles * config["SPLIT"] * config["BLOCK_M"] * config["BLOCK_N"]
partial = torch.empty(sums, dtype=torch.float32, device=a.device)
arrived = torch.zeros(tiles, dtype=torch.int32, device=a.device)
{kernels[0].name}[grid](
    {p.passed("partial, arrived")}, **config
)"""
    test = "if rows:" if len(kernels) == 1 else f"if 0 < rows <= {THIN}:"
    body = lines(test, inside(few, 1))
    if len(kernels) == 2:
        wide = 'config["BLOCK_N"] * config["HALVES"]' if p.halves else 'config["BLOCK_N"]'
        many = f"""\
config = pick({kernels[1].name}_configs, rows)
tiles = triton.cdiv(rows, config["BLOCK_M"]) * {_times(spec)}triton.cdiv({spec.n}, {wide})
{kernels[1].name}[(min(config["PROGRAMS"], tiles),)](
    {p.passed()}, **config
)"""
        body = lines(body, "elif rows:", inside(many, 1))
    return f'''
def {name}({p.parameters()}):
    """{takes}, a product with w [{spec.matrix[0]}, {spec.matrix[1]}]."""
    rows = a.shape[0]
    out = torch.empty((rows, {p.out_row}), dtype=torch.{spec.out}, device=a.device)
{inside(body, 1)}
    return out
'''


def _traffic(
    spec: Gemm,
    p: Product,
    target: Target,
    kernels: tuple[Kernel, ...],
    sizes: Mapping[str, int],
) -> Traffic:
    rows, machine = sizes["tokens"], MACHINES[target.name]
    shape = shape_of(spec, rows)
    kernel = kernels[-1] if rows > THIN else kernels[0]
    config = configured(kernel, rows)
    if "SPLIT" in config.constants:
        moved = thin_bytes(shape, config.constants, machine)
    else:
        moved = wide_bytes(shape, config.constants, machine)
    return Traffic(bytes=moved, bound=bound(shape, machine), flops=shape.flops)
