"""Tokens to their experts: rows sorted by expert, tokens of one expert in their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backends.triton.families.attention import indented
from backends.triton.kernel import Argument, Config, Kernel, Operator, Traffic, pointer, size
from backends.triton.targets import Target

BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e8m0fnu": 1,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
}
RANKED = (1024, 4096)  # choices that a step of ranking looks at: few tokens, many tokens


@dataclass(frozen=True)
class DispatchSpec:
    """How rows go to experts.

    Attributes:
        experts: of this device: those numbered from ``first`` on. Other choices are left out.
        picks: experts of a token.
        width: numbers of a row.
        dtype: of the rows, which are moved as they are.
        scales: scales of a row that go with it; 0: none.
        scale: dtype of the scales.
        capacity: rows that each expert has room for; None: rows lie without gaps. Choices beyond it
            are left out: with room for all tokens of a call there are none.
        index: dtype of the choices.
    """

    experts: int
    picks: int
    width: int
    dtype: str = "bfloat16"
    scales: int = 0
    scale: str = "float32"
    first: int = 0
    capacity: int | None = None
    index: str = "int64"

    @property
    def name(self) -> str:
        parts = [f"dispatch_{self.picks}of{self.experts}x{self.width}"]
        parts += [f"from{self.first}"] if self.first else []
        parts += [f"scales{self.scales}_{self.scale}"] if self.scales else []
        parts += [f"room{self.capacity}"] if self.capacity is not None else []
        parts += [self.dtype] if self.dtype != "bfloat16" else []
        parts += [self.index] if self.index != "int64" else []
        return "_".join(parts)

    @property
    def row_bytes(self) -> int:
        return self.width * BYTES[self.dtype] + self.scales * BYTES[self.scale]


def generate(spec: DispatchSpec, target: Target) -> Operator:
    """``name(pick, x[, scales]) -> (rows[, row_scales], row_of, offsets or counts)``."""
    return Operator(
        name=spec.name,
        kernels=(_ranking(spec), _moving(spec)),
        launcher=_launcher(spec),
        traffic=lambda sizes: traffic(spec, sizes),
        shown={"tokens": 4096},
        example=lambda sizes, device: _example(spec, sizes["tokens"], device),
    )


def traffic(spec: DispatchSpec, sizes: Mapping[str, int]) -> Traffic:
    """What a call moves: a row is read once and written for each of its experts. Ranks, and choices
    that every expert's program reads, stay in L2."""
    tokens = sizes["tokens"]
    pairs = tokens * spec.picks
    moved = (tokens + pairs) * spec.row_bytes + pairs * (BYTES[spec.index] + 4) + spec.experts * 4
    return Traffic(moved + spec.experts * 4, moved, pairs)


def _example(spec: DispatchSpec, tokens: int, device: str) -> tuple[Any, ...]:
    import torch

    scores = torch.rand(tokens, spec.experts, device=device)
    pick = (scores.topk(spec.picks).indices + spec.first).to(getattr(torch, spec.index))
    x = torch.randn(tokens, spec.width, device=device).to(getattr(torch, spec.dtype))
    scales = torch.rand(tokens, spec.scales, device=device).to(getattr(torch, spec.scale))
    return (pick, x, scales) if spec.scales else (pick, x)


def _ranking(spec: DispatchSpec) -> Kernel:
    name = f"{spec.name}_ranking"
    expert = f"tl.program_id(0) + {spec.first}" if spec.first else "tl.program_id(0)"
    source = f'''\
@triton.jit
def {name}(pick, rank, counts, choices, BLOCK: tl.constexpr):
    """The place of each choice among those of the same expert, in order, and how many there are.

    Tiling: a program for each expert looks at all choices, BLOCK at a time.
    Bytes: {BYTES[spec.index]} a choice from memory, then from L2; 4 written. FLOPs: none.
    Bound: the steps, one after another.
    """
    expert = {expert}
    seen = 0
    for start in tl.range(0, choices, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = tl.load(pick + at, mask=at < choices, other=-1) == expert
        before = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(rank + at, seen + before - 1, mask=mine)
        seen += tl.sum(mine.to(tl.int32), 0)
    tl.store(counts + tl.program_id(0), seen)
'''
    few, many = RANKED
    return Kernel(
        name,
        source,
        (pointer("pick", spec.index), *_numbers("rank", "counts"), size("choices")),
        (Config({"BLOCK": few}, 4, upto=2 * few), Config({"BLOCK": many}, 8)),
    )


def _numbers(*names: str) -> list[Argument]:
    return [pointer(name, "int32") for name in names]


