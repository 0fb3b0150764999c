"""Products of tokens with the matrices of their experts: BF16 and block-scaled FP8.

Two layouts of the tokens. *Contiguous*, for prefill: rows sorted by expert, those of expert ``e``
from ``offsets[e]`` to ``offsets[e + 1]``, as uneven as routing makes them, nothing padded.
*Masked*, for decode: ``capacity`` rows for each expert, of which the first ``counts[e]`` are
tokens, so that no shape depends on the routing. In both, how many tokens an expert has is read on
the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from backends.triton.families import product as text
from backends.triton.families.formats import BYTES, Quantised, supported
from backends.triton.families.product import Product, inside, lines
from backends.triton.families.product_example import operand
from backends.triton.families.tiling import (
    MACHINES,
    Shape,
    configured,
    meanwhile,
    thin_bytes,
    thin_configs,
    wide_bytes,
    wide_configs,
)
from backends.triton.kernel import Config, Kernel, Operator, Traffic, pointer
from backends.triton.targets import Target

THIN = 32  # tokens of an expert up to which weights are the tensor cores' rows


@dataclass(frozen=True)
class GroupedGemm:
    """``out[m] = w[expert of m] @ a[m]``; each expert has a matrix ``[n, k]``.

    Attributes:
        capacity: rows of each expert in the masked layout; None: the contiguous layout.
        weights, activations: formats of the operands; None: ``dtype``.
        dtype, out: torch's dtypes.
    """

    experts: int
    n: int
    k: int
    capacity: int | None = None
    weights: Quantised | None = None
    activations: Quantised | None = None
    dtype: str = "bfloat16"
    out: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.activations and not self.weights:
            raise ValueError("quantised activations need quantised weights")
        if self.activations and self.activations.rows != 1:
            raise ValueError("activations have a scale for each row")

    @property
    def block_k(self) -> int:
        if self.weights is None:
            return 64
        block = gcd(128, self.weights.columns)
        return gcd(block, self.activations.columns) if self.activations else block


def generate(spec: GroupedGemm, target: Target) -> Operator:
    """The operator ``name(a, [a_scales,] w[, w_scales], offsets or counts) -> out``.

    Contiguous: ``a`` [rows, K], ``offsets`` int32 [experts + 1] from 0, ``out`` [rows, N]; rows
    from ``offsets[experts]`` on are not written.
    Masked: ``a`` [experts, capacity, K], ``counts`` int32 [experts], ``out`` [experts, capacity,
    N], of which only tokens' rows are written; a last argument ``expected`` says how many tokens
    an expert has on average, which picks the tiles.
    ``a_scales`` [rows, tiles] in any strides, ``w`` [experts, N, K], ``w_scales`` [experts, ...].
    """
    supported(target, spec.weights, spec.activations)
    p = product_of(spec, target)
    name = f"grouped_gemm_{spec.experts}x{spec.n}x{spec.k}_{p.short}"
    if spec.capacity is not None:
        name += f"_masked_{spec.capacity}"
    thin = _thin(spec, p, f"{name}_few_rows", target)
    kernels: tuple[Kernel, ...] = (thin,)
    if spec.weights is None or spec.activations is not None:
        kernels = (thin, _wide(spec, p, f"{name}_kernel", target))
    return Operator(
        name=name,
        kernels=kernels,
        launcher=_launcher(spec, p, name, kernels),
        traffic=lambda sizes: _traffic(spec, target, kernels, sizes),
        dense=spec.activations is None,  # scales lie tile after tile
        shown={"tokens": 32768 if spec.capacity is None else 16 * spec.experts},
        example=lambda sizes, device: _example(spec, sizes["tokens"], device),
    )


def _example(spec: GroupedGemm, rows: int, device: str) -> tuple[Any, ...]:
    """Experts with equally many rows, near enough."""
    import torch

    w = operand((spec.experts,), spec.n, spec.k, spec.weights, spec.dtype, device)
    if spec.capacity is None:
        a = operand((), rows, spec.k, spec.activations, spec.dtype, device)
        shares = torch.arange(spec.experts + 1, device=device) * rows // spec.experts
        return *a, *w, shares.to(torch.int32)
    each = min(spec.capacity, max(1, rows // spec.experts))
    leading = (spec.experts,)
    a = operand(leading, spec.capacity, spec.k, spec.activations, spec.dtype, device)
    counts = torch.full((spec.experts,), each, dtype=torch.int32, device=device)
    return *a, *w, counts, each


def product_of(spec: GroupedGemm, target: Target) -> Product:
    a_dtype = spec.activations.element if spec.activations else spec.dtype
    w_dtype = spec.weights.element if spec.weights else spec.dtype
    by_row, scale_at = False, ""
    if spec.weights is not None:
        down, across = spec.weights.scales(spec.n, spec.k)
        by_row = spec.weights.rows % 128 != 0
        row = "(n0 + tl.arange(0, BLOCK_N))" if by_row else "n0"
        scale_at = f"(expert * {down} + {row} // {spec.weights.rows}) * {across}"
    return Product(
        n=spec.n,
        k=spec.k,
        w_rows=spec.experts * spec.n,
        w_columns=spec.k,
        column=0,
        a_row=spec.k,
        out_row=spec.n,
        transposed=False,
        weights=spec.weights,
        activations=spec.activations,
        dtype=spec.dtype,
        out=spec.out,
        by_row=by_row,
        descriptors=text.has_descriptors(target, spec.k, a_dtype, w_dtype, (spec.k,), spec.k),
        scale_at=scale_at,
        block_k=spec.block_k,
    )


def _tile(spec: GroupedGemm, wide: str) -> str:
    """From a tile's number to its expert, ``m0``, ``end`` and ``n0``."""
    row = "tl.load(offsets + expert)" if spec.capacity is None else f"expert * {spec.capacity}"
    end = (
        "tl.load(offsets + expert + 1)"
        if spec.capacity is None
        else "row + tl.load(counts + expert)"
    )
    return f"""\
# Expert by expert; in each, GROUP tiles of tokens down, then across: an expert's weights are read
# once, and what neighbours read stays in the L2 cache.
expert = tl.sum((last_tile <= tile).to(tl.int32))
of_expert = tile - tl.sum(tl.where(each < expert, m_tiles, 0)) * n_tiles
down = tl.sum(tl.where(each == expert, m_tiles, 0))
first = of_expert // (GROUP * n_tiles) * GROUP
high = min(down - first, GROUP)
row = {row}
m0 = row + (first + of_expert % (GROUP * n_tiles) % high) * BLOCK_M
end = {end}
n0 = of_expert % (GROUP * n_tiles) // high * {wide}
w_row = expert * N + n0"""


