"""Experts' rows back to their tokens: weighted sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from backends.triton.families.attention import TRITON_NAMES, indented
from backends.triton.kernel import Config, Kernel, Operator, Traffic, pointer, size
from backends.triton.targets import Target

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class CombineSpec:
    """``y[t] = sum_i weight[t, i] rows[row_of[t, i]] (+ added[t])``.

    Attributes:
        added: so many tensors like y are added: what runs for every token, a residual.
        dtype: of rows, added and result; weights and sums are float32.
    """

    picks: int
    width: int
    added: int = 0
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        added = [f"added{self.added}"] if self.added else []
        dtype = [] if self.dtype == "bfloat16" else [self.dtype]
        return "_".join([f"combine_{self.picks}x{self.width}", *added, *dtype])


def generate(spec: CombineSpec, target: Target) -> Operator:
    """The operator ``name(rows, row_of, weight[, added_0, ...]) -> y``."""
    name = f"{spec.name}_kernel"
    added = [f"added_{i}" for i in range(spec.added)]
    arguments = (
        pointer("rows", spec.dtype),
        pointer("row_of", "int32"),
        pointer("weight", "float32"),
        *(pointer(each, spec.dtype) for each in added),
        pointer("y", spec.dtype),
        size("tokens"),
    )
    ordered = tuple(candidates(spec, target))
    source = _source(spec, name, ", ".join(a.name for a in arguments), added)
    given = "".join(f", {each}" for each in added)
    launcher = f'''\
def {spec.name}(rows, row_of, weight{given}):
    """Weighted sums of rows [.., {spec.width}], y [tokens, {spec.width}].

    row_of: int32 [tokens, {spec.picks}], -1 for none; weight: f32 [tokens, {spec.picks}].
    """
    tokens = row_of.shape[0]
    y = torch.empty(tokens, {spec.width}, dtype=rows.dtype, device=rows.device)
    if tokens:
        config = pick({name}_configs, tokens)
        grid = (tokens, triton.cdiv({spec.width}, config["BLOCK_D"]), 1)
        {name}[grid](rows, row_of, weight{given}, y, tokens, **config)
    return y
'''
    return Operator(
        name=spec.name,
        kernels=(Kernel(name, source, arguments, ordered[:1], ordered[1:]),),
        launcher=launcher,
        traffic=lambda sizes: traffic(spec, sizes),
        shown={"tokens": 4096},
        example=lambda sizes, device: _example(spec, sizes["tokens"], device),
    )


def traffic(spec: CombineSpec, sizes: Mapping[str, int]) -> Traffic:
    """What a call moves: each expert's row once, the result once."""
    tokens = sizes["tokens"]
    width = spec.width * BYTES[spec.dtype]
    moved = tokens * ((spec.picks + spec.added + 1) * width + spec.picks * 8)
    return Traffic(moved, moved, tokens * spec.width * (2 * spec.picks + spec.added))


def _example(spec: CombineSpec, tokens: int, device: str) -> tuple[Any, ...]:
    import torch

    def rows(count: int) -> Any:
        return torch.randn(count, spec.width, dtype=getattr(torch, spec.dtype), device=device)

    places = torch.randperm(tokens * spec.picks, device=device).to(torch.int32)
    weight = torch.rand(tokens, spec.picks, device=device)
    added = [rows(tokens) for _ in range(spec.added)]
    return rows(tokens * spec.picks), places.view(tokens, spec.picks), weight, *added


def candidates(spec: CombineSpec, target: Target) -> Iterator[Config]:
    """Columns of a program: loads of 16 bytes a thread, from all of a token's rows at once."""
    least = 1 << (spec.width - 1).bit_length()
    found = {(min(block, least), warps) for block in (512, 1024, 2048) for warps in (2, 4, 8)}

    def far(one: tuple[int, int]) -> tuple[float, int]:
        return abs(one[0] / (one[1] * target.warp) - 16 / BYTES[spec.dtype]), -one[0]

    yield from (Config({"BLOCK_D": d}, warps) for d, warps in sorted(found, key=far))


def _source(spec: CombineSpec, name: str, parameters: str, added: list[str]) -> str:
    lines = [
        "token = tl.program_id(0).to(tl.int64)",
        "d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)",
        f"inside = d < {spec.width}",
        "total = tl.zeros([BLOCK_D], tl.float32)",
        f"for i in tl.static_range({spec.picks}):",
        f"    row = tl.load(row_of + token * {spec.picks} + i).to(tl.int64)",
        f"    share = tl.load(weight + token * {spec.picks} + i)",
        f"    at = rows + row * {spec.width} + d",
        "    part = tl.load(at, mask=inside & (row >= 0), other=0.0).to(tl.float32)",
        "    total += tl.where(row >= 0, share, 0.0) * part",
        *(
            f"total += tl.load({each} + token * {spec.width} + d, mask=inside, other=0.0)"
            ".to(tl.float32)"
            for each in added
        ),
        f"y_at = y + token * {spec.width} + d",
        f"tl.store(y_at, total.to(tl.{TRITON_NAMES[spec.dtype]}), mask=inside)",
    ]
    more = "".join(f" + {each}[t]" for each in added)
    moved = (spec.picks + spec.added + 1) * spec.width * BYTES[spec.dtype] + spec.picks * 8
    flops = spec.width * (2 * spec.picks + spec.added)
    return f'''\
@triton.jit
def {name}({parameters}, BLOCK_D: tl.constexpr):
    """y[t] = sum_i weight[t, i] rows[row_of[t, i]]{more}; row -1 is an expert elsewhere: nothing.

    Tiling: a program owns BLOCK_D columns of a token, and reads its {spec.picks} rows at once.
    Bytes: {moved:,} a token. FLOPs: {flops:,} a token. Bound: memory, each row once.
    """
{indented(lines, 1)}
'''
