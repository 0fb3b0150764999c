"""Gated units: an activation of one half times the other, quantised where that is wanted."""

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
    ways,
)
from backends.triton.families.rows_example import random_rows
from backends.triton.kernel import Kernel, Operator, Traffic, pointer, size
from backends.triton.targets import Target

SILU = "gate * tl.sigmoid(gate)"


@dataclass(frozen=True)
class Gated:
    """``y = activation(gate) * up``, rows ``[width]``.

    Attributes:
        dtype: of gate, up and y; the arithmetic is float32.
        activation: text of Triton over ``gate``, a float32 tensor.
        name: of the activation, in the kernel's name.
        stacked: gate and up lie in one tensor [rows, 2 * width], gate first.
        to: y is quantised, from float32, to a row's tiles of this format.
        capacity: rows are [experts, capacity], the first ``counts[e]`` of each are tokens, and
            nothing else is read or written; None: all are.
    """

    width: int
    dtype: str = "bfloat16"
    activation: str = SILU
    name: str = "silu"
    stacked: bool = False
    to: Quantised | None = None
    capacity: int | None = None

    def __post_init__(self) -> None:
        if self.to and self.to.rows != 1:
            raise ValueError(f"tiles of {self.to.rows} rows are not found row by row")


def generate(spec: Gated, target: Target) -> Operator:
    """The operator ``name(gate, up[, counts]) -> y``, or ``-> codes, scales``.

    Stacked, ``gate, up`` is one tensor. With a capacity, tensors are [experts, capacity, ...].
    """
    supported(target, spec.to)
    name = f"gated_{spec.name}_{spec.width}" + ("_stacked" if spec.stacked else "")
    if spec.dtype != "bfloat16":
        name += f"_{spec.dtype}"
    if spec.to:
        name += f"_{spec.to.short}"
    if spec.capacity is not None:
        name += f"_masked_{spec.capacity}"
    return Operator(
        name=name,
        kernels=(_kernel(spec, f"{name}_kernel"),),
        launcher=_launcher(spec, name),
        traffic=lambda sizes: _traffic(spec, sizes),
        shown={"tokens": 4096},
        example=lambda sizes, device: _example(spec, sizes["tokens"], device),
    )


