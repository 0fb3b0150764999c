"""RMSNorm of rows, after a residual is added where there is one, quantised where that is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backends.triton.families.formats import (
    BYTES,
    LANGUAGE,
    Quantised,
    quantising_helpers,
    supported,
)
from backends.triton.families.quantise import (
    allocate_scales,
    as_argument,
    scale_arguments,
    tile_lanes,
)
from backends.triton.families.rows_example import random_rows
from backends.triton.kernel import Config, Kernel, Operator, Traffic, pointer, size
from backends.triton.targets import Target

LANES = 1024  # of a program at least: narrow rows share one


@dataclass(frozen=True)
class RMSNorm:
    """``y = x * rsqrt(mean(x^2) + eps) * gain``, rows ``[width]``.

    Attributes:
        dtype: of x, gain and y; sums are float32.
        residual: x is the sum of two tensors; the sum is returned too.
        to: y is quantised, from float32, to a row's tiles of this format.
        keep: y is returned beside its codes.
        rounds_before_gain: ``x * rsqrt(...)`` is rounded to ``dtype`` before it meets the gain.
    """

    width: int
    eps: float
    dtype: str = "bfloat16"
    residual: bool = False
    to: Quantised | None = None
    keep: bool = False
    rounds_before_gain: bool = False

    def __post_init__(self) -> None:
        if self.to and self.to.rows != 1:
            raise ValueError(f"tiles of {self.to.rows} rows are not found row by row")

    @property
    def plain(self) -> bool:
        """y is stored in ``dtype``."""
        return self.to is None or self.keep


def generate(spec: RMSNorm, target: Target) -> Operator:
    """The operator ``name(x, [added,] gain) -> results``.

    Results: y, then codes [rows, width] and scales [rows, tiles], then x + added, each where the
    spec has it; a single one is not in a tuple.
    """
    supported(target, spec.to)
    name = f"rms_norm_{spec.width}" + ("_residual" if spec.residual else "")
    if spec.dtype != "bfloat16":
        name += f"_{spec.dtype}"
    if spec.rounds_before_gain:
        name += "_rounded"
    if spec.to:
        name += f"_{spec.to.short}" + ("_kept" if spec.keep else "")
    return Operator(
        name=name,
        kernels=(_kernel(spec, f"{name}_kernel"),),
        launcher=_launcher(spec, name),
        traffic=lambda sizes: _traffic(spec, sizes),
        shown={"tokens": 4096},
        example=lambda sizes, device: _example(spec, sizes["tokens"], device),
    )


def _example(spec: RMSNorm, rows: int, device: str) -> tuple[Any, ...]:
    values = [random_rows(rows, spec.width, spec.dtype, device) for _ in range(1 + spec.residual)]
    return (*values, random_rows(1, spec.width, spec.dtype, device)[0])


def _row_bytes(spec: RMSNorm) -> int:
    tensors = 1 + spec.plain + 2 * spec.residual
    return tensors * spec.width * BYTES[spec.dtype] + (
        spec.to.stored_bytes(1, spec.width) if spec.to else 0
    )


def _kernel(spec: RMSNorm, name: str) -> Kernel:
    width, dtype = spec.width, LANGUAGE[spec.dtype]
    tensors = ["x", *(["added"] if spec.residual else []), "gain"]
    results = [*(["y"] if spec.plain else []), *(["total"] if spec.residual else [])]
    arguments = [pointer(tensor, spec.dtype) for tensor in (*tensors, *results)]
    if spec.to:
        arguments += [pointer("codes", spec.to.element), *scale_arguments(spec.to)]
    arguments.append(size("rows"))
    signature = ", ".join(argument.name for argument in arguments)

    maths = "y = v * rsqrt(mean(v^2) + eps) * gain, v = x" + (" + added" if spec.residual else "")
    load = "value = tl.load(x + at, inside, other=0.0).to(tl.float32)"
    if spec.residual:
        load += f"""
    value += tl.load(added + at, inside, other=0.0).to(tl.float32)
    value = value.to({dtype}).to(tl.float32)  # the sum is kept in x's dtype
    tl.store(total + at, value.to({dtype}), inside)"""
    if spec.to is None:
        block = 1 << (width - 1).bit_length()
        lanes = "lane = tl.arange(0, BLOCK)"
        each, mean, new = "[:, None]", "tl.sum(value * value, 1)", "[None, :]"
    else:
        tiles = spec.to.scales(1, width)[1]
        block = 1 << (tiles - 1).bit_length()
        maths += f";\n    codes = y / scale, a scale for each {spec.to.columns} of a row"
        lanes = tile_lanes(spec.to)
        each, mean, new = "[:, None, None]", "tl.sum(tl.sum(value * value, 2), 1)", "[None, :, :]"
    unit = "value * scale" + each
    rounded = f"({unit}).to({dtype}).to(tl.float32)" if spec.rounds_before_gain else unit
    store = f"\n    tl.store(y + at, y_value.to({dtype}), inside)" if spec.plain else ""
    if spec.to:
        found = quantising_helpers(spec.to)[-1][0]
        store += f"""
    stored, step = {found}(largest(y_value, 2))
    code = tl.div_rn(y_value, tl.broadcast_to(step[:, :, None], y_value.shape))
    tl.store(codes + at, code.to({LANGUAGE[spec.to.element]}), inside)
    there = (row < rows)[:, None] & (tile < {tiles})[None, :]
    tl.store(scales + row[:, None] * scales_row + tile[None, :] * scales_tile, stored, there)"""
    source = f'''
@triton.jit
def {name}({signature}, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """{maths}.

    Rows [{width}], eps {spec.eps}. A program has ROWS rows, which stay in its registers.
    A row moves {_row_bytes(spec):,} bytes and takes {4 * width:,} FLOPs: the bound is memory, each
    operand once.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    {lanes}
    inside = (row < rows){each} & (lane < {width}){new}
    at = row.to(tl.int64){each} * {width} + lane{new}
    {load}
    weight = tl.load(gain + lane{new}, (lane < {width}){new}, other=0.0).to(tl.float32)
    mean = {mean} / {width}
    scale = tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + {spec.eps}))
    y_value = {rounded} * weight{store}