def _schedule(spec: GroupedGemm, wide: str) -> str:
    """Before the loop over tiles: how many each expert has."""
    experts = f"each < {spec.experts}"
    if spec.capacity is None:
        count = lines(
            f"count = tl.load(offsets + each + 1, {experts}, other=0)",
            f"count -= tl.load(offsets + each, {experts}, other=0)",
        )
    else:
        count = f"count = tl.load(counts + each, {experts}, other=0)"
    return lines(
        f"each = tl.arange(0, {1 << (spec.experts - 1).bit_length()})",
        count,
        "m_tiles = tl.cdiv(count, BLOCK_M)",
        f"n_tiles = tl.cdiv(N, {wide})",
        "last_tile = tl.cumsum(m_tiles, 0) * n_tiles",
        "tiles = tl.sum(m_tiles) * n_tiles",
        "for tile in tl.range(tl.program_id(0), tiles, PROGRAMS):",
    )


def _wide(spec: GroupedGemm, p: Product, name: str, target: Target) -> Kernel:
    counts: tuple[int | None, ...] = tuple(spec.experts * each for each in (64, 128, 256, 1024))
    configs, candidates = wide_configs(
        lambda rows: shape_of(spec, rows),
        target,
        scaled=p.scaled,
        halves=p.halves,
        widest=128 if p.scaled and not p.halves else 1 << (spec.n - 1).bit_length(),
        counts=(*counts, None),
        many=128 * spec.experts,
    )
    wide = "BLOCK_N * HALVES" if p.halves else "BLOCK_N"
    body = lines(
        p.constants(),
        f"WIDE: tl.constexpr = {wide}",
        text.wide_descriptors(p, _rows(spec), spec.k),
        _schedule(spec, "WIDE"),
        inside(lines(_tile(spec, "WIDE"), text.wide_sums(p), text.wide_store(p)), 1),
    )
    about = f"""{_about(spec, p)}
A tile of BLOCK_M tokens of one expert by {"HALVES times " if p.halves else ""}BLOCK_N,
{p.block_k} of K at a time{", each promoted to float32" if p.scaled else ""}. PROGRAMS programs \
take tile after tile.
{_cost(spec, target, 128)}"""
    parameters = ["BLOCK_M", "BLOCK_N", "GROUP", *(["HALVES"] if p.halves else []), "PROGRAMS"]
    return _kernel(spec, p, name, parameters, about, body, configs, candidates, wide=True)


