"""Products of tokens with a stored matrix or a part of it: BF16, block-scaled FP8, FP8 weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.triton.families import product as text
from backends.triton.families.formats import supported
from backends.triton.families.gemm_spec import (
    Gemm,
    columns,
    name_of,
    part,
    product_of,
    shape_of,
    times,
)
from backends.triton.families.product import Product, inside, lines
from backends.triton.families.product_example import operand
from backends.triton.families.tiling import (
    MACHINES,
    configured,
    meanwhile,
    thin_bytes,
    thin_configs,
    thin_seconds,
    wide_bytes,
    wide_configs,
    wide_seconds,
)
from backends.triton.kernel import Config, Kernel, Operator, Traffic, pointer
from backends.triton.targets import Target

__all__ = ["Gemm", "generate"]

FEW = (16, 32, 64, 128, 256)  # rows for which weights may be the tensor cores' rows


def generate(spec: Gemm, target: Target) -> Operator:
    """The operator ``name(a, [a_scales,] w[, w_scales]) -> out``.

    ``a`` [rows, K] (of parts with own columns [rows, parts * K]), ``a_scales`` [rows, tiles] in any
    strides, ``w`` and ``w_scales`` as they are stored, ``out`` [rows, parts * N].
    """
    supported(target, spec.weights, spec.activations)
    p = product_of(spec, target)
    name = name_of(spec, p)
    only = spec.transposed or (spec.weights is not None and spec.activations is None)
    kernels: tuple[Kernel, ...]
    few = None
    if only:
        kernels = (_thin(spec, p, f"{name}_few_rows", target, (*FEW, None)),)
    else:
        wide = _wide(spec, p, f"{name}_kernel", target)
        few = _few(spec, p, target, wide)
        counts = (*(count for count in FEW if count < few), None)
        kernels = (_thin(spec, p, f"{name}_few_rows", target, counts, few), wide)
    return Operator(
        name=name,
        kernels=kernels,
        launcher=_launcher(spec, p, name, kernels, few),
        traffic=lambda sizes: _traffic(spec, target, kernels, few, sizes),
        shown={"tokens": 4096},
        dense=spec.activations is None and spec.a_row is None,  # scales lie tile after tile
        example=lambda sizes, device: _example(spec, sizes["tokens"], device),
    )


def _example(spec: Gemm, rows: int, device: str) -> tuple[Any, ...]:
    wide = spec.a_row or spec.a_columns
    a, *a_scales = operand((), rows, wide, spec.activations, spec.dtype, device)
    w = operand((), *spec.matrix, spec.weights, spec.dtype, device)
    return a[:, : spec.a_columns], *a_scales, *w


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
    a_column, a_tile, out_column = columns(spec, p)
    wide = "BLOCK_N * HALVES" if p.halves else "BLOCK_N"
    loop = lines(
        "# GROUP tiles down, then across: what neighbours read stays in the L2 cache.",
        "strip = GROUP * n_tiles",
        "first = tile // strip * GROUP",
        "high = min(m_tiles - first, GROUP)",
        "m0 = (first + tile % strip % high) * BLOCK_M",
        "across = tile % strip // high",
        part(spec, "wide"),
        text.wide_sums(p, a_column, a_tile),
        text.wide_store(p, out_column),
    )
    body = lines(
        p.constants(),
        f"WIDE: tl.constexpr = {wide}",
        "end = rows",
        text.wide_descriptors(p, "rows", spec.a_columns),
        "m_tiles = tl.cdiv(rows, BLOCK_M)",
        f"n_tiles = {times(spec)}tl.cdiv(N, WIDE)",
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
        helpers=p.helpers(wide=True),
    )


def _widest(spec: Gemm, p: Product) -> int:
    """Columns of a tile at most: no wider than the part, rounded up; one half if scales differ."""
    widest = 1 << (spec.n - 1).bit_length()
    return min(widest, 128) if p.scaled and not p.halves else widest


PARTIAL = (pointer("partial", "float32"), pointer("arrived", "int32"))


Counts = tuple[int | None, ...]


def _thin_configs(
    spec: Gemm, p: Product, target: Target, counts: Counts, most: int
) -> tuple[tuple[Config, ...], tuple[Config, ...]]:
    return thin_configs(
        lambda rows: shape_of(spec, rows),
        target,
        block_k=p.block_k,
        k_tiles=p.k_tiles,
        narrowest=spec.n,
        counts=counts,
        split=True,
        most=most,
        tallest=128 if spec.weights is None else 64,
    )


def _few(spec: Gemm, p: Product, target: Target, wide: Kernel) -> int:
    """Up to how many rows a thin kernel is faster, by the model; 64 at least."""
    machine, few = MACHINES[target.name], 64
    for rows in (128, 256):
        shape = shape_of(spec, rows)
        thin = _thin_configs(spec, p, target, (None,), rows)[0][0]
        config = configured(wide, rows)
        programs = config.constants["PROGRAMS"] // machine.processors
        if few == rows // 2 and thin_seconds(shape, thin, machine) < wide_seconds(
            shape, config, machine, programs, p.scaled
        ):
            few = rows
    return few


def _thin(
    spec: Gemm, p: Product, name: str, target: Target, counts: Counts, most: int = 4096
) -> Kernel:
    configs, candidates = _thin_configs(spec, p, target, counts, most)
    a_column, a_tile, out_column = columns(spec, p)
    body = lines(
        p.constants(),
        "# Programs that share weights are neighbours: those come from memory once.",
        "m0 = tl.program_id(0) * BLOCK_M",
        "across = tl.program_id(1)",
        "end = rows",
        part(spec, "thin"),
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


def _cost(spec: Gemm, target: Target, rows: int) -> str:
    shape, machine = shape_of(spec, rows), MACHINES[target.name]
    slow = "memory" if meanwhile(shape, machine) <= shape.compulsory else "the tensor cores"
    return (
        f"At {rows} rows: {shape.flops / 1e9:,.1f} GFLOP, {shape.compulsory / 1e6:,.1f} MB "
        f"if each operand moves once; the bound is {slow}."
    )


def _launcher(
    spec: Gemm, p: Product, name: str, kernels: tuple[Kernel, ...], few: int | None
) -> str:
    takes = f"a [rows, {spec.a_columns}] -> [rows, {spec.parts * spec.n}]"
    thin = f"""\