'''
    wide = block * (spec.to.columns if spec.to else 1)
    rows = max(1, LANES // wide)
    warps = max(1, min(8, wide * rows // 512))
    given = {"ROWS": rows, "BLOCK": block}
    return Kernel(
        name=name,
        source=source,
        arguments=tuple(arguments),
        configs=(Config(given, num_warps=warps),),
        candidates=tuple(Config(given, num_warps=n) for n in (warps, 4, 8, 16, 2)),
        helpers=quantising_helpers(spec.to) if spec.to else (),
    )


def _launcher(spec: RMSNorm, name: str) -> str:
    parameters = "x, added, gain" if spec.residual else "x, gain"
    passed, returned, allocated = [parameters], [], []
    if spec.plain:
        allocated.append("y = torch.empty_like(x)")
        passed.append("y")
        returned.append("y")
    if spec.residual:
        allocated.append("total = torch.empty_like(x)")
        passed.append("total")
    if spec.to:
        tiles = spec.to.scales(1, spec.width)[1]
        allocated.append(f"codes = torch.empty_like(x, dtype=torch.{spec.to.element})")
        allocated.append(allocate_scales(spec.to, "rows", tiles))
        passed.append(f"codes, {as_argument(spec.to)}")
        returned.append("codes, scales")
    if spec.residual:
        returned.append("total")
    about = f"RMSNorm of x{' + added' if spec.residual else ''} [..., {spec.width}]"
    about += ", in codes" if spec.to else ""
    about += ", and the sum" if spec.residual else ""
    body = "\n    ".join(allocated)
    return f'''
def {name}({parameters}):
    """{about}; gain [{spec.width}]."""
    rows = x.numel() // {spec.width}
    {body}
    if rows:
        config = pick({name}_kernel_configs, rows)
        grid = (triton.cdiv(rows, config["ROWS"]),)
        {name}_kernel[grid]({", ".join(passed)}, rows, **config)
    return {", ".join(returned)}
'''


def _traffic(spec: RMSNorm, sizes: Mapping[str, int]) -> Traffic:
    rows = sizes["tokens"]
    moved = rows * _row_bytes(spec) + spec.width * BYTES[spec.dtype]
    return Traffic(bytes=moved, least=moved, flops=4 * spec.width * rows)