def _thin(spec: GroupedGemm, p: Product, name: str, target: Target) -> Kernel:
    configs, candidates = thin_configs(
        lambda rows: shape_of(spec, rows),
        target,
        block_k=p.block_k,
        k_tiles=p.k_tiles,
        narrowest=spec.n,
        counts=(spec.experts * 8, spec.experts * 16, None),
        split=False,
        most=spec.experts * THIN,
        tallest=64,
    )
    sums = text.thin_sums(p, "0", "K_TILES")
    body = lines(
        p.constants(),
        _schedule(spec, "BLOCK_N"),
        inside(lines(_tile(spec, "BLOCK_N"), sums, text.thin_store(p)), 1),
    )
    about = f"""{_about(spec, p)}
For few tokens of an expert: weights are the tensor cores' rows, tokens their columns, so a tile is
BLOCK_N weights by BLOCK_M tokens, {p.block_k} of K at a time. PROGRAMS programs take tile after
tile.
{_cost(spec, target, 8)}"""
    parameters = ["BLOCK_M", "BLOCK_N", "GROUP", "PROGRAMS"]
    return _kernel(spec, p, name, parameters, about, body, configs, candidates, wide=False)


def _kernel(
    spec: GroupedGemm,
    p: Product,
    name: str,
    parameters: list[str],
    about: str,
    body: str,
    configs: tuple[Config, ...],
    candidates: tuple[Config, ...],
    wide: bool,
) -> Kernel:
    arguments = p.arguments((pointer("offsets" if spec.capacity is None else "counts", "int32"),))
    return Kernel(
        name=name,
        source=text.source(name, arguments, parameters, about, body),
        arguments=arguments,
        configs=configs,
        candidates=candidates,
        helpers=p.helpers(wide=wide),
    )


def _rows(spec: GroupedGemm) -> str:
    return "rows" if spec.capacity is None else str(spec.experts * spec.capacity)


def _about(spec: GroupedGemm, p: Product) -> str:
    maths = "out[m,n] = sum_k a[m,k] * w[e,n,k]"
    if p.scaled:
        maths = (
            "out[m,n] = sum_j a_scale[m,j] * w_scale[e,n,j] * sum_{k in tile j} a[m,k] * w[e,n,k]"
        )
    elif spec.weights:
        maths = "out[m,n] = sum_k a[m,k] * (w_scale * w)[e,n,k]"
    where = "rows offsets[e] to offsets[e + 1]"
    if spec.capacity is not None:
        where = f"the first counts[e] of the {spec.capacity} rows from e * {spec.capacity}"
    return f"""{maths}, e the expert of row m.

{spec.experts} experts, N = {spec.n}, K = {spec.k}; the tokens of expert e are {where}."""