config = pick({kernels[0].name}_configs, rows)
grid = (
    triton.cdiv(rows, config["BLOCK_M"]),
    {times(spec)}triton.cdiv({spec.n}, config["BLOCK_N"]),
    config["SPLIT"],
)
tiles = grid[0] * grid[1] if config["SPLIT"] > 1 else 0
sums = tiles * config["SPLIT"] * config["BLOCK_M"] * config["BLOCK_N"]
partial = torch.empty(sums, dtype=torch.float32, device=a.device)
arrived = torch.zeros(tiles, dtype=torch.int32, device=a.device)
{kernels[0].name}[grid](
    {p.passed("partial, arrived")}, **config
)"""
    test = "if rows:" if few is None else f"if 0 < rows <= {few}:"
    body = lines(test, inside(thin, 1))
    if len(kernels) == 2:
        wide = 'config["BLOCK_N"] * config["HALVES"]' if p.halves else 'config["BLOCK_N"]'
        many = f"""\
config = pick({kernels[1].name}_configs, rows)
tiles = triton.cdiv(rows, config["BLOCK_M"]) * {times(spec)}triton.cdiv({spec.n}, {wide})
{kernels[1].name}[(min(config["PROGRAMS"], tiles),)](
    {p.passed()}, **config
)"""
        many = lines("triton.set_allocator(scratch)", many) if p.descriptors else many
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
    target: Target,
    kernels: tuple[Kernel, ...],
    few: int | None,
    sizes: Mapping[str, int],
) -> Traffic:
    rows, machine = sizes["tokens"], MACHINES[target.name]
    shape = shape_of(spec, rows)
    kernel = kernels[-1] if few is not None and rows > few else kernels[0]
    config = configured(kernel, rows)
    if "SPLIT" in config.constants:
        moved = thin_bytes(shape, config.constants, machine)
    else:
        moved = wide_bytes(shape, config.constants, machine)
    return Traffic(
        bytes=moved, least=shape.compulsory, flops=shape.flops, meanwhile=meanwhile(shape, machine)
    )