def _moving(spec: DispatchSpec) -> Kernel:
    name = f"{spec.name}_moving"
    width = 1 << (spec.width - 1).bit_length()
    experts = 1 << (spec.experts - 1).bit_length()
    packed = spec.capacity is None
    arguments = [
        pointer("pick", spec.index),
        *_numbers("rank", "counts"),
        pointer("x", spec.dtype),
        *([pointer("scales", spec.scale)] if spec.scales else []),
        pointer("rows", spec.dtype),
        *([pointer("row_scales", spec.scale)] if spec.scales else []),
        *_numbers("row_of"),
        *(_numbers("offsets") if packed else []),
    ]
    lines = ["token = tl.program_id(0).to(tl.int64)"]
    if packed:
        lines += [
            f"e = tl.arange(0, {experts})",
            f"count = tl.load(counts + e, mask=e < {spec.experts}, other=0)",
            "if tl.program_id(0) == 0:",
            "    tl.store(offsets, 0)",
            f"    tl.store(offsets + 1 + e, tl.cumsum(count, 0), mask=e < {spec.experts})",
        ]
    lines += [
        f"d = tl.arange(0, {width})",
        f"row = tl.load(x + token * {spec.width} + d, mask=d < {spec.width})",
    ]
    if spec.scales:
        lines += [
            f"n = tl.arange(0, {1 << (spec.scales - 1).bit_length()})",
            f"scale = tl.load(scales + token * {spec.scales} + n, mask=n < {spec.scales})",
        ]
    first = f" - {spec.first}" if spec.first else ""
    lines += [
        f"for i in tl.static_range({spec.picks}):",
        f"    choice = token * {spec.picks} + i",
        f"    expert = (tl.load(pick + choice){first}).to(tl.int32)",
        f"    here = (expert >= 0) & (expert < {spec.experts})",
        "    place = tl.load(rank + choice, mask=here, other=0)",
    ]
    if packed:
        lines.append("    to = tl.sum(tl.where(e < expert, count, 0), 0) + place")
    else:
        lines += [
            f"    here &= place < {spec.capacity}",
            f"    to = expert * {spec.capacity} + place",
        ]
    lines += [
        "    tl.store(row_of + choice, tl.where(here, to, -1))",
        "    at = to.to(tl.int64)",
        f"    tl.store(rows + at * {spec.width} + d, row, mask=here & (d < {spec.width}))",
    ]
    if spec.scales:
        lines.append(
            f"    tl.store(row_scales + at * {spec.scales} + n, scale,"
            f" mask=here & (n < {spec.scales}))"
        )
    where = (
        "offsets[e] + its rank: rows of experts lie one after another"
        if packed
        else f"{spec.capacity} e + its rank"
    )
    source = f'''\
@triton.jit
def {name}({", ".join(a.name for a in arguments)}):
    """Rows of tokens, copied to where their experts find them.

    A choice of expert e goes to {where}.
    Tiling: a program for each token, which reads its row once and writes it {spec.picks} times.
    Bytes: {spec.row_bytes:,} read and {spec.picks * spec.row_bytes:,} written a token.
    FLOPs: none. Bound: memory.
    """
{indented(lines, 1)}
'''
    warps = max(1, min(8, width // 1024))
    return Kernel(name, source, tuple(arguments), (Config({}, warps),))


def _launcher(spec: DispatchSpec) -> str:
    packed = spec.capacity is None
    scales = ", scales" if spec.scales else ""
    row_scales = ", row_scales" if spec.scales else ""
    result = "offsets" if packed else "counts"
    total = f"choices, {spec.width}" if packed else f"{spec.experts}, {spec.capacity}, {spec.width}"
    lines = [
        f"choices, device = pick_of.shape[0] * {spec.picks}, pick_of.device",
        f"rows = torch.empty({total}, dtype=x.dtype, device=device)",
    ]
    if spec.scales:
        shape = total.rsplit(", ", 1)[0] + f", {spec.scales}"
        lines.append(f"row_scales = torch.empty({shape}, dtype=scales.dtype, device=device)")
    lines += [
        "numbers = dict(dtype=torch.int32, device=device)",
        f"row_of = torch.empty(pick_of.shape[0], {spec.picks}, **numbers)",
        "rank = torch.empty(choices, **numbers)",
        f"counts = torch.empty({spec.experts}, **numbers)",
    ]
    if packed:
        lines.append(f"offsets = torch.zeros({spec.experts + 1}, **numbers)")
    passed = "pick_of, rank, counts, x" + scales + ", rows" + row_scales + ", row_of"
    passed += ", offsets" if packed else ""
    lines += [
        f"config = pick({spec.name}_ranking_configs, choices)",
        f"{spec.name}_ranking[({spec.experts}, 1, 1)](pick_of, rank, counts, choices, **config)",
        "if choices:",
        f"    config = pick({spec.name}_moving_configs, choices)",
        f"    {spec.name}_moving[(pick_of.shape[0], 1, 1)]({passed}, **config)",
        f"return rows{row_scales}, row_of, {result}",
    ]
    about = (
        f"offsets: int32 [{spec.experts + 1}], where each expert's rows\n"
        "    begin. Rows beyond the last offset are not written."
        if packed
        else f"counts: int32 [{spec.experts}], how many rows each\n"
        "    expert has; others are not written."
    )
    scales_about = f"; scales: [tokens, {spec.scales}]" if spec.scales else ""
    return f'''\
def {spec.name}(pick_of, x{scales}):
    """Rows of x sorted by expert, tokens of an expert in their order; and where each choice went.

    pick_of: {spec.index} [tokens, {spec.picks}]; x: [tokens, {spec.width}]{scales_about}.
    row_of: int32 [tokens, {spec.picks}], -1 for experts that are not here. {about}
    """
{indented(lines, 1)}
'''