def shape_of(spec: GroupedGemm, rows: int) -> Shape:
    """What the model of the machine is asked: as if every expert had as many tokens."""
    a = spec.activations.stored_bytes(1, spec.k) / spec.k if spec.activations else None
    w = spec.weights.stored_bytes(spec.n, spec.k) / (spec.n * spec.k) if spec.weights else None
    each = BYTES[spec.dtype]
    return Shape(
        m=rows,
        n=spec.n,
        k=spec.k,
        a_bytes=each if a is None else a,
        w_bytes=each if w is None else w,
        out_bytes=BYTES[spec.out],
        groups=spec.experts,
    )


def _cost(spec: GroupedGemm, target: Target, each: int) -> str:
    shape, machine = shape_of(spec, each * spec.experts), MACHINES[target.name]
    slow = "memory" if meanwhile(shape, machine) <= shape.compulsory else "the tensor cores"
    return (
        f"With {each} tokens an expert: {shape.flops / 1e9:,.1f} GFLOP, "
        f"{shape.compulsory / 1e6:,.1f} MB if each operand\nmoves once; the bound is {slow}."
    )


def _launcher(spec: GroupedGemm, p: Product, name: str, kernels: tuple[Kernel, ...]) -> str:
    experts = spec.experts
    if spec.capacity is None:
        given, rows, leading = "offsets", "rows = a.shape[0]", "rows"
        about = f"a [rows, {spec.k}], sorted by expert -> [rows, {spec.n}]"
        scales = "*a_scales.stride()"
    else:
        given, rows = (
            "counts",
            f"rows = {experts} * ({spec.capacity} if expected is None else expected)",
        )
        leading = f"{experts}, {spec.capacity}"
        about = f"a [{leading}, {spec.k}] -> [{leading}, {spec.n}], the first counts of each expert"
        scales = "*a_scales.stride()[1:]"
    passed = p.passed(given, scales)

    def launch(kernel: Kernel, wide: str) -> str:
        # Rows of several experts never share a tile: at most one more for each expert.
        tiles = f'tiles = triton.cdiv(rows, config["BLOCK_M"]) + min(rows, {experts})'
        if spec.capacity is not None:
            tiles = f'tiles = {experts} * triton.cdiv({spec.capacity}, config["BLOCK_M"])'
        return f"""\
config = pick({kernel.name}_configs, rows)
{tiles}
grid = (min(config["PROGRAMS"], tiles * triton.cdiv({spec.n}, {wide})),)
{kernel.name}[grid](
    {passed}, **config
)"""

    few = launch(kernels[0], 'config["BLOCK_N"]')
    if len(kernels) == 1:
        body = lines("if rows:", inside(few, 1))
    else:
        wide = 'config["BLOCK_N"] * config["HALVES"]' if p.halves else 'config["BLOCK_N"]'
        many = launch(kernels[1], wide)
        many = lines("triton.set_allocator(scratch)", many) if p.descriptors else many
        body = lines(
            f"if 0 < rows <= {THIN * experts}:", inside(few, 1), "elif rows:", inside(many, 1)
        )
    return f'''
def {name}({p.parameters()}, {given}{"" if spec.capacity is None else ", expected=None"}):
    """{about}."""
    {rows}
    out = torch.empty(({leading}, {spec.n}), dtype=torch.{spec.out}, device=a.device)
{inside(body, 1)}
    return out
'''


def _traffic(
    spec: GroupedGemm, target: Target, kernels: tuple[Kernel, ...], sizes: Mapping[str, int]
) -> Traffic:
    rows, machine = sizes["tokens"], MACHINES[target.name]
    shape = shape_of(spec, rows)
    kernel = kernels[-1] if rows > THIN * spec.experts else kernels[0]
    given = configured(kernel, rows).constants
    thin = kernel is kernels[0]
    moved = thin_bytes(shape, given, machine) if thin else wide_bytes(shape, given, machine)
    return Traffic(
        bytes=moved, least=shape.compulsory, flops=shape.flops, meanwhile=meanwhile(shape, machine)
    )