def _example(spec: Gated, rows: int, device: str) -> tuple[Any, ...]:
    import torch

    widths = [2 * spec.width] if spec.stacked else [spec.width, spec.width]
    values = [random_rows(rows, width, spec.dtype, device) for width in widths]
    if spec.capacity is None:
        return tuple(values)
    experts = max(1, rows // spec.capacity)
    padded = [x.repeat(spec.capacity, 1)[: experts * spec.capacity] for x in values]
    counts = torch.full((experts,), spec.capacity // 2, dtype=torch.int32, device=device)
    return (*(x.view(experts, spec.capacity, -1) for x in padded), counts)


def _row_bytes(spec: Gated) -> int:
    y = spec.to.stored_bytes(1, spec.width) if spec.to else spec.width * BYTES[spec.dtype]
    return 2 * spec.width * BYTES[spec.dtype] + y


def _kernel(spec: Gated, name: str) -> Kernel:
    width, columns = spec.width, spec.to.columns if spec.to else 128
    tiles = -(-width // columns)
    tensors = ["both"] if spec.stacked else ["gate_in", "up_in"]
    arguments = [pointer(tensor, spec.dtype) for tensor in tensors]
    if spec.to:
        arguments += [pointer("codes", spec.to.element), *scale_arguments(spec.to)]
    else:
        arguments += [pointer("y", spec.dtype)]
    if spec.capacity is not None:
        arguments += [pointer("counts", "int32")]
    arguments.append(size("rows"))
    signature = ", ".join(argument.name for argument in arguments)

    source_row = "source" if spec.stacked else "at"
    gate, up = (f"both + {source_row}", f"both + {source_row} + {width}")
    if not spec.stacked:
        gate, up = "gate_in + at", "up_in + at"
    rows = "there = row < rows"
    if spec.capacity is not None:
        rows += f"""
    count = tl.load(counts + row // {spec.capacity}, there, other=0)
    there = there & (row % {spec.capacity} < count)"""
    source_at = (
        f"\n    source = row.to(tl.int64)[:, None, None] * {2 * width} + lane[None, :, :]"
        if spec.stacked
        else ""
    )
    inside = f"there[:, None, None] & (lane < {width})[None, :, :]"
    if spec.to:
        found = quantising_helpers(spec.to)[-1][0]
        maths = f"y = activation(gate) * up; codes = y / scale, a scale for each {columns} of a row"
        store = f"""\
    stored, scale = {found}(largest(value, 2))
    code = tl.div_rn(value, tl.broadcast_to(scale[:, :, None], value.shape))
    tl.store(codes + at, code.to({LANGUAGE[spec.to.element]}), inside)
    scales_at = scales + row[:, None] * scales_row + tile[None, :] * scales_tile
    tl.store(scales_at, stored, there[:, None] & (tile < {tiles})[None, :])"""
    else:
        maths = "y = activation(gate) * up"
        store = f"    tl.store(y + at, value.to({LANGUAGE[spec.dtype]}), inside)"
    source = f'''
@triton.jit
def {name}({signature}, TILES: tl.constexpr, ROWS: tl.constexpr):
    """{maths}; activation {spec.name}.

    Rows [{width}]. A program has ROWS rows of TILES tiles of {columns}, once through registers.
    A row moves {_row_bytes(spec):,} bytes and takes {5 * width:,} FLOPs: the bound is memory, each
    operand once.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    lane = tile[:, None] * {columns} + tl.arange(0, {columns})[None, :]
    {rows}
    inside = {inside}
    at = row.to(tl.int64)[:, None, None] * {width} + lane[None, :, :]{source_at}
    gate = tl.load({gate}, inside, other=0.0).to(tl.float32)
    up = tl.load({up}, inside, other=0.0).to(tl.float32)
    value = {spec.activation} * up
{store}
'''
    tried = ways(tiles, columns, 2048)
    return Kernel(
        name=name,
        source=source,
        arguments=tuple(arguments),
        configs=tried[:1],
        candidates=tried,
        helpers=quantising_helpers(spec.to) if spec.to else (),
    )


def _launcher(spec: Gated, name: str) -> str:
    tiles = -(-spec.width // (spec.to.columns if spec.to else 128))
    given = "x" if spec.stacked else "gate, up"
    x = given.partition(",")[0]
    masked = ", counts" if spec.capacity is not None else ""
    shape = f"(*{x}.shape[:-1], {spec.width})"
    if spec.to:
        allocated = f"""\
codes = torch.empty({shape}, dtype=torch.{spec.to.element}, device={x}.device)
    {allocate_scales(spec.to, "rows", tiles).replace("x.device", f"{x}.device")}"""
        passed, returned = f"codes, {as_argument(spec.to)}", "codes, scales"
        if spec.capacity is not None:
            returned = f"codes, scales.unflatten(0, (-1, {spec.capacity}))"
    else:
        allocated = f"y = torch.empty({shape}, dtype=torch.{spec.dtype}, device={x}.device)"
        passed, returned = "y", "y"
    return f'''
def {name}({given}{masked}):
    """{spec.name}(gate) * up{", in codes" if spec.to else ""}; rows [{spec.width}]."""
    rows = {x}.numel() // {spec.width * (2 if spec.stacked else 1)}
    {allocated}
    if rows:
        config = pick({name}_kernel_configs, rows)
        grid = (triton.cdiv(rows, config["ROWS"]), triton.cdiv({tiles}, config["TILES"]))
        {name}_kernel[grid]({given}, {passed}{masked}, rows, **config)
    return {returned}
'''


def _traffic(spec: Gated, sizes: Mapping[str, int]) -> Traffic:
    moved = sizes["tokens"] * _row_bytes(spec)
    return Traffic(bytes=moved, least=moved, flops=5 * spec.width * sizes["tokens"])
