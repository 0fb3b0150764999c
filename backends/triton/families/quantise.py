"""Quantising rows: a scale for each tile of a row, and the codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backends.triton.families.formats import (
    BYTES,
    LANGUAGE,
    SHORT,
    Quantised,
    quantising_helpers,
    supported,
)
from backends.triton.families.rows_example import random_rows
from backends.triton.kernel import Argument, Config, Kernel, Operator, Traffic, pointer, size
from backends.triton.targets import Target


@dataclass(frozen=True)
class Quantise:
    """Rows ``[width]`` of ``dtype`` to codes and scales.

    Attributes:
        to: a row's tiles (``to.rows`` is 1).
    """

    width: int
    to: Quantised
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.to.rows != 1:
            raise ValueError(f"tiles of {self.to.rows} rows are not found row by row")


def generate(spec: Quantise, target: Target) -> Operator:
    """The operator ``name(x) -> (codes, scales)``; shapes [rows, width] and [rows, tiles].

    Scales lie in memory with the rows next to each other: products read those of many rows for one
    tile at a time.
    """
    supported(target, spec.to)
    name = f"quantise_{spec.width}_{SHORT[spec.dtype]}_{spec.to.short}"
    return Operator(
        name=name,
        kernels=(_kernel(spec, f"{name}_kernel"),),
        launcher=_launcher(spec, name),
        traffic=lambda sizes: _traffic(spec, sizes),
        shown={"tokens": 4096},
        example=lambda sizes, device: (
            random_rows(sizes["tokens"], spec.width, spec.dtype, device),
        ),
    )


def scale_arguments(to: Quantised, name: str = "scales") -> tuple[Argument, ...]:
    """Scales, and how far apart those of two rows and of two tiles are."""
    return pointer(name, to.scale), size(f"{name}_row"), size(f"{name}_tile")


def allocate_scales(to: Quantised, rows: str, tiles: int, name: str = "scales") -> str:
    """Text that allocates scales [rows, tiles]."""
    return f"{name} = torch.empty(({tiles}, {rows}), dtype=torch.{to.scale}, device=x.device).T"


def as_argument(to: Quantised, name: str = "scales") -> str:
    """Text that passes scales to a kernel: exponents are bytes to Triton."""
    tensor = name if to.scale in LANGUAGE else f"{name}.view(torch.uint8)"
    return f"{tensor}, *{name}.stride()"


def tile_lanes(to: Quantised) -> str:
    """Text that numbers BLOCK tiles of a row, and the elements in them [BLOCK, columns]."""
    return f"""\
tile = tl.arange(0, BLOCK)
    lane = tile[:, None] * {to.columns} + tl.arange(0, {to.columns})[None, :]"""


def _kernel(spec: Quantise, name: str) -> Kernel:
    to, width = spec.to, spec.width
    tiles = to.scales(1, width)[1]
    moved = width * BYTES[spec.dtype] + to.stored_bytes(1, width)
    inside = f" & (lane < {width})" if width % to.columns else ""
    scale = quantising_helpers(to)[-1][0]
    source = f'''
@triton.jit
def {name}(
    x, codes, scales, scales_row, scales_tile, rows, TILES: tl.constexpr, ROWS: tl.constexpr
):
    """codes = x / scale, a scale for each {to.columns} of a row; rows [{width}].

    scale = max|x| / {to.largest:g}, 1 for a tile of zeros; to nearest even. What is greater than
    {to.largest:g} saturates, as the conversion of the hardware does.
    A program has ROWS rows of TILES tiles, once through registers. A row moves {moved:,} bytes and
    takes {3 * width:,} FLOPs: the bound is memory, each operand once.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    lane = tile[:, None] * {to.columns} + tl.arange(0, {to.columns})[None, :]
    there = (row < rows)[:, None] & (tile < {tiles})[None, :]
    inside = there[:, :, None]{inside.replace("lane", "lane[None, :, :]")}
    at = row.to(tl.int64)[:, None, None] * {width} + lane[None, :, :]
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    stored, scale = {scale}(largest(value, 2))
    code = tl.div_rn(value, tl.broadcast_to(scale[:, :, None], value.shape))
    tl.store(codes + at, code.to({LANGUAGE[to.element]}), inside)
    tl.store(scales + row[:, None] * scales_row + tile[None, :] * scales_tile, stored, there)
'''
    tried = ways(tiles, to.columns, 4096)
    return Kernel(
        name=name,
        source=source,
        arguments=(
            pointer("x", spec.dtype),
            pointer("codes", to.element),
            *scale_arguments(to),
            size("rows"),
        ),
        configs=tried[:1],
        candidates=tried,
        helpers=quantising_helpers(to),
    )


def ways(tiles: int, columns: int, first: int) -> tuple[Config, ...]:
    """Tiles and rows of a program, that of ``first`` elements in front.

    16 bytes a load, enough loads in flight, and 8 rows where there are enough elements: then scales
    fill the 32 bytes that memory is written in.
    """
    found = []
    for elements in sorted((1024, 2048, 4096, 8192), key=lambda n: n != first):
        for wanted in (8, 1):
            rows = max(1, min(wanted, elements // columns))
            taken = max(1, min(1 << (tiles - 1).bit_length(), elements // (rows * columns)))
            rows = max(1, elements // (taken * columns))
            config = Config({"TILES": taken, "ROWS": rows}, num_warps=max(1, elements // 1024))
            if config not in found:
                found.append(config)
    return tuple(found)


def _launcher(spec: Quantise, name: str) -> str:
    to = spec.to
    tiles = to.scales(1, spec.width)[1]
    return f'''
def {name}(x):
    """Codes [rows, {spec.width}] and scales [rows, {tiles}] of x [rows, {spec.width}]."""
    rows = x.shape[0]
    codes = torch.empty_like(x, dtype=torch.{to.element})
    {allocate_scales(to, "rows", tiles)}
    if rows:
        config = pick({name}_kernel_configs, rows)
        grid = (triton.cdiv(rows, config["ROWS"]), triton.cdiv({tiles}, config["TILES"]))
        {name}_kernel[grid](x, codes, {as_argument(to)}, rows, **config)
    return codes, scales
'''


def _traffic(spec: Quantise, sizes: Mapping[str, int]) -> Traffic:
    rows = sizes["tokens"]
    moved = rows * (spec.width * BYTES[spec.dtype] + spec.to.stored_bytes(1, spec.width))
    return Traffic(bytes=moved, least=moved, flops=3 * spec.width * rows)
